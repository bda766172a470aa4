"""What `ff.plan` foretells is what a run takes: memory within a tenth, time within 30 %."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.machine import ROOT
from tests.prune.plan_run import CASES

ATTEMPTS = 10  # of the time, on a machine that does other things too


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_what_the_plan_says(case: str) -> None:
    command = [sys.executable, "-m", "tests.prune.plan_run", case, str(ATTEMPTS)]
    found = json.loads(
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    planned, real = found["bytes"]
    assert planned == pytest.approx(real, rel=0.1)
    assert (found["groups"] > 1) == (case == "groups")
    assert any(planned == pytest.approx(real, rel=0.3) for planned, real in found["seconds"]), found[
        "seconds"
    ]
