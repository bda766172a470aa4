"""The study of per-sample gradients: one run of few samples, its bar, and the memory it states."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gradients


def test_a_tiny_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "apart", lambda name, k: {})
    assert gradients.main(["--samples", "3", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("gradients-*.json")
    result = json.loads(stored.read_text())
    assert list(result) == ["table", "date", "machine", "commit", "threads", "rows", "bar"]
    for row in result["rows"].values():
        assert min(row["seconds"].values()) > 0
        assert max(row["errors"].values()) < gradients.AGREES
        assert not any("torch.func" in how or "vmap" in how for how in row["how"])
    assert "asked at least 2.5x" in capsys.readouterr().out


def test_a_wrong_result_passes_no_bar() -> None:
    seconds = dict.fromkeys(gradients.WAYS, 1.0) | {gradients.OURS: 0.1}
    for error, passed in ((1e-6, True), (1e-2, False)):
        row = {"seconds": seconds, "errors": {gradients.OURS: error}}
        assert gradients.judge({"net": row}, "cpu")["passed"] == passed


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
@pytest.mark.parametrize("network", ["ResNet-20, 32 x 32", "MLP 784-500-500-10"])
def test_the_peak_is_within_what_is_allowed_for(network: str) -> None:
    found = gradients.apart(network, 48)
    assert found["rows_bytes"] < found["peak_bytes"] <= found["allowed_bytes"]
