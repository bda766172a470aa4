"""The study of several processes: one run of tiny sizes, whose bytes are those that must be sent and little more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import ranks


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_a_tiny_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "ROUNDS", 1)
    assert ranks.main(["--tiny", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("ranks-*.json")
    (two,) = json.loads(stored.read_text())["rows"]
    gradients = 4 * ranks.NUM_GRADS / 2
    assert two["fewest"] == gradients + 4
    # blocks do not divide evenly
    assert two["sent"]["all_to_all_single"] == pytest.approx(gradients, rel=0.1)
    assert two["sent"]["broadcast"] == pytest.approx(5, rel=0.1)  # a float32 and a byte of the mask
    assert "bytes sent for each weight" in capsys.readouterr().out
