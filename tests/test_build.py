"""The build without a compiler, with a broken one, and switched off: the package works, and says why it is slower.

The same for the CUDA toolkit.  Where nothing is to be run, the compilers are scripts that only make the files.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def setup_file() -> ModuleType:
    """setup.py as a module."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("setup")
    finally:
        sys.path.remove(str(ROOT))


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build with these variables; without CUDA_HOME there is no toolkit."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FASTFISHER_BUILD", "FASTFISHER_CUDA_ARCHS", "CXX", "CUDA_PATH")
    }
    environment["CUDA_HOME"] = "/nowhere/cuda"
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
    return script(folder / "broken-c++", "echo 'csrc/bindings.cpp:1: error: out of ideas'\nexit 1\n")


def script(path: Path, text: str) -> Path:
    """A program for the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


MAKE_THE_OUTPUT = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'


def quick_compiler(folder: Path) -> str:
    """A C++ compiler that makes an empty file of everything."""
    return str(script(folder / "quick-c++", MAKE_THE_OUTPUT))


def toolkit(folder: Path, compiles: str = MAKE_THE_OUTPUT, known: str = "75 80 90 100") -> Path:
    """A CUDA toolkit of release 12.34 that knows some architectures and compiles by a piece of shell."""
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    answers = (
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 12.34, V12.34.5"; exit ;;\n'
        f'--list-gpu-arch) for arch in {known}; do echo "compute_$arch"; done; exit ;;\n'
        f'--dryrun) echo "#$ TOP={folder}/bin/.."; exit ;;\n'
        "esac\n"
    )
    script(folder / "bin" / "nvcc", answers + compiles)
    return folder


def build_info(source: Path) -> dict[str, object]:
    """What the build recorded."""
    values: dict[str, object] = {}
    exec((source / "built" / "fastfisher" / "_build_info.py").read_text(), values)
    return values


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
    assert "FASTFISHER_BUILD must be none, auto, native or cuda, got 'maybe'" in done.stderr


def test_a_failed_build_removes_the_extension_of_an_older_one(source: Path) -> None:
    stale = source / "built" / "fastfisher" / "_native.cpython-x.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert build(source, CXX="/nowhere/c++").returncode == 0
    assert not stale.exists()


@pytest.mark.parametrize("mode", ["auto", "native"])
def test_without_a_toolkit_the_rest_is_built(source: Path, tmp_path: Path, mode: str) -> None:
    done = build(source, CXX=quick_compiler(tmp_path), FASTFISHER_BUILD=mode)
    assert done.returncode == 0, done.stderr
    reason = "CUDA_HOME names /nowhere/cuda, which lacks bin/nvcc or include/cuda_runtime.h"
    assert f"without its CUDA kernels: {reason}" in done.stderr
    info = build_info(source)
    assert (info["REASON"], info["CUDA_REASON"]) == ("", reason)
    assert (info["CUDA_ARCHS"], info["CUDA_TOOLKIT"]) == ((), "")


def test_cuda_build_without_a_toolkit_fails(source: Path, tmp_path: Path) -> None:
    done = build(source, CXX=quick_compiler(tmp_path), FASTFISHER_BUILD="cuda")
    assert done.returncode != 0
    assert "FASTFISHER_BUILD=cuda, but CUDA_HOME names /nowhere/cuda" in done.stderr


def test_toolkit_is_taken_and_recorded(source: Path, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda home")
    done = build(source, CXX=quick_compiler(tmp_path), CUDA_HOME=str(home), FASTFISHER_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    assert f"CUDA kernels: {home} (12.34.5) for sm_80, sm_90, sm_100" in done.stderr
    info = build_info(source)
    assert info["CUDA_REASON"] == ""
    assert info["CUDA_ARCHS"] == ("80", "90", "100")
    assert info["CUDA_TOOLKIT"] == f"{home} (12.34.5)"


def test_unknown_architectures_are_named_and_left_out(source: Path, tmp_path: Path) -> None:
    home = str(toolkit(tmp_path / "cuda", known="75 80 90"))
    variables = {"CXX": quick_compiler(tmp_path), "CUDA_HOME": home}
    done = build(source, FASTFISHER_CUDA_ARCHS="12.5;90 80", **variables)
    assert done.returncode == 0, done.stderr
    assert "does not know sm_125: left out" in done.stderr
    assert build_info(source)["CUDA_ARCHS"] == ("80", "90")
    assert build(source, FASTFISHER_CUDA_ARCHS="125", **variables).returncode == 0
    assert "knows none of the architectures 125" in str(build_info(source)["CUDA_REASON"])
    wrong = build(source, FASTFISHER_CUDA_ARCHS="hopper", **variables)
    assert wrong.returncode != 0
    assert "FASTFISHER_CUDA_ARCHS must be numbers such as 80;90;100, got hopper" in wrong.stderr


def test_failing_nvcc(source: Path, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", compiles="echo 'tile.cuh(7): error: out of registers'; exit 1")
    variables = {"CXX": quick_compiler(tmp_path), "CUDA_HOME": str(home)}
    for mode in ("native", "cuda"):
        done = build(source, FASTFISHER_BUILD=mode, **variables)
        assert done.returncode != 0
        assert f"FASTFISHER_BUILD={mode}, but {home}/bin/nvcc failed: tile.cuh(7): error" in done.stderr
    assert build(source, **variables).returncode == 0
    info = build_info(source)
    assert info["REASON"] == ""
    assert info["CUDA_REASON"] == f"{home}/bin/nvcc failed: tile.cuh(7): error: out of registers"


def test_toolkit_behind_a_script_on_the_path(
    setup_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert setup_file.find_toolkit().folder == home

    script(tmp_path / "bin" / "nvcc", "exit 1\n")  # one that says nothing and is no part of a toolkit
    monkeypatch.setattr(setup_file, "TOOLKITS", ())
    with pytest.raises(setup_file.CudaUnavailableError, match="no CUDA toolkit was found"):
        setup_file.find_toolkit()
    monkeypatch.setattr(setup_file, "TOOLKITS", (home,))
    assert setup_file.find_toolkit().release == "12.34.5"
    (tmp_path / "bin" / "nvcc").unlink()
    assert setup_file.find_toolkit().folder == home


def test_the_extension_here_holds_what_the_record_says() -> None:
    info = pytest.importorskip("fastfisher._build_info", reason="nothing was built here")
    if info.CUDA_REASON:
        pytest.skip(info.CUDA_REASON)
    native = importlib.import_module("fastfisher._native")
    assert all(
        hasattr(native, f"cuda_{op}") for op in ("spd_inverse", "inverse_from_grads", "sherman_morrison")
    )


def test_every_isa_file_has_its_flags(setup_file: ModuleType) -> None:
    stems = {path.stem for path in (ROOT / "csrc" / "cpu").glob("kernels_*.cpp")}
    assert stems == {*setup_file.ISA_FLAGS, "kernels_portable"}
    assert "-ffast-math" not in " ".join(setup_file.COMMON)
    assert "fast" not in " ".join(setup_file.CUDA)
