"""Models with plain zeros <-> files: `save` and `load` for any loader, `export_packed` and `load_packed` for few bytes,
`save_checkpoint` and `load_checkpoint` for a training run that may be killed at any moment.

The first two are safetensors files.  `save` writes every tensor as it is, so that any safetensors loader reads it.
`export_packed` writes, of tensors where that is smaller, the nonzero values in order and a bitmask of where they are:
nnz · itemsize + ⌈n / 8⌉ bytes in place of n · itemsize.  Tensors that share memory exactly are written once.
The metadata hold a fingerprint (SHA-256 over names, dtypes, shapes and bytes), and loading compares it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from fastfisher.errors import FastFisherError
from fastfisher.memory import format_bytes

if TYPE_CHECKING:
    from fastfisher.report import Report

# Written into the metadata under these keys; readers of an older file find the kinds they know.
KIND, FINGERPRINT, ZEROS, TIED, REPORT, SHAPES = (
    "fastfisher.kind",
    "fastfisher.fingerprint",
    "fastfisher.zeros",
    "fastfisher.tied",
    "fastfisher.report",
    "fastfisher.shapes",
)
PLAIN, PACKED = "plain 1", "packed 1"
CHECKPOINT = "fastfisher checkpoint 1"
VALUES, MASK = "values:", "mask:"  # before the names of the two tensors that a packed one is written as
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> what reads the bits


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file, and of the same tensors as they are."""

    bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.dense_bytes / self.bytes

    def __str__(self) -> str:
        packed, dense = format_bytes(self.bytes), format_bytes(self.dense_bytes)
        return f"{packed} packed, {dense} dense (ratio {self.ratio:.2f})"


def save(model: nn.Module, path: str | os.PathLike[str], *, report: Report | None = None) -> str:
    """Write the weights of a model as plain tensors, zeros included, with the report of how they came about.

    path: a safetensors file, replaced at once when all of it is written; its folder is made if absent.
    The metadata tell the fingerprint, the zeros of every tensor, which names share one tensor, and the report as JSON.
    Returns the fingerprint.   Raises FastFisherError where the model holds masks of torch.nn.utils.prune, entries that
    are no tensors, or nothing; OSError where the file cannot be written.
    """
    state, tied = _state_of(model)
    found = fingerprint(state)
    metadata = {
        KIND: PLAIN,
        FINGERPRINT: found,
        ZEROS: json.dumps({name: _zeros(tensor) for name, tensor in state.items()}),
        TIED: json.dumps(tied),
    }
    if report is not None:
        metadata[REPORT] = json.dumps(report.to_dict(), ensure_ascii=False, default=float)
    _write(state, path, metadata)
    return found


def load(path: str | os.PathLike[str], model: nn.Module, *, verify: bool = True) -> Report | None:
    """Read the weights that `save` wrote into a model, and return the report that was saved with them, or None.

    verify: compare fingerprint and zeros with what was saved; False takes any safetensors file, unseen.
    The weights are copied into the tensors that the model has, in their dtype.  On any error the model is as it was.
    Raises FastFisherError where the file is missing, broken, was not written by `save` or was changed since, and where
    names, shapes or ties are not those of the model.
    """
    state, metadata = _read(path)
    if verify:
        _check_kind(path, metadata, PLAIN)
        _check_fingerprint(path, state, metadata)
        zeros = _parsed(path, metadata, ZEROS)
        for name, tensor in state.items():
            if zeros.get(name) != _zeros(tensor):
                raise FastFisherError(
                    f"{str(path)!r} is changed: {name!r} holds {_zeros(tensor)} zeros, {zeros.get(name)} were saved"
                )
    tied = _parsed(path, metadata, TIED) if TIED in metadata else {}
    for other, name in tied.items():
        if name not in state:
            raise FastFisherError(
                f"{str(path)!r} is broken: {other!r} is said to be {name!r}, which is missing"
            )
        state.setdefault(other, state[name])
    report = _report_of(path, metadata)
    _copy(path, state, model)
    return report


def export_packed(model: nn.Module, path: str | os.PathLike[str]) -> PackedSize:
    """Write the weights of a model as the values that are not zero and a bitmask, bit for bit; dense where smaller.

    A value is left out if all its bits are zero: -0.0 is kept.   path: as in `save`.
    Returns the size of the file and of the tensors as they are, in bytes.   Raises as `save` does.
    """
    state, tied = _state_of(model)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        packed = _packed(tensor)
        if packed is None:
            tensors[name] = tensor
        else:
            tensors[VALUES + name], tensors[MASK + name] = packed
            shapes[name] = list(tensor.shape)
    metadata = {
        KIND: PACKED,
        FINGERPRINT: fingerprint(state),
        TIED: json.dumps(tied),
        SHAPES: json.dumps(shapes),
    }
    _write(tensors, path, metadata)
    return PackedSize(Path(path).stat().st_size, sum(tensor.nbytes for tensor in state.values()))


def load_packed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict that `export_packed` wrote, bit for bit, on the CPU; tied names share one tensor.

    Raises FastFisherError where the file is missing, broken, was not written by `export_packed`, or was changed since.
    """
    tensors, metadata = _read(path)
    _check_kind(path, metadata, PACKED)
    state: dict[str, Tensor] = {}
    shapes = _parsed(path, metadata, SHAPES)
    try:
        for name, shape in shapes.items():
            values, mask = tensors.pop(VALUES + name), tensors.pop(MASK + name)
            state[name] = _unpacked(values, mask, shape)
        state |= tensors
        for other, name in _parsed(path, metadata, TIED).items():
            state[other] = state[name]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FastFisherError(f"{str(path)!r} is broken: {' '.join(str(error).split())}") from error
    _check_fingerprint(path, {name: state[name] for name in (*shapes, *tensors)}, metadata)
    return state


def save_checkpoint(path: str | os.PathLike[str], **states: Any) -> None:
    """Write the states of a training run, so that at every moment the path holds all of the old file or of the new one.

        ff.save_checkpoint("run/last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                           pruner=pruner.state_dict(), rng=torch.get_rng_state(), epoch=epoch + 1)

    states: tensors, numbers, texts, and lists or dictionaries of them, under names of yours.
    The file is one of torch.save, flushed to the disk and read again before it takes the place of an older one; its
    folder is made if absent.  A process that is killed while it writes leaves a hidden file beside it.
    Raises FastFisherError where a state holds objects that torch.load refuses with weights_only=True, before the older
    file is touched; OSError where the file cannot be written.
    """
    try:
        with _replacing(path) as beside:
            torch.save({KIND: CHECKPOINT, "states": states}, beside)
            # mapped, so that only the names and shapes are read
            torch.load(beside, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise FastFisherError(
            f"a checkpoint takes tensors, numbers, texts, and lists or dictionaries of them; in one of "
            f"{', '.join(states)}: {_reason(error)}"
        ) from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The states that `save_checkpoint` wrote, by name, on the CPU; load_state_dict takes them to where they belong.

    No code in the file is run.   Raises FastFisherError where it is missing, cut off, changed, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FastFisherError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed is not None:
            raise FastFisherError(f"{str(path)!r} is changed: the checksum of {changed!r} is not its own")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.PickleError, zipfile.BadZipFile) as error:
        raise FastFisherError(
            f"{str(path)!r} cannot be read as a checkpoint, it is truncated or of another kind: {_reason(error)}"
        ) from error
    if not isinstance(content, dict) or content.get(KIND) != CHECKPOINT:
        found = content.get(KIND) if isinstance(content, dict) else None
        what = "was not written by ff.save_checkpoint" if found is None else f"is of the kind {found!r}"
        raise FastFisherError(f"{str(path)!r} {what}; this version reads {CHECKPOINT!r}")
    return dict(content["states"])


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty where it has none.   Raises FastFisherError where it is none."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of the names; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous().cpu()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """Why torch.load or torch.save gave up, without the paragraphs on how to load what cannot be trusted."""
    reason = " ".join(str(error).split())
    unknown = re.search(r"GLOBAL ([\w.]+)", reason)
    return f"objects of {unknown[1]} are no plain data" if unknown else reason[:200]


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(_countable(tensor)))


def _countable(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 where it has a format of a single byte that torch does not compare."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict with every tensor once, contiguous and on the CPU, and the other names: name -> name it shares."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FastFisherError(
                f"{name!r} of the model's state_dict is no tensor but {type(value).__name__}"
            )
        if value.is_meta:
            raise FastFisherError(f"{name!r} is on the device 'meta' and holds no values")
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state:
            raise FastFisherError(
                f"the model holds masks of torch.nn.utils.prune (first: {name!r}); "
                f"call ff.from_torch_masks(model) to make them plain zeros"
            )
        if isinstance(value, SparseSemiStructuredTensor):
            raise FastFisherError(f"{name!r} is semi-structured; save the model before ff.to_semi_structured")
        # tensors without elements share address 0
        place = value.data_ptr() if value.numel() else name
        same = first.setdefault((value.device, place, value.shape, value.stride(), value.dtype), name)
        if same == name:
            state[name] = value.detach()
        else:
            tied[name] = same
    if not state:
        raise FastFisherError(f"the model {type(model).__name__} holds no tensors")
    # a copy where memory is shared in another way: safetensors writes no two tensors from one place
    storages: set[tuple[torch.device, int]] = set()
    for name, value in state.items():
        storage = (value.device, value.untyped_storage().data_ptr())
        plain = value.contiguous().cpu()
        state[name] = plain.clone() if storage in storages and value.numel() else plain
        storages.add(storage)
    return state, tied


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The values that are not zero and the bitmask uint8 [⌈n / 8⌉], or None where the tensor itself is as small."""
    if tensor.itemsize not in INTEGERS or tensor.is_complex():
        return None
    flat = tensor.reshape(-1)
    kept = flat.view(INTEGERS[tensor.itemsize]) != 0  # [n]
    mask = torch.from_numpy(np.packbits(kept.numpy()))
    if int(kept.sum()) * tensor.itemsize + mask.nbytes >= tensor.nbytes:
        return None
    return flat[kept], mask


def _unpacked(values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    """The inverse of `_packed`.   Raises ValueError where the three do not fit together."""
    size = torch.Size(shape).numel()
    if mask.dtype != torch.uint8 or mask.numel() != -(-size // 8):
        raise ValueError(f"a bitmask of {mask.numel()} bytes for {size} weights")
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=size)).bool()
    if int(kept.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for a bitmask of {int(kept.sum())}")
    flat = torch.zeros(size, dtype=INTEGERS[values.itemsize])
    flat[kept] = values.view(flat.dtype)
    return flat.view(values.dtype).reshape(shape)


def _write(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    with _replacing(path) as beside:
        # "format" is what other loaders look for
        save_file(tensors, str(beside), metadata={"format": "pt", **metadata})


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside the path to be written, which takes its place, complete and on the disk, when the block ends."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield beside
        with beside.open("r+b") as file:
            # without it a power cut may leave the new name with none of the new bytes
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FastFisherError(f"there is no file {str(path)!r}")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise FastFisherError(
            f"{str(path)!r} cannot be read as safetensors, it is truncated or of another kind: "
            f"{' '.join(str(error).split())}"
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _parsed(path: str | os.PathLike[str], metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The mapping that a key of the metadata holds as JSON."""
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise FastFisherError(f"{str(path)!r} is broken: {key!r} is missing or no JSON") from error
    if not isinstance(value, dict):
        raise FastFisherError(f"{str(path)!r} is broken: {key!r} must be a mapping, got {value!r:.60}")
    return value


def _report_of(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Report | None:
    """The report in the metadata, or None."""
    from fastfisher.report import Report

    if REPORT not in metadata:
        return None
    try:
        return Report.from_dict(_parsed(path, metadata, REPORT))
    except (KeyError, TypeError) as error:
        raise FastFisherError(
            f"{str(path)!r} is broken: its report lacks or does not know {error}"
        ) from error


def _check_kind(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: str) -> None:
    writers = {PLAIN: "ff.save", PACKED: "ff.export_packed"}
    found = metadata.get(KIND)
    if found == kind:
        return
    if found is None:
        raise FastFisherError(f"{str(path)!r} was not written by {writers[kind]}: it has no fingerprint")
    if found in writers:
        reader = {PLAIN: "ff.load(path, model)", PACKED: "ff.load_packed(path)"}[found]
        raise FastFisherError(f"{str(path)!r} was written by {writers[found]}; read it with {reader}")
    raise FastFisherError(f"{str(path)!r} is of the kind {found!r}, which this version does not know")


def _check_fingerprint(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    found, saved = fingerprint(state), metadata.get(FINGERPRINT)
    if found != saved:
        raise FastFisherError(
            f"{str(path)!r} is changed: the fingerprint of its weights is {found[:12]}..., not {saved!s:.12}..."
        )


def _copy(path: str | os.PathLike[str], state: dict[str, Tensor], model: nn.Module) -> None:
    """Copy tensors into those of a model, after names, shapes and ties were checked."""
    own = model.state_dict()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in own.items():
        if isinstance(value, Tensor):
            place = value.data_ptr() if value.numel() else name
            groups.setdefault((value.device, place, value.shape, value.stride()), []).append(name)
    for names in groups.values():
        given = [name for name in names if name in state]
        for name in given[1:]:
            if state[name] is not state[given[0]] and not torch.equal(state[name], state[given[0]]):
                raise FastFisherError(
                    f"{given[0]!r} and {name!r} are one tensor in the model, and differ in {str(path)!r}"
                )
        for name in names:
            if given:
                state.setdefault(name, state[given[0]])
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    for names, verdict in (
        (missing, "holds no value for {} tensors of the model (first: {!r})"),
        (unknown, "holds {} tensors that the model lacks (first: {!r})"),
    ):
        if names:
            raise FastFisherError(f"{str(path)!r} " + verdict.format(len(names), names[0]))
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise FastFisherError(
                f"{name!r} is {list(value.shape)} in the model and {list(state[name].shape)} in {str(path)!r}"
            )
    model.load_state_dict(state)
