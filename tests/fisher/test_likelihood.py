"""What labels stand for, in float64: losses and Hessians by autograd, draws against the probabilities, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vmap

from fastfisher.errors import FastFisherError
from fastfisher.fisher import likelihood
from fastfisher.fisher.likelihood import drawn_labels, drawn_root, hessian_root, label_loss

DOUBLE = torch.float64
KINDS = ("softmax", "positions", "gaussian", "bernoulli", "bernoulli column")


def problem(kind: str, n: int = 1) -> tuple[Tensor, Tensor]:
    """Outputs and labels; one position of the softmax with positions does not count."""
    torch.manual_seed(2)
    if kind == "softmax":
        return torch.randn(n, 3, dtype=DOUBLE), torch.randint(3, (n,))
    if kind == "positions":
        labels = torch.randint(3, (n, 2, 2))
        labels[:, 0, 1] = -100
        return torch.randn(n, 3, 2, 2, dtype=DOUBLE), labels
    if kind == "gaussian":
        return torch.randn(n, 3, 2, dtype=DOUBLE), torch.randn(n, 3, 2, dtype=DOUBLE)
    if kind == "bernoulli":
        return torch.randn(n, 2, 2, dtype=DOUBLE), torch.rand(n, 2, 2) < 0.5
    assert kind == "bernoulli column"
    return torch.randn(n, 1, dtype=DOUBLE), torch.rand(n) < 0.5


def closed_form(output: Tensor, label: Tensor) -> Tensor:
    """∇²_o ℓ of one sample as the module's docstring states it [n_out, n_out]."""
    size = output.numel()
    if label.is_floating_point():
        return 2 / size * torch.eye(size, dtype=DOUBLE)
    if label.dtype == torch.bool:
        p = 1 / (1 + torch.exp(-output.reshape(-1)))
        return torch.diag(p * (1 - p)) / size
    p = output.softmax(1).reshape(output.shape[1], -1)  # [C, P]
    counted = (label.reshape(-1) != -100).double()
    found = torch.zeros(*p.shape, *p.shape, dtype=DOUBLE)
    for i, weight in enumerate(counted / counted.sum()):
        found[:, i, :, i] = weight * (torch.diag(p[:, i]) - torch.outer(p[:, i], p[:, i]))
    return found.reshape(size, size)


def all_labels(label: Tensor, classes: int) -> list[Tensor]:
    """Every label that can be drawn in place of `label`."""
    values = (False, True) if label.dtype == torch.bool else tuple(range(classes))
    open_to = (label != -100).reshape(-1).nonzero()[:, 0]
    found = []
    for chosen in itertools.product(values, repeat=len(open_to)):
        y = label.reshape(-1).clone()
        y[open_to] = torch.tensor(chosen, dtype=label.dtype)
        found.append(y.reshape(label.shape))
    return found


def log_probability(output: Tensor, y: Tensor) -> float:
    if y.dtype == torch.bool:
        return -float(
            F.binary_cross_entropy_with_logits(output, y.reshape(output.shape).double(), reduction="sum")
        )
    return -float(F.cross_entropy(output, y, reduction="sum"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_squares_to_the_hessian_of_the_loss(kind: str) -> None:
    output, label = problem(kind)
    size = output.numel()
    root = hessian_root(output, label).reshape(size, size)
    expected = jacrev(jacrev(lambda o: label_loss(o, label)))(output).reshape(size, size)
    torch.testing.assert_close(root.T @ root, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed_form(output, label), expected, rtol=1e-12, atol=1e-14)


def test_losses_are_those_of_torch() -> None:
    for n in (1, 4):
        o, y = problem("bernoulli", n)
        p = o.sigmoid()
        expected = -torch.where(y, p.log(), (1 - p).log()).mean()
        torch.testing.assert_close(label_loss(o, y), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(label_loss(o, y.reshape(n, 4)), expected, rtol=1e-12, atol=0)
    with pytest.raises(
        FastFisherError, match=r"bool labels .* \(4, 2, 2\); got \(4, 2\); labels of classes are"
    ):
        label_loss(o, y[:, 0])
    with pytest.raises(FastFisherError, match=r"no loss can be inferred for torch.complex128 labels"):
        label_loss(o, torch.zeros(4, dtype=torch.complex128))


def test_bernoulli_holds_its_digits_where_a_probability_rounds_to_one() -> None:
    output = torch.tensor([[40.0, -40.0]], dtype=DOUBLE)
    root = hessian_root(output, torch.ones(1, 2, dtype=torch.bool)).reshape(2, 2)
    expected = (torch.exp(torch.tensor(-40.0, dtype=DOUBLE)) / 2).sqrt()
    torch.testing.assert_close(root.diagonal(), expected.expand(2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["softmax", "positions", "bernoulli", "bernoulli column"])
def test_enumerated_labels_have_the_mean_of_the_hessian(kind: str) -> None:
    """Σ_y p(y) P ∇ℓ ∇ℓᵀ = ∇²ℓ for a sample: what drawn_root promises of its labels, P the positions that count."""
    output, label = problem(kind)
    size = output.numel()
    counted = int((label != -100).sum())
    total, weight = torch.zeros(size, size, dtype=DOUBLE), 0.0
    for y in all_labels(label, 3):
        slope = jacrev(lambda o, y=y: label_loss(o, y))(output).reshape(-1)
        p = torch.tensor(log_probability(output, y), dtype=DOUBLE).exp()
        total += p * counted * torch.outer(slope, slope)
        weight += float(p)
    assert weight == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(total, closed_form(output, label), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_the_root_drawn_is_the_slope_of_the_labels_drawn(kind: str, n: int) -> None:
    output, label = problem(kind, n)
    for seed in range(5):
        torch.manual_seed(seed)
        v = drawn_root(output, label)
        torch.manual_seed(seed)
        y = drawn_labels(output, label)
        slope = jacrev(lambda o, y=y: label_loss(o, y))(output)
        positions = 1 if label.is_floating_point() else int((label != -100).sum()) / n
        torch.testing.assert_close(v.abs(), positions**0.5 * slope.abs(), rtol=1e-10, atol=1e-14)
        # the sign of a Gaussian's draw is free
        if not label.is_floating_point():
            torch.testing.assert_close(v, positions**0.5 * slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_roots_drawn_have_the_mean_of_the_hessian(kind: str, n: int) -> None:
    """E[v vᵀ] = ∇²_o ℓ / n, every entry within 5 standard errors; ℓ is the mean over n samples."""
    draws = 4000
    output, label = problem(kind, n)
    size = output.numel()
    expected = jacrev(jacrev(lambda o: label_loss(o, label)))(output).reshape(size, size) / n
    torch.manual_seed(0)
    v = torch.stack([drawn_root(output, label).reshape(-1) for _ in range(draws)])
    products = v[:, :, None] * v[:, None]
    error = products.std(0) / draws**0.5
    z = (products.mean(0) - expected) / error.clamp_min(1e-300)
    assert float(z[error > 1e-15].abs().max()) < 5
    assert bool((expected[error <= 1e-15].abs() < 1e-15).all())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_drawn_are_as_likely_as_predicted(kind: str) -> None:
    draws = 4000
    output, label = problem(kind, 2)
    torch.manual_seed(0)
    y = torch.stack([drawn_labels(output, label) for _ in range(draws)])
    assert y.shape[1:] == label.shape
    assert y.dtype == label.dtype
    assert label_loss(output, y[0]).isfinite()
    if kind == "gaussian":
        z = (y - output) / 3**0.5  # variance n_out / 2
        assert float(z.mean(0).abs().max()) < 5 / draws**0.5
        assert float((z.var(0) - 1).abs().max()) < 5 * (2 / draws) ** 0.5
        return
    if label.dtype == torch.bool:
        p = output.sigmoid().reshape(label.shape)
        hits = [(y, p)]
    else:
        assert bool((y[:, label == -100] == -100).all())
        counted = label != -100
        hits = [(y[:, counted] == c, output.softmax(1)[:, c][counted]) for c in range(3)]
    for hit, p in hits:
        z = (hit.double().mean(0) - p) / (p * (1 - p) / draws).sqrt()
        assert float(z.abs().max()) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_draws_under_vmap_are_those_of_a_batch(kind: str) -> None:
    output, label = problem(kind, 4)
    torch.manual_seed(3)
    expected = drawn_labels(output, label)
    torch.manual_seed(3)
    found = vmap(lambda o, y: drawn_labels(o[None], y[None])[0], randomness="different")(output, label)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    roots = vmap(lambda o, y: hessian_root(o[None], y[None]))(output, label)
    for root, o, y in zip(roots, output, label, strict=True):
        torch.testing.assert_close(root, hessian_root(o[None], y[None]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_outputs_give_labels_of_their_loss(kind: str, dtype: torch.dtype) -> None:
    output, label = problem(kind, 3)
    y = drawn_labels(output.to(dtype), label)
    assert y.dtype == (dtype if kind == "gaussian" else label.dtype)
    assert label_loss(output.to(dtype), y).dtype == dtype
    assert drawn_root(output.to(dtype), label).dtype == dtype
    assert hessian_root(output[:1].to(dtype), label[:1]).dtype == dtype


def test_the_last_class_is_drawn_where_rounding_leaves_the_sum_below_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "_uniform", lambda shape, device: torch.ones(shape, dtype=DOUBLE))
    output, label = problem("softmax", 3)
    assert drawn_labels(output, label).tolist() == [2, 2, 2]
    assert drawn_labels(output, label.to(torch.uint8)).dtype == torch.int64
