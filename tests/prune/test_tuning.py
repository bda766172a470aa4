"""The grid: judged on samples held out, the model as it was, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.prune import tune as tuning
from tests.prune.models import assert_same, batches, classifier, images, picture, train


def tune(model: nn.Module, **options: Any) -> ff.Tuning:
    defaults: dict[str, Any] = {
        "sparsity": 0.6,
        "num_grads": 20,
        "block_size": 16,
        "relative_damping": (0.1, 1.0),
        "absolute_damping": (1e-3,),
    }
    data = options.pop("data") if "data" in options else batches(*images(60), 8)
    return ff.tune(model, data, **(defaults | options))


def test_the_loss_is_that_of_a_run_on_the_samples_that_are_left() -> None:
    model = classifier()
    train(model, *images(60), epochs=5)
    inputs, labels = images(60)
    found = tune(model, held_out=0.25, num_recomputations=(0, 1))
    assert found.held_out == 15
    assert len(found.trials) == 6
    held = torch.arange(60) % 4 == 3
    for trial in found.trials:
        again = classifier()
        again.load_state_dict(model.state_dict())
        ff.prune(again, [(inputs[~held], labels[~held])], sparsity=0.6, **trial.settings)
        again.eval()
        loss = float(F.cross_entropy(again(inputs[held]), labels[held]).detach())
        assert trial.loss == pytest.approx(loss, rel=1e-4)
    losses = [trial.loss for trial in found.trials]
    assert found.winner.loss == min(losses)
    assert len(set(losses)) == len(losses)
    assert found.best == found.winner.settings
    model.eval()
    dense = float(F.cross_entropy(model(inputs[held]), labels[held]).detach())
    assert found.dense_loss == pytest.approx(dense, rel=1e-5)


def test_the_model_is_as_it_was() -> None:
    model = classifier()
    model.train()
    before = picture(model)
    tune(model)
    assert_same(before, picture(model))


def test_an_interrupt_leaves_the_model_as_it_was_and_a_second_run_goes_on(tmp_path: Path) -> None:
    model = classifier()
    before = picture(model)

    def stop(phase: str, done: int, total: int) -> None:
        assert (phase, total) == ("trials", 3)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, folder=tmp_path, progress=stop)
    assert_same(before, picture(model))
    noted = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert len(noted) == 2
    whole = tune(model)
    resumed = tune(model, folder=tmp_path)
    assert [trial.loss for trial in resumed.trials] == [trial.loss for trial in whole.trials]
    assert [trial.seconds for trial in resumed.trials[:2]] == [trial["seconds"] for trial in noted]


@pytest.mark.parametrize("change", ["weights", "data", "sparsity", "options"])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    tune(classifier(), folder=tmp_path)
    options: dict[str, Any] = {}
    if change == "data":
        options["data"] = batches(*images(60, seed=9), 8)
    elif change == "sparsity":
        options["sparsity"] = 0.61
    elif change == "options":
        options["update"] = "joint"
    with pytest.raises(FastFisherError, match="is of another run"):
        tune(classifier(seed=1 if change == "weights" else 0), folder=tmp_path, **options)


def test_a_damaged_record_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(FastFisherError, match="is no record of a tuning run"):
        tune(classifier(), folder=tmp_path)


def test_a_trial_that_breaks_down_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = tuning.prune

    def sometimes(*args: Any, **options: Any) -> ff.Report:
        if options["damping"] == 1.0:
            raise FisherError("lost its accuracy")
        return original(*args, **options)

    sometimes.__signature__ = tuning.inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(tuning, "prune", sometimes)
    model = classifier()
    before = picture(model)
    found = tune(model)
    assert_same(before, picture(model))
    assert [trial.error for trial in found.trials] == [None, "lost its accuracy", None]
    assert "lost its accuracy" in str(found)
    found.save(tmp_path)
    assert (tmp_path / "tune.png").stat().st_size > 1000
    with pytest.raises(FisherError, match="none of 1 trials gave a network: lost its accuracy"):
        tune(model, relative_damping=1.0, absolute_damping=None)


def test_held_out_batches_of_their_own() -> None:
    model = classifier()
    inputs, labels = images(24, seed=4)
    found = tune(model, held_out=batches(inputs, labels, 7))
    assert found.held_out == 24
    model.eval()
    assert found.dense_loss == pytest.approx(float(F.cross_entropy(model(inputs), labels).detach()), rel=1e-5)


def test_table_csv_and_heat_map(tmp_path: Path) -> None:
    found = tune(classifier(), block_size=(8, None), num_grads=(10, 20))
    found.save(tmp_path / "run")
    lines = (tmp_path / "run" / "tune.csv").read_text().splitlines()
    assert lines[0].startswith("damping_mode,damping,num_grads,block_size,num_recomputations,loss")
    assert len(lines) == 1 + 12
    axes = found.plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "relative 0.1",
        "relative 1",
        "absolute 0.001",
    ]
    assert len(axes.get_xticklabels()) == 4
    assert str(found).count("best") == 2


def test_a_stream_without_length_is_read_as_far_as_needed() -> None:
    def stream() -> Any:
        for i in range(10_000):
            yield images(8, seed=i)
        raise AssertionError("read to the end")

    found = tune(classifier(), data=stream())
    assert found.held_out == 20


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[:, 0], batch[1].float())


def test_other_options_go_to_prune() -> None:
    found = tune(
        classifier(), loss_fn=mse, method="woodtaylor", update="joint", targets=["8.weight"], scope="layer"
    )
    assert all(trial.loss is not None for trial in found.trials)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.1}, "tune takes no 'damping'"),
        ({"relative_damping": None, "absolute_damping": None}, "there is no damping to try"),
        ({"relative_damping": ()}, "relative_damping must hold at least one value, got ()"),
        ({"relative_damping": (0.1, -1.0)}, "damping must be a positive number; got -1.0"),
        ({"num_grads": (20, 0)}, "num_grads must be a whole number of at least 1; got 0"),
        ({"method": "wood"}, "method must be one of"),
        ({"held_out": 1.5}, "held_out must be a share between 0 and 1 or batches; got 1.5"),
        (
            {"num_grads": 50},
            "the largest trial needs 50 samples for gradients and some held out; the data leave 45",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(options: dict[str, Any], message: str) -> None:
    def never(phase: str, done: int, total: int) -> None:
        raise AssertionError("a trial ran")

    with pytest.raises(FastFisherError) as caught:
        tune(classifier(), progress=never, **options)
    assert message in str(caught.value)


def test_a_pattern_brings_its_sparsity_and_what_it_leaves_dense_counts_for_nothing() -> None:
    model = classifier()
    found = ff.tune(
        model, batches(*images(64), 16), pattern="2:4", relative_damping=(0.1, 1.0), absolute_damping=None,
        num_grads=32, block_size=16,
    )  # fmt: skip
    assert found.sparsity == 0.5
    assert len(found.trials) == 2
