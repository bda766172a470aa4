"""Which table the benchmarks run, as an option of pytest."""

from __future__ import annotations

import pytest

from benchmarks.problems import TABLES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", choices=sorted(TABLES), default="full", help="the table of problems to run")
