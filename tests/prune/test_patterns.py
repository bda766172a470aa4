"""N:M and whole blocks: the zeros lie where the pattern allows them, along the inputs, in every step and update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.prune.patterns import Pattern
from fastfisher.prune.select import select
from tests.prune.models import batches


def network() -> nn.Module:
    """Convolutions (one grouped, one transposed) whose inputs are multiples of 4, and a first one whose are not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def data(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return batches(
        torch.randn(count, 2, 5, 5, generator=generator), torch.randint(3, (count,), generator=generator), 8
    )


def prune(model: nn.Module, **options: Any) -> ff.Report:
    return ff.prune(model, data(), num_grads=32, block_size=32, **options)


# the inputs of each tensor last
ROWS = {
    "2.weight": lambda w: w.movedim(1, -1),
    "4.weight": lambda w: w.movedim(0, -1),
    "7.weight": lambda w: w,
}


def groups_of(model: nn.Module, size: int) -> Tensor:
    """Which weights are zero in every group of `size` inputs, [groups, size], where a pattern can be taken."""
    parameters = dict(model.named_parameters())
    return torch.cat([(rows(parameters[name]) == 0).reshape(-1, size) for name, rows in ROWS.items()])


@pytest.mark.parametrize("method", ["woodfisher", "woodtaylor", "diagonal", "kfac", "magnitude", "random"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_n_of_m_inputs_stay_everywhere(method: str, pattern: str) -> None:
    model = network()
    if method == "kfac":  # it knows no transposed convolution
        report = prune(model, method=method, pattern=pattern, ignore="4")
        zeros = (dict(model.named_parameters())["7.weight"] == 0).reshape(-1, 4)
    else:
        report = prune(model, method=method, pattern=pattern)
        zeros = groups_of(model, 4)
    assert bool((zeros.sum(dim=1) == 4 - int(pattern[0])).all())
    assert report.sparsity == 1 - int(pattern[0]) / 4
    assert report.unfit == {"0.weight": "2 inputs are no multiple of 4"}
    assert any("0.weight cannot take" in note for note in report.notes)
    assert bool((model[0].weight != 0).all())


@pytest.mark.parametrize("update", ["sum", "joint", "greedy"])
@pytest.mark.parametrize("recomputations", [0, 3])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_2_of_4_with_every_update_and_number_of_steps(update: str, recomputations: int, scope: str) -> None:
    model = network()
    report = prune(model, pattern="2:4", update=update, num_recomputations=recomputations, scope=scope)
    assert bool((groups_of(model, 4).sum(dim=1) == 2).all())
    assert len(report.steps) == recomputations + 1
    assert report.num_zeros == report.num_weights // 2


@pytest.mark.parametrize("update", ["sum", "joint", "greedy"])
@pytest.mark.parametrize("recomputations", [0, 2])
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_blocks_of_4_leave_as_a_whole(update: str, recomputations: int, sparsity: float) -> None:
    model = network()
    report = prune(
        model, pattern="block4", sparsity=sparsity, update=update, num_recomputations=recomputations
    )
    counts = groups_of(model, 4).sum(dim=1)
    assert sorted(set(counts.tolist())) == [0, 4]
    assert int((counts == 4).sum()) == round(sparsity * len(counts)) == report.num_zeros // 4


def test_zeros_beyond_the_pattern_stay() -> None:
    model = network()
    with torch.no_grad():
        model[7].weight[0, :3] = 0  # three of four
        model[7].weight[1, 4] = 0
    report = prune(model, pattern="2:4", num_recomputations=1)
    zeros = groups_of(model, 4).sum(dim=1)
    assert sorted(set(zeros.tolist())) == [2, 3]
    assert report.num_zeros == report.num_weights // 2 + 1
    assert bool((model[7].weight[0, :3] == 0).all())


def test_the_least_salient_of_each_group_go() -> None:
    saliency = torch.tensor([4.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    dead = torch.zeros(8, dtype=torch.bool)
    mask = select(saliency, dead, 0.5, scope="global", ranges=[(0, 8)], pattern=Pattern.parse("2:4"))
    assert mask.tolist() == [True, False, True, False, False, False, True, True]
    # on the way there: three of all, and no group loses more than two
    mask = select(saliency, dead, 3 / 8, scope="global", ranges=[(0, 8)], pattern=Pattern.parse("2:4"))
    assert mask.tolist() == [True, False, True, True, False, False, True, True]


def test_a_cap_keeps_the_most_salient_of_its_layer() -> None:
    saliency = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    dead = torch.tensor([False] * 7 + [True])
    options: dict[str, Any] = {"scope": "global", "ranges": [(0, 4), (4, 8)]}
    assert (~select(saliency, dead, 0.5, **options)).tolist() == [True, True, True] + [False] * 4 + [True]
    mask = select(saliency, dead, 0.5, most=[2, 4], **options)
    assert (~mask).tolist() == [True, True, False, False, True, False, False, True]


def test_caps_by_name_hold_and_the_sparsity_too() -> None:
    model = network()
    report = prune(model, sparsity=0.6, max_layer_sparsity={"0": 0.25, "7.weight": 0.5})
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["0.weight"].zeros <= 0.25 * by_name["0.weight"].weights
    assert by_name["7.weight"].zeros <= 0.5 * by_name["7.weight"].weights
    assert report.num_zeros == round(0.6 * report.num_weights)


def test_blocks_of_a_live_layout_hold_whole_groups() -> None:
    whole = BlockLayout(["a", "b"], [(40,), (64,)], 16, group=4)
    generator = torch.Generator().manual_seed(0)
    live = torch.rand(104, generator=generator) < 0.7
    live[8:12] = False
    layout = LiveLayout(whole, live)
    assert layout.blocks[0, 0] == 0
    assert layout.blocks[-1, 1] == int(live.sum())
    assert torch.equal(layout.blocks[1:, 0], layout.blocks[:-1, 1])
    assert int((layout.blocks[:, 1] - layout.blocks[:, 0]).max()) <= 16
    for start, stop in layout.blocks.tolist():
        inside, outside = set(layout.groups[start:stop].tolist()), layout.groups[:start].tolist()
        assert not inside & set(outside)
    # a block is as full as whole groups allow: what follows would not fit, or belongs to another tensor
    sizes = (layout.blocks[:, 1] - layout.blocks[:, 0]).tolist()
    assert sum(size >= 10 for size in sizes) >= len(sizes) - 2


def test_inputs_run_fastest_and_the_way_back_is_exact() -> None:
    shapes = [(3, 4, 2, 2), (5, 8)]
    layout = BlockLayout(["conv", "fc"], shapes, 16, group=4, last={"conv": 1, "fc": 1})
    tensors = {"conv": torch.randn(3, 4, 2, 2), "fc": torch.randn(5, 8)}
    flat = layout.flatten(tensors)
    assert torch.equal(flat[:48].view(3, 2, 2, 4), tensors["conv"].permute(0, 2, 3, 1))
    back = layout.unflatten(flat)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    back["conv"][0, 1, 0, 0] = 7  # a view
    assert float(flat[1]) == 7
    many = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in tensors.items()}
    assert torch.equal(torch.cat([layout.rows(n, g) for n, g in many.items()], 1), layout.flatten(many))


def test_operations_weigh_in_where_they_are_the_cost() -> None:
    plain, weighed = network(), network()
    by_params = ff.prune(plain, data(), sparsity=0.5, method="magnitude")
    by_flops = ff.prune(weighed, data(), sparsity=0.5, method="magnitude", cost="flops")
    assert by_flops.num_zeros == by_params.num_zeros
    assert by_flops.flops_nz is not None
    assert by_params.flops_nz is not None
    assert by_flops.flops_nz < by_params.flops_nz
