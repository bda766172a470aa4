"""The callback in the Trainer of transformers: real runs of a small BERT, whole, and interrupted and resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # without it there is no Trainer

from fastfisher.integrations.transformers import STATE, PruningCallback  # noqa: E402

RAMP = ff.CubicSchedule(0.3, 0.8, begin=1, end=3)
EPOCHS = 5
STEPS = 6  # in one epoch


class Interrupted(Exception):
    """The run was killed."""


class Kill(transformers.TrainerCallback):
    """Ends the process, as it were, at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


class Watch(transformers.TrainerCallback):
    """Collects the sparsity at the end of every epoch, and asserts the zeros after every step."""

    def __init__(self, callback: PruningCallback) -> None:
        self.callback = callback
        self.sparsities: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        assert_zero(model, self.callback)

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.sparsities.append(sparsity(model, self.callback))


def samples() -> list[dict[str, Any]]:
    """Sentences of 8 words, whose label is whether the first is in the upper half of the vocabulary."""
    words = torch.randint(32, (48, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row.tolist(), "labels": int(row[0] >= 16)} for row in words]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    eval_dataset = samples()[:8] if "eval_strategy" in changes else None
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "save_strategy": "epoch",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        },
    )
    return transformers.Trainer(
        model, args, train_dataset=samples(), eval_dataset=eval_dataset, callbacks=callbacks
    )


def pruning(**changes: Any) -> PruningCallback:
    return PruningCallback(**{"schedule": RAMP, "num_grads": 16, "block_size": 16, **changes})


def sparsity(model: nn.Module, callback: PruningCallback) -> float:
    weights = [model.get_parameter(name) for name in callback.pruner.masks]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def assert_zero(model: nn.Module, callback: PruningCallback) -> None:
    for name, mask in callback.pruner.masks.items():
        assert not bool(model.get_parameter(name).detach()[~mask].any()), name


def assert_same_run(one: nn.Module, a: PruningCallback, two: nn.Module, b: PruningCallback) -> None:
    """Weights and masks bit for bit, and as many reports."""
    theirs: dict[str, Tensor] = two.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    assert all(torch.equal(mask, b.pruner.masks[name]) for name, mask in a.pruner.masks.items())
    assert [report.num_zeros for report in a.pruner.reports] == [
        report.num_zeros for report in b.pruner.reports
    ]


def test_sparsity_is_reached_and_held(tmp_path: Path) -> None:
    model, callback = bert(), pruning(strict=True)
    watch = Watch(callback)
    run = trainer(model, tmp_path, [callback, watch], save_strategy="no")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(its mask says zero|schedule ends)")
        run.train()
    expected = [0, *(RAMP(epoch) for epoch in (1, 2, 3, 3))]
    assert watch.sparsities == pytest.approx(expected, abs=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not run.optimizer.optimizer._optimizer_step_post_hooks
    assert list(model.state_dict()) == list(bert().state_dict())


def test_pruning_changes_nothing_else_of_a_run(tmp_path: Path) -> None:
    """The order of the samples and the draws of dropout are those of a run without it."""
    plain, model = bert(), bert()
    trainer(plain, tmp_path, [], save_strategy="no", num_train_epochs=3).train()
    callback = pruning(schedule=[(1, 1e-9)])  # takes gradients, and then removes no weight
    trainer(model, tmp_path, [callback], save_strategy="no", num_train_epochs=3).train()
    assert [report.num_zeros for report in callback.pruner.reports] == [0]
    assert callback.pruner.reports[0].effective_grads
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("killed", [2 * STEPS + 2, 4 * STEPS])
@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, by: str, killed: int) -> None:
    schedule = RAMP if by == "epoch" else ff.LinearSchedule(0.2, 0.8, begin=3, end=27, every=8)
    # one that is saved in the middle of epochs too
    saving = {"save_strategy": "steps", "save_steps": 4}
    options = {"schedule": schedule, "by": by}
    whole, first = bert(), pruning(**options)
    trainer(whole, tmp_path / "whole", [first], **saving).train()
    cut = trainer(bert(), tmp_path / "cut", [pruning(**options), Kill(killed)], **saving)
    with pytest.raises(Interrupted):
        cut.train()
    folder = tmp_path / "cut" / f"checkpoint-{killed // 4 * 4}"
    assert (folder / STATE).is_file()
    resumed, second = bert(), pruning(strict=True, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training goes on")
        trainer(resumed, tmp_path / "cut", [second], **saving).train(resume_from_checkpoint=True)
    assert len(second.pruner.reports) == len(first.pruner.reports) > 2
    assert_same_run(whole, first, resumed, second)


def test_a_checkpoint_elsewhere_is_named(tmp_path: Path) -> None:
    saving = {"num_train_epochs": 2}
    trainer(bert(), tmp_path / "one", [pruning()], **saving).train()
    folder = tmp_path / "one" / f"checkpoint-{2 * STEPS}"
    with pytest.warns(UserWarning, match=r"training goes on at step 12, but there is no .*two.*pruner\.pt"):
        trainer(bert(), tmp_path / "two", [pruning()]).train(resume_from_checkpoint=str(folder))
    callback = pruning(checkpoint=folder)
    trainer(bert(), tmp_path / "two", [callback]).train(resume_from_checkpoint=str(folder))
    assert len(callback.pruner.reports) == 3
    (tmp_path / "three").mkdir()
    trainer(bert(), tmp_path / "three", [pruning(seed=7, method="random")], **saving).train()
    other = tmp_path / "three" / f"checkpoint-{2 * STEPS}"
    (other / STATE).replace(tmp_path / STATE)
    torch.save(torch.load(folder / STATE), other / STATE)
    with pytest.raises(FastFisherError, match="belong to other weights"):
        trainer(bert(), tmp_path / "three", [pruning()]).train(resume_from_checkpoint=True)
    with pytest.raises(FastFisherError, match="there is no folder"):
        trainer(bert(), tmp_path, [pruning(checkpoint=tmp_path / "none")]).train(
            resume_from_checkpoint=str(folder)
        )


def test_the_best_checkpoint_keeps_its_own_masks(tmp_path: Path) -> None:
    class Falling(transformers.TrainerCallback):
        """A score that is best after the second epoch."""

        def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Any, **kwargs: Any) -> None:
            metrics["eval_score"] = float(round(state.epoch) == 2)

    model, callback = bert(), pruning()
    run = trainer(
        model,
        tmp_path,
        [Falling(), callback],
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    with pytest.warns(
        UserWarning, match=r"the schedule ends at a sparsity of 0.8, but training ended at 0.3"
    ):
        run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{2 * STEPS}")
    assert sparsity(model, callback) == pytest.approx(0.3, abs=1e-3)


def test_a_pruner_made_before_and_data_of_its_own(tmp_path: Path) -> None:
    model = bert()
    read = []

    class Data:
        def __iter__(self) -> Any:
            read.append(True)
            ids = torch.tensor([sample["input_ids"] for sample in samples()])
            return iter([{"input_ids": ids, "labels": torch.tensor([s["labels"] for s in samples()])}])

    gradual = ff.Pruner(model, schedule=[(0, 0.5)], num_grads=16, block_size=16)
    callback = PruningCallback(gradual, data=Data())
    trainer(model, tmp_path, [callback], num_train_epochs=1, gradient_accumulation_steps=2).train()
    assert callback.pruner is gradual
    assert read
    assert gradual.sparsity == pytest.approx(0.5, abs=1e-3)
    assert_zero(model, callback)
    with pytest.raises(FastFisherError, match="another model than the BertForSequenceClassification"):
        trainer(bert(), tmp_path, [PruningCallback(gradual)]).train()


def test_bad_input_is_said_before_training() -> None:
    gradual = ff.Pruner(bert(), schedule=[(0, 0.5)])
    for arguments, options, match in [
        ([], {}, "at least schedule"),
        ([gradual], {"schedule": RAMP}, "not both; got 'schedule' too"),
        ([{"schedule": RAMP}], {}, "takes a Pruner, or its keywords by name"),
        ([gradual], {"by": "batch"}, "by must be 'epoch' or 'step'; got 'batch'"),
    ]:
        with pytest.raises(FastFisherError, match=match):
            PruningCallback(*arguments, **options)


def test_the_example_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from examples.trainer import main

    one = main(str(tmp_path), epochs=4).pruner
    assert one.sparsity == pytest.approx(0.8, abs=1e-3)
    two = main(str(tmp_path), epochs=4).pruner
    assert all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items())
