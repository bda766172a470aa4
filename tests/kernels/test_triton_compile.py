"""Every Triton kernel compiles for every architecture we name, and the hot ones keep their numbers in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import tables

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")

# What the time of a pruning run goes into on a GPU.  The others prepare or finish, or serve blocks that no chip holds.
HOT = {
    "block_matvec._expand",
    "block_matvec._primal",
    "block_matvec._project",
    "blocked._update",
    "conv_weight_grads._conv",
    "dual_factor._gram",
    "factor._diagonal",
    "factor._downdate",
    "factor._product",
    "fisher_accumulate._accumulate",
    "fishleg_block_step._apply",
    "fishleg_block_step._gram",
    "fishleg_block_step._on_chip",
    "fishleg_block_step._project",
    "inverse_diagonal._dual",
    "inverse_diagonal._primal",
    "inverse_from_grads._build",
    "kron_matvec._multiply",
    "obs._apply",
    "obs._saliency",
    "obs._solve_on_chip",
    "prune_mask._count",
    "prune_mask._look",
    "prune_mask._remove",
    "rank_updates._rank_k_steps",
    "rank_updates._rank_one_steps",
    "small._accumulate",
    "small._build",
    "small._invert_in_place",
    "small._rank_one_steps",
    "spd_inverse._invert",
}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may take
# Another release assigns registers differently; the table was made for this one.
TUNED_FOR = "3.6."


def usages(path: Path) -> list[dict]:
    """What every kernel uses, by a process of its own: here the kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict] = json.loads(path.read_text())
    tables.show("Triton kernels, the largest use over all cases", largest(found))
    return found


def largest(rows: list[dict]) -> str:
    """One line for each kernel: registers, bytes spilled and bytes of shared memory on every architecture."""
    lines = [f"{'kernel':<36}" + "".join(f"sm_{a}: registers spilled shared  " for a in SHARED)]
    for kernel in sorted({row["kernel"] for row in rows}):
        line = f"{kernel + (' (hot)' if kernel in HOT else ''):<36}"
        for architecture in SHARED:
            mine = [row for row in rows if row["kernel"] == kernel and row["architecture"] == architecture]
            registers, spilled, shared = (
                max((row[key] for row in mine), default=0) for key in ("registers", "spilled", "shared")
            )
            line += f"{registers:>{len(str(architecture)) + 14}} {spilled:>7} {shared:>6}  "
        lines.append(line.rstrip())
    return "\n".join(lines)


@pytest.mark.slow
def test_every_kernel_compiles_and_hot_ones_do_not_spill(tmp_path: Path) -> None:
    rows = usages(tmp_path / "rows.json")
    assert {row["architecture"] for row in rows} == set(SHARED)
    assert {row["kernel"] for row in rows} >= HOT
    wrong = [
        f"{row['kernel']} {row['case']} sm_{row['architecture']}: {row['error']}"
        for row in rows
        if row["error"]
    ]
    assert not wrong, "\n".join(wrong)
    for row in rows:
        assert row["shared"] <= SHARED[row["architecture"]], row
    if not version("triton").startswith(TUNED_FOR):
        pytest.skip(f"tuned for Triton {TUNED_FOR}x, this is {version('triton')}")
    spilling = [
        f"{row['kernel']} {row['case']} sm_{row['architecture']}: {row['spilled']} bytes"
        for row in rows
        if row["kernel"] in HOT and row["spilled"]
    ]
    assert not spilling, "\n".join(spilling)
