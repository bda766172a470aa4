"""Products with the Fisher in float64 against Jᵀ H J, by z-tests where labels are drawn, and their traps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import read_batch
from fastfisher.fisher.objective import Objective, difference_step, untouched
from tests.fisher.test_fisher_type import Classified, fishers, linear, problem
from tests.prune.models import assert_same, classifier, images, picture

DOUBLE = torch.float64
KINDS = ("softmax", "gaussian", "bernoulli", "positions")


def objective_of(model: nn.Module, fisher_type: str, **options: Any) -> Objective:
    return Objective(
        model, [name for name, _ in model.named_parameters()], fisher_type=fisher_type, **options
    )


def direction_of(objective: Objective, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(w.shape, generator=generator, dtype=DOUBLE).to(w)
        for name, w in objective.weights.items()
    }


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def drawn(objective: Objective, product: Callable[[], Mapping[str, Tensor]], draws: int) -> Tensor:
    with untouched(objective.model, 0):
        return torch.stack([flat(product()) for _ in range(draws)])  # [draws, d]


def assert_mean(found: Tensor, expected: Tensor) -> None:
    """Mean within 3 %, cosine above .999, and within 5 standard errors along every axis and 50 random directions."""
    mean = found.mean(0)
    assert float((mean - expected).norm() / expected.norm()) < 0.03
    assert float(torch.cosine_similarity(mean, expected, dim=0)) > 0.999
    torch.manual_seed(7)
    axes = torch.cat([torch.eye(len(expected), dtype=DOUBLE), torch.randn(50, len(expected), dtype=DOUBLE)])
    along = found @ axes.T
    # along some axes the drawn Hessian does not depend on the draw: there rounding is all
    error = along.std(0) / len(found) ** 0.5 + 1e-8 * expected.norm()
    assert float(((along.mean(0) - axes @ expected) / error).abs().max()) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_product_is_that_of_the_exact_fisher(kind: str) -> None:
    model, x, y = problem(kind, 7)
    objective = objective_of(model, "exact")
    v = direction_of(objective)
    found = objective.fisher_product(v, read_batch((x, y)))
    assert {name: p.shape for name, p in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    expected = fishers(model, x, y).mean(0) @ flat(v)
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-12)


def test_the_empirical_product_is_that_of_the_rows() -> None:
    model, x, y = problem("softmax", 7)
    objective = objective_of(model, "empirical")
    v, samples = direction_of(objective), read_batch((x, y))
    rows = objective.gradients(samples)[0]
    G = torch.cat([rows[name].reshape(7, -1) for name in rows], dim=1)
    found = flat(objective.fisher_product(v, samples))
    torch.testing.assert_close(found, G.T @ (G @ flat(v)) / 7, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "n"), [("softmax", 1), *((kind, 60) for kind in KINDS)])
def test_products_of_rows_are_unbiased(kind: str, n: int) -> None:
    model, x, y = problem(kind, max(n, 2))
    x, y = x[:n], y[:n]
    # one sample in many copies: its draws, and the same Fisher
    if n == 1:
        x, y = x.repeat_interleave(60, 0), y.repeat_interleave(60, 0)
    objective = objective_of(model, "mc")
    v, samples = direction_of(objective), read_batch((x, y))
    found = drawn(objective, lambda: objective.fisher_product(v, samples), 600)
    assert objective.why_loop is None
    assert_mean(found, fishers(model, x, y).mean(0) @ flat(v))


@pytest.mark.parametrize(
    ("kind", "n", "copies"),
    # as many copies as the noise of the draws calls for
    [
        ("softmax", 2, 64),
        ("softmax", 60, 40),
        ("gaussian", 60, 20),
        ("bernoulli", 60, 20),
        ("positions", 60, 6),
    ],
)
def test_antithetic_products_are_unbiased(kind: str, n: int, copies: int) -> None:
    model, x, y = problem(kind, n)
    objective = objective_of(model, "mc")
    # copies have draws of their own and the same Fisher
    v, samples = (
        direction_of(objective),
        read_batch((x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0))),
    )
    weights = torch.full((n,), 1 / n, dtype=DOUBLE)
    if kind == "positions":
        # the loss of the batch is the mean over all positions that count
        counted = (y != -100).sum((1, 2)).double()
        weights = counted / counted.sum()
    expected = torch.einsum("n,nij,j->i", weights, fishers(model, x, y), flat(v))
    found = drawn(objective, lambda: objective.antithetic_product(v, samples), 600)
    assert found.std(0).max() > 1e-3 * expected.abs().max()  # labels are drawn
    assert_mean(found, expected)


@pytest.mark.parametrize("n", [4, 12])
def test_the_gradient_of_a_batch_mean_is_not_that_of_a_sample(n: int) -> None:
    """Taken for one, the product comes out n times too short: E[ḡ ḡᵀ] = F / n."""
    draws = 1500
    model, x, y = problem("softmax", n)
    objective = objective_of(model, "mc", grad_batch_size=n)
    v, samples = direction_of(objective), read_batch((x, y))
    expected = fishers(model, x, y).mean(0) @ flat(v)
    along = drawn(objective, lambda: objective.fisher_product(v, samples), draws) @ expected
    share, error = along / expected.square().sum(), float(along.std() / draws**0.5 / expected.square().sum())
    assert float(share.mean()) == pytest.approx(1 / n, abs=5 * error)
    assert 5 * error < 0.3 / n  # the test can fail
    # the difference of the same gradients is not: it is linear in them
    found = drawn(objective, lambda: objective.antithetic_product(v, samples), 1000) @ expected
    assert float(found.mean() / expected.square().sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_labels_of_the_data_it_is_the_hessian_of_their_loss(kind: str) -> None:
    model, x, y = problem(kind, 6)
    objective = objective_of(model, "empirical")
    v = direction_of(objective)

    def loss(w: dict[str, Tensor]) -> Tensor:
        o = functional_call(model, w, (x,))
        if y.dtype == torch.bool:
            return F.binary_cross_entropy_with_logits(o, y.double())
        return F.mse_loss(o, y) if y.is_floating_point() else F.cross_entropy(o, y)

    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = flat(grad(lambda w: flat(grad(loss)(w)) @ flat(v))(weights))
    found = flat(objective.antithetic_product(v, read_batch((x, y))))
    assert float((found - expected).norm() / expected.norm()) < 1e-8
    given = flat(objective.antithetic_product(v, read_batch((x, y)), step=1e-3))
    assert 1e-9 < float((given - expected).norm() / expected.norm()) < 1e-3
    own = Objective(model, list(weights), loss_fn=lambda m, batch: loss(dict(m.named_parameters())))
    assert (
        float((flat(own.antithetic_product(v, read_batch((x, y)))) - expected).norm() / expected.norm())
        < 1e-8
    )


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("shape", ["dense", "single entry", "zero"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_the_step_fits_the_length_of_the_direction(dtype: torch.dtype, shape: str, size: float) -> None:
    wide, model = classifier(dtype=DOUBLE), classifier(dtype=dtype)
    wide[2] = model[2] = nn.Tanh()  # a difference across the kink of a ReLU depends on its step
    x, y = images(8, dtype=DOUBLE)
    objective = objective_of(wide, "mc")
    v = direction_of(objective)
    if shape != "dense":
        v = {name: torch.zeros_like(t) for name, t in v.items()}
    if shape == "single entry":
        v["8.weight"].view(-1)[3] = 1.0
    with untouched(wide, 1):
        expected = flat(objective.antithetic_product(v, read_batch((x, y)), step=1e-6))
    objective = objective_of(model, "mc")
    scaled = {name: (size * t).to(dtype) for name, t in v.items()}
    with untouched(model, 1):
        found = flat(objective.antithetic_product(scaled, read_batch((x.to(dtype), y))))
    assert found.dtype == dtype
    error = float((found.double() / size - expected).norm())
    assert error <= (1e-8 if dtype == DOUBLE else 5e-4) * float(expected.norm())
    assert (float(expected.norm()) > 0) == (shape != "zero")


def test_steps_by_hand() -> None:
    w = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    unit = torch.finfo(torch.float32).eps ** (1 / 3) / 4
    v = {"a": torch.tensor([0.0, 10.0]), "b": torch.tensor([[0.0]])}
    assert difference_step(w, v) == pytest.approx(unit * 0.4)  # min(5 / 10, 4 / 10)
    v = {"a": torch.ones(2), "b": torch.ones(1, 1)}
    assert difference_step(w, v) == pytest.approx(unit * 5 / 3**0.5)
    zero = {name: torch.zeros_like(t) for name, t in w.items()}
    assert difference_step(zero, v) == pytest.approx(unit / 3**0.5)
    assert difference_step(w, zero) == pytest.approx(unit * 4)
    half = {name: t.bfloat16() for name, t in w.items()}
    assert difference_step(half, v) == pytest.approx(2 ** (-7 / 3) / 4 * 5 / 3**0.5)


@pytest.mark.parametrize("product", ["fisher_product", "antithetic_product"])
@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_a_model_that_trains_is_untouched_and_judged_in_eval_mode(fisher_type: str, product: str) -> None:
    model = classifier(dtype=DOUBLE)
    samples = read_batch(images(9, dtype=DOUBLE))
    model.train()
    model[7].eval()
    objective = objective_of(model, fisher_type)
    v = direction_of(objective)
    buffers = {name: buffer.clone() for name, buffer in objective._fixed.items()}
    before = picture(model)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = flat(getattr(objective, product)(v, samples))
    assert_same(before, picture(model))
    assert all(torch.equal(objective._fixed[name], buffer) for name, buffer in buffers.items())
    with untouched(model, 4):
        expected = flat(getattr(objective, product)(v, samples))
    assert torch.equal(found, expected)
    assert float(found.norm()) > 0


def test_a_model_that_fails_has_its_flags_back() -> None:
    model = classifier().train()
    objective = objective_of(model, "mc")
    samples = read_batch((torch.zeros(3, 5, 5, 5), torch.zeros(3, dtype=torch.long)))
    before = picture(model)
    for product in (objective.fisher_product, objective.antithetic_product):
        with pytest.raises(FastFisherError, match="the model failed on batch 0 of the loader"):
            product(direction_of(objective), samples)
    assert_same(before, picture(model))


def test_dict_batches_of_a_classifier() -> None:
    model = Classified().double()
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randint(3, (6,))
    whole, inner = objective_of(model, "mc"), objective_of(model.linear, "mc")
    v = direction_of(whole)
    with untouched(model, 2):
        found = flat(whole.antithetic_product(v, read_batch({"x": x, "labels": y, "mask": None})))
    short = {name.removeprefix("linear."): t for name, t in v.items()}
    with untouched(model, 2):
        expected = flat(inner.antithetic_product(short, read_batch((x, y))))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_what_no_difference_can_tell_is_refused() -> None:
    model, x, y = problem("softmax")
    objective = objective_of(model, "exact")
    with pytest.raises(
        FastFisherError, match=r"needs labels; use fisher_type 'mc', or fisher_product for 'exact'"
    ):
        objective.antithetic_product(direction_of(objective), read_batch((x, y)))
    objective = objective_of(Classified(1), "mc")
    with pytest.raises(FastFisherError, match="fisher_type='mc' needs batches"):
        objective.antithetic_product(
            direction_of(objective), read_batch({"x": torch.ones(2, 4), "labels": y[:2]})
        )


def test_weights_out_of_reach_have_zeros() -> None:
    model = linear(3)
    model.register_parameter("unused", nn.Parameter(torch.randn(2, 3, dtype=DOUBLE)))
    _, x, y = problem("softmax")
    objective = objective_of(model, "mc")
    v = direction_of(objective)
    for product in (objective.fisher_product, objective.antithetic_product):
        found = product(v, read_batch((x, y)))
        assert bool((found["unused"] == 0).all())
        assert float(found["0.weight"].norm()) > 0
