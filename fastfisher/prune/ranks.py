"""The processes that prune one model together, each on its own shard of the data and its own blocks.

Everything that one of them tells the others goes through this file: gradients to the process that owns their blocks
(`columns`), histograms of saliencies (`keep_mask`), new weights (`share`), sums, and whether anything went wrong.

A process that fails says so at its next `status`, which stands before every exchange, so that the others raise too and
do not wait for it.  Where a process dies, torch.distributed raises in the others, at once or after the timeout of the
group; that becomes a DistributedError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastfisher.errors import DistributedError, FastFisherError, FisherError
from fastfisher.fisher.batches import Samples
from fastfisher.fisher.sharded import is_sharded

# Of a saliency, that one histogram looks at.
DIGIT_BITS = 16
Span = tuple[int, int]


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes on which DistributedDataParallel or FSDP2 has put this model, or None.

    Raises FastFisherError where its parameters are spread over a mesh of several dimensions that is not everything.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return module.process_group
    mesh: Any = next((getattr(p, "device_mesh", None) for p in model.parameters() if is_sharded(p)), None)
    if mesh is None:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()  # type: ignore[no-any-return]
    if mesh.size() != dist.get_world_size():
        raise FastFisherError(
            f"the model lies on a part of a mesh of {mesh.ndim} dimensions; give process_group"
        )
    return dist.group.WORLD


class Ranks:
    """The processes of a group, or this one alone where there is none.

    rank: of this process in the group.   size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._doing = "start"
        self._told: BaseException | None = None  # what this process has told the others of
        # NCCL takes tensors on GPUs only, gloo on the CPU at least
        nccl = group is not None and "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What torch.distributed raises where a process is lost, in a sentence."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, FastFisherError):
                raise
            reason = str(error).strip().split("\n")[0]
            raise DistributedError(
                f"a process of the {self.size} that prune together was lost during {self._doing} (seen by rank "
                f"{self.rank}): {reason:.200}; the model and every checkpoint are as they were before"
            ) from error

    def status(self, count: int, error: BaseException | None = None) -> list[int]:
        """The count that each process tells.   error: what keeps this one from going on.

        Raises that error here, and DistributedError on all others.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [count]
        with self._talking():
            mine = torch.tensor([count, error is not None], device=self._device)
            everyone = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyone, mine, group=self.group)
            told = torch.stack(everyone).tolist()
            if not any(failed for _, failed in told):
                return [count for count, _ in told]
            texts = self.objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            self._told = error
            raise error
        first = next(rank for rank, text in enumerate(texts) if text is not None)
        raise DistributedError(f"rank {first} failed during {self._doing}: {texts[first]}")

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work that each process does for itself; where one fails in it, all raise at its end."""
        self._doing = doing
        try:
            yield
        except DistributedError:
            raise
        except BaseException as error:
            if error is not self._told:
                self.status(0, error)
            raise
        self.status(0)

    def objects(self, value: Any) -> list[Any]:
        """What each process tells, in the order of ranks; anything that can be pickled."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def sum(self, *values: float) -> list[float]:
        """The sum over all processes of each value, in float64."""
        if self.size == 1:
            return list(values)
        with self._talking():
            total = torch.tensor(values, dtype=torch.float64, device=self._device)
            dist.all_reduce(total, group=self.group)
            return [float(value) for value in total.tolist()]

    def count(self, *values: int) -> list[int]:
        """The same for whole numbers."""
        if self.size == 1:
            return list(values)
        return self._summed(torch.tensor(values, dtype=torch.int64)).tolist()

    def add(self, vector: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its dtype."""
        return vector if self.size == 1 else self._summed(vector).to(vector.device)

    def _summed(self, tensor: Tensor) -> Tensor:
        with self._talking():
            total = tensor.to(self._device, copy=True)
            dist.all_reduce(total, group=self.group)
            return total

    def same(self, what: str, value: str) -> None:
        """Raise DistributedError where the processes do not agree on a value."""
        for rank, other in enumerate(self.objects(value)):
            if other != value:
                raise DistributedError(
                    f"{what} of rank {rank} differs from that of rank {self.rank}: {other} and {value}; "
                    f"all processes must call with the same model and settings"
                )

    def shares(self, wanted: int, known: int | None) -> int:
        """How many of `wanted` gradients this process takes: as even as what each has, `known`, allows.

        known: None where that cannot be told, which counts as enough.
        Raises FastFisherError on all of them where there are too few in all, or none for one of them.
        """
        if self.size == 1:
            return wanted
        room = self.objects(known)
        have = [wanted if r is None else r for r in room]
        empty = next((rank for rank, number in enumerate(have) if number < 1), None)
        if empty is not None:
            raise FastFisherError(f"the loader of rank {empty} holds too few samples for one gradient")
        if wanted < self.size:
            raise FastFisherError(
                f"num_grads={wanted} is less than one for each of the {self.size} processes"
            )
        if sum(have) < wanted:
            told = " + ".join(map(str, have))
            raise FastFisherError(f"num_grads={wanted} but the loaders of the ranks give {told}.")
        given = [0] * self.size
        for _ in range(wanted):
            # the first among those that have given least
            open_ranks = [rank for rank in range(self.size) if given[rank] < have[rank]]
            given[min(open_ranks, key=lambda rank: (given[rank], rank))] += 1
        return given[self.rank]

    def samples(self, groups: Sequence[Samples]) -> list[Any]:
        """The batches of all processes, in the order of ranks, on the CPU."""
        mine = [group.cpu().batch() for group in groups]
        return [batch for batches in self.objects(mine) for batch in batches]

    def columns(
        self,
        pieces: Iterator[Tensor],
        spans: Sequence[Sequence[Span]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Iterator[list[Tensor]]:
        """Gradients to the processes that own their columns, while the next ones are being computed.

        pieces: [k, d] of this dtype on this device, which the next one may overwrite; their number and k may differ
        from process to process.   spans: for each process the columns that it owns, as ranges of [0, d).
        Yields, for each range of this process, rows [k of all processes, its width], until all pieces have come.
        """
        if self.size == 1:
            for rows in pieces:
                yield [rows[:, a:b] for a, b in spans[0]]
            return
        widths = [sum(b - a for a, b in ranges) for ranges in spans]
        mine = [b - a for a, b in spans[self.rank]]
        under_way: tuple[Any, Tensor, Tensor, list[int]] | None = None
        while True:
            error: BaseException | None = None
            piece: Tensor | None = None
            try:
                piece = next(pieces, None)
            except BaseException as failure:  # noqa: BLE001 - told to the others, and raised
                error = failure
            self._doing = "gradients"
            counts = self.status(0 if piece is None else len(piece), error)
            started = None
            if any(counts):
                columns = [] if piece is None else [piece[:, a:b].reshape(-1) for r in spans for a, b in r]
                sent = torch.cat(columns or [torch.empty(0, dtype=dtype)]).to(self._device)
                sizes = [count * widths[self.rank] for count in counts]
                received = torch.empty(sum(sizes), dtype=dtype, device=self._device)
                to_each = [counts[self.rank] * width for width in widths]
                with self._talking():
                    work = dist.all_to_all_single(
                        received, sent, sizes, to_each, group=self.group, async_op=True
                    )
                started = work, received, sent, counts
            if under_way is not None:
                work, received, _, counts = under_way
                with self._talking():
                    work.wait()
                chunks = received.split([n * widths[self.rank] for n in counts])
                by_rank = [
                    [rows.view(n, -1) for rows in chunk.split([n * width for width in mine])]
                    for n, chunk in zip(counts, chunks, strict=True)
                    if n
                ]
                yield [torch.cat(rows).to(device) for rows in zip(*by_rank, strict=True)]
            if started is None:
                return
            under_way = started

    def share(self, vector: Tensor, spans: Sequence[Sequence[Span]]) -> None:
        """Each range of a vector [d] from the process that owns it to all others, in place."""
        if self.size == 1:
            return
        with self._talking():
            for rank, ranges in enumerate(spans):
                for a, b in ranges:
                    # NCCL knows no bool
                    bits = vector[a:b].view(torch.uint8) if vector.dtype == torch.bool else vector[a:b]
                    moved = bits.to(self._device)
                    dist.broadcast(moved, group=self.group, group_src=rank)
                    bits.copy_(moved)

    def keep_mask(self, saliency: Tensor, dead: Tensor, zeros: int, owner: Tensor) -> Tensor:
        """The mask that removes the `zeros` least salient of all weights, equal ones by index; dead ones count.

        saliency: [d] float, not negative, read where this process owns it.   dead: bool [d], the same everywhere.
        owner: int [d], which segment each weight belongs to; segment s is owned by process s % size, those with a
        larger number come later in [d], and -1 is nobody's.
        Returns bool [d]: right where this process owns it, and False where dead.
        The threshold is found digit by digit: each pass adds up one histogram of 2¹⁶ counts.
        Raises FisherError on a saliency that is not finite.
        """
        mask = ~dead
        mine = mask & (owner >= 0) & (owner % self.size == self.rank)
        values = saliency[mine].double() + 0.0  # -0 becomes 0
        with self.together("selection"):
            if not bool(values.isfinite().all()):
                at = int((mine & ~saliency.isfinite()).nonzero()[0])
                raise FisherError(f"the saliency of weight {at} is {float(saliency[at])}")
        more = zeros - int(dead.sum())
        if more <= 0:
            return mask
        keys = values.view(torch.int64)  # which have the same order, as no number is negative
        prefix, left = 0, more
        candidates = keys
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
            digits = (candidates >> shift) & ((1 << DIGIT_BITS) - 1)
            counts = self.add(torch.bincount(digits, minlength=1 << DIGIT_BITS))
            below = counts.cumsum(0)
            digit = int((below < left).sum())
            left -= int(below[digit - 1]) if digit else 0
            candidates = candidates[digits == digit]
            prefix = (prefix << DIGIT_BITS) | digit
        gone = keys < prefix
        # of those at the threshold, the first `left` in the order of segments
        ties = keys == prefix
        segments = owner[mine].long()
        number = max(int(owner.max()) + 1, 1)
        per_segment = self.add(torch.bincount(segments[ties], minlength=number))
        before = (per_segment.cumsum(0) - per_segment).to(segments.device)
        rank_in_segment = _rank_among(segments[ties])
        gone[ties.nonzero().squeeze(1)] = before[segments[ties]] + rank_in_segment < left
        mask[mine.nonzero().squeeze(1)[gone]] = False
        return mask


def _rank_among(segments: Tensor) -> Tensor:
    """The place of each entry among those of its segment before it.   segments: int [n], not decreasing."""
    if len(segments) == 0:
        return segments
    counts = torch.bincount(segments)
    return torch.arange(len(segments), device=segments.device) - (counts.cumsum(0) - counts)[segments]
