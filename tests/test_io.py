"""What is saved comes back bit for bit, other loaders read it, and a file that is broken or changed is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune
from safetensors import safe_open
from torch import Tensor, nn

import fastfisher as ff
from fastfisher import io
from fastfisher.errors import FastFisherError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Tied(nn.Module):
    """An embedding that is the output layer too, a non-contiguous weight, buffers of other dtypes, an empty one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 8)
        self.mix = nn.Linear(8, 8)
        self.mix.weight = nn.Parameter(torch.randn(8, 8).T)
        self.out = nn.Linear(8, 30, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("allowed", torch.rand(9) < 0.5)
        self.register_buffer("none", torch.empty(0, 3))


def sparse(model: nn.Module, share: float = 0.9, seed: int = 1) -> nn.Module:
    """The model with this share of its matrices set to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < share, 0)
    return model


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert set(found) == set(truth)
    for name, tensor in truth.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def changed(path: Path, **metadata: str) -> None:
    """Write the file again with other metadata."""
    with safe_open(str(path), "pt") as file:
        old, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new = {**old, **{f"fastfisher.{key}": value for key, value in metadata.items()}}
    safetensors.torch.save_file(tensors, str(path), metadata=new)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_model_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = sparse(Tied()).to(dtype)
    fingerprint = ff.save(model, tmp_path / "new" / "model.safetensors")
    other = Tied(seed=5).to(dtype)
    tie = other.embed.weight
    assert ff.load(tmp_path / "new" / "model.safetensors", other) is None
    assert_same_bits(other.state_dict(), model.state_dict())
    assert other.out.weight is tie
    assert other.embed.weight is tie
    assert ff.save(other, tmp_path / "again.safetensors") == fingerprint
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_any_loader_reads_it_and_the_metadata(tmp_path: Path) -> None:
    model = sparse(Tied())
    path = tmp_path / "model.safetensors"
    fingerprint = ff.save(model, path)
    plain = safetensors.torch.load_file(path)
    assert set(plain) == set(model.state_dict()) - {"out.weight"}
    assert torch.equal(plain["mix.weight"], model.mix.weight)
    other = Tied(seed=3)
    safetensors.torch.load_model(other, path)
    assert_same_bits(other.state_dict(), model.state_dict())
    metadata = io.read_metadata(path)
    assert metadata["format"] == "pt"
    assert metadata["fastfisher.fingerprint"] == fingerprint
    zeros = json.loads(metadata["fastfisher.zeros"])
    assert zeros["embed.weight"] == int((model.embed.weight == 0).sum())
    assert json.loads(metadata["fastfisher.tied"]) == {"out.weight": "embed.weight"}


def test_report_comes_back_with_the_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [(torch.randn(16, 6), torch.randint(2, (16,)))]
    report = ff.prune(model, data, sparsity=0.5, num_grads=16, block_size=8, num_recomputations=1)
    ff.save(model, tmp_path / "model.safetensors", report=report)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    assert ff.load(tmp_path / "model.safetensors", other) == report
    assert sum(int((layer.weight == 0).sum()) for layer in (other[0], other[2])) == report.num_zeros == 32


def test_tensors_that_share_memory_in_part_are_written_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(24)
            self.a, self.b = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[8:20])
            self.c = nn.Parameter(self.a.detach().T)

    model, other = Views(), Views()
    ff.save(model, tmp_path / "model.safetensors")
    ff.load(tmp_path / "model.safetensors", other)
    assert_same_bits(other.state_dict(), model.state_dict())
    ff.export_packed(model, tmp_path / "packed.safetensors")
    assert_same_bits(ff.load_packed(tmp_path / "packed.safetensors"), model.state_dict())


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    model = Tied()
    ff.save(model, path)
    before = path.read_bytes()

    def fail(tensors: dict[str, Tensor], name: str, **_: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        ff.save(sparse(model), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_broken_changed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model = sparse(Tied())
    path = tmp_path / "model.safetensors"
    ff.save(model, path)
    whole = path.read_bytes()
    other = Tied(seed=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    def refuse(message: str) -> None:
        with pytest.raises(FastFisherError, match=message):
            ff.load(path, other)
        assert_same_bits(other.state_dict(), before)

    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuse("cannot be read as safetensors, it is truncated or of another kind")
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    refuse("cannot be read as safetensors")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuse("is changed: the fingerprint of its weights is")
    path.write_bytes(whole)
    zeros = json.loads(io.read_metadata(path)["fastfisher.zeros"])
    changed(path, zeros=json.dumps(zeros | {"mix.weight": 0}))
    refuse("'mix.weight' holds .* zeros, 0 were saved")
    path.write_bytes(whole)
    changed(path, tied="[]")
    refuse("'fastfisher.tied' must be a mapping")
    path.write_bytes(whole)
    changed(path, tied=json.dumps({"out.weight": "nowhere"}))
    refuse("'out.weight' is said to be 'nowhere', which is missing")
    path.write_bytes(whole)
    changed(path, report="{}")
    refuse("its report lacks or does not know 'layers'")
    path.write_bytes(whole)
    changed(path, kind="plain 2")
    refuse("is of the kind 'plain 2', which this version does not know")
    safetensors.torch.save_model(model, str(path))
    refuse("was not written by ff.save")
    assert ff.load(path, other, verify=False) is None
    assert_same_bits(other.state_dict(), model.state_dict())
    ff.export_packed(model, path)
    with pytest.raises(FastFisherError, match=r"written by ff.export_packed; read it with ff.load_packed"):
        ff.load(path, other)
    path.unlink()
    with pytest.raises(FastFisherError, match="there is no file"):
        ff.load(path, other)


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ff.save(nn.Sequential(nn.Linear(4, 3)), path)
    for other, message in (
        (
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
            r"no value for 2 tensors of the model \(first: '1.bias'\)",
        ),
        (nn.Sequential(nn.Linear(4, 3, bias=False)), r"1 tensors that the model lacks \(first: '0.bias'\)"),
        (nn.Sequential(nn.Linear(5, 3)), r"'0.weight' is \[3, 5\] in the model and \[3, 4\] in"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(FastFisherError, match=message):
            ff.load(path, other)
        assert_same_bits(other.state_dict(), before)


def test_ties_that_differ_between_file_and_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    ff.save(tied, path)
    untied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ff.load(path, untied)
    assert_same_bits(untied.state_dict(), tied.state_dict())
    ff.save(untied, path)
    ff.load(path, tied)
    with torch.no_grad():
        untied[1].weight[0, 0] += 1
    ff.save(untied, path)
    with pytest.raises(
        FastFisherError, match=r"'0\.weight' and '1\.weight' are one tensor in the model, and differ"
    ):
        ff.load(path, tied)


def test_models_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

    masked = nn.Sequential(nn.Linear(4, 3))
    torch.nn.utils.prune.l1_unstructured(masked[0], "weight", 5)
    for model, message in (
        (Extra(2, 2), "'_extra_state' of the model's state_dict is no tensor but dict"),
        (nn.Linear(2, 2, device="meta"), "'weight' is on the device 'meta'"),
        (nn.ReLU(), "the model ReLU holds no tensors"),
        (masked, r"holds masks of torch.nn.utils.prune \(first: '0.weight_mask'\)"),
    ):
        for write in (ff.save, ff.export_packed):
            with pytest.raises(FastFisherError, match=message):
                write(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_round_trip_is_bit_for_bit(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    model = sparse(Tied(), share).to(dtype)
    with torch.no_grad():
        model.mix.weight[0, :3] = torch.tensor([-0.0, torch.nan, torch.inf], dtype=dtype)
    path = tmp_path / "packed.safetensors"
    size = ff.export_packed(model, path)
    state = ff.load_packed(path)
    assert_same_bits(state, model.state_dict())
    assert state["out.weight"] is state["embed.weight"]
    other = Tied(seed=4).to(dtype)
    other.load_state_dict(state)
    assert_same_bits(other.state_dict(), model.state_dict())
    assert size.bytes == path.stat().st_size
    tensors = {**model.state_dict(), "out.weight": torch.empty(0)}
    assert size.dense_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_packed_size_is_that_of_values_and_bits(tmp_path: Path) -> None:
    model = nn.Linear(1000, 300, bias=False)
    with torch.no_grad():
        model.weight.view(-1)[torch.randperm(300_000)[: 300_000 * 9 // 10]] = 0
    size = ff.export_packed(model, tmp_path / "packed.safetensors")
    content = 30_000 * 4 + 300_000 // 8
    assert content < size.bytes < content + 1000
    assert size.dense_bytes == 1_200_000
    assert size.ratio == pytest.approx(1_200_000 / size.bytes)
    assert str(size) == "157.9 kB packed, 1.2 MB dense (ratio 7.60)"
    dense = ff.export_packed(nn.Linear(100, 30), tmp_path / "dense.safetensors")
    assert dense.bytes < dense.dense_bytes + 1000


def test_broken_packed_files_are_refused(tmp_path: Path) -> None:
    model = sparse(nn.Linear(20, 20))
    path = tmp_path / "packed.safetensors"
    ff.export_packed(model, path)
    whole = path.read_bytes()

    def refuse(message: str) -> None:
        with pytest.raises(FastFisherError, match=message):
            ff.load_packed(path)
        path.write_bytes(whole)

    path.write_bytes(whole[:-3])
    refuse("truncated or of another kind")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuse("is changed: the fingerprint|is broken: .* values for a bitmask")
    changed(path, shapes=json.dumps({"weight": [20, 30]}))
    refuse("is broken: a bitmask of 50 bytes for 600 weights")
    changed(path, shapes=json.dumps({"other": [20, 20]}))
    refuse("is broken: 'values:other'")
    changed(path, shapes=json.dumps({"weight": ["20", 20]}))
    refuse("is broken")
    changed(path, shapes="no JSON")
    refuse("'fastfisher.shapes' is missing or no JSON")
    ff.save(model, path)
    refuse(r"written by ff.save; read it with ff.load\(path, model\)")
    safetensors.torch.save_file({"weight": torch.ones(2)}, str(path))
    refuse("was not written by ff.export_packed")


def test_fingerprint_tells_names_shapes_dtypes_and_bits_apart() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, -0.0])},
    ]
    assert io.fingerprint(dict(reversed(base.items()))) == io.fingerprint(base)
    assert io.fingerprint(base | {"a": torch.arange(6.0).repeat(2).view(2, 6).T[:, 0]}) == io.fingerprint(
        base
    )
    assert len({io.fingerprint(state) for state in (base, *others)}) == 5


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.mix(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "new" / "last.pt"
    ff.save_checkpoint(path, epoch=1)
    ff.save_checkpoint(
        path,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=torch.get_rng_state(),
        best={"epoch": 3, "accuracy": 0.25, "files": ["a", None]},
    )
    found = ff.load_checkpoint(path)
    assert list(found) == ["model", "optimizer", "rng", "best"]
    assert_same_bits(found["model"], model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        assert_same_bits(found["optimizer"]["state"][i], state)
    assert torch.equal(found["rng"], torch.get_rng_state())
    assert found["best"] == {"epoch": 3, "accuracy": 0.25, "files": ["a", None]}
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_checkpoint_that_could_not_be_read_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    ff.save_checkpoint(path, epoch=1)
    content = path.read_bytes()
    for bad, reason in (
        (np.zeros(3), r"numpy\.\w+\.multiarray\._reconstruct are no plain data"),
        (nn.Linear(2, 2), r"objects of torch\.nn\.modules\.linear\.Linear are no plain data"),
        (lambda: 0, "in one of epoch, state: Can't pickle"),
    ):
        with pytest.raises(FastFisherError, match=f"a checkpoint takes tensors, numbers, .*{reason}"):
            ff.save_checkpoint(path, epoch=2, state=bad)

    def full(source: object, target: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            ff.save_checkpoint(path, epoch=2)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["last.pt"]


def test_checkpoints_that_are_broken_changed_or_foreign_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"

    def refuse(message: str) -> None:
        with pytest.raises(FastFisherError, match=message):
            ff.load_checkpoint(path)

    refuse("there is no file")
    weight = torch.randn(8, 8)
    ff.save_checkpoint(path, weight=weight)
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refuse("cannot be read as a checkpoint, it is truncated or of another kind")
    place = content.index(weight.numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    refuse("is changed: the checksum of '[^']+' is not its own")
    torch.save(nn.Linear(2, 2).state_dict(), path)
    refuse("was not written by ff.save_checkpoint; this version reads 'fastfisher checkpoint 1'")
    torch.save({io.KIND: "fastfisher checkpoint 2"}, path)
    refuse("is of the kind 'fastfisher checkpoint 2'; this version reads")
    torch.save(nn.Linear(2, 2), path)
    refuse("another kind: objects of torch.nn.modules.linear.Linear are no plain data")
    path.write_text("no checkpoint")
    refuse("cannot be read as a checkpoint")
