"""Which table the benchmarks run, as an option of pytest."""

from __future__ import annotations

import pytest

from benchmarks.problems import SWEEPS, TABLES


def pytest_addoption(parser: pytest.Parser) -> None:
    tables = sorted(set(TABLES) - set(SWEEPS))  # those of a GPU are worker.py's
    parser.addoption("--table", choices=tables, default="full", help="the table of problems to run")
