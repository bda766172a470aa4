"""The build without a compiler, with a broken one, and switched off: the package works, and says why it is slower."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "fastfisher")

PRUNE_A_LAYER = """
import torch
import fastfisher as ff
from fastfisher import _build_info

print(ff.__file__)
print(_build_info.REASON)
torch.manual_seed(0)
model = torch.nn.Linear(6, 4)
report = ff.prune(model, [(torch.randn(32, 6), torch.randint(0, 4, (32,)))], sparsity=0.5, num_grads=32, block_size=6)
assert report.num_zeros == int((model.weight == 0).sum()) == 12
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, without anything built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                copy / name,
                ignore=shutil.ignore_patterns("__pycache__", "_native*", "_build_info.py"),
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("FASTFISHER_BUILD", "CXX")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "built"],
        cwd=source,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def use(source: Path) -> list[str]:
    """Prune with the package in `built`; its file and the reason it keeps are returned."""
    done = subprocess.run(
        [sys.executable, "-c", PRUNE_A_LAYER],
        cwd=source / "built",
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def failing_compiler(folder: Path) -> Path:
    """A compiler that is there and cannot compile."""
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\necho 'csrc/bindings.cpp:1: error: out of ideas'\nexit 1\n")
    path.chmod(0o755)
    return path


def test_switched_off_build_is_pure_pytorch(source: Path) -> None:
    assert build(source, FASTFISHER_BUILD="none").returncode == 0
    assert not list((source / "built").rglob("_native*"))
    file, reason = use(source)
    assert Path(file).is_relative_to(source)
    assert "FASTFISHER_BUILD=none" in reason


def test_missing_compiler_leaves_a_working_package_and_one_sentence(source: Path) -> None:
    done = build(source, CXX="/nowhere/c++")
    assert done.returncode == 0
    assert (
        "without its native kernels: the C++ compiler named by CXX was not found: /nowhere/c++" in done.stderr
    )
    _, reason = use(source)
    assert reason == "the C++ compiler named by CXX was not found: /nowhere/c++"


def test_failing_compiler_is_quoted(source: Path, tmp_path: Path) -> None:
    assert build(source, CXX=str(failing_compiler(tmp_path))).returncode == 0
    reason = (source / "built" / "fastfisher" / "_build_info.py").read_text()
    assert "failed: csrc/bindings.cpp:1: error: out of ideas" in reason


def test_native_build_fails_loudly(source: Path) -> None:
    done = build(source, FASTFISHER_BUILD="native", CXX="/nowhere/c++")
    assert done.returncode != 0
    assert "FASTFISHER_BUILD=native, but the C++ compiler named by CXX was not found" in done.stderr


def test_unknown_build_mode_is_refused(source: Path) -> None:
    done = build(source, FASTFISHER_BUILD="maybe")
    assert done.returncode != 0
    assert "FASTFISHER_BUILD must be none, auto or native, got 'maybe'" in done.stderr


def test_a_failed_build_removes_the_extension_of_an_older_one(source: Path) -> None:
    stale = source / "built" / "fastfisher" / "_native.cpython-x.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert build(source, CXX="/nowhere/c++").returncode == 0
    assert not stale.exists()


def test_every_isa_file_has_its_flags() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        import setup
    finally:
        sys.path.remove(str(ROOT))
    stems = {path.stem for path in (ROOT / "csrc" / "cpu").glob("kernels_*.cpp")}
    assert stems == {*setup.ISA_FLAGS, "kernels_portable"}
    assert "-ffast-math" not in " ".join(setup.COMMON)
