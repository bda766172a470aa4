"""K-FAC against its definition by loops and dense Kronecker products in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher import kfac
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.kfac import KFACInverse, draw_labels, kfac_factors, kfac_inverse
from fastfisher.fisher.objective import Objective
from tests.prune.models import assert_same, batches, classifier, images, picture

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "groups": nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, padding=(2, 1)),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
    "same": nn.Conv2d(4, 3, (2, 3), padding="same"),
    "circular": nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "line": nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "reflected line": nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
}


def layout_of(model: nn.Module, names: Sequence[str], block_size: int | None = 1) -> BlockLayout:
    parameters = dict(model.named_parameters())
    return BlockLayout(list(names), [parameters[name].shape for name in names], block_size)


def groups(inputs: Tensor, labels: Tensor, size: int = 4) -> Iterator[Samples]:
    return SampleReader(batches(inputs, labels, 3), inputs.device).groups(size)


def inverse_of(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    labels: Tensor,
    *,
    damping: float = 1e-2,
    size: int = 4,
    loss_fn: Any = None,
    **options: Any,
) -> KFACInverse:
    objective = Objective(model, names, loss_fn=loss_fn)
    return kfac_inverse(
        objective, groups(inputs, labels, size), layout_of(model, names), damping=damping, **options
    )


def fisher(model: nn.Module, name: str, inputs: Tensor, labels: Tensor) -> Tensor:
    """(1/m) Σ g gᵀ of one tensor by a loop."""
    model = copy.deepcopy(model).eval()
    weight = dict(model.named_parameters())[name]
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), weight)[0].reshape(-1)
        for x, y in zip(inputs, labels, strict=True)
    ]
    G = torch.stack(rows)
    return G.T @ G / len(G)


def dense(A: Tensor, S: Tensor) -> Tensor:
    """S ⊗ A of every group, as one block-diagonal matrix in the flat order of the weight."""
    return torch.block_diag(*(torch.kron(s, a) for a, s in zip(A, S, strict=True)))


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)
    ).double()


def points(count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


MLP_NAMES = ["0.weight", "3.weight", "5.weight"]


def test_one_sample_is_the_exact_fisher() -> None:
    model = mlp()
    inputs, labels = points(1)
    factors, count = kfac_factors(Objective(model, MLP_NAMES), groups(inputs, labels), MLP_NAMES)
    assert count == 1
    for name in MLP_NAMES:
        torch.testing.assert_close(dense(*factors[name]), fisher(model, name, inputs, labels))
    assert float(fisher(model, "0.weight", inputs, labels).norm()) > 1e-3


def test_inputs_of_constant_length_and_direction_are_exact_too() -> None:
    """Inputs ±x: a aᵀ is the same for all samples, so the Fisher of the first layer is a Kronecker product."""
    model = mlp()
    inputs, labels = points(9)
    inputs = inputs[:1] * torch.tensor([1, -1, 1, 1, -1, 1, -1, -1, 1]).double()[:, None]
    factors, _ = kfac_factors(Objective(model, MLP_NAMES), groups(inputs, labels), MLP_NAMES)
    torch.testing.assert_close(dense(*factors["0.weight"]), fisher(model, "0.weight", inputs, labels))


def test_the_factors_are_means_over_all_samples_whatever_the_groups() -> None:
    model = mlp()
    inputs, labels = points(11)
    # by hand: inputs and output gradients of the second layer, sample by sample, in eval mode and without ReLU in place
    twin = copy.deepcopy(model).eval()
    a = twin[0](inputs).relu().detach()
    s = twin[3](a).detach().requires_grad_()
    losses = F.cross_entropy(twin[5](twin[4](s)), labels, reduction="none")
    g = torch.autograd.grad(losses.sum(), s)[0]
    for size in (1, 4, 11):
        factors, count = kfac_factors(Objective(model, MLP_NAMES), groups(inputs, labels, size), MLP_NAMES)
        A, S = factors["3.weight"]
        assert count == 11
        torch.testing.assert_close(A[0], a.T @ a / 11)
        torch.testing.assert_close(S[0], g.T @ g / 11)
    # what follows the first layer overwrites its output; its gradient is that before the ReLU
    s = twin[0](inputs).detach().requires_grad_()
    losses = F.cross_entropy(twin[5](twin[4](twin[3](s.relu()))), labels, reduction="none")
    g = torch.autograd.grad(losses.sum(), s)[0]
    torch.testing.assert_close(factors["0.weight"][1][0], g.T @ g / 11)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_the_linear_map_of_its_patches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS[kind]).double()
    one = isinstance(layer, nn.Conv1d)
    x = torch.randn(5, 4, 7, dtype=torch.float64) if one else torch.randn(5, 4, 7, 6, dtype=torch.float64)
    monkeypatch.setattr(kfac, "PATCH_BYTES", 20_000)  # two or three pieces
    a = torch.cat(list(kfac.input_rows(layer, x)), dim=1)  # [G, rows, p]
    out = layer(x) - layer.bias.view(-1, *[1] * (x.ndim - 2))
    rows = kfac.output_rows(layer, out)  # [G, rows, q]
    weight = layer.weight.reshape(layer.groups, -1, a.shape[2])  # [G, q, p]
    torch.testing.assert_close(a @ weight.mT, rows)

    # and A, S are the moments of those rows: with one sample and one place, the exact Fisher
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))
    model(x)
    labels = torch.tensor([0, 2, 1, 1, 0])
    factors, _ = kfac_factors(Objective(model, ["0.weight"]), groups(x, labels), ["0.weight"])
    A, S = factors["0.weight"]
    torch.testing.assert_close(A, a.mT @ a / a.shape[1])
    hidden = layer(x).detach().requires_grad_()
    losses = F.cross_entropy(model[3](hidden.tanh().flatten(1)), labels, reduction="none")
    g = kfac.output_rows(layer, torch.autograd.grad(losses.sum(), hidden)[0])
    torch.testing.assert_close(S, g.mT @ g / 5)


def test_a_grouped_convolution_with_one_place_and_sample_is_exact_in_its_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    x, y = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.tensor([1])
    factors, _ = kfac_factors(Objective(model, ["0.weight"]), groups(x, y), ["0.weight"])
    F_ = fisher(model, "0.weight", x, y)
    half = len(F_) // 2
    found = dense(*factors["0.weight"])
    torch.testing.assert_close(found[:half, :half], F_[:half, :half])
    torch.testing.assert_close(found[half:, half:], F_[half:, half:])
    assert float(F_[:half, half:].abs().max()) > 0 == float(found[:half, half:].abs().max())


def test_positions_that_share_a_weight_are_places() -> None:
    """A linear layer over tokens [n, t, in]: A is a mean over tokens, S a sum over the tokens of a sample."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh().mean(1))

    model = Tokens()
    x, y = torch.randn(6, 7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    factors, _ = kfac_factors(Objective(model, ["first.weight"]), groups(x, y), ["first.weight"])
    s = model.first(x).detach().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(model.last(s.tanh().mean(1)), y, reduction="sum"), s)[0].flatten(
        0, 1
    )
    a = x.flatten(0, 1)
    torch.testing.assert_close(factors["first.weight"][0][0], a.T @ a / 42)
    torch.testing.assert_close(factors["first.weight"][1][0], g.T @ g / 6)


@pytest.mark.parametrize("tied", ["module", "parameter"])
def test_the_calls_of_a_tied_layer_are_places_too(tied: str) -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False).double()
            self.two = self.one
            if tied == "parameter":
                self.two = nn.Linear(4, 4, bias=False).double()
                self.two.weight = self.one.weight
            self.last = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.two(self.one(x).tanh()))

    model = Twice()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    factors, _ = kfac_factors(Objective(model, ["one.weight"]), groups(x, y), ["one.weight"])
    s = model.one(x).detach().requires_grad_()
    b = s.tanh()
    t = model.two(b)
    g, h = torch.autograd.grad(F.cross_entropy(model.last(t), y, reduction="sum"), (s, t))
    torch.testing.assert_close(factors["one.weight"][0][0], (x.T @ x + b.T @ b) / 12)
    torch.testing.assert_close(factors["one.weight"][1][0], (g.T @ g + h.T @ h) / 6)


@pytest.mark.parametrize("damping", [1e-4, 0.3])
@pytest.mark.parametrize("direct", [0, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_that_of_the_dense_kronecker_product(
    dtype: torch.dtype, damping: float, direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfac, "DIRECT", direct)
    model = classifier(dtype=dtype)
    names = ["0.weight", "3.weight", "10.weight"]  # a convolution, one with groups, a linear layer
    layout = layout_of(model, names, 7)
    inputs, labels = images(13, dtype=dtype)
    objective = Objective(model, names)
    factors, _ = kfac_factors(objective, groups(inputs, labels), names)
    F_ = torch.block_diag(*(dense(*factors[name]) for name in names))
    expected = torch.linalg.inv(F_ + damping * torch.eye(len(F_), dtype=torch.float64))
    inverse = kfac_inverse(objective, groups(inputs, labels), layout, damping=damping)
    assert (inverse.form, inverse.damping, inverse.num_grads, inverse.mean) == ("kfac", damping, 13, None)
    assert inverse.num_blocks == 4

    def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = dtype) -> None:
        assert found.dtype == dtype
        error = float((found.double() - wanted).norm() / wanted.norm())
        assert error < (1e-9 if dtype == torch.float64 else 1e-6)

    close(inverse.diag(), expected.diagonal(), torch.float64)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(len(F_), 3, generator=generator, dtype=torch.float64).to(dtype)
    close(inverse.mul(v), expected @ v.double())
    close(inverse @ v[:, 0], expected @ v[:, 0].double())
    named = inverse.mul(layout.unflatten(v[:, 1].contiguous()))
    close(layout.flatten(named), expected @ v[:, 1].double())
    w = layout.flatten({name: objective.weights[name] for name in names})
    before = w.clone()
    rho = w.double().square() / (2 * expected.diagonal())
    close(inverse.saliency(w), rho)
    for share in (0.1, 0.5, 0.95):
        mask = rho > rho.quantile(share)
        change = expected @ torch.where(mask, 0, w.double() / expected.diagonal())
        found = inverse.prune_update(w, mask, update="sum")
        close(found, torch.where(mask, w.double() - change, 0))
        assert not found[~mask].any()
        y = torch.linalg.solve(expected[~mask][:, ~mask], w[~mask].double())
        wanted = torch.where(mask, w.double() - expected[:, ~mask] @ y, 0)
        found = inverse.prune_update(w, mask, update="joint")
        assert not found[~mask].any()
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6
    assert torch.equal(w, before)
    everything = torch.ones_like(mask)
    for update in ("sum", "joint"):
        assert torch.equal(inverse.prune_update(w, everything, update=update), w)
        assert not inverse.prune_update(w, ~everything, update=update).any()


def test_a_solve_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inverse = inverse_of(mlp(), MLP_NAMES, *points(), damping=1e-6)
    monkeypatch.setattr(kfac, "MAX_ITERATIONS", 2)
    monkeypatch.setattr(kfac, "DIRECT", 0)
    w = torch.randn(inverse.layout.num_weights, dtype=torch.float64)
    with pytest.raises(FisherError, match=r"'0.weight' does not converge in 2 .* damping=1e-06"):
        inverse.prune_update(w, w > 0, update="joint")


def test_relative_damping_is_a_multiple_of_the_mean_diagonal() -> None:
    model, (inputs, labels) = mlp(), points()
    factors, _ = kfac_factors(Objective(model, MLP_NAMES), groups(inputs, labels), MLP_NAMES)
    mean = torch.cat([dense(*factors[name]).diagonal() for name in MLP_NAMES]).mean()
    inverse = inverse_of(model, MLP_NAMES, inputs, labels, damping=0.7, damping_mode="relative")
    assert inverse.damping == pytest.approx(0.7 * float(mean), rel=1e-12)


def test_a_layers_own_output_counts_and_not_what_a_hook_makes_of_it() -> None:
    model = mlp()
    inputs, labels = points(1)
    model[3].register_forward_hook(lambda module, args, output: 3 * output)
    factors, _ = kfac_factors(Objective(model, MLP_NAMES), groups(inputs, labels), MLP_NAMES)
    torch.testing.assert_close(dense(*factors["3.weight"]), fisher(model, "3.weight", inputs, labels))


def test_a_layer_that_the_loss_does_not_reach_has_no_fisher() -> None:
    model = mlp()
    model.add_module("aside", nn.Linear(2, 2, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential(*list(model)[:6])(x)  # type: ignore[method-assign]
    inverse = inverse_of(model, ["aside.weight", *MLP_NAMES], *points(), damping=0.5)
    torch.testing.assert_close(inverse.diag()[:4], torch.full((4,), 2.0).double())
    assert (inverse.diag()[4:] < 2).any()


def test_labels_are_drawn_from_the_model() -> None:
    model = mlp()
    with torch.no_grad():
        model[5].weight *= 4  # far from equal chances
    inputs, labels = points(2)
    draws = 20_000
    objective = Objective(model, MLP_NAMES)
    many, same = inputs.repeat(draws, 1), labels.repeat(draws)
    (samples,) = SampleReader([(many, same)], inputs.device).groups(2 * draws)
    model.eval()
    drawn = draw_labels(objective, samples, torch.Generator().manual_seed(0)).leaves[1]
    counts = F.one_hot(drawn.view(draws, 2), 3).double().mean(0)  # [2, 3]
    p = model(inputs).softmax(1).detach()
    assert float(((counts - p) / (p * (1 - p) / draws).sqrt()).abs().max()) < 4.5
    assert torch.equal(samples.leaves[1], same)

    # S of the last layer is diag p − p pᵀ when labels are the model's; one input many times makes it converge
    many = inputs[:1].repeat(4000, 1)
    found, _ = kfac_factors(
        objective,
        groups(many, torch.zeros(4000, dtype=torch.int64), 4000),
        ["5.weight"],
        fisher_type="mc",
        seed=1,
    )
    torch.testing.assert_close(
        found["5.weight"][1][0], torch.diag(p[0]) - p[0][:, None] * p[0], atol=0.03, rtol=0
    )


def test_labels_to_leave_out_stay_so() -> None:
    model = nn.Conv1d(2, 3, 1)
    inputs, labels = torch.randn(4, 2, 5), torch.randint(3, (4, 5))
    labels[1] = -100
    (sample,) = SampleReader([(inputs, labels)], inputs.device).groups(4)
    drawn = draw_labels(Objective(model, ["weight"]), sample, torch.Generator().manual_seed(0)).leaves[1]
    assert torch.equal(drawn < 0, labels < 0)
    assert drawn.shape == labels.shape
    assert not torch.equal(drawn, labels)


def test_bad_input_is_one_sentence() -> None:
    model = classifier(dtype=torch.float64)
    data = images(5, dtype=torch.float64)
    with pytest.raises(FastFisherError, match=r"'1.weight' belongs to BatchNorm2d"):
        inverse_of(model, ["0.weight", "1.weight"], *data)
    with pytest.raises(FastFisherError, match=r"'8.bias' belongs to Linear"):
        inverse_of(model, ["8.bias"], *data)
    with pytest.raises(FastFisherError, match="damping must be positive"):
        inverse_of(model, ["0.weight"], *data, damping=-1.0)
    with pytest.raises(FastFisherError, match="fisher_type must be one of empirical, mc, got 'exact'"):
        inverse_of(model, ["0.weight"], *data, fisher_type="exact")
    with pytest.raises(FastFisherError, match="mc"):
        inverse_of(model, ["0.weight"], data[0], data[1].double(), fisher_type="mc")
    with pytest.raises(FastFisherError, match="mc"):
        inverse_of(model, ["0.weight"], data[0], torch.ones(5, 3, dtype=torch.bool), fisher_type="mc")
    with pytest.raises(FastFisherError, match="at least one sample"):
        inverse_of(model, ["0.weight"], data[0][:0], data[1][:0])
    objective = Objective(model, ["0.weight"])
    whole = layout_of(model, ["0.weight"])
    live = LiveLayout(whole, torch.arange(whole.num_weights) % 3 > 0)
    with pytest.raises(FastFisherError, match="the layout holds 48 of 72; give the whole layout"):
        kfac_inverse(objective, groups(*data), live, damping=1.0)
    inputs, labels = images(5, dtype=torch.float64)
    inputs[2] = math.nan
    with pytest.raises(FisherError, match=r"factors of '0.weight' over 5 samples are not finite"):
        inverse_of(model, ["0.weight"], inputs, labels)
    with pytest.raises(FisherError, match="no label can be drawn for batch 0"):
        inverse_of(model, ["0.weight"], inputs, labels, fisher_type="mc")
    inverse = inverse_of(model, ["0.weight"], *data)
    for call in (
        lambda: inverse.mul(torch.zeros(3)),
        lambda: inverse.mul(torch.zeros(72, dtype=torch.int64)),
        lambda: inverse.saliency(torch.zeros(72, 1)),
        lambda: inverse.prune_update(torch.zeros(72), torch.zeros(72)),
        lambda: inverse.prune_update(torch.zeros(72), torch.zeros(72).bool(), update="greedy"),
    ):
        with pytest.raises(FastFisherError, match="must be"):
            call()


class _Behind(nn.Module):
    """Uses the weight of a layer without calling it, as nn.MultiheadAttention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


class _Hidden(_Behind):
    """Calls it in a checkpoint of the old kind, whose forward records nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)


class _Recomputed(_Behind):
    """Calls it in a checkpoint of the new kind, which calls it again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_a_layer_whose_calls_cannot_be_seen_is_named() -> None:
    with pytest.raises(FastFisherError, match=r"'layer.weight' is used without calling its layer"):
        inverse_of(_Behind(), ["layer.weight"], *points())
    with pytest.raises(FastFisherError, match=r"'layer.weight' runs where no gradient is recorded"):
        inverse_of(_Hidden(), ["layer.weight"], *points())


def test_a_recomputed_layer_counts_once() -> None:
    torch.manual_seed(0)
    model = _Recomputed()
    inputs, labels = points()
    factors, _ = kfac_factors(Objective(model, ["layer.weight"]), groups(inputs, labels), ["layer.weight"])
    torch.testing.assert_close(factors["layer.weight"][0][0], inputs.T @ inputs / 11)
    g = model.layer(inputs).softmax(1) - F.one_hot(labels, 3)
    torch.testing.assert_close(factors["layer.weight"][1][0], (g.T @ g / 11).detach())


def test_layers_of_different_kinds_do_not_add_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    x = torch.randint(5, (3,))
    with pytest.raises(FastFisherError, match=r"'embed.weight' belongs to Embedding"):
        inverse_of(Tied(), ["embed.weight"], x, x)


def test_the_model_is_left_as_it_was_and_no_hook_stays() -> None:
    model = classifier().train()
    names = ["0.weight", "3.weight", "8.weight"]
    before = picture(model)
    inverse_of(model, names, *images(6), fisher_type="mc")
    assert_same(before, picture(model))
    inputs, _ = images(6)
    for fisher_type in ("mc", "empirical"):
        with pytest.raises(FastFisherError, match="the model failed on batch"):
            inverse_of(model, names, inputs[:, :, :3, :3], torch.zeros(6).long(), fisher_type=fisher_type)
    with pytest.raises(FastFisherError, match="the model failed on batch"):
        inverse_of(model, names, inputs, torch.full((6,), 7))
    assert_same(before, picture(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_over_tokens_whose_output_is_overwritten() -> None:
    """Its output is a view there, which leaves the graph when it is written into; its gradient must not go with it."""
    x, y = torch.randn(5, 6, 4), torch.randint(2, (5,))
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)

        class Tokens(nn.Module):
            def __init__(self, inplace: bool) -> None:
                super().__init__()
                self.a, self.relu, self.b = nn.Linear(4, 3), nn.ReLU(inplace), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.relu(self.a(x)).mean(1))

        objective = Objective(Tokens(inplace), ["a.weight"])
        factors, _ = kfac_factors(objective, groups(x, y), ["a.weight"])
        found.append(factors["a.weight"])
    for with_copy, in_place in zip(*found, strict=True):
        assert float(in_place.norm()) > 0
        torch.testing.assert_close(in_place, with_copy)
