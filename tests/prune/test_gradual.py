"""Pruner in a training loop: absolute targets at the due times, zeros between them, and runs that go on bit for bit."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import fastfisher as ff
from fastfisher.errors import FastFisherError
from tests.prune.models import assert_same, batches, classifier, images, picture
from tests.prune.test_masks import OPTIMIZERS, assert_zero

D = 72 + 144 + 432 + 18
DATA = batches(*images(48), 16)
RAMP = ff.CubicSchedule(0.3, 0.9, begin=1, end=6, every=2)


def pruner(model: nn.Module, schedule: Any = RAMP, **options: Any) -> ff.Pruner:
    return ff.Pruner(model, schedule=schedule, **({"num_grads": 32, "block_size": 16} | options))


def train_epoch(model: nn.Module, optimizer: Optimizer, call: nn.Module | None = None) -> None:
    model.train()
    for x, y in DATA:
        optimizer.zero_grad()
        F.cross_entropy((call or model)(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adam-fused", "adamw-foreach"])
@pytest.mark.parametrize("method", ["woodfisher", "woodtaylor", "magnitude"])
def test_the_journey(kind: str, method: str) -> None:
    model = classifier()
    optimizer = OPTIMIZERS[kind](model.parameters())
    gradual = pruner(model, method=method, strict=True)
    gradual.attach(optimizer)
    found = {}
    zeros: dict[str, torch.Tensor] = {}
    for epoch in range(9):
        flags = [module.training for module in model.modules()]
        report = gradual.step(DATA, epoch=epoch)
        assert flags == [module.training for module in model.modules()]
        if report is not None:
            found[epoch] = report.num_zeros
            assert_zero(model, gradual.masks, optimizer)  # before the next step of the optimizer
            # what was removed once stays so
            assert all(not bool((gradual.masks[name] & gone).any()) for name, gone in zeros.items())
            zeros = {name: ~mask for name, mask in gradual.masks.items()}
        train_epoch(model, optimizer)
        if zeros:
            assert_zero(model, gradual.masks, optimizer)
    assert found == {epoch: round(RAMP(epoch) * D) for epoch in (1, 3, 5, 6)}
    assert gradual.sparsity == pytest.approx(round(0.9 * D) / D)
    assert [report.zeros_before for report in gradual.reports] == [0, *list(found.values())[:-1]]
    gradual.finalize()
    assert not optimizer._optimizer_step_post_hooks
    assert list(model.state_dict()) == list(classifier().state_dict())


def test_a_step_is_one_call_of_prune_from_the_weights_as_they_are() -> None:
    model, other = classifier(), classifier()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    gradual = pruner(model, [(0, 0.4), (1, 0.7)], seed=3)
    gradual.attach(optimizer)
    for epoch, (sparsity, seed) in enumerate([(0.4, 3), (0.7, 4)]):
        other.load_state_dict(model.state_dict())
        ff.prune(other, DATA, sparsity=sparsity, num_grads=32, block_size=16, num_recomputations=0, seed=seed)
        report = gradual.step(DATA, epoch=epoch)
        assert report is not None
        assert report.update == "greedy"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        train_epoch(model, optimizer)


def test_missed_times_are_made_good_and_none_comes_twice() -> None:
    gradual = pruner(classifier(), method="magnitude")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer is attached
        found = [gradual.step(None, step=step) for step in (0, 4, 4, 3, 1, 100, 101)]
    assert [None if report is None else report.sparsity for report in found] == [
        None,
        RAMP(3),
        None,
        None,
        None,
        0.9,
        None,
    ]


def test_a_function_that_stays_where_it_is_prunes_once() -> None:
    gradual = pruner(classifier(), lambda epoch: min(0.5, 0.25 * epoch), method="random")
    with pytest.warns(UserWarning, match="no optimizer is attached"):
        found = [gradual.step(None, epoch=epoch) for epoch in range(5)]
    assert [report is not None for report in found] == [False, True, True, False, False]
    gradual.finalize()  # where a function ends nobody knows


def test_data_are_read_only_when_pruning_is_due() -> None:
    class Unread:
        def __iter__(self) -> Any:
            raise AssertionError

    gradual = pruner(classifier())
    assert gradual.step(Unread(), epoch=0) is None
    with pytest.raises(AssertionError):
        gradual.step(Unread(), epoch=1)


def test_an_error_leaves_weights_and_place_as_they_were() -> None:
    model = classifier()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    gradual = pruner(model)
    gradual.attach(optimizer)
    train_epoch(model, optimizer)
    before = picture(model)
    with pytest.raises(FastFisherError, match="num_grads=32 but the loader yields 16 samples"):
        gradual.step(DATA[:1], epoch=1)
    assert_same(before, picture(model))
    assert gradual.reports == []
    assert gradual.sparsity == 0
    report = gradual.step(DATA, epoch=1)
    assert report is not None
    assert report.num_zeros == round(0.3 * D)


def test_a_sparse_start_keeps_its_zeros_and_counts_them() -> None:
    model = classifier()
    ff.prune(model, None, method="magnitude", sparsity=0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    gradual = pruner(model, [(1, 0.6)], strict=True)
    gradual.attach(optimizer)
    train_epoch(model, optimizer)
    assert gradual.sparsity == 0.5
    assert_zero(model, gradual.masks, optimizer)
    report = gradual.step(DATA, epoch=1)
    assert report is not None
    assert (report.zeros_before, report.num_zeros) == (333, 400)

    with torch.no_grad():
        model[10].weight.zero_()
    with pytest.warns(UserWarning, match=r"'10.weight' holds nothing but zeros"):
        pruner(model)


def test_zeros_overwritten_between_steps_still_count_and_are_noted() -> None:
    model = classifier()
    gradual = pruner(model, [(0, 0.4), (1, 0.5)])
    attached = OPTIMIZERS["sgd"](model[:1].parameters())
    gradual.attach(attached)
    gradual.step(DATA, epoch=0)
    masks = dict(gradual.masks)
    train_epoch(model, OPTIMIZERS["sgd"](model.parameters()))  # another optimizer, not attached
    with pytest.warns(UserWarning, match="an optimizer that is not attached"):
        report = gradual.step(DATA, epoch=1)
    assert report is not None
    assert (report.zeros_before, report.num_zeros) == (266, 333)
    assert all(not bool((gradual.masks[name] & ~mask).any()) for name, mask in masks.items())
    assert "266 weights that had been removed were nonzero again and were set to zero." in report.notes

    strict = pruner(classifier(), [(0, 0.4), (1, 0.5)], strict=True, method="magnitude")
    with pytest.warns(UserWarning, match="no optimizer is attached"):
        strict.step(None, epoch=0)
    strict.model[8].weight.data.fill_(1.0)
    with pytest.raises(FastFisherError, match=r"'8.weight' has \d+ nonzero weights where its mask says zero"):
        strict.step(None, epoch=1)
    with pytest.raises(FastFisherError, match=r"'8.weight' has \d+ nonzero"):
        strict.finalize()


@pytest.mark.parametrize(
    "options", [{"scope": "layer"}, {"method": "kfac"}, {"cost": "flops"}, {"pattern": "block4"}]
)
def test_what_prune_can_do_goes_step_by_step_too(options: dict[str, Any]) -> None:
    model = classifier()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    targets = "8" if "pattern" in options else None
    gradual = pruner(model, [(0, 0.25), (1, 0.5)], targets=targets, strict=True, **options)
    gradual.attach(optimizer)
    for epoch in range(2):
        report = gradual.step(DATA, epoch=epoch)
        assert report is not None
        assert report.num_zeros == round([0.25, 0.5][epoch] * report.num_weights)
        train_epoch(model, optimizer)
    assert_zero(model, gradual.masks, optimizer)


def test_a_pattern_is_reached_step_by_step() -> None:
    model = classifier()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    gradual = pruner(
        model, ff.LinearSchedule(0.2, 0.5, begin=0, end=2), pattern="2:4", targets="8", strict=True
    )
    gradual.attach(optimizer)
    for epoch in range(3):
        report = gradual.step(DATA, epoch=epoch)
        assert report is not None
        assert report.num_zeros == round((0.2, 0.35, 0.5)[epoch] * 432)
        assert int(gradual.masks["8.weight"].view(-1, 4).sum(dim=1).min()) >= 2
        train_epoch(model, optimizer)
    assert bool((gradual.masks["8.weight"].view(-1, 4).sum(dim=1) == 2).all())
    with pytest.raises(
        FastFisherError, match=r"pattern='2:4' makes a sparsity of 0.5, at which .* must end; got 0.9"
    ):
        pruner(model, pattern="2:4")


def test_compiled_models_are_pruned_under_their_own_names() -> None:
    model = classifier()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["sgd"](compiled.parameters())
    gradual = pruner(compiled, [(0, 0.5), (1, 0.8)], strict=True)
    gradual.attach(optimizer)
    for epoch in range(2):
        gradual.step(DATA, epoch=epoch)
        train_epoch(model, optimizer, compiled)
    assert_zero(model, gradual.masks, optimizer)
    assert gradual.sparsity == pytest.approx(round(0.8 * D) / D)
    plain = pruner(classifier(), [(0, 0.5), (1, 0.8)])
    plain.load_state_dict(gradual.state_dict())
    assert list(plain.masks) == ["0.weight", "3.weight", "8.weight", "10.weight"]


def test_a_model_that_moves_between_two_steps() -> None:
    model = classifier()
    gradual = pruner(model, [(0, 0.5), (1, 0.8)])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    gradual.attach(optimizer)
    gradual.step(DATA, epoch=0)
    model.double()
    report = gradual.step([(x.double(), y) for x, y in DATA], epoch=1)
    assert report is not None
    assert (report.zeros_before, report.num_zeros) == (333, 533)


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(48)), batch_size=8, shuffle=True)


def run(
    epochs: range, checkpoint: bytes | None, kind: str, method: str
) -> tuple[bytes, nn.Module, ff.Pruner]:
    """Part of a training run in objects of its own; returns what it would save."""
    model = classifier(seed=0 if checkpoint is None else 5)  # other weights, to be loaded over
    optimizer = OPTIMIZERS[kind](model.parameters())
    gradual = pruner(model, method=method, strict=True)  # loading in any order is no write past the optimizer
    gradual.attach(optimizer)
    if checkpoint is not None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        gradual.load_state_dict(state["pruner"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in epochs:
        torch.manual_seed(epoch)
        gradual.step(shuffled(), epoch=epoch)
        model.train()
        for x, y in shuffled():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "pruner": gradual.state_dict(),
        },
        file,
    )
    return file.getvalue(), model, gradual


@pytest.mark.parametrize(("kind", "method"), [("sgd", "woodfisher"), ("adam-fused", "woodtaylor")])
def test_a_run_that_was_interrupted_ends_bit_for_bit_alike(kind: str, method: str) -> None:
    _, whole, first = run(range(8), None, kind, method)
    for stop in (1, 2, 3, 6, 7):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is to be mended
            checkpoint, *_ = run(range(stop), None, kind, method)
            _, model, gradual = run(range(stop, 8), checkpoint, kind, method)
        for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), (stop, name)
        assert all(torch.equal(first.masks[name], gradual.masks[name]) for name in first.masks)
        assert [r.num_zeros for r in gradual.reports] == [r.num_zeros for r in first.reports]
        assert gradual.reports[-1].layers == first.reports[-1].layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: pruner(classifier(), num_grads=16), "the state was saved with num_grads=32; this Pruner has 16"),
        (lambda: pruner(classifier(), method="obd"), "was saved with method='woodfisher'; this Pruner has 'obd'"),
        (lambda: pruner(classifier(), [(1, 0.9)]), "saved with schedule=CubicSchedule(initial=0.3, final=0.9, begin=1"),
        (lambda: pruner(classifier(), ignore="10"), "its mask of '10.weight' has the shape [3, 6], here it is none"),
        (lambda: pruner(nn.Sequential(nn.Linear(72, 6))), "the shape [4, 2, 3, 3], here it is [6, 72]"),
    ],
)  # fmt: skip
def test_a_state_of_something_else_is_refused(change: Callable[[], ff.Pruner], message: str) -> None:
    source = pruner(classifier())
    optimizer = OPTIMIZERS["sgd"](source.model.parameters())
    source.attach(optimizer)
    source.step(DATA, epoch=1)
    other = change()
    with pytest.raises(FastFisherError, match=re.escape(message)):
        other.load_state_dict(source.state_dict())
    assert other.sparsity == 0
    assert other.reports == []


def test_what_is_no_state_is_refused() -> None:
    gradual = pruner(classifier())
    with pytest.raises(
        FastFisherError, match="no state of a Pruner that this version can read: 'format' is missing"
    ):
        gradual.load_state_dict({})
    with pytest.raises(FastFisherError, match="its format is 99"):
        gradual.load_state_dict(gradual.state_dict() | {"format": 99})


def test_the_unit_of_time_is_remembered() -> None:
    gradual = pruner(classifier())
    for times in ({}, {"epoch": 1, "step": 1}):
        with pytest.raises(FastFisherError, match=r"step takes either epoch=... or step=...; got epoch="):
            gradual.step(DATA, **times)
    with pytest.raises(FastFisherError, match="epoch must be a number; got '1'"):
        gradual.step(DATA, epoch="1")  # type: ignore[arg-type]
    gradual.step(DATA, epoch=0)
    resumed = pruner(classifier())
    resumed.load_state_dict(gradual.state_dict())
    for one in (gradual, resumed):
        with pytest.raises(FastFisherError, match="this Pruner counts by epoch; got step=1"):
            one.step(DATA, step=1)


def test_an_end_before_the_end_is_told() -> None:
    model = classifier()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    gradual = pruner(model, [(0, 0.5), (5, 0.9)], method="magnitude")
    gradual.attach(optimizer)
    gradual.step(None, epoch=0)
    with pytest.warns(
        UserWarning, match=r"the schedule ends at a sparsity of 0.9, but training ended at 0.5"
    ):
        gradual.finalize()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5}, "Pruner takes no 'sparsity': the schedule says how sparse"),
        ({"eval_fn": len}, "Pruner takes no 'eval_fn'"),
        ({"blocksize": 5}, "Pruner has no option 'blocksize'; the closest is 'block_size'"),
        ({"method": "woodfish"}, "method must be one of 'woodfisher'"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1; got 0"),
        ({"targets": "conv"}, "targets=['conv'] matched none of"),
        ({"max_layer_sparsity": 0.5}, "sparsity=0.9 needs 599 zeros, but max_layer_sparsity leaves"),
        ({"memory_limit": "1 kB"}, "block_size=16 needs"),
        ({"schedule": 0.9}, "schedule must be a CubicSchedule or its like"),
    ],
)
def test_bad_input_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    model = classifier()
    before = picture(model)
    with pytest.raises(FastFisherError, match=re.escape(message)):
        pruner(model, **({"schedule": RAMP} | options))
    assert_same(before, picture(model))
