"""The three kinds of Fisher in float64 against Jᵀ H J, with J by jacrev and H by the Hessian of torch's own losses."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import SampleReader
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.gradients import GradientStream
from fastfisher.fisher.inverse import FisherAccumulator
from fastfisher.fisher.objective import Objective, untouched
from tests.prune.models import assert_same, batches, classifier, images, picture

CPU = torch.device("cpu")
DOUBLE = torch.float64


def stream_of(
    model: nn.Module,
    data: Any,
    num_grads: int,
    fisher_type: str,
    *,
    names: Sequence[str] | None = None,
    memory_limit: int = 1 << 30,
    **options: Any,
) -> GradientStream:
    parameters = dict(model.named_parameters())
    names = list(parameters) if names is None else list(names)
    layout = BlockLayout(names, [parameters[name].shape for name in names], None)
    objective = Objective(model, names, fisher_type=fisher_type, **options)
    return GradientStream(objective, data, layout, num_grads=num_grads, memory_limit=memory_limit)


def rows_of(
    model: nn.Module, data: Any, num_grads: int, fisher_type: str, *, seed: int = 0, **options: Any
) -> tuple[Tensor, GradientStream]:
    stream = stream_of(model, data, num_grads, fisher_type, **options)
    with untouched(model, seed):
        rows = torch.cat([piece.clone() for piece in stream])
    return rows, stream


def fishers(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Jᵀ H J of every sample [n, d, d], H the Hessian in the outputs of the loss for that sample."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = []
    for x, y in zip(inputs[:, None], labels[:, None], strict=True):

        def output(w: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return functional_call(model, w, (x,))

        def loss(o: Tensor, y: Tensor = y) -> Tensor:
            if y.dtype == torch.bool:
                return F.binary_cross_entropy_with_logits(o, y.to(o.dtype))
            return F.mse_loss(o, y) if y.is_floating_point() else F.cross_entropy(o, y)

        with untouched(model, 0):
            o = output(weights)
            jacobians = jacrev(output)(weights)
        size = o.numel()
        J = torch.cat([jacobians[name].reshape(size, -1) for name in weights], dim=1)  # [R, d]
        H = jacrev(jacrev(loss))(o).reshape(size, size)
        found.append(J.T @ H @ J)
    return torch.stack(found)


def closeness(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def linear(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def positions() -> nn.Module:
    """Outputs [n, 3, 2, 2]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 2)).double()


def mixed(count: int) -> Tensor:
    """Labels [count, 2, 2] for `positions`, some of which cross entropy leaves out."""
    labels = torch.randint(3, (count, 2, 2))
    labels[0, 0, 1] = labels[1, 1, 0] = labels[1, 0, 0] = -100
    return labels


def problem(kind: str, count: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(count, 4, dtype=DOUBLE)
    if kind == "softmax":
        return linear(3), x, torch.randint(3, (count,))
    if kind == "gaussian":
        return linear(2), x, torch.randn(count, 2, dtype=DOUBLE)
    if kind == "bernoulli":
        return linear(2), x, torch.rand(count, 2) < 0.5
    if kind == "conv":
        return classifier(dtype=DOUBLE), *images(count, dtype=DOUBLE)
    pixels = torch.randn(count, 2, 5, 5, dtype=DOUBLE)
    if kind == "positions":
        return positions(), pixels, mixed(count)
    if kind == "bernoulli positions":
        return positions(), pixels, torch.rand(count, 3, 2, 2) < 0.5
    assert kind == "gaussian positions"
    return positions(), pixels, torch.randn(count, 3, 2, 2, dtype=DOUBLE)


KINDS = (
    "softmax",
    "gaussian",
    "bernoulli",
    "conv",
    "positions",
    "gaussian positions",
    "bernoulli positions",
)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_the_hessian_in_the_outputs_between_the_jacobians(kind: str) -> None:
    model, x, y = problem(kind)
    expected = fishers(model, x, y)
    rows, stream = rows_of(model, batches(x, y, 2), 5, "exact")
    assert stream.objective.why_loop is None
    each = stream.rows_per_grad
    assert each == {"softmax": 3, "gaussian": 2, "bernoulli": 2, "conv": 3}.get(kind, 12)
    per_sample = rows.reshape(5, each, -1)
    assert closeness(per_sample.mT @ per_sample, expected) < 1e-10
    norms = expected.diagonal(dim1=1, dim2=2).sum(1)
    assert stream.effective == pytest.approx(float(norms.sum() ** 2 / norms.square().sum()), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_a_loop_is_exact_under_vmap(kind: str) -> None:
    model, x, y = problem(kind)
    expected, _ = rows_of(model, [(x, y)], 5, "exact")
    stream = stream_of(model, [(x, y)], 5, "exact")
    stream.objective.why_loop = "the test says so"
    with untouched(model, 0):
        found = torch.cat([piece.clone() for piece in stream])
    assert closeness(found, expected) < 1e-12
    empirical, other = rows_of(model, [(x, y)], 5, "empirical")
    assert empirical.shape[0] == 5
    assert torch.allclose(torch.cat(stream.kept_losses), torch.cat(other.kept_losses), rtol=1e-12)


def test_exact_is_the_mean_of_the_empirical_over_all_labels() -> None:
    model, x, y = problem("softmax")
    p = model(x).softmax(1).detach()
    expected = torch.zeros(())
    for c in range(3):
        rows, _ = rows_of(model, [(x, torch.full_like(y, c))], 5, "empirical")
        expected = expected + rows.T @ (p[:, c, None] * rows)
    rows, _ = rows_of(model, [(x, y)], 5, "exact")
    assert closeness(rows.T @ rows, expected) < 1e-12


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mean_of_the_exact_fisher(kind: str, size: int) -> None:
    """E[g gᵀ] = F for single samples, and F / n for means over n of them, entry by entry within 5 standard errors."""
    draws = 4000 // size
    model, x, y = problem(kind, 3)
    names = [next(name for name, _ in model.named_parameters())]
    first = dict(model.named_parameters())[names[0]].numel()
    expected = fishers(model, x, y)[:, :first, :first]
    if size == 1:
        expected = expected[0]
        x, y = x[:1], y[:1]
    elif kind == "positions":
        # the batch's loss is the mean over all counted positions, so a sample weighs by how many of them it has
        counted = (y != -100).sum((1, 2)).double()
        expected = (counted / counted.sum()).mul(3)[:, None, None] * expected / 3
        expected = expected.sum(0) / 3
    else:
        expected = expected.mean(0) / 3
    data = [(x, y)] * draws
    rows, _ = rows_of(model, data, draws, "mc", names=names, grad_batch_size=size)
    entries = torch.randperm(first)[:8]
    g = rows[:, entries]
    products = g[:, :, None] * g[:, None]  # [draws, 8, 8]
    error = products.std(0) / draws**0.5
    z = (products.mean(0) - expected[entries][:, entries]) / error.clamp_min(1e-300)
    assert float(z[error > 0].abs().max()) < 5
    assert float((expected[entries, entries] / error.diagonal()).nan_to_num().max()) > 15  # the test can fail
    total = rows.square().sum(1)
    assert float(total.mean() / expected.trace() - 1) == pytest.approx(
        0, abs=5 * float(total.std() / draws**0.5 / expected.trace())
    )


@pytest.mark.parametrize("kind", ["softmax", "gaussian", "bernoulli", "positions"])
def test_draws_follow_the_seed_and_nothing_else(kind: str) -> None:
    model, x, y = problem(kind, 9)
    first, stream = rows_of(model, [(x, y)], 9, "mc", seed=3)
    assert stream.objective.why_loop is None
    again, _ = rows_of(model, [(x, y)], 9, "mc", seed=3)
    other, _ = rows_of(model, [(x, y)], 9, "mc", seed=4)
    assert torch.equal(first, again)
    assert closeness(other, first) > 1e-2
    # the same labels whatever the pieces are, and one sample at a time
    pieces, small = rows_of(model, batches(x, y, 4), 9, "mc", seed=3, memory_limit=1)
    assert small.micro_batch == 1
    assert closeness(pieces, first) < 1e-12
    stream = stream_of(model, [(x, y)], 9, "mc")
    stream.objective.why_loop = "the test says so"
    with untouched(model, 3):
        looped = torch.cat([piece.clone() for piece in stream])
    assert closeness(looped, first) < 1e-12


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_labels_tell_the_likelihood_and_no_more(fisher_type: str) -> None:
    for kind in ("softmax", "gaussian", "bernoulli"):
        model, x, y = problem(kind)
        first, before = rows_of(model, [(x, y)], 5, fisher_type)
        second, after = rows_of(model, [(x, y.flip(0))], 5, fisher_type)
        assert torch.equal(first, second)
        assert not torch.equal(before.kept_losses[0], after.kept_losses[0])


@pytest.mark.parametrize("size", [1, 2])
def test_losses_are_those_of_the_data(size: int) -> None:
    model, x, y = problem("softmax", 6)
    expected = F.cross_entropy(model(x), y, reduction="none").detach().reshape(-1, size).mean(1)
    for fisher_type in ("mc", "exact")[: 3 - size]:
        _, stream = rows_of(model, [(x, y)], 6 // size, fisher_type, grad_batch_size=size)
        assert torch.allclose(torch.cat(stream.kept_losses), expected, rtol=1e-12)
        objective = stream.objective
        losses = torch.cat([objective.losses(objective.weights, kept) for kept in stream.kept])
        assert torch.allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_curvatures_are_the_fisher_and_slopes_the_data(fisher_type: str) -> None:
    model, x, y = problem("softmax")
    rows, stream = rows_of(model, [(x, y)], 5, fisher_type, seed=2)
    empirical, _ = rows_of(model, [(x, y)], 5, "empirical")
    delta = torch.randn(rows.shape[1], dtype=DOUBLE)
    change = stream.layout.unflatten(delta)
    with untouched(model, 2):
        curvatures = stream.objective.curvatures(change, stream.kept[0])
        slopes = stream.objective.slopes(change, stream.kept[0])
    assert torch.allclose(curvatures, (rows @ delta).square().reshape(5, -1).sum(1), rtol=1e-10)
    assert torch.allclose(slopes, empirical @ delta, rtol=1e-10)


class Classified(nn.Module):
    """Computes its own loss and returns the logits beside it, as transformers' classifiers do."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, classes)

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> SimpleNamespace:
        logits = self.linear(x)
        short = logits.reshape(-1, logits.shape[-1])
        wanted = labels.reshape(-1)
        loss = (
            (short[:, 0] - wanted).square().mean() if short.shape[1] == 1 else F.cross_entropy(short, wanted)
        )
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_dict_batches_of_a_classifier(fisher_type: str) -> None:
    model = Classified().double()
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randint(3, (6,))
    found, stream = rows_of(model, [{"x": x, "labels": y, "mask": None}], 6, fisher_type)
    expected, _ = rows_of(model.linear, [(x, y)], 6, fisher_type)
    assert closeness(found, expected) < 1e-12
    assert stream.objective.why_loop is None


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_what_tells_no_likelihood_is_refused(fisher_type: str) -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    message = (
        rf"fisher_type='{fisher_type}' needs batches \(input, label\), or dicts .* keys \['labels', 'x'\]$"
    )
    sequences = {"x": torch.randn(6, 2, 4), "labels": torch.randint(3, (6, 2))}
    for model, batch in (
        (Classified(1), {"x": x, "labels": y}),
        (Classified(1), {"x": x, "labels": torch.randn(6)}),
        (Classified(3), sequences),
    ):
        with pytest.raises(FastFisherError, match=message):
            rows_of(model, [batch], 2, fisher_type)
    with pytest.raises(FastFisherError, match=rf"fisher_type='{fisher_type}' .* which loss_fn does not"):
        Objective(Classified(), ["linear.weight"], loss_fn=lambda m, b: m(*b).loss, fisher_type=fisher_type)


def test_options_that_do_not_fit_are_refused() -> None:
    model = linear(3)
    with pytest.raises(FastFisherError, match="must be one of empirical, mc, exact; got 'true'"):
        Objective(model, ["0.weight"], fisher_type="true")
    with pytest.raises(FastFisherError, match="outputs of single samples; got grad_batch_size=4"):
        Objective(model, ["0.weight"], fisher_type="exact", grad_batch_size=4)
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randint(3, (6,))
    stream = stream_of(model, [(x, y)], 6, "exact", memory_limit=1000)
    with pytest.raises(FastFisherError, match=r"takes 2 x 3 rows of 27 weights .* 1296 bytes .* is 1000;"):
        next(iter(stream))
    with pytest.raises(FastFisherError, match="num_grads=2 but the loader yields 0 samples"):
        stream_of(model, iter([]), 2, "exact").rows_per_grad  # noqa: B018
    with pytest.raises(FastFisherError, match="the model failed on batch 0 of the loader"):
        stream_of(model, [(x[:, :3], y)], 2, "exact").rows_per_grad  # noqa: B018


def test_outputs_of_another_size_are_refused() -> None:
    model = positions()
    data = [(torch.randn(2, 2, n, n, dtype=DOUBLE), torch.randint(3, (2, n - 3, n - 3))) for n in (5, 6)]
    rows, _ = rows_of(model, data, 4, "mc")
    assert rows.shape[0] == 4
    with pytest.raises(FastFisherError, match=r"batch 1 of the loader gives 27 of a sample .* gave 12"):
        rows_of(model, data, 4, "exact")


class Branching(nn.Module):
    """Control flow that depends on the data, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum().item() > 0 else self.right(x)


def test_a_model_vmap_cannot_trace() -> None:
    model = Branching().double()
    _, x, y = problem("softmax", 9)
    left = x.sum(1) > 0
    assert 0 < int(left.sum()) < 9
    for fisher_type in ("mc", "exact"):
        found, stream = rows_of(model, [(x, y)], 9, fisher_type)
        assert "RuntimeError" in (stream.objective.why_loop or "")
        rows = found.reshape(9, -1, 30)
        assert bool((rows[left][:, :, 15:] == 0).all())
        assert bool((rows[~left][:, :, :15] == 0).all())
    for module, mine, part in ((model.left, left, slice(15)), (model.right, ~left, slice(15, 30))):
        expected, _ = rows_of(module, [(x[mine], y[mine])], int(mine.sum()), "exact")
        assert closeness(rows[mine][:, :, part].flatten(0, 1), expected) < 1e-12


def test_a_sample_that_is_not_finite_is_replaced_with_all_its_rows() -> None:
    model, x, y = problem("softmax", 9)
    good = [0, 1, 3, 4, 6, 7]
    expected, clean = rows_of(model, [(x[good], y[good])], 6, "exact")
    x[2], x[5, 1] = float("nan"), float("inf")
    found, stream = rows_of(model, batches(x, y, 4), 6, "exact")
    assert closeness(found, expected) < 1e-12
    assert (stream.num_finite, stream.num_non_finite) == (6, 2)
    assert stream.first_non_finite == "batch 0, '0.weight', float64"
    assert stream.effective == pytest.approx(clean.effective, rel=1e-12)
    kept = torch.cat([samples.leaves[0] for samples in stream.kept])
    assert torch.equal(kept, x[good])
    assert torch.allclose(torch.cat(stream.kept_losses), torch.cat(clean.kept_losses), rtol=1e-12)


def test_rows_of_zeros_complete_the_count() -> None:
    model, x, y = problem("softmax", 6)
    x[1], y[3] = float("nan"), -100  # no label, no loss
    expected, _ = rows_of(model, [(x[[0, 2, 4, 5]], y[[0, 2, 4, 5]])], 4, "exact")
    for limit in (1 << 30, 2000):
        found, stream = rows_of(model, [(x, y)], 6, "exact", memory_limit=limit)
        assert found.shape[0] == 18
        assert closeness(found[:12], expected) < 1e-12
        assert bool((found[12:] == 0).all())
        assert (stream.num_finite, stream.num_non_finite) == (4, 2)


def test_the_memory_limit_changes_pieces_and_not_rows() -> None:
    model, x, y = problem("positions", 7)
    expected, _ = rows_of(model, [(x, y)], 7, "exact")
    row = expected.shape[1] * 8
    micro = set()
    for limit in (24 * row, 40 * row, 150 * row, 1 << 30):
        stream = stream_of(model, batches(x, y, 3), 7, "exact", memory_limit=limit)
        micro.add(stream._chunks()[1:])
        with untouched(model, 0):
            pieces = [piece.clone() for piece in stream]
        assert closeness(torch.cat(pieces), expected) < 1e-12
        assert all(len(piece) % 12 == 0 and piece.nbytes <= limit for piece in pieces)
    assert any(chunk is not None for _, chunk in micro)
    assert len(micro) > 2


def test_unused_and_removed_weights() -> None:
    model, x, y = problem("softmax")
    whole, _ = rows_of(model, [(x, y)], 5, "exact")
    model.register_parameter("unused", nn.Parameter(torch.randn(2, 3, dtype=DOUBLE)))
    names = [*(name for name, _ in model.named_parameters() if name != "unused"), "unused"]
    parameters = dict(model.named_parameters())
    layout = BlockLayout(names, [parameters[name].shape for name in names], None)
    live = torch.rand(layout.num_weights) < 0.5
    for why_loop in (None, "the test says so"):
        objective = Objective(model, names, fisher_type="exact")
        objective.why_loop = why_loop
        stream = GradientStream(objective, [(x, y)], LiveLayout(layout, live), num_grads=5)
        with untouched(model, 0):
            found = torch.cat([piece.clone() for piece in stream])
        expected = torch.cat([whole, torch.zeros(15, 6, dtype=DOUBLE)], dim=1)[:, live]
        assert closeness(found, expected) < 1e-12
        assert stream.unreached == ["unused"]


def test_the_rows_make_the_inverse() -> None:
    model, x, y = problem("softmax", 8)
    stream = stream_of(model, batches(x, y, 3), 8, "exact")
    with untouched(model, 0):
        accumulator = FisherAccumulator(
            stream.layout, num_grads=8, num_rows=8 * stream.rows_per_grad, damping=1e-2
        )
        for piece in stream:
            accumulator.add(piece)
    F_ = fishers(model, x, y).mean(0) + 1e-2 * torch.eye(27, dtype=DOUBLE)
    assert closeness(accumulator.finish().diag(), torch.linalg.inv(F_).diagonal()) < 1e-9


def test_streams_go_on_in_the_data() -> None:
    model, x, y = problem("softmax", 8)
    expected, _ = rows_of(model, [(x, y)], 8, "exact")
    objective = Objective(model, names := list(dict(model.named_parameters())), fisher_type="exact")
    layout = BlockLayout(names, [p.shape for p in model.parameters()], None)
    reader = SampleReader(batches(x, y, 3), CPU, repeat=4)
    with untouched(model, 0):
        for start in (0, 4, 0):
            stream = GradientStream(objective, reader, layout, num_grads=4)
            assert stream.rows_per_grad == 3
            rows = torch.cat([piece.clone() for piece in stream])
            assert closeness(rows, expected[3 * start : 3 * start + 12]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_models_give_float32_rows(dtype: torch.dtype) -> None:
    wide, x, y = problem("softmax")
    for p in wide.parameters():
        p.data = p.data.to(dtype).double()
    x = x.to(dtype)
    narrow = linear(3)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.to(dtype)
    for fisher_type in ("mc", "exact"):
        expected, _ = rows_of(wide, [(x.double(), y)], 5, fisher_type)
        found, _ = rows_of(narrow, [(x, y)], 5, fisher_type)
        assert found.dtype == torch.float32
        assert closeness(found.double(), expected) < (5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("fisher_type", "size"), [("mc", 1), ("mc", 3), ("exact", 1)])
def test_the_model_is_untouched(fisher_type: str, size: int) -> None:
    model = classifier()
    model.train()
    inputs, labels = images(12)
    before = picture(model)
    rows, _ = rows_of(model, batches(inputs, labels, 5), 12 // size, fisher_type, grad_batch_size=size)
    assert float(rows.abs().max()) > 0
    assert_same(before, picture(model))
