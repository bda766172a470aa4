"""The inverse Fisher of one step in groups of blocks, of which one at a time is in memory, on one process or several.

One group on one process holds everything, and the inverse is made once.  With several groups the inverse of a group is
needed again after the weights are chosen from all of them.  Then gradients are `stored`, [m, d] outside the memory of
the device, or `recomputed` from the same samples; and inverses are stored or rebuilt.  `Storage` says which, and why.

Of several processes each owns one part of every group.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfisher.fisher import offload
from fastfisher.fisher.blocks import BlockLayout, PartLayout
from fastfisher.fisher.gradients import GradientStream
from fastfisher.fisher.inverse import (
    FisherAccumulator,
    FisherInverse,
    absolute_damping,
    choose_form,
    column_sums,
)
from fastfisher.memory import format_bytes
from fastfisher.prune.ranks import Ranks
from fastfisher.prune.settings import FROM_GRADIENTS, Settings


@dataclass(frozen=True)
class Storage:
    """How many groups the blocks are worked on in, and what waits outside memory meanwhile.

    gradients: "stored" or "recomputed".   inverses: "stored" or "rebuilt".   place: "memory" (that of the CPU, pinned)
    or "file".   bytes, seconds: of what waits there, the seconds for writing and reading.   visits: how often a step
    goes through all groups.   why: what decided.   With one group none of this matters.
    """

    groups: int = 1
    gradients: str = "recomputed"
    inverses: str = "rebuilt"
    place: str = "file"
    bytes: int = 0
    seconds: float = 0.0
    visits: int = 1
    why: str = ""

    @property
    def builds(self) -> int:
        """How often each inverse is built."""
        return self.visits if self.groups > 1 and self.inverses == "rebuilt" else 1

    @property
    def passes(self) -> int:
        """How often the gradients of all samples are computed, of the whole network or of one group."""
        return self.groups * self.builds if self.groups > 1 and self.gradients == "recomputed" else 1

    def __str__(self) -> str:
        where = "in CPU memory" if self.place == "memory" else f"in {tempfile.gettempdir()}"
        text = f"{self.groups} groups of blocks in turn: gradients {self.gradients}, inverses {self.inverses}"
        if self.bytes:
            text += f", {format_bytes(self.bytes)} {where}"
        return f"{text} ({self.why})" if self.why else text


ONE_GROUP = Storage()


def shares_blocks(settings: Settings) -> bool:
    """Whether blocks are worked on apart, so that groups of them and several processes can: not what is learned."""
    return settings.method in FROM_GRADIENTS and settings.method != "fishleg" and not settings.fisher_average


def cut(layout: BlockLayout, groups: int, ranks: int) -> list[list[PartLayout | None]]:
    """The blocks of a layout for each group and, in it, for each process; None where there are too few for all.

    Blocks stay in order, group by group, and their numbers differ by one at most.
    """
    pieces = groups * ranks
    edges = [layout.num_blocks * i // pieces for i in range(pieces + 1)]
    parts = [PartLayout(layout, a, b) if a < b else None for a, b in itertools.pairwise(edges)]
    return [parts[first : first + ranks] for first in range(0, pieces, ranks)]


def timed(pieces: Iterator[Tensor], enter: Callable[[str], Any]) -> Iterator[Tensor]:
    """The pieces, each of which is made in the phase "gradients".   enter: of a phase, a context."""
    while True:
        with enter("gradients"):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _span(part: PartLayout | None) -> tuple[int, int]:
    return (0, 0) if part is None else (part.start, part.stop)


class GroupedInverse:
    """The inverse of one step, gone through as often as needed: each time every group comes as (start, stop, inverse).

    stream: the gradients of this process.   Iterating takes part in exchanges between the processes, so all of them
    iterate equally often, to the end.   form, damping: known after the first time.
    """

    def __init__(
        self,
        stream: GradientStream,
        settings: Settings,
        storage: Storage,
        ranks: Ranks,
        *,
        enter: Callable[[str], Any],
        advance: Callable[[int], None],
        limit: int,
    ) -> None:
        self.stream = stream
        self.settings = settings
        self.storage = storage
        self.ranks = ranks
        self.layout = stream.layout
        self.num_rows = settings.num_grads * stream.rows_per_grad  # of all processes
        self.form = choose_form("auto", self.num_rows, self.layout.block_size)
        self.damping = settings.damping
        self.groups = cut(self.layout, max(1, min(storage.groups, self.layout.num_blocks)), ranks.size)
        self._enter = enter  # of a phase, a context
        self._advance = advance
        self._limit = limit
        self._known: dict[int, FisherInverse | dict[str, Any] | None] = {}  # by group, in memory or put away
        self._rows: list[Tensor] = []  # of stored gradients, by group
        self._total: Tensor | None = None  # Σ g of this process, float64 [d], for a covariance
        self._first = True

    @property
    def spans(self) -> list[list[tuple[int, int]]]:
        """For each process the ranges of the layout's weights that it owns."""
        return [[_span(group[rank]) for group in self.groups] for rank in range(self.ranks.size)]

    def owners(self) -> Tensor:
        """The segment of every weight of the layout, int32 [d], as `Ranks.keep_mask` takes them."""
        owner = torch.empty(self.layout.num_weights, dtype=torch.int32, device=self.stream.objective.device)
        for i, part in enumerate(part for group in self.groups for part in group):
            start, stop = _span(part)
            owner[start:stop] = i
        return owner

    def __iter__(self) -> Iterator[tuple[int, int, FisherInverse]]:
        first, self._first = self._first, False
        if first and self._storing:
            self._store()
            first = False
        for g in range(len(self.groups)):
            found = self._known.get(g)
            if isinstance(found, dict):
                with self._enter("offload"):
                    inverse: FisherInverse | None = self._taken_back(found, self._part(g))
            elif g in self._known:
                inverse = found
            else:
                inverse = self._build(g, first=first and g == 0)
                self._keep(g, inverse)
            if inverse is not None:
                yield *_span(self._part(g)), inverse
            del inverse

    @property
    def _storing(self) -> bool:
        return len(self.groups) > 1 and self.storage.gradients == "stored"

    def _part(self, g: int) -> PartLayout | None:
        return self.groups[g][self.ranks.rank]

    def _keep(self, g: int, inverse: FisherInverse | None) -> None:
        stored = len(self.groups) > 1 and self.storage.inverses == "stored"
        if len(self.groups) == 1 or (stored and inverse is None):
            self._known[g] = inverse
        elif stored and inverse is not None:
            with self._enter("offload"):
                state = inverse.state_dict()
                state["parts"] = offload.put_away(state["parts"], self.storage.place)
                self._known[g] = state

    def _taken_back(self, state: dict[str, Any], part: PartLayout | None) -> FisherInverse:
        assert part is not None
        parts = offload.taken_back(state["parts"], self.stream.objective.device)
        return FisherInverse.from_state_dict({**state, "parts": parts}, layout=part)

    def _accumulator(self, part: PartLayout) -> FisherAccumulator:
        settings = self.settings
        return FisherAccumulator(
            part,
            num_grads=settings.num_grads,
            num_rows=self.num_rows,
            damping=settings.damping,
            damping_mode=settings.damping_mode,
            form=self.form,
            device=self.stream.objective.device,
            mean=settings.method == "woodtaylor",
            centered=settings.centered,
        )

    def _build(self, g: int, *, first: bool) -> FisherInverse | None:
        """The inverse of this process's part of a group.   first: from the stream itself, and all else is learned."""
        part = self._part(g)
        accumulator = None
        if self._rows:
            with self.ranks.together("the inverse"):
                if part is None:
                    return None
                accumulator = self._accumulator(part)
                with self._enter("fisher"):
                    accumulator.add(self._rows[g])
        else:
            pieces = self._first_pieces() if first else self._again(g)
            begin = 0 if first else min(start for start, stop in map(_span, self.groups[g]) if stop)
            spans = [[(a - begin, b - begin)] if b else [(0, 0)] for a, b in map(_span, self.groups[g])]
            device, dtype = self.stream.objective.device, self.stream.dtype
            for (rows,) in self.ranks.columns(pieces, spans, dtype, device):
                with self._enter("fisher"):
                    if part is not None:
                        accumulator = accumulator or self._accumulator(part)
                        accumulator.add(rows)
                del rows  # they are views of the buffer that the gradients came in
            if first:
                self._learn_all()
        with self.ranks.together("the inverse"), self._enter("inverse"):
            if accumulator is None:
                return None
            inverse = accumulator.finish(None if self._alone else self.damping)
            self.damping = inverse.damping
            return inverse

    @property
    def _alone(self) -> bool:
        """One group on one process: its accumulator learns all there is to know."""
        return len(self.groups) == 1 and self.ranks.size == 1

    def _first_pieces(self) -> Iterator[Tensor]:
        """All gradients of this process as they come, of the whole layout."""
        for piece in timed(iter(self.stream), self._enter):
            if self.settings.centered and not self._alone:
                total = column_sums(piece)
                self._total = total if self._total is None else self._total + total
            yield piece
            self._advance(self.stream.num_finite)

    def _again(self, g: int) -> Iterator[Tensor]:
        """The same gradients once more, of the weights of one group."""
        parts = [part for part in self.groups[g] if part is not None]
        whole = PartLayout(self.layout, parts[0].first, parts[-1].first + parts[-1].num_blocks)
        stream = GradientStream(
            self.stream.objective.only(whole.names),
            [samples.batch() for samples in self.stream.used],
            whole,
            num_grads=self.stream.num_finite,
            memory_limit=self._limit,
            dtype=self.settings.grad_dtype,
        )
        yield from timed(iter(stream), self._enter)
        # rows of zeros stood for what was not finite
        if missing := self.stream.num_grads - self.stream.num_finite:
            rows = missing * self.stream.rows_per_grad
            yield torch.zeros(rows, whole.num_weights, dtype=stream.dtype, device=stream.objective.device)

    def _store(self) -> None:
        """All gradients, of every group, outside the memory of the device."""
        stream = self.stream
        with self.ranks.together("the storing of gradients"):
            for part in (self._part(g) for g in range(len(self.groups))):
                width = 0 if part is None else part.num_weights
                self._rows.append(offload.waiting((self.num_rows, width), stream.dtype, self.storage.place))
        at = 0
        pieces = self.ranks.columns(self._first_pieces(), self.spans, stream.dtype, stream.objective.device)
        for columns in pieces:
            with self._enter("offload"):
                for stored, rows in zip(self._rows, columns, strict=True):
                    stored[at : at + len(rows)] = rows
            at += len(columns[0])
        self._learn_all()

    def _learn_all(self) -> None:
        """λ from all gradients of all processes, once they have come."""
        settings = self.settings
        if self._alone or settings.damping_mode == "absolute":
            return
        squares = self.ranks.sum(self.stream.sum_squares)[0]
        if settings.centered and self._total is not None:
            mean = self.ranks.add(self._total) / settings.num_grads
            squares -= settings.num_grads * float(mean.square().sum())
        self.damping = absolute_damping(
            settings.damping, squares / (settings.num_grads * self.layout.num_weights)
        )
