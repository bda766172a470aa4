"""The study of several processes: its picture, and one run of tiny sizes that sends little more than it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks import ranks


def test_the_picture_of_a_stored_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "ranks-here.json"
    rows = [
        {
            "processes": size,
            "seconds": 8 / size,
            "sent": {"broadcast": 5.0 * (size - 1)},
            "fewest": 4 * (size - 1),
        }
        for size in ranks.PROCESSES
    ]
    stored.write_text(json.dumps({"rows": rows}))
    figures: list[Figure] = []
    monkeypatch.setattr(ranks.plt, "close", figures.append)
    assert ranks.main(["--redraw", str(stored)]) == 0
    assert stored.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.undo()
    (figure,) = figures
    ranks.plt.close(figure)
    left, right = figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[2, 5], [4, 15]], [[2, 4], [4, 12]]]
    measured, shared = (line.get_xydata().tolist() for line in right.lines)
    assert measured == shared == [[1, 8], [2, 4], [4, 2]]
    assert right.get_title() == "exponent -1.00"


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_a_tiny_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "ROUNDS", 1)
    assert ranks.main(["--tiny", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("ranks-*.json")
    result = json.loads(stored.read_text())
    assert list(result) == ["table", "date", "machine", "commit", "settings", "rows"]
    assert stored.with_suffix(".png").stat().st_size > 10_000
    one, two = result["rows"]
    assert sum(one["sent"].values()) == one["fewest"] == 0
    gradients = 4 * ranks.NUM_GRADS / 2
    assert two["fewest"] == gradients + 4
    # blocks do not divide evenly
    assert two["sent"]["all_to_all_single"] == pytest.approx(gradients, rel=0.1)
    assert two["sent"]["broadcast"] == pytest.approx(5, rel=0.1)  # a float32 and a byte of the mask
    assert "bytes sent for each weight" in capsys.readouterr().out
