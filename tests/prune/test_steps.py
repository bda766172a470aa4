"""Recomputations and WoodTaylor: every step from the point that the last one reached, and the gradient term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.prune import steps
from fastfisher.prune.settings import Settings
from tests.prune.models import assert_same, batches, classifier, images, picture
from tests.prune.test_prune import TARGETS, D, run, zeros


def weights(model: nn.Module, names: tuple[str, ...] = TARGETS) -> Tensor:
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].detach().reshape(-1) for name in names])


def steps_of(sparsity: float, num_recomputations: int, before: float = 0.0) -> list[float]:
    settings = Settings(
        sparsity, "woodfisher", "global", 64, 512, 1, 0.1, "relative", "sum", 0, num_recomputations
    )
    return settings.targets_of_steps(before)


def test_steps_grow_from_where_the_network_is_and_end_at_the_target() -> None:
    assert steps_of(0.8, 0) == [0.8]
    steps = steps_of(0.8, 3, before=0.2)
    assert steps == pytest.approx([0.8 - 0.6 * (1 - i / 4) ** 2 for i in (1, 2, 3, 4)])
    assert steps_of(0.5, 2, before=0.7) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("update", ["sum", "joint", None])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("block_size", [7, None])
def test_a_run_with_recomputations_is_one_step_after_the_other(
    update: str | None, scope: str, block_size: int | None
) -> None:
    options: dict[str, Any] = {"update": update, "scope": scope, "block_size": block_size}
    at_once, stepwise = classifier(dtype=torch.float64), classifier(dtype=torch.float64)
    data = batches(*images(32, dtype=torch.float64), 8)
    report = run(at_once, data=data, sparsity=0.7, num_recomputations=2, **options)
    for sparsity in steps_of(0.7, 2):
        run(stepwise, data=data, sparsity=sparsity, **options)
    assert torch.allclose(weights(at_once), weights(stepwise), rtol=1e-9, atol=1e-12)
    assert zeros(at_once) == report.num_zeros == round(0.7 * D)
    assert [round(step.sparsity * D) for step in report.steps] == [round(s * D) for s in steps_of(0.7, 2)]
    assert report.predicted_change is None
    assert "loss before" in str(report)
    assert ff.Report.from_dict(report.to_dict()) == report


def test_steps_are_as_many_as_the_sparsity_calls_for() -> None:
    assert [len(steps_of(s, None)) for s in (0.0, 0.1, 0.5, 0.8, 0.9)] == [1, 1, 6, 13, 19]
    assert len(steps_of(0.9, None, before=0.8)) == 6
    assert steps_of(0.5, None, before=0.7) == [0.5]


def test_by_default_the_update_is_joint_with_recomputations_and_greedy_without() -> None:
    reports = [run(classifier(), num_recomputations=n) for n in (None, 0, 2)]
    assert [report.update for report in reports] == ["joint", "greedy", "joint"]
    assert [len(report.steps) for report in reports] == [6, 1, 3]
    for large in (257, None):
        assert run(classifier(), num_recomputations=0, block_size=large).update == "sum"
    assert run(classifier(), num_recomputations=0, method="kfac").update == "sum"
    assert run(classifier(), method="diagonal").update is None


@pytest.mark.parametrize("method", ["woodfisher", "woodtaylor", "diagonal", "magnitude"])
def test_zeros_count_on_the_way_and_nothing_else_changes(method: str) -> None:
    model = classifier()
    with torch.no_grad():
        model[8].weight[:, ::3] = 0
    dead = model[8].weight == 0
    before = picture(model)
    report = run(model, method=method, sparsity=0.9, num_recomputations=3, num_grads=20)
    assert zeros(model) == report.num_zeros == round(0.9 * D)
    assert bool((model[8].weight[dead] == 0).all())
    assert len(report.steps) == (0 if method == "magnitude" else 4)
    assert_same(before, picture(model), weights=False)


def test_every_step_takes_further_samples() -> None:
    seen = []
    inputs, labels = images(32)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        return F.cross_entropy(model(batch[0]), batch[1])

    run(
        classifier(),
        data=batches(inputs, labels, 8),
        loss_fn=loss_fn,
        num_recomputations=2,
        num_grads=5,
        grad_batch_size=4,
    )
    assert set(seen) == {4}


def test_an_interrupt_in_a_later_step_leaves_the_model_as_it_was() -> None:
    model = classifier()
    before = picture(model)

    def stop(phase: str, done: int, total: int) -> None:
        assert total == 3 * 32
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, num_recomputations=2, progress=stop)
    assert_same(before, picture(model))


def test_half_precision_weights_are_corrected_in_float32_between_the_steps() -> None:
    model = classifier(dtype=torch.bfloat16)
    report = run(
        model, data=batches(*images(32, dtype=torch.bfloat16), 8), num_recomputations=2, sparsity=0.6
    )
    assert zeros(model) == report.num_zeros == round(0.6 * D)


def test_data_that_can_be_read_once_must_last() -> None:
    data = batches(*images(40), 8)
    with pytest.raises(
        FastFisherError, match="8 samples after the 32 of the estimates before; give data that"
    ):
        run(classifier(), data=iter(data), num_recomputations=1)
    report = run(classifier(), data=iter(data), num_recomputations=None)
    assert (len(report.steps), report.update) == (1, "greedy")
    assert any("The data can be read only once" in note for note in report.notes)
    long = batches(*images(64), 8)
    report = run(classifier(), data=iter(long), num_recomputations=1)
    assert len(report.steps) == 2


@pytest.mark.parametrize("value", [-1, 1.5, True, "12"])
def test_a_wrong_number_of_recomputations_is_one_sentence(value: Any) -> None:
    message = "num_recomputations must be None or a whole number of at least 0; got"
    with pytest.raises(FastFisherError, match=message):
        run(classifier(), num_recomputations=value)
    with pytest.raises(FastFisherError, match=message):
        ff.plan(classifier(), None, sparsity=0.5, num_recomputations=value)


def test_the_plan_counts_every_step() -> None:
    data = batches(*images(32), 8)
    one = ff.plan(classifier(), data, sparsity=0.9, num_grads=32, block_size=16, num_recomputations=0)
    many = ff.plan(classifier(), data, sparsity=0.9, num_grads=32, block_size=16, num_recomputations=9)
    seconds = [
        next(phase.seconds for phase in plan.phases if phase.name == "gradients") for plan in (one, many)
    ]
    assert seconds[1] > 2 * seconds[0]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("update", ["sum", "joint", None])
@pytest.mark.parametrize("block_size", [16, None])
def test_woodtaylor_follows_from_the_model_with_its_gradient_in_float64(
    update: str | None, centered: bool, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the loss makes of the step's length is the test below
    monkeypatch.setattr(steps.Run, "_shortened", lambda self, t, *rest: t)
    model = classifier(dtype=torch.float64)
    inputs, labels = images(32, dtype=torch.float64)
    name = "8.weight"
    parameter = dict(model.named_parameters())[name]
    model.eval()
    g = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameter)[0].reshape(-1)
            for x, y in zip(inputs, labels, strict=True)
        ]
    )  # [m, d]
    w, slope, damping = parameter.detach().reshape(-1).clone(), g.mean(0), 1e-2
    rows = g - slope if centered else g
    full = rows.T @ rows / len(g)
    fisher = torch.zeros_like(full)
    size = block_size or len(w)
    for a in range(0, len(w), size):
        fisher[a : a + size, a : a + size] = full[a : a + size, a : a + size]
    identity = torch.eye(len(w), dtype=torch.float64)
    fisher += damping * identity
    f_inv = torch.linalg.inv(fisher)
    u = f_inv @ slope
    # as far along u as the whole Fisher allows, all gradients being among the kept samples; with one block all the way
    length = slope @ u / (u @ (full + damping * identity) @ u)
    assert float(length) == pytest.approx(1.0) if block_size is None else 0.05 < float(length) < 0.95
    u = length * u
    slope = fisher @ u
    # WoodFisher, eq. 5.8 as it stands there
    saliency = (w**2 + u**2) / (2 * f_inv.diag()) - w * u / f_inv.diag()
    q = torch.zeros(len(w), dtype=torch.bool)
    q[saliency.argsort()[: round(0.6 * len(w))]] = True
    if update == "joint":
        # the minimiser of slope·δ + ½ δᵀFδ where the weights in q become 0, slope being F times the step taken
        delta = -w
        delta[~q] = torch.linalg.solve(fisher[~q][:, ~q], -(slope[~q] - fisher[~q][:, q] @ w[q]))
        expected = w + delta
    elif update == "sum":
        expected = w - u - f_inv @ torch.where(q, (w - u) / f_inv.diag(), 0)
    else:
        expected = w - u
    expected[q] = 0
    run(
        model,
        data=[(inputs, labels)],
        sparsity=0.6,
        block_size=block_size,
        damping=damping,
        damping_mode="absolute",
        update=update,
        targets=[name],
        method="woodtaylor",
        centered=centered,
    )
    found = parameter.detach().reshape(-1)
    assert torch.equal(found == 0, q)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_centered_goes_with_woodtaylor_alone() -> None:
    with pytest.raises(
        FastFisherError, match="centered=True goes with method='woodtaylor'; got method='diagonal'"
    ):
        run(classifier(), method="diagonal", centered=True)


@pytest.mark.parametrize(("block_size", "num_grads"), [(64, 256), (None, 256), (64, 400)])
def test_the_step_along_the_gradient_is_no_longer_than_the_loss_allows(
    block_size: int | None, num_grads: int
) -> None:
    """A gradient that is the mean over 64 places has 1/64 of the curvature as its second moment, at most.

    With 400 gradients the loss is looked at on some of the samples only.
    """
    torch.manual_seed(0)

    class Places(nn.Module):
        """x [n, P, 8] -> logits [n, 4, P]."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).transpose(1, 2)

    teacher, model = Places(), Places()
    x = torch.randn(400, 64, 8)
    y = torch.distributions.Categorical(logits=3 * teacher(x).transpose(1, 2)).sample()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    report = ff.prune(
        model,
        [(x, y)],
        sparsity=0.02,
        method="woodtaylor",
        num_grads=num_grads,
        block_size=block_size,
        num_recomputations=2,
        damping=0.01,
    )
    first, *later = (step.loss_before for step in report.steps)
    assert max(later) < first + 0.01
    assert F.cross_entropy(model(x), y).item() < first + 0.01
