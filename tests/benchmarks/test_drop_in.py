"""The drop-in benchmark checks both answers before it prints a ratio."""

from __future__ import annotations

import pytest
import torch

from benchmarks import drop_in, rivals

TINY = ("--weights", "330", "--block-size", "20", "--num-grads", "150", "--repeats", "1")


@pytest.fixture(autouse=True)
def same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_both_answers_are_right_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    code = drop_in.main([*TINY])
    said = capsys.readouterr().out
    assert said.count("worst error") == 2
    ratio = float(said.splitlines()[-1].split("x")[0])
    assert code == (0 if ratio >= drop_in.BAR else 1)


def test_a_wrong_answer_gets_no_ratio(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals.ScriptLoop, "diag", lambda self: 1.001 * torch.ones(330))
    assert drop_in.main([*TINY]) == 1
    said = capsys.readouterr().out
    assert "script's loop is WRONG" in said
    assert "bar" not in said
