"""The study of how a build grows: its fits, its estimate, and one run of tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling


def test_exponents_of_powers() -> None:
    sizes = [10, 100, 1_000]
    assert scaling.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    rows = {"d": [{"point": (s, 4, 2), "seconds": s**1.2, "kernel_seconds": s} for s in sizes]}
    judged = scaling.judge(rows)
    assert judged["d"]["exponent"] == pytest.approx(1.2)
    assert not judged["d"]["passed"]
    assert judged["d, kernel alone"]["passed"]


def test_an_estimate_shares_the_weights_out() -> None:
    result = {"rows": [{"problem": scaling.FOR_ESTIMATE.name, "name": "ours", "median": 0.25502912}]}
    rows = {(row["weights"], row["gpus"]): row for row in scaling.estimate(result)}
    one, many = rows[10**9, 1], rows[10**9, 8]
    assert one["seconds"] == pytest.approx(10.0)
    assert many["seconds"] == pytest.approx(10.0 / 8)
    assert (one["received_bytes"], many["state_bytes"]) == (0, 25 * 10**9)
    assert scaling.estimate(None) == scaling.estimate({"rows": []}) == []


def test_a_tiny_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--tiny", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("scaling-*.json")
    result = json.loads(stored.read_text())
    assert list(result) == ["table", "date", "machine", "commit", "rows", "exponents", "estimate"]
    assert stored.with_suffix(".png").stat().st_size > 10_000
    assert set(result["exponents"]) == {"d", "d, kernel alone"}
    for rows in result["rows"].values():
        for row in rows:
            held, fewest = scaling.bytes_per_weight(row)
            assert min(row["seconds"], row["kernel_seconds"]) > 0
            assert 0 < fewest <= held
    assert "exponent of time" in capsys.readouterr().out
