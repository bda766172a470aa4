"""Imports run one way, `cli, integrations -> compat, io -> prune -> fisher -> ops -> kernels`, and never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastfisher"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room may import from itself and from the rooms behind it in this list.
ORDER = (
    "cli",
    "bench",
    "integrations",
    "compat",
    "io",
    "prune",
    "report_html",
    "runlog",
    "report",
    "fisher",
    "ops",
)
# What every room may import; these import none of the rooms.
SHARED = ("environment", "errors", "memory", "_build_info", "__version__")
# doctor looks at every room; the package root names them without importing them before they are asked for.
OUTSIDE = ("__init__", "doctor", "selftest")
# The registry of the ops and the kernels know each other: a kernel file registers its functions with the ops it serves.
KERNEL_ROOMS = ("ops", "kernels", "_native")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of fastfisher that a file imports anywhere, at the top or inside a function, except for typing only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = path.relative_to(PACKAGE.parent).parts[: -node.level]
                module = ".".join([*here, *module.split(".")]).strip(".")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("fastfisher.")}


def allowed_rooms(room: str) -> set[str]:
    if room in KERNEL_ROOMS:
        return {*KERNEL_ROOMS, *SHARED}
    if room in SHARED:
        return {*SHARED}
    if room in ORDER:
        return {*ORDER[ORDER.index(room) :], *SHARED}
    return set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room in OUTSIDE:
        return
    wrong = imported_rooms(path) - (allowed_rooms(room) | ({"doctor"} if room == "cli" else set()))
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}"


def test_only_environment_reads_the_environment() -> None:
    readers = [
        path.name for path in FILES if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert readers == ["environment.py"]


@pytest.mark.parametrize("module", ["fastfisher", "fastfisher.environment", "fastfisher.cli"])
def test_import_leaves_torch_alone(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_prune_stays_a_function() -> None:
    import fastfisher
    import fastfisher.prune.select

    assert callable(fastfisher.prune)
    assert {"prune", "plan", "FisherInverse"} <= set(dir(fastfisher))
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        _ = fastfisher.pruned
