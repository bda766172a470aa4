"""The log of a gradual run: one line a step, written at once, read back as reports; repeated lines count once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastfisher as ff
from fastfisher import runlog
from fastfisher.errors import FastFisherError
from tests.prune.models import batches, classifier, images

DATA = batches(*images(48), 16)


class Writer:
    """What a SummaryWriter offers."""

    def __init__(self) -> None:
        self.found: list[tuple[str, float, float]] = []

    def add_scalar(self, tag: str, value: float, when: float) -> None:
        self.found.append((tag, value, when))


def pruner(log: Path | None, writer: Writer | None = None) -> ff.Pruner:
    return ff.Pruner(
        classifier(), schedule=[(1, 0.5), (3, 0.8)], num_grads=16, block_size=16, log=log, writer=writer
    )


@pytest.mark.filterwarnings("ignore:no optimizer is attached")
def test_a_line_for_each_step_and_record(tmp_path: Path) -> None:
    path, writer = tmp_path / "new" / "run.jsonl", Writer()
    gradual = pruner(path, writer)
    assert path.read_bytes() == b""
    for epoch in range(5):
        before = path.read_bytes()
        report = gradual.step(DATA, epoch=epoch)
        assert (path.read_bytes() != before) == (report is not None)
        gradual.record({"accuracy": epoch / 8}, epoch=epoch)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["when"], "report" in line) for line in lines] == [
        (0, False), (1, True), (1, False), (2, False), (3, True), (3, False), (4, False),
    ]  # fmt: skip
    assert {line["unit"] for line in lines} == {"epoch"}
    log = runlog.read(path)
    assert log.steps == list(zip((1, 3), gradual.reports, strict=True))
    assert log.scores == [(epoch, {"accuracy": epoch / 8}) for epoch in range(5)]

    first = gradual.reports[0]
    assert writer.found[:5] == [
        ("fastfisher/accuracy", 0.0, 0),
        ("fastfisher/sparsity", 333 / 666, 1),
        ("fastfisher/loss before pruning", first.loss_dense, 1),
        ("fastfisher/loss after pruning", first.loss_pruned, 1),
        ("fastfisher/accuracy", 0.125, 1),
    ]


def test_what_a_killed_run_left_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def record(*whens: float) -> None:
        for when in whens:
            runlog.append(path, "step", when, scores={"a": when + len(path.read_bytes())})

    def found() -> list[float]:
        return [when for when, _ in runlog.read(path).scores]

    path.touch()
    record(0, 1, 2, 3)
    assert found() == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:-9])
    assert found() == [0, 1, 2]
    record(2)
    assert found() == [0, 1, 2]
    assert runlog.read(path).scores[-1][1]["a"] > 200  # the later of the two
    record(1)
    assert found() == [0, 1]
    assert path.read_bytes().count(b"\n") == 6


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for content, message in (
        (None, "there is no file"),
        ("", "holds no line of a log"),
        ("no log\n", "holds no line of a log"),
        ("[1]\n", "line 1 of .* is none of a log of ff.Pruner"),
        ('{"unit": "epoch", "when": "1"}\n', "line 1 of .* is none of a log"),
        ('{"unit": "epoch", "when": 1, "report": {}}\n', "is no log of ff.Pruner: 'layers'"),
        ('{"unit": "epoch", "when": 1, "scores": {"a": "b"}}\n', "is no log of ff.Pruner"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(FastFisherError, match=message):
            runlog.read(path)


@pytest.mark.filterwarnings("ignore:no optimizer is attached")
def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastFisherError, match=r"log='.*run.jsonl' cannot be written: "):
        pruner(tmp_path / "file" / "run.jsonl")
    with pytest.raises(FastFisherError, match=re.escape("record needs a log or a writer: Pruner(model")):
        pruner(None).record(0.5, epoch=0)
    gradual = pruner(tmp_path / "run.jsonl")
    with pytest.raises(FastFisherError, match="scores must be a number or numbers by name; got 'good'"):
        gradual.record("good", epoch=0)  # type: ignore[arg-type]

    def full(*args: object, **content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog, "append", full)
    with pytest.warns(UserWarning, match=r"run.jsonl' lacks a line: No space left on device"):
        assert gradual.step(DATA, epoch=1) is not None  # the training goes on
    assert gradual.sparsity == 0.5
