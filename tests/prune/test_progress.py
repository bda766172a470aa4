"""The line of progress: phase, share and remaining time, on terminals and where it is asked for."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.prune import progress
from tests.prune.models import batches, classifier, images

DATA = batches(*images(64), 16)
OPTIONS: dict[str, Any] = {"num_grads": 32, "block_size": 16}


class Terminal(io.StringIO):
    """A standard error that is a terminal, or not."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real

    def isatty(self) -> bool:
        return self.real


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a call draws, at once and always."""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)

    def draw(call: Callable[[], Any], real: bool = True) -> str:
        error = Terminal(real)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", error)
            call()
        return error.getvalue()

    return draw


def prune(**options: Any) -> Callable[[], Any]:
    return lambda: ff.prune(classifier(), DATA, sparsity=0.75, num_recomputations=2, **OPTIONS, **options)


def test_a_line_tells_phase_share_and_remaining_time(shown: Callable[..., str]) -> None:
    drawn = shown(prune(eval_fn=lambda model: 1.0))
    found = re.findall(
        r"prune to 75 %: ([a-z]+(?: [a-z]+)?) +(\d+)%\|.{20}\| \d\d:\d\d<(\d\d:\d\d|\?)", drawn
    )
    assert {"gradients", "fisher", "inverse", "select", "update", "evaluate"} <= {
        phase for phase, *_ in found
    }
    shares = [int(share) for _, share, _ in found]
    assert (shares[0], shares[-1]) == (0, 100)
    assert shares == sorted(shares)
    assert {33, 67} <= set(shares)
    assert any(":" in remaining for *_, remaining in found)
    assert drawn.endswith("\r")  # the line is gone when the call is over
    assert "\n" not in drawn


def test_it_is_shown_on_terminals_and_where_it_is_asked_for(shown: Callable[..., str]) -> None:
    assert shown(prune(), real=False) == ""
    assert shown(prune(progress=False)) == ""
    assert "inverse" in shown(prune(progress=True), real=False)
    seen: list[tuple[str, int, int]] = []
    assert shown(prune(progress=lambda *event: seen.append(event)), real=False) == ""
    assert seen[-1] == ("gradients", 96, 96)
    with pytest.raises(
        FastFisherError, match=r"progress must be True, False, None, or a function .* got 'yes'"
    ):
        prune(progress="yes")()


def test_what_is_over_at_once_shows_nothing(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 60)
    assert shown(prune()).strip() == ""


@pytest.mark.filterwarnings("ignore:no optimizer is attached")
def test_gradual_steps_and_tuning_show_it(shown: Callable[..., str]) -> None:
    pruner = ff.Pruner(classifier(), schedule=[(1, 0.5), (3, 0.875)], **OPTIONS)
    assert shown(lambda: pruner.step(DATA, epoch=0)) == ""
    assert "epoch 1: prune to 50 %: inverse " in shown(lambda: pruner.step(DATA, epoch=1))
    assert "epoch 4: prune to 87.5 %: gradients " in shown(lambda: pruner.step(DATA, epoch=4))
    silent = ff.Pruner(classifier(), schedule=[(1, 0.5)], progress=False, **OPTIONS)
    assert shown(lambda: silent.step(DATA, epoch=1)) == ""
    drawn = shown(
        lambda: ff.tune(
            classifier(), DATA, sparsity=0.5, relative_damping=(0.1, 1), absolute_damping=None, **OPTIONS
        )
    )
    assert "tune: trials  50%" in drawn
    assert "prune to" not in drawn
