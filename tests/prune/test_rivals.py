"""Every method of the papers through the one call: exact zeros, what each removes, and the kinds of Fisher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastfisher as ff
from fastfisher.errors import FisherError
from tests.prune.models import batches, classifier, images, train

RIVALS = ("obd", "kfac", "hessian", "random")


def trained() -> nn.Module:
    model = classifier()
    train(model, *images(256), epochs=20)
    return model


def prune(model: nn.Module, **options: Any) -> ff.Report:
    defaults: dict[str, Any] = {"sparsity": 0.5, "num_grads": 64, "block_size": 16, "damping": 1.0}
    if options.get("method") == "hessian" and "damping" not in options:
        defaults |= {"damping": 3.0, "damping_mode": "absolute"}  # above its negative curvature
    return ff.prune(model, batches(*images(64), 16), **(defaults | options))


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("recomputations", [0, 2])
def test_exactly_the_zeros_asked_for(method: str, scope: str, recomputations: int) -> None:
    model = trained()
    report = prune(model, method=method, scope=scope, num_recomputations=recomputations)
    assert report.num_zeros == round(0.5 * report.num_weights)
    assert len(report.steps) == (0 if method == "random" else recomputations + 1)
    assert report.data_fingerprint or method == "random"


@pytest.mark.parametrize("method", ["obd", "kfac", "hessian", "woodfisher"])
@pytest.mark.parametrize("update", ["sum", "joint"])
def test_a_zero_that_was_there_stays(method: str, update: str) -> None:
    model = trained()
    with torch.no_grad():
        model[8].weight[:, ::3] = 0
    prune(model, method=method, update=update, num_recomputations=1)
    assert bool((model[8].weight[:, ::3] == 0).all())


def test_random_follows_the_seed_and_is_worse_than_magnitude() -> None:
    masks, losses = [], {}
    for seed in (0, 0, 1):
        model = trained()
        prune(model, method="random", seed=seed)
        masks.append(model[8].weight == 0)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    inputs, labels = images(256)
    for method in ("random", "magnitude", "woodfisher", "hessian", "kfac", "obd"):
        model = trained().eval()
        prune(model, method=method, sparsity=0.6)
        losses[method] = float(nn.functional.cross_entropy(model(inputs), labels))
    assert all(loss < losses["random"] for method, loss in losses.items() if method != "random")
    assert losses["woodfisher"] < losses["magnitude"]


def test_the_hessian_prunes_by_itself_in_full() -> None:
    """One step in one block over a network that is quadratic in its weights reaches what the Hessian foretells."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False)).double()
    inputs, targets = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    with torch.no_grad():  # the minimum of the squares, where the gradient is zero
        model[0].weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    H = torch.func.hessian(lambda w: nn.functional.mse_loss(inputs @ w.view(2, 6).T, targets))(
        model[0].weight.detach().reshape(-1)
    )
    before = float(nn.functional.mse_loss(model(inputs), targets))
    w = model[0].weight.detach().reshape(-1).clone()
    ff.prune(
        model, [(inputs, targets)], sparsity=0.25, method="hessian", num_grads=64, block_size=None, damping=1e-9,
        damping_mode="absolute", update="joint", num_recomputations=0,
    )  # fmt: skip
    new = model[0].weight.detach().reshape(-1)
    foretold = float((new - w) @ H @ (new - w)) / 2
    assert float(nn.functional.mse_loss(model(inputs), targets)) - before == pytest.approx(foretold, rel=1e-6)
    # no other set of three is cheaper by the first removal's score: the least salient weight is among them
    least = int((w**2 / torch.linalg.inv(H).diagonal()).argmin())
    assert float(new[least]) == 0


def test_a_hessian_that_is_not_positive_definite_names_the_damping_it_needs() -> None:
    with pytest.raises(FisherError, match="damping"):
        prune(classifier(), method="hessian", damping=1e-6)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("block_size", [16, 200])  # primal, and dual for mc
def test_other_fishers_prune_too(fisher_type: str, block_size: int) -> None:
    model, empirical = trained(), trained()
    report = prune(model, fisher_type=fisher_type, block_size=block_size, num_recomputations=1)
    prune(empirical, block_size=block_size, num_recomputations=1)
    assert report.num_zeros == round(0.5 * report.num_weights)
    assert not torch.equal(model[8].weight, empirical[8].weight)
    assert report.effective_grads is not None
    assert 1 <= report.effective_grads <= 64


def test_the_exact_fisher_of_one_step_is_the_sum_over_classes() -> None:
    model = trained().double()
    inputs, labels = images(16, dtype=torch.float64)
    report = ff.prune(
        model, batches(inputs, labels, 8), sparsity=0.5, num_grads=16, block_size=16, num_recomputations=0,
        fisher_type="exact",
    )  # fmt: skip
    assert report.form == "primal"
    assert report.num_grads == 16
    # 16 samples with 3 classes each are 48 outer products: enough for blocks of 16
    other = ff.prune(
        trained().double(), batches(inputs, labels, 8), sparsity=0.5, num_grads=16, block_size=40,
        num_recomputations=0, fisher_type="exact",
    )  # fmt: skip
    assert other.form == "primal"


@pytest.mark.parametrize("method", ["obd", "kfac", "hessian"])
def test_the_plan_knows_them(method: str) -> None:
    plan = ff.plan(
        classifier(), batches(*images(64), 16), sparsity=0.5, method=method, num_grads=64, block_size=16
    )
    assert plan.peak_bytes > 0
    assert plan.fits
    assert any("does without" in note for note in plan.notes)
