"""What a report prints, saves and reloads, and that its figures are those of the network."""

from __future__ import annotations

import builtins
import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.memory import format_bytes, free_bytes, parse_bytes, peak_bytes
from fastfisher.report import LayerRow, Report, align


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    data = [(torch.randn(32, 1, 6, 6), torch.randint(5, (32,)))]
    report = ff.prune(
        model,
        data,
        sparsity=0.75,
        num_grads=32,
        block_size=20,
        num_recomputations=0,
        seed=7,
        eval_fn=lambda m: {"accuracy": 0.5, "nonzero": sum(int((p != 0).sum()) for p in m.parameters())},
    )
    return model, report


def test_sizes_and_flops_follow_shrinkbench(pruned: tuple[nn.Module, Report]) -> None:
    model, report = pruned
    assert report.size == 36 + 320 + 5
    assert report.size_nz == sum(int((p != 0).sum()) for p in model.parameters()) == 361 - round(0.75 * 356)
    assert report.compression_ratio == pytest.approx(361 / report.size_nz)
    # two per multiply-add: 4 filters of 9 at 16 places, and a 64 x 5 matrix
    conv, linear = 2 * 4 * 9 * 16, 2 * 64 * 5
    assert report.flops == conv + linear
    density = [1 - row.sparsity for row in report.layers]
    assert report.flops_nz == pytest.approx(conv * density[0] + linear * density[1])
    assert report.theoretical_speedup == pytest.approx(report.flops / report.flops_nz)
    assert report.val_acc1 is None
    assert report.dense["nonzero"] == 361
    assert report.control["nonzero"] == report.pruned["nonzero"] == report.size_nz


def test_the_record_is_complete(pruned: tuple[nn.Module, Report]) -> None:
    _, report = pruned
    assert set(report.seconds) == {
        "gradients",
        "fisher",
        "inverse",
        "select",
        "update",
        "loss check",
        "evaluate",
    }
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.peak_memory is not None
    assert report.peak_memory > 10**7
    assert report.seed == 7
    assert report.versions["torch"] == str(torch.__version__)
    assert report.command
    assert report.data_fingerprint is not None
    assert len(report.data_fingerprint) == 16
    assert report.effective_grads is not None
    assert 1 <= report.effective_grads <= 32
    assert report.measured_change == pytest.approx(report.loss_pruned - report.loss_dense)  # type: ignore[operator]


def test_print_is_aligned_and_complete(
    pruned: tuple[nn.Module, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = pruned
    report.print()
    text = capsys.readouterr().out
    assert text == str(report) + "\n"
    for word in ("0.weight", "4×1×3×3", "75.00%", "accuracy", "dense", "magnitude", "predicted", "seed 7"):
        assert word in text
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert len(set(map(len, [lines[head], *lines[head + 2 : head + 4]]))) == 1


def test_save_and_load(pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, report = pruned
    folder = tmp_path / "new" / "folder"
    report.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["layers.csv", "layers.png", "report.json"]
    for path in (folder, folder / "report.json", str(folder)):
        assert Report.load(path) == report
    content = json.loads((folder / "report.json").read_text())
    for key in (
        "size",
        "size_nz",
        "compression_ratio",
        "flops",
        "flops_nz",
        "theoretical_speedup",
        "val_acc1",
    ):
        assert key in content
    with (folder / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], int(row["zeros"])) for row in rows] == [
        (row.name, row.zeros) for row in report.layers
    ]
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_each_layer(pruned: tuple[nn.Module, Report]) -> None:
    pytest.importorskip("matplotlib")
    _, report = pruned
    axes = report.plot_layers().axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [100 * row.sparsity for row in report.layers]
    )


def test_without_matplotlib_one_sentence_says_so(
    pruned: tuple[nn.Module, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = pruned
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.warns(UserWarning, match=r"layers.png was not written: .*pip install 'fastfisher\[viz\]'"):
        report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.csv", "report.json"]
    with pytest.raises(ImportError, match=r"pip install 'fastfisher\[viz\]'"):
        report.plot_layers()


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastFisherError, match="no report at"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FastFisherError, match="is not a report of fastfisher"):
        Report.load(tmp_path)


def test_few_effective_gradients_bring_a_warning() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    inputs = torch.randn(64, 6) * 1e-3
    inputs[0] = 100
    report = ff.prune(model, [(inputs, torch.randint(3, (64,)))], sparsity=0.5, num_grads=64, block_size=6)
    assert any(
        note.startswith("Effective number of gradients is 1 of 64: the model fits") for note in report.notes
    )
    assert "note: Effective number" in str(report)


def test_one_number_from_eval_fn_is_val_acc1() -> None:
    report = ff.prune(
        nn.Linear(6, 3), None, sparsity=0.5, method="magnitude", eval_fn=lambda m: torch.tensor(0.25)
    )
    assert report.val_acc1 == 0.25
    assert report.control is None
    assert report.flops is None
    assert "0.2500" in str(report)


def test_align() -> None:
    assert align([["a", "bb"], ["ccc", "d"]]) == "a    bb\n-------\nccc   d"
    assert LayerRow("x", (2, 2), 4, 0, 1).sparsity == 0.25


def test_bytes() -> None:
    assert [parse_bytes(v) for v in (5, "5", "2 kB", "1.5GB", "1 MiB")] == [
        5,
        5,
        2000,
        1_500_000_000,
        1 << 20,
    ]
    assert [format_bytes(v) for v in (12, 1234, 102e9, 3e15)] == ["12 B", "1.2 kB", "102.0 GB", "3000.0 TB"]
    for bad in ("", "GB", "5 apples", 0, -1, True, float("inf"), float("nan"), None):
        with pytest.raises(FastFisherError, match="a memory limit must be a positive number of bytes"):
            parse_bytes(bad)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    assert free_bytes(cpu) is None or free_bytes(cpu) > 0  # type: ignore[operator]
    assert peak_bytes(cpu) is None or peak_bytes(cpu) > 0  # type: ignore[operator]
