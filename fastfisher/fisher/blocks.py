"""Which weights share a block: the map between named parameter tensors, the flat vector [d], and blocks of
it.

A block is a range of the flat vector.  It never crosses a parameter tensor, so the last block of a tensor may
be short; with `block_size=None` the whole network is one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError


class BlockLayout:
    """The d weights of named tensors in one flat order, cut into K blocks of at most B.

    names: of the parameter tensors, in the order of the flat vector.   shapes: one per name.
    block_size: B, or None for one block over everything.
    group: so many consecutive weights are never cut apart; each tensor holds a multiple of it, and blocks are as large
    as B allows.   last: name -> the dimension of that tensor which runs fastest, by default its last.
    Raises FastFisherError where names and shapes do not match, a tensor is empty, B is below the group or above d.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    num_weights: int
    block_size: int
    single_block: bool
    parameter_ranges: dict[str, tuple[int, int]]
    blocks: Tensor  # int64 [K, 2], start and stop of each block
    group: int
    last: dict[str, int]

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        block_size: int | None,
        *,
        group: int = 1,
        last: Mapping[str, int] | None = None,
    ) -> None:
        if len(names) != len(shapes) or not names:
            raise FastFisherError(f"names and shapes must pair up, got {len(names)} and {len(shapes)}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise FastFisherError(f"names must differ, got {twice!r} twice")
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.parameter_ranges = {}
        stop = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            if shape.numel() == 0:
                raise FastFisherError(f"{name} has no weights, its shape is {list(shape)}")
            start, stop = stop, stop + shape.numel()
            self.parameter_ranges[name] = (start, stop)
        self.num_weights = stop
        self.group = group
        self.last = dict(last or {})
        self.single_block = block_size is None
        if block_size is None:
            self.block_size = self.num_weights
            self.blocks = torch.tensor([[0, self.num_weights]])
            return
        if block_size < group:
            whole = f", the weights of a group, got {block_size}" if group > 1 else f", got {block_size}"
            raise FastFisherError(f"block_size must be at least {group}{whole}")
        if block_size > self.num_weights:
            raise FastFisherError(f"block_size={block_size} exceeds the {self.num_weights} weights")
        self.block_size = block_size
        self.blocks = torch.cat([self._cut(*edges) for edges in self.parameter_ranges.values()])

    def _cut(self, start: int, stop: int) -> Tensor:
        """The blocks [K, 2] of one tensor."""
        size = self.block_size // self.group * self.group
        starts = torch.arange(start, stop, size)
        return torch.stack([starts, (starts + size).clamp(max=stop)], dim=1)

    @property
    def groups(self) -> Tensor:
        """The group of every weight, int64 [d], not decreasing."""
        return torch.arange(self.num_weights) // self.group

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], block_size: int | None) -> BlockLayout:
        """The layout of unnamed flat tensors of these sizes; they are called tensor0, tensor1, ..."""
        return cls([f"tensor{i}" for i in range(len(sizes))], [(size,) for size in sizes], block_size)

    def state_dict(self) -> dict[str, Any]:
        """What `from_state_dict` needs, in plain types."""
        return {
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "block_size": None if self.single_block else self.block_size,
            "group": self.group,
            "last": dict(self.last),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> BlockLayout:
        """The layout that `state_dict` described; other entries are left alone."""
        return BlockLayout(
            state["names"],
            state["shapes"],
            state["block_size"],
            group=state.get("group", 1),
            last=state.get("last"),
        )

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.blocks.shape[0]

    def __repr__(self) -> str:
        return (
            f"BlockLayout({len(self.names)} tensors, {self.num_weights} weights, "
            f"{self.num_blocks} blocks of up to {self.block_size})"
        )

    def describe_block(self, b: int) -> str:
        """Which weights block b holds, as parameter[first:last] of the flattened parameter."""
        return self.describe_range(*self.blocks[b].tolist())

    def describe_range(self, start: int, stop: int) -> str:
        """Which weights [start, stop) of the flat vector are, as parameter[first:last] of the flattened parameter."""
        if self.single_block and len(self.names) > 1:
            return f"{self.names[0]} ... {self.names[-1]} [{start}:{stop}]"
        name = next(name for name, (_, last) in self.parameter_ranges.items() if start < last)
        first = self.parameter_ranges[name][0]
        return f"{name}[{start - first}:{stop - first}]"

    def rows(self, name: str, grads: Tensor) -> Tensor:
        """The weights of one tensor that are in the layout, from [k, *shape] to [k, its share of d]."""
        return self._flat(name, grads, 1)

    def place(self, name: str, rows: Tensor) -> Tensor | None:
        """The columns of one tensor in rows [k, d] as a view [k, *shape], None where its order there is another."""
        if name in self.last:
            return None
        start, stop = self.parameter_ranges[name]
        return rows[:, start:stop].unflatten(1, self.shapes[self.names.index(name)] or (1,))

    def _flat(self, name: str, tensor: Tensor, lead: int) -> Tensor:
        """[*lead, *shape] as [*lead, its share of d], in the order of the layout."""
        if name in self.last:
            tensor = tensor.movedim(lead + self.last[name], -1)
        return tensor.reshape(*tensor.shape[:lead], -1)

    def gather(self, vector: Tensor) -> Tensor:
        """From a vector over all weights of the tensors to the one [d] over those in the layout."""
        return vector

    def scatter(self, vector: Tensor) -> Tensor:
        """The inverse of `gather`, with 0 for what is not in the layout."""
        return vector

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors of the layout's shapes as one new vector [d].

        A common leading dimension is kept: tensors [m, *shape] give [m, d].
        Raises FastFisherError where a name is missing or unknown, or a shape differs.
        """
        if set(tensors) != set(self.names):
            wrong = sorted(set(tensors) ^ set(self.names))[0]
            verdict = "is missing" if wrong in self.names else "is unknown"
            raise FastFisherError(f"{wrong!r} {verdict}; the layout holds {', '.join(self.names)}")
        lead = tensors[self.names[0]].shape[: tensors[self.names[0]].ndim - len(self.shapes[0])]
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != lead + shape:
                raise FastFisherError(f"{name} must be {[*lead, *shape]}, got {list(tensors[name].shape)}")
            pieces.append(self._flat(name, tensors[name], len(lead)))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The named views of a vector [d]; writing into them writes into the vector."""
        if vector.shape != (self.num_weights,):
            raise FastFisherError(f"vector must be [{self.num_weights}], got {list(vector.shape)}")
        pieces = vector.split([shape.numel() for shape in self.shapes])
        tensors = {}
        for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True):
            dim = self.last.get(name, len(shape) - 1)
            moved = [*shape[:dim], *shape[dim + 1 :], *shape[dim : dim + 1]]
            tensors[name] = piece.view(moved).movedim(-1, dim) if shape else piece.view(shape)
        return tensors


class LiveLayout(BlockLayout):
    """The blocks of the weights of another layout that are not removed yet, packed without gaps.

    whole: a layout with all weights of its tensors.   live: bool [d of the whole], on the device of the vectors.
    A tensor without a live weight is left out.   Raises FastFisherError where nothing is live.
    """

    def __init__(self, whole: BlockLayout, live: Tensor) -> None:
        if live.shape != (whole.num_weights,):
            raise FastFisherError(f"live must be [{whole.num_weights}], got {list(live.shape)}")
        self.whole = whole
        self.index = live.nonzero().squeeze(1)  # [d], where each weight is in the whole
        counts = {name: int(live[a:b].sum()) for name, (a, b) in whole.parameter_ranges.items()}
        names = [name for name, count in counts.items() if count]
        if not names:
            raise FastFisherError(f"all {whole.num_weights} weights are zero: there is nothing to prune")
        block_size = None if whole.single_block else min(whole.block_size, len(self.index))
        self._groups = self.index.cpu() // whole.group
        super().__init__(names, [(counts[name],) for name in names], block_size, group=whole.group)

    def _cut(self, start: int, stop: int) -> Tensor:
        """The blocks [K, 2] of one tensor.

        Members of a group that is no longer whole stay together.  A group goes into the block that its first weight
        belongs to if blocks are shorter than B by all but one of a group; so no block gets longer than B.
        """
        if self.group == 1:
            return super()._cut(start, stop)
        groups = self._groups[start:stop]
        first = torch.cat([torch.tensor([True]), groups[1:] != groups[:-1]]).nonzero().squeeze(1)
        block = first // (self.block_size - self.group + 1)
        starts = start + first[torch.cat([torch.tensor([True]), block[1:] != block[:-1]])]
        return torch.stack([starts, torch.cat([starts[1:], torch.tensor([stop])])], dim=1)

    @property
    def groups(self) -> Tensor:
        """The group of every weight in the whole, int64 [d], not decreasing."""
        return self._groups

    def describe_block(self, b: int) -> str:
        """Which weights block b holds, by their first and last place in the flattened parameter."""
        start, stop = self.blocks[b].tolist()
        first, last = self.index[start], self.index[stop - 1]
        ranges = self.whole.parameter_ranges
        name, other = (
            next(name for name, (_, end) in ranges.items() if place < end) for place in (first, last)
        )
        where = f"{name} ... {other}"
        if name == other:
            where = f"{name}[{int(first) - ranges[name][0]}:{int(last) - ranges[name][0] + 1}]"
        return f"{where}, of which {stop - start} weights are left"

    def rows(self, name: str, grads: Tensor) -> Tensor:
        """The live weights of one tensor, from [k, *shape] to [k, its share of d]."""
        start, stop = self.parameter_ranges[name]
        places = self.index[start:stop] - self.whole.parameter_ranges[name][0]
        return self.whole.rows(name, grads)[:, places]

    def place(self, name: str, rows: Tensor) -> Tensor | None:
        """None: what is left of a tensor lies without gaps."""
        return None

    def gather(self, vector: Tensor) -> Tensor:
        """From a vector over the whole to the one [d] over the live weights."""
        return vector[self.index]

    def scatter(self, vector: Tensor) -> Tensor:
        """The inverse of `gather`, with 0 for what is not live."""
        whole = vector.new_zeros(self.whole.num_weights)
        whole[self.index] = vector
        return whole

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors of the whole as one vector [d] of their live weights."""
        return self.whole.flatten(tensors)[..., self.index]

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [d] as named tensors of the whole, with 0 for what is not live."""
        return self.whole.unflatten(self.scatter(vector))


class PartLayout(BlockLayout):
    """Blocks first to last - 1 of another layout, with their range of its weights as a vector of its own.

    start, stop: that range in the whole.
    """

    def __init__(self, whole: BlockLayout, first: int, last: int) -> None:
        self.whole = whole
        self.first = first
        self.start, self.stop = int(whole.blocks[first, 0]), int(whole.blocks[last - 1, 1])
        self.num_weights = self.stop - self.start
        self.block_size = whole.block_size
        self.single_block = whole.single_block
        self.group = whole.group
        self.last = whole.last
        self.blocks = whole.blocks[first:last] - self.start
        ranges = {
            name: (max(a - self.start, 0), min(b, self.stop) - self.start)
            for name, (a, b) in whole.parameter_ranges.items()
            if a < self.stop and self.start < b
        }
        self.parameter_ranges = ranges
        self.names = tuple(ranges)
        self.shapes = tuple(torch.Size([b - a]) for a, b in ranges.values())

    @property
    def groups(self) -> Tensor:
        """The group of every weight in the whole, int64 [d], not decreasing."""
        return self.whole.groups[self.start : self.stop]

    def describe_block(self, b: int) -> str:
        """Which weights block b holds, as the whole tells it."""
        return self.whole.describe_block(self.first + b)

    def rows(self, name: str, grads: Tensor) -> Tensor:
        """The weights of one tensor that are in this part, from [k, *shape] to [k, its share of d]."""
        begin = self.whole.parameter_ranges[name][0]
        start, stop = (self.start + edge - begin for edge in self.parameter_ranges[name])
        return self.whole.rows(name, grads)[:, start:stop]

    def gather(self, vector: Tensor) -> Tensor:
        """From a vector of all that the whole gathers from to the one [d] of this part."""
        return self.whole.gather(vector)[self.start : self.stop]


def padded(x: Tensor, blocks: Tensor, block_size: int, fill: float) -> Tensor:
    """A vector [d] as one row for each block, [K, B], with `fill` after a short one.   blocks: int64 [K, 2]."""
    index = blocks[:, :1] + torch.arange(block_size, device=x.device)  # [K, B]
    inside = index < blocks[:, 1:]
    return torch.where(inside, x[index.clamp_(max=len(x) - 1)], fill)


def covered(blocks: Tensor, num_weights: int) -> Tensor:
    """Which of the d weights lie in one of the blocks, bool [d].   blocks: int64 [K, 2], increasing and disjoint."""
    steps = torch.zeros(num_weights + 1, dtype=torch.int64, device=blocks.device)
    one = torch.ones(len(blocks), dtype=torch.int64, device=blocks.device)
    steps.index_add_(0, blocks[:, 0], one).index_add_(0, blocks[:, 1], -one)
    return steps.cumsum(0)[:-1] > 0
