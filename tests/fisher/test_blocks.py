"""Names, ranges and blocks of a layout."""

from __future__ import annotations

import pytest
import torch

from fastfisher.errors import FastFisherError
from fastfisher.fisher.blocks import BlockLayout, LiveLayout, covered, padded

NAMES = ["conv.weight", "fc.weight", "fc.bias"]
SHAPES = [(2, 3, 2), (5, 1), (3,)]


def test_blocks_never_cross_a_tensor_and_the_last_may_be_short() -> None:
    layout = BlockLayout(NAMES, SHAPES, 5)
    assert layout.blocks.tolist() == [[0, 5], [5, 10], [10, 12], [12, 17], [17, 20]]
    assert layout.blocks.dtype == torch.int64
    assert layout.blocks.is_contiguous()
    assert (layout.num_weights, layout.num_blocks, layout.block_size) == (20, 5, 5)
    assert layout.parameter_ranges == {"conv.weight": (0, 12), "fc.weight": (12, 17), "fc.bias": (17, 20)}
    assert not layout.single_block


def test_a_tensor_smaller_than_a_block_is_one_short_block() -> None:
    assert BlockLayout.from_sizes([3, 40, 2], 20).blocks.tolist() == [[0, 3], [3, 23], [23, 43], [43, 45]]


def test_one_block_over_everything() -> None:
    layout = BlockLayout(NAMES, SHAPES, None)
    assert layout.blocks.tolist() == [[0, 20]]
    assert layout.block_size == 20
    assert layout.single_block
    assert layout.describe_block(0) == "conv.weight ... fc.bias [0:20]"


def test_a_block_is_described_by_its_place_in_its_parameter() -> None:
    layout = BlockLayout(NAMES, SHAPES, 5)
    described = [layout.describe_block(b) for b in range(layout.num_blocks)]
    assert described[1:4] == ["conv.weight[5:10]", "conv.weight[10:12]", "fc.weight[0:5]"]


def test_flatten_and_unflatten_are_inverse() -> None:
    layout = BlockLayout(NAMES, SHAPES, 5)
    vector = torch.arange(20.0)
    tensors = layout.unflatten(vector)
    assert [tuple(tensor.shape) for tensor in tensors.values()] == SHAPES
    assert torch.equal(layout.flatten(tensors), vector)
    tensors["fc.bias"][0] = -1  # a view
    assert vector[17] == -1


def test_flatten_takes_strided_tensors_and_keeps_a_leading_dimension() -> None:
    layout = BlockLayout(["a", "b"], [(2, 3), ()], 4)
    a, b = torch.arange(24.0).reshape(3, 2, 4).transpose(1, 2)[..., :2], torch.arange(3.0)
    flat = layout.flatten({"a": a.transpose(1, 2)[..., :3], "b": b})
    assert flat.shape == (3, 7)
    assert torch.equal(flat[1], torch.cat([a[1].T[:, :3].reshape(-1), b[1:2]]))


@pytest.mark.parametrize(
    ("names", "shapes", "block_size", "message"),
    [
        (NAMES, SHAPES, 21, "block_size=21 exceeds the 20 weights"),
        (NAMES, SHAPES, 0, "block_size must be at least 1, got 0"),
        (NAMES[:2], SHAPES, 5, "names and shapes must pair up, got 2 and 3"),
        ([], [], 5, "names and shapes must pair up, got 0 and 0"),
        (["a", "a"], [(1,), (2,)], 1, "names must differ, got 'a' twice"),
        (["a", "b"], [(1,), (0, 2)], 1, r"b has no weights, its shape is \[0, 2\]"),
    ],
)
def test_bad_layouts(names: list[str], shapes: list[tuple[int, ...]], block_size: int, message: str) -> None:
    with pytest.raises(FastFisherError, match=message):
        BlockLayout(names, shapes, block_size)


def test_flatten_names_what_is_wrong() -> None:
    layout = BlockLayout(["a", "b"], [(2,), (3,)], 2)
    with pytest.raises(FastFisherError, match="'b' is missing; the layout holds a, b"):
        layout.flatten({"a": torch.ones(2)})
    with pytest.raises(FastFisherError, match="'c' is unknown"):
        layout.flatten({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)})
    with pytest.raises(FastFisherError, match=r"b must be \[3\], got \[4\]"):
        layout.flatten({"a": torch.ones(2), "b": torch.ones(4)})
    with pytest.raises(FastFisherError, match=r"vector must be \[5\], got \[6\]"):
        layout.unflatten(torch.ones(6))


def test_padded_gives_a_row_for_every_block() -> None:
    blocks = torch.tensor([[0, 3], [3, 4], [6, 9]])
    rows = padded(torch.arange(10.0), blocks, 3, -1.0)
    assert rows.tolist() == [[0, 1, 2], [3, -1, -1], [6, 7, 8]]
    assert padded(torch.arange(3.0), torch.tensor([[1, 3]]), 4, 0.5).tolist() == [[1, 2, 0.5, 0.5]]


def test_covered_tells_which_weights_lie_in_a_block() -> None:
    assert covered(torch.tensor([[0, 2], [3, 4], [4, 5]]), 6).tolist() == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]


def test_live_weights_are_packed_and_come_back_to_their_places() -> None:
    whole = BlockLayout(NAMES, SHAPES, 4)
    live = torch.tensor([i % 3 == 0 for i in range(12)] + [False] * 5 + [True, False, True])
    layout = LiveLayout(whole, live)
    assert layout.names == ("conv.weight", "fc.bias")
    assert layout.blocks.tolist() == [[0, 4], [4, 6]]
    vector = torch.arange(20.0)
    packed = layout.gather(vector)
    assert packed.tolist() == [0, 3, 6, 9, 17, 19]
    assert torch.equal(layout.scatter(packed), torch.where(live, vector, 0))
    tensors = whole.unflatten(vector)
    assert torch.equal(layout.flatten(tensors), packed)
    assert torch.equal(layout.unflatten(packed)["fc.weight"], torch.zeros(5, 1))
    grads = torch.arange(24.0).reshape(2, *SHAPES[0])
    assert layout.rows("conv.weight", grads).tolist() == [[0, 3, 6, 9], [12, 15, 18, 21]]
    assert layout.describe_block(0) == "conv.weight[0:10], of which 4 weights are left"
    assert layout.describe_block(1) == "fc.bias[0:3], of which 2 weights are left"
    one = LiveLayout(BlockLayout(NAMES, SHAPES, None), live)
    assert one.single_block
    assert one.describe_block(0) == "conv.weight ... fc.bias, of which 6 weights are left"


def test_a_layout_where_everything_is_live_is_the_whole() -> None:
    whole = BlockLayout(NAMES, SHAPES, 5)
    layout = LiveLayout(whole, torch.ones(20, dtype=torch.bool))
    assert torch.equal(layout.blocks, whole.blocks)


def test_nothing_live_is_an_error() -> None:
    whole = BlockLayout(NAMES, SHAPES, 5)
    with pytest.raises(FastFisherError, match="all 20 weights are zero"):
        LiveLayout(whole, torch.zeros(20, dtype=torch.bool))
    with pytest.raises(FastFisherError, match=r"live must be \[20\], got \[3\]"):
        LiveLayout(whole, torch.ones(3, dtype=torch.bool))
