"""The examples run, for fewer epochs, and end where they say; those with a Trainer are in tests/integrations."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

import pytest
import torch

import fastfisher as ff
from fastfisher import runlog

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_digits(tmp_path: Path) -> None:
    from examples.digits import main

    ((sparsity, dense, magnitude, ours),) = main(tmp_path, epochs=6, sparsities=[0.8])
    assert sparsity == 0.8
    assert dense > 0.9
    assert ours > max(magnitude, 0.85)
    assert {"accuracy.txt", "accuracy.png", "report.json"} <= {path.name for path in tmp_path.iterdir()}


def test_loop_beats_magnitude_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples import loop

    found = loop.main(tmp_path, epochs=12)
    assert found["woodtaylor"] > max(found["magnitude"], 0.8)
    folder = tmp_path / "woodtaylor"
    log = runlog.read(folder / "log.jsonl")
    assert [when for when, _ in log.steps] == [*range(3, 10)]
    assert log.scores[-1] == (11, {"accuracy": found["woodtaylor"]})

    class Killed(BaseException):
        pass

    save = ff.save_checkpoint

    def killed(*args: object, **states: object) -> None:
        if states["epoch"] == 6:
            raise Killed
        save(*args, **states)  # type: ignore[arg-type]

    monkeypatch.setattr(ff, "save_checkpoint", killed)
    with pytest.raises(Killed):
        loop.run(tmp_path / "killed", "woodtaylor", 12, 0.97)
    monkeypatch.setattr(ff, "save_checkpoint", save)
    again, accuracy = loop.run(tmp_path / "killed", "woodtaylor", 12, 0.97)
    assert accuracy == found["woodtaylor"]
    whole = loop.network()
    report = ff.load(folder / "model.safetensors", whole)
    assert report is not None
    assert report.num_zeros / report.num_weights == pytest.approx(0.97, abs=1e-3)
    for one, two in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, two)


def test_old_script_changes_one_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EXAMPLES / "old_script"
    before, after = (folder / "before.py", folder / "after.py")
    lines = difflib.ndiff(before.read_text().splitlines(), after.read_text().splitlines())
    assert [line for line in lines if line[0] != " " and line[0] != "?"] == [
        "- from original import EmpiricalBlockFisherInverse",
        "+ from fastfisher.compat import EmpiricalBlockFisherInverse",
    ]
    monkeypatch.syspath_prepend(folder)
    one, two = (list(runpy.run_path(str(path))["main"](epochs=8).parameters()) for path in (before, after))
    weights = [(p.detach(), q.detach()) for p, q in zip(one, two, strict=True) if p.dim() > 1]
    assert sum(int((p == 0).sum()) for p, _ in weights) == round(0.8 * sum(p.numel() for p, _ in weights))
    for p, q in weights:
        assert torch.equal(p == 0, q == 0)
        assert float((p - q).norm() / p.norm()) < 1e-4
