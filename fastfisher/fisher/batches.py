"""Samples out of whatever a user's loader yields: batches taken apart, regrouped, fingerprinted.

A batch is a tensor, or a tuple, list or mapping of batches; None may stand anywhere.  Every tensor carries the samples
along its first dimension.  The loader is read once, in its own order, and never further than needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastfisher.errors import FastFisherError

# a batch with its tensors taken out: an int stands for the tensor of that number
Skeleton = Any


@dataclass(frozen=True)
class Samples:
    """n samples of equal shape: `leaves` are tensors [n, ...], `origin[i]` is the loader's batch sample i came from."""

    leaves: tuple[Tensor, ...]
    skeleton: Skeleton
    origin: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    def narrow(self, start: int, stop: int) -> Samples:
        """Samples start .. stop - 1, as views."""
        return Samples(
            tuple(leaf[start:stop] for leaf in self.leaves), self.skeleton, self.origin[start:stop]
        )

    def pick(self, rows: Tensor) -> Samples:
        """The samples where the bool vector `rows` [n] is true, copied."""
        leaves = tuple(leaf[rows.to(leaf.device)] for leaf in self.leaves)
        kept = rows.tolist()
        return Samples(
            leaves, self.skeleton, tuple(o for o, keep in zip(self.origin, kept, strict=True) if keep)
        )

    def cpu(self) -> Samples:
        """The samples in CPU memory, where they may be already."""
        return Samples(tuple(leaf.cpu() for leaf in self.leaves), self.skeleton, self.origin)

    def batch(self, leaves: Sequence[Tensor] | None = None) -> Any:
        """The batch in the shape the loader gave it, around these leaves or others."""
        return _fill(self.skeleton, self.leaves if leaves is None else leaves)

    def fits(self, other: Samples) -> bool:
        """Whether the two can be put into one batch."""
        return self.skeleton == other.skeleton and all(
            a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
            for a, b in zip(self.leaves, other.leaves, strict=True)
        )


def _take_apart(batch: Any, leaves: list[Tensor]) -> Skeleton:
    if isinstance(batch, Tensor) and batch.dim() > 0:
        leaves.append(batch)
        return len(leaves) - 1
    if batch is None:
        return None
    if isinstance(batch, Mapping):
        return {key: _take_apart(value, leaves) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        # a named tuple becomes a plain one, as the default collation of torch's loaders treats them alike
        return tuple(_take_apart(value, leaves) for value in batch)
    what = (
        "a tensor without dimensions"
        if isinstance(batch, Tensor)
        else f"{type(batch).__name__} ({batch!r:.40})"
    )
    raise FastFisherError(
        f"every entry of a batch must be a tensor with samples along its first dimension; got {what}"
    )


def _fill(skeleton: Skeleton, leaves: Sequence[Tensor]) -> Any:
    if skeleton is None:
        return None
    if isinstance(skeleton, int):
        return leaves[skeleton]
    if isinstance(skeleton, dict):
        return {key: _fill(value, leaves) for key, value in skeleton.items()}
    return tuple(_fill(value, leaves) for value in skeleton)


def read_batch(batch: Any, index: int = 0) -> Samples:
    """Take a loader's batch apart.  Raises FastFisherError on anything but tensors that agree on the sample count."""
    leaves: list[Tensor] = []
    skeleton = _take_apart(batch, leaves)
    if not leaves:
        raise FastFisherError(f"batch {index} of the loader holds no tensor")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise FastFisherError(
            f"the tensors of batch {index} disagree on the number of samples: {[leaf.shape[0] for leaf in leaves]}"
        )
    return Samples(tuple(leaves), skeleton, (index,) * sizes.pop())


def join(parts: Sequence[Samples]) -> Samples:
    """One group of samples out of several that fit each other."""
    if len(parts) == 1:
        return parts[0]
    leaves = tuple(torch.cat(column) for column in zip(*(part.leaves for part in parts), strict=True))
    return Samples(leaves, parts[0].skeleton, tuple(o for part in parts for o in part.origin))


def known_samples(data: Any) -> int | None:
    """How many samples the loader will yield, where that can be told without reading it."""
    if isinstance(data, DataLoader):
        # batch_size None: a custom batch sampler or no batching at all, whose sizes only reading would tell
        if data.batch_size is None or not isinstance(data.sampler, Sized):
            return None
        samples = len(data.sampler)
        return samples - samples % data.batch_size if data.drop_last else samples
    if isinstance(data, (list, tuple)):
        return sum(len(read_batch(batch, index)) for index, batch in enumerate(data))
    return None


class SampleReader:
    """Samples from an iterable of batches, handed out in groups of any size, in the loader's order.

    repeat: begin again at the end of the data, if one pass yields at least this many samples.
    fingerprint: a hash of every batch of the first pass so far (shapes, dtypes, bytes).   seen: samples handed out.
    known: the samples of a pass, where that can be told without reading.   once: whether there can be one pass only.
    """

    def __init__(self, data: Iterable[Any], device: torch.device, *, repeat: int | None = None) -> None:
        if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
            raise FastFisherError(
                f"data must be an iterable of batches, such as a DataLoader or [(inputs, labels)]; "
                f"got {type(data).__name__}"
            )
        batches = iter(data)
        self.once = batches is data
        self.known = known_samples(data)
        self._data = data
        self._batches: Iterator[tuple[int, Any]] = enumerate(batches)
        self.repeat = repeat
        self._in_pass = 0  # samples read in this pass
        self._first_pass = True
        self._held: list[Samples] = []
        self._hash = hashlib.blake2b(digest_size=8)
        self.device = device
        self.seen = 0

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def _read(self) -> Samples | None:
        while True:
            for index, batch in self._batches:
                samples = read_batch(batch, index)
                if self._first_pass:
                    self._note(samples)
                if len(samples):
                    self._in_pass += len(samples)
                    return samples
            if self.repeat is None or self.once or self._in_pass < max(1, self.repeat):
                return None
            self._batches = enumerate(iter(self._data))
            self._in_pass = 0
            self._first_pass = False

    def _note(self, samples: Samples) -> None:
        """Take a batch into the fingerprint."""
        for leaf in samples.leaves:
            self._hash.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            raw = leaf.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            self._hash.update(raw.numpy().data)

    def peek(self) -> Samples | None:
        """The first sample still to come, on the device, or None at the end."""
        if not self._held:
            samples = self._read()
            if samples is None:
                return None
            self._held.append(samples)
        return self._move(self._held[0].narrow(0, 1))

    def take(self, count: int, *, exactly: bool) -> Samples | None:
        """The next `count` samples on the device, or None at the end.

        Fewer come where the shapes change or the loader ends.  exactly: then a change of shape raises FastFisherError
        and an incomplete last group is dropped.
        """
        while sum(map(len, self._held)) < count:
            samples = self._read()
            if samples is None:
                break
            if self._held and not self._held[0].fits(samples):
                if exactly:
                    raise FastFisherError(
                        f"batch {samples.origin[0]} of the loader differs in shape or dtype from the samples before, "
                        f"so no gradient can be averaged over {count} of them; use grad_batch_size=1"
                    )
                group = join(self._held)
                self._held = [samples]
                return self._hand_out(group)
            self._held.append(samples)
        if not self._held:
            return None
        group = join(self._held)
        if exactly and len(group) < count:
            self._held = []
            return None
        self._held = [group.narrow(count, len(group))] if len(group) > count else []
        return self._hand_out(group.narrow(0, min(count, len(group))))

    def groups(self, size: int, limit: int | None = None) -> Iterator[Samples]:
        """All samples still to come, or as many as make `limit` in all, in groups of up to `size`."""
        while limit is None or self.seen < limit:
            samples = self.take(size if limit is None else min(size, limit - self.seen), exactly=False)
            if samples is None:
                return
            yield samples

    def _hand_out(self, group: Samples) -> Samples:
        self.seen += len(group)
        return self._move(group)

    def _move(self, group: Samples) -> Samples:
        return Samples(tuple(leaf.to(self.device) for leaf in group.leaves), group.skeleton, group.origin)
