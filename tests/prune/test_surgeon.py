"""FishLeg Surgeon through `prune` and `Pruner`, and WoodFisher with a moving average: what is kept between prunings."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.fisher.fishleg import PARAMETERIZATIONS, FishLegInverse
from fastfisher.prune.surgeon import Surgeon


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 4),
    )  # fmt: skip


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 32, 4, 4, 4, generator=generator)
    return [(x, (x.mean(dim=(2, 3)) * 20).argmax(dim=1)) for x in images]


def trained() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model, data = network(), batches()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), data


def loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in data]).mean())


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    return trained()


def pruned(given: Any, **options: Any) -> tuple[nn.Module, ff.Report]:
    model, data = copy.deepcopy(given[0]), given[1]
    report = ff.prune(model, data, sparsity=0.85, **{"num_grads": 128, "num_recomputations": 4, **options})
    return model, report


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("aux", ["exact", "sampled"])
def test_every_form_prunes_to_the_sparsity(given: Any, parameterization: str, aux: str) -> None:
    only = {"targets": "6", "block_size": None} if parameterization == "full" else {}
    fishleg = {"parameterization": parameterization, "aux": aux, "tile": 32, "max_aux_steps": 5}
    model, report = pruned(given, method="fishleg", fishleg=fishleg, **only)
    assert report.num_zeros == round(0.85 * report.num_weights)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_it_keeps_more_than_magnitude(given: Any) -> None:
    _, data = given
    by_size = loss(pruned(given, method="magnitude")[0], data)
    for fishleg in ({}, {"parameterization": "block"}):
        assert loss(pruned(given, method="fishleg", fishleg=fishleg)[0], data) < by_size


def test_blocks_prune_like_woodfisher_in_one_step(given: Any) -> None:
    """The learned blocks are its inverse once the fit goes all the way."""
    same = {"num_recomputations": 0, "update": "joint", "block_size": 32, "num_grads": 256}
    theirs, _ = pruned(given, method="woodfisher", **same)
    ours, _ = pruned(given, method="fishleg", fishleg={"parameterization": "block"}, **same)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(((a == 0) == (b == 0)).double().mean()) > 0.93


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("product", ["rows", "antithetic"])
def test_kinds_of_fisher(given: Any, fisher_type: str, product: str) -> None:
    if fisher_type == "exact" and product == "antithetic":
        with pytest.raises(FastFisherError, match="antithetic"):
            pruned(
                given,
                method="fishleg",
                fisher_type=fisher_type,
                fishleg={"aux": "sampled", "product": product},
            )
        return
    fishleg = {
        "aux": "sampled" if product == "antithetic" else "exact",
        "product": product,
        "max_aux_steps": 5,
    }
    _, report = pruned(given, method="fishleg", fisher_type=fisher_type, num_grads=64, fishleg=fishleg)
    assert report.num_zeros == round(0.85 * report.num_weights)


def test_half_precision_weights_have_a_float32_state(given: Any) -> None:
    model, data = copy.deepcopy(given[0]).bfloat16(), [(x.bfloat16(), y) for x, y in given[1]]
    pruner = ff.Pruner(model, schedule=[(0, 0.5), (1, 0.8)], method="fishleg", num_grads=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.attach(optimizer)
    pruner.step(data, epoch=0)
    assert isinstance(pruner._learner, Surgeon)
    assert pruner._learner.inverse is not None
    assert pruner._learner.inverse.dtype == torch.float32
    pruner.step(data, epoch=1)
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_embeddings_norms_and_biases(given: Any) -> None:
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 8)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            result: Tensor = self.out(self.norm(self.table(tokens).mean(dim=1)))
            return result

    model = Bag()
    data = [(torch.randint(0, 30, (64, 5)), torch.randint(0, 3, (64,))) for _ in range(4)]
    names = ["table.weight", "norm.weight", "out.weight", "out.bias"]
    report = ff.prune(
        model, data, sparsity=0.5, method="fishleg", targets=names, num_grads=128, num_recomputations=2
    )
    assert report.num_zeros == round(0.5 * report.num_weights)
    assert len(report.layers) == 4


def run(
    given: Any, stop: int | None = None, state: Any = None, **options: Any
) -> tuple[nn.Module, ff.Pruner | None, Any]:
    """Train for 6 epochs with prunings at 1, 3 and 5; a state before the epoch `stop`, or from such a state on."""
    model, data = copy.deepcopy(given[0]).train(), given[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = ff.CubicSchedule(0.3, 0.9, begin=1, end=5, every=2)
    pruner = ff.Pruner(model, schedule=schedule, num_grads=64, seed=3, **options)
    pruner.attach(optimizer)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(0 if state is None else state["epoch"], 6):
        if epoch == stop:
            file = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch}, file)
            file.seek(0)
            return model, None, torch.load(file, weights_only=True)
        pruner.step(data, epoch=epoch)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, pruner, None


KEPT = {
    "tiles": {"method": "fishleg", "fishleg": {"update_aux_every": 3, "tile": 40}},
    "blocks": {"method": "fishleg", "fishleg": {"update_aux_every": 3, "parameterization": "block"}},
    "sampled": {
        "method": "fishleg",
        "fishleg": {"update_aux_every": 3, "aux": "sampled", "max_aux_steps": 5},
    },
    "average": {"method": "woodfisher", "fisher_average": 0.7},
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_resumed_run_ends_with_the_same_bits(given: Any, kind: str) -> None:
    whole, _, _ = run(given, **KEPT[kind])
    for stop in (2, 5):
        _, _, state = run(given, stop=stop, **KEPT[kind])
        again, _, _ = run(given, state=state, **KEPT[kind])
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_auxiliary_steps_come_between_prunings(given: Any) -> None:
    _, pruner, _ = run(given, method="fishleg", fishleg={"update_aux_every": 4})
    assert pruner is not None
    surgeon = pruner._learner
    assert isinstance(surgeon, Surgeon)
    # 8 steps an epoch; the first pruning comes after one epoch, and then five times 8 / 4
    assert surgeon.moves == 10
    _, without, _ = run(given, method="fishleg", fishleg={"update_aux_every": 0})
    assert without is not None
    assert isinstance(without._learner, Surgeon)
    assert without._learner.moves == 0
    pruner.finalize()


def test_batchnorm_and_generators_are_untouched_by_auxiliary_steps(given: Any) -> None:
    model, data = copy.deepcopy(given[0]).train(), given[1]
    pruner = ff.Pruner(model, schedule=[(0, 0.5)], method="fishleg", num_grads=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.attach(optimizer)
    pruner.step(data, epoch=0)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    surgeon = pruner._learner
    assert isinstance(surgeon, Surgeon)
    surgeon.move(model, data, None)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(module.training for module in model.modules())


def test_the_average_of_two_estimates(given: Any) -> None:
    """After two prunings with β the inverse is that of β F_1 + (1 − β) F_2 over the weights that are left."""
    from fastfisher.fisher.blocks import BlockLayout
    from fastfisher.prune.average import AveragedFisher
    from fastfisher.prune.settings import Settings

    settings = Settings(
        sparsity=0.5, method="woodfisher", scope="global", block_size=8, num_grads=40, grad_batch_size=1, damping=0.1,
        damping_mode="absolute", update="joint", seed=0, fisher_average=0.7,
    )  # fmt: skip
    first, second = torch.randn(2, 40, 20, dtype=torch.float64)
    learner = AveragedFisher(BlockLayout(["w"], [(4, 5)], 8), settings)
    live = torch.ones(20, dtype=torch.bool)
    learner.learn(iter([first]), live, num_rows=40)
    live = torch.arange(20) % 3 > 0
    found = learner.copy().learn(iter([second]), live, num_rows=40)
    F = 0.7 * first.T @ first / 40 + 0.3 * second.T @ second / 40
    for a, b in ((0, 8), (8, 16), (16, 20)):
        keep = live[a:b]
        inverse = torch.linalg.inv(
            F[a:b, a:b][keep][:, keep] + 0.1 * torch.eye(int(keep.sum()), dtype=torch.float64)
        )
        torch.testing.assert_close(found.diag()[a:b][keep], inverse.diagonal())


def test_bad_options_are_refused(given: Any) -> None:
    model, data = given
    for fishleg, message in (
        ({"parameterisation": "kron"}, "no option 'parameterisation'; the closest is 'parameterization'"),
        ({"parameterization": "krom"}, "parameterization must be one of .*; got 'krom'"),
        ({"max_aux_steps": 0}, "max_aux_steps must be a whole number of at least 1; got 0"),
        ("kron", "fishleg must be a mapping of options; got 'kron'"),
    ):
        with pytest.raises(FastFisherError, match=message):
            ff.prune(model, data, sparsity=0.5, method="fishleg", fishleg=fishleg)
    with pytest.raises(FastFisherError, match=r"fisher_average must be a share in \[0, 1\); got 1"):
        ff.prune(model, data, sparsity=0.5, fisher_average=1)
    with pytest.raises(FastFisherError, match="fisher_average goes with method='woodfisher'"):
        ff.prune(model, data, sparsity=0.5, method="kfac", fisher_average=0.5)
    tiles = {"parameterization": "block-kron"}
    with pytest.raises(FastFisherError, match="goes through blocks"):
        ff.prune(model, data, sparsity=0.5, method="fishleg", update="greedy", fishleg=tiles)


def test_the_surgeon_is_told_what_is_gone(given: Any) -> None:
    """Zeros that were there before the first pruning are no part of Q either."""
    model, data = copy.deepcopy(given[0]), given[1]
    with torch.no_grad():
        model[4].weight[:, ::2] = 0
    pruner = ff.Pruner(model, schedule=[(0, 0.7)], method="fishleg", num_grads=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.attach(optimizer)
    pruner.step(data, epoch=0)
    assert isinstance(pruner._learner, Surgeon)
    inverse = pruner._learner.inverse
    assert isinstance(inverse, FishLegInverse)
    masks = torch.cat([mask.flatten() for mask in pruner.masks.values()])
    assert torch.equal(inverse.live, masks)
    assert bool((inverse.diag()[~masks] == 0).all())


def test_the_report_tells_how_the_fits_went(given: Any) -> None:
    _, report = pruned(given, method="fishleg")
    assert all(step.auxiliary is not None and step.auxiliary["steps"] >= 1 for step in report.steps)
    assert "auxiliary steps" in str(report)
    again = ff.Report.from_dict(report.to_dict())
    assert again.steps == report.steps
    _, plain = pruned(given, method="woodfisher")
    assert "auxiliary" not in str(plain)


def test_plan_counts_the_state(given: Any) -> None:
    model, data = given
    tiles, blocks = (
        ff.plan(
            model, data, sparsity=0.5, method="fishleg", num_grads=8, fishleg={"parameterization": p}
        ).peak_bytes
        for p in ("block-kron", "block")
    )
    assert tiles < blocks
