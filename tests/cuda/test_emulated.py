"""The CUDA kernels executed on the processor: right numbers under sanitizers, and no barrier that nobody misses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulated

pytestmark = pytest.mark.xdist_group("emulated GPU")


def run(program: Path) -> str:
    """What a program prints; it must end well."""
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The folder of the programs built with sanitizers."""
    if not emulated.available():
        pytest.skip(str(emulated.missing()))
    programs = {name: [f"{name}.cpp"] for name in ("test_emulate", "test_kernels")}
    return emulated.build("sanitized", programs, emulated.SANITIZE, emulated.SANITIZE)


def test_emulated_gpu_notices_mistakes(sanitized: Path) -> None:
    run(sanitized / "test_emulate")


def test_kernels_against_plain_loops(sanitized: Path) -> None:
    assert "passed" in run(sanitized / "test_kernels")


def test_every_barrier_is_missed_when_it_is_gone() -> None:
    if not emulated.available():
        pytest.skip(str(emulated.missing()))
    folder = emulated.build("fast", {"test_barriers": ["test_barriers.cpp"]}, emulated.FAST, [])
    assert "barriers in 14 kernels are missed" in run(folder / "test_barriers")
