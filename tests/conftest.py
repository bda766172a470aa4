"""Where the tests run: on this processor, or with FASTFISHER_TEST_DEVICE=cuda on a GPU (make test-gpu)."""

from __future__ import annotations

import os
import time

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: threads of several processes would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import tables
from tests.device import DEVICE

STARTED = time.time()

if DEVICE.type == "cpu":
    # Triton reads it when a kernel is defined: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the compilers say of the GPU kernels."""
    for title, text in tables.shown(STARTED).items():
        terminalreporter.section(title)
        terminalreporter.write(text)
