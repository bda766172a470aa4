"""The Hessian's diagonal and blocks against torch.func.hessian in float64, and the inverses that are made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.hessian import hessian_blocks, hessian_diagonal, hessian_inverse, obd_inverse
from fastfisher.fisher.objective import Objective
from tests.prune.models import assert_same, batches, classifier, images, picture

NAMES = ["0.weight", "3.weight"]


def small(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """27 target weights; dropout would show in training mode."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 5)).to(dtype)


def data(count: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(5, (count,), generator=generator)


def layout_of(model: nn.Module, block_size: int | None, names: Sequence[str] = NAMES) -> BlockLayout:
    parameters = dict(model.named_parameters())
    return BlockLayout(list(names), [parameters[name].shape for name in names], block_size)


def groups(inputs: Tensor, labels: Tensor, size: int = 4) -> Iterator[Samples]:
    return SampleReader(batches(inputs, labels, 3), inputs.device).groups(size)


def exact(model: nn.Module, layout: BlockLayout, inputs: Tensor, labels: Tensor) -> Tensor:
    """H [d, d] of the mean loss in eval mode."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        weights = {**parameters, **layout.unflatten(flat)}
        return F.cross_entropy(functional_call(model, weights, (inputs,)), labels)

    training = model.training
    model.eval()
    H = hessian(loss)(layout.flatten({name: parameters[name] for name in layout.names}))
    model.train(training)
    return H


class Quadratic(nn.Module):
    """Σ c w² / 2 over its weights, and a weight that has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, c: Tensor) -> Tensor:
        return (c.mean(0) * self.w.square()).sum() / 2


def curvature(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def test_a_diagonal_hessian_is_found_exactly_by_one_probe() -> None:
    model = Quadratic()
    layout = layout_of(model, 1, ["w", "unused"])
    c = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = Objective(model, ["w", "unused"], loss_fn=curvature)
    reader = SampleReader([(c[:3],), (c[3:],)], c.device)
    found = hessian_diagonal(objective, reader.groups(4), layout, num_probes=1)
    assert (c.mean(0) < 0).any()
    torch.testing.assert_close(found, torch.cat([c.mean(0).reshape(-1), torch.zeros(2).double()]))


def test_the_probes_are_unbiased_and_vary_as_the_formula_says() -> None:
    model = small()
    layout = layout_of(model, 1)
    inputs, labels = data()
    H = exact(model, layout, inputs, labels)
    objective = Objective(model, NAMES)
    probes = 4000
    found = hessian_diagonal(objective, groups(inputs, labels, 11), layout, num_probes=probes, seed=3)
    variance = (H.square().sum(1) - H.diagonal().square()) / probes
    z = (found - H.diagonal()) / variance.sqrt()
    # each of the 27 lies beyond 4.5 by chance once in 5000 runs; their squares have mean 1 if the variance is right
    assert float(z.abs().max()) < 4.5
    assert 0.4 < float(z.square().mean()) < 1.9


def test_groups_of_unequal_size_count_by_their_samples() -> None:
    model = Quadratic()
    layout = layout_of(model, 1, ["w"])
    c = torch.ones(4, 2, 3, dtype=torch.float64)
    c[3] = 9
    objective = Objective(model, ["w"], loss_fn=curvature)
    found = hessian_diagonal(objective, SampleReader([(c,)], c.device).groups(3), layout)
    torch.testing.assert_close(found, torch.full_like(found, 3))


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    model = small()
    layout, objective = layout_of(model, 1), Objective(model, NAMES)
    a, b, c = (hessian_diagonal(objective, groups(*data()), layout, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("block_size", [1, 5, 12, None])
def test_blocks_are_those_of_the_hessian(block_size: int | None) -> None:
    model = small()
    layout = layout_of(model, block_size)
    inputs, labels = data()
    H = exact(model, layout, inputs, labels)
    found = hessian_blocks(Objective(model, NAMES), groups(inputs, labels), layout)
    for b, (start, stop) in enumerate(layout.blocks.tolist()):
        n = stop - start
        torch.testing.assert_close(found[b, :n, :n], H[start:stop, start:stop], rtol=1e-10, atol=1e-13)
        assert not found[b, n:].any()
        assert not found[b, :, n:].any()


def test_a_live_layout_has_the_hessian_of_the_weights_that_are_left() -> None:
    model = small()
    whole = layout_of(model, 7)
    live = torch.rand(whole.num_weights, generator=torch.Generator().manual_seed(0)) < 0.6
    layout = LiveLayout(whole, live)
    inputs, labels = data()
    H = exact(model, whole, inputs, labels)[live][:, live]
    objective = Objective(model, NAMES)
    found = hessian_blocks(objective, groups(inputs, labels), layout)
    for b, (start, stop) in enumerate(layout.blocks.tolist()):
        n = stop - start
        torch.testing.assert_close(found[b, :n, :n], H[start:stop, start:stop], rtol=1e-10, atol=1e-13)
    probed = hessian_diagonal(objective, groups(inputs, labels), layout, num_probes=2000)
    assert float((probed - H.diagonal()).abs().max()) < 0.2 * float(H.diagonal().abs().max())


class _Twice(torch.autograd.Function):
    """2 x, which vmap knows nothing of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if g.sum().item() == math.inf:
            raise RuntimeError
        return 2 * g


class _Once(torch.autograd.Function):
    """sin x, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class _Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def test_what_vmap_cannot_trace_is_multiplied_one_vector_at_a_time() -> None:
    torch.manual_seed(0)
    inner = small()
    plain, odd = nn.Sequential(inner, nn.Identity()), nn.Sequential(inner, _Applied(_Twice))
    names = ["0.0.weight", "0.3.weight"]
    layout = layout_of(odd, 6, names)
    inputs, labels = data()

    def doubled(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(2 * model(batch[0]), batch[1])

    expected = hessian_blocks(Objective(plain, names, loss_fn=doubled), groups(inputs, labels), layout)
    found = hessian_blocks(Objective(odd, names), groups(inputs, labels), layout)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_a_loss_without_second_derivative_is_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 5, dtype=torch.float64), _Applied(_Once))
    layout = layout_of(model, 1, ["0.weight"])
    with pytest.raises(FastFisherError, match="batch 0 cannot be differentiated twice"):
        hessian_diagonal(Objective(model, ["0.weight"]), groups(*data()), layout)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v).flatten(1)

    model = Attention()
    layout = layout_of(model, None, ["qkv.weight"])
    inputs = torch.randn(3, 5, 4, dtype=torch.float64)
    objective = Objective(model, ["qkv.weight"], loss_fn=lambda model, batch: model(batch[0]).square().mean())
    found = hessian_blocks(objective, SampleReader([(inputs,)], inputs.device).groups(3), layout)[0]

    def loss(flat: Tensor) -> Tensor:
        q, k, v = (inputs @ flat.view(12, 4).T).chunk(3, dim=-1)
        return ((q @ k.mT / 2).softmax(-1) @ v).square().mean()

    torch.testing.assert_close(found, hessian(loss)(model.qkv.weight.detach().reshape(-1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [5, None])
def test_the_inverse_is_that_of_the_damped_hessian(block_size: int | None, dtype: torch.dtype) -> None:
    model = small(dtype=dtype)
    layout = layout_of(model, block_size)
    inputs, labels = data(dtype=dtype)
    H = exact(model.double(), layout, inputs.double(), labels)
    model.to(dtype)
    same = torch.zeros_like(H, dtype=torch.bool)
    for start, stop in layout.blocks.tolist():
        same[start:stop, start:stop] = True
    damping = 0.3
    expected = torch.linalg.inv(torch.where(same, H, 0) + damping * torch.eye(len(H)).double())
    inverse = hessian_inverse(Objective(model, NAMES), groups(inputs, labels), layout, damping=damping)
    tolerance: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert (inverse.form, inverse.damping, inverse.num_grads) == ("primal", damping, len(labels))
    torch.testing.assert_close(inverse.diag().double(), expected.diagonal(), **tolerance)
    w = layout.flatten({name: dict(model.named_parameters())[name].detach() for name in NAMES})
    v = torch.randn(len(H), 2, dtype=dtype)
    torch.testing.assert_close((inverse @ v).double(), expected @ v.double(), **tolerance)
    rho = w.double().square() / (2 * expected.diagonal())
    torch.testing.assert_close(inverse.saliency(w).double(), rho, **tolerance)
    mask = rho > rho.median()
    change = -expected[:, ~mask] @ torch.linalg.solve(expected[~mask][:, ~mask], w[~mask].double())
    found = inverse.prune_update(w, mask, update="joint")
    torch.testing.assert_close(found.double(), torch.where(mask, w.double() + change, 0), **tolerance)
    change = -expected @ torch.where(mask, 0, w.double() / expected.diagonal())
    found = inverse.prune_update(w, mask, update="sum")
    torch.testing.assert_close(found.double(), torch.where(mask, w.double() + change, 0), **tolerance)


def test_relative_damping_is_a_multiple_of_the_mean_positive_curvature() -> None:
    model = Quadratic()
    c = torch.tensor([[4.0, -1.0, 2.0], [0.0, -3.0, 6.0]], dtype=torch.float64)[None]
    objective = Objective(model, ["w"], loss_fn=curvature)
    layout = layout_of(model, 1, ["w"])

    def obd(**options: Any) -> Any:
        return obd_inverse(objective, SampleReader([(c,)], c.device).groups(1), layout, **options)

    inverse = obd(damping=0.5, damping_mode="relative")
    assert inverse.damping == pytest.approx(0.5 * 12 / 6)
    h = c.reshape(-1).clamp(min=0)
    torch.testing.assert_close(inverse.diag(), 1 / (h + 1))
    w = model.w.detach().reshape(-1)
    torch.testing.assert_close(inverse.saliency(w), w**2 / 2 * (h + 1))
    mask = h > 1
    for update in ("sum", "joint"):
        torch.testing.assert_close(inverse.prune_update(w, mask, update=update), torch.where(mask, w, 0))
    blocks = layout_of(model, 4, ["w"])  # a short one, whose padding has no part in the mean
    exact = hessian_inverse(
        objective,
        SampleReader([(c,)], c.device).groups(1),
        blocks,
        damping=2.0,
        damping_mode="relative",
    )
    assert exact.damping == pytest.approx(4)
    torch.testing.assert_close(exact.diag(), 1 / (c.reshape(-1) + 4))
    c.fill_(-1)
    with pytest.raises(FastFisherError, match=r"relative.*positive curvature"):
        obd(damping=1.0, damping_mode="relative")


def test_a_block_that_is_not_positive_definite_is_named() -> None:
    model = Quadratic()
    c = torch.tensor([[4.0, 1.0, 2.0], [0.0, -3.0, 6.0]], dtype=torch.float64)[None]
    objective = Objective(model, ["w"], loss_fn=curvature)
    layout = layout_of(model, 3, ["w"])

    def invert(damping: float) -> Any:
        reader = SampleReader([(c,)], c.device)
        return hessian_inverse(objective, reader.groups(1), layout, damping=damping)

    with pytest.raises(
        FisherError,
        match=r"w\[3:6\] \(block 1 of 2\).*damping=0.5: its smallest eigenvalue is -2.5; use a damping above 3",
    ):
        invert(0.5)
    # negative entries on the diagonal of H are no reason to refuse
    torch.testing.assert_close(invert(3.5).diag(), 1 / (c.reshape(-1) + 3.5))


def test_bad_input_is_one_sentence() -> None:
    model = small()
    objective = Objective(model, NAMES)
    layout, ones = layout_of(model, 4), layout_of(model, 1)
    with pytest.raises(FastFisherError, match=r"27 weights takes 27 .* max_weights=26"):
        hessian_inverse(objective, groups(*data()), layout, damping=1.0, max_weights=26)
    with pytest.raises(FastFisherError, match="block_size=1, got 4"):
        obd_inverse(objective, groups(*data()), layout, damping=1.0)
    with pytest.raises(FastFisherError, match=r"num_probes .* got 0"):
        hessian_diagonal(objective, groups(*data()), ones, num_probes=0)
    with pytest.raises(FastFisherError, match="damping must be positive"):
        obd_inverse(objective, groups(*data()), ones, damping=0.0)
    for function in (hessian_diagonal, hessian_blocks):
        with pytest.raises(FastFisherError, match="at least one sample"):
            function(objective, iter(()), ones)
    with pytest.raises(FastFisherError, match=r"'3.weight' of the layout"):
        hessian_diagonal(Objective(model, NAMES[:1]), groups(*data()), ones)
    inputs, labels = data()
    inputs[5] = math.nan
    for function in (hessian_diagonal, hessian_blocks):
        with pytest.raises(FisherError, match=r"not finite in '0.weight'"):
            function(objective, groups(inputs, labels), ones)


def test_the_model_is_left_as_it_was() -> None:
    model = classifier().train()
    names = ["3.weight", "10.weight"]
    objective = Objective(model, names)
    before = picture(model)
    hessian_diagonal(objective, groups(*images(6)), layout_of(model, 1, names), num_probes=1)
    hessian_blocks(objective, groups(*images(6)), layout_of(model, 9, names))
    assert_same(before, picture(model))
    inputs, _ = images(6)
    with pytest.raises(FastFisherError, match="the model failed on batch"):
        hessian_diagonal(objective, groups(inputs, torch.full((6,), 7)), layout_of(model, 1, names))
    assert_same(before, picture(model))
