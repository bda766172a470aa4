"""Where the tests run: on this processor, or with FASTFISHER_TEST_DEVICE=cuda on a GPU (make test-gpu)."""

from __future__ import annotations

import os

from tests.device import DEVICE

if DEVICE.type == "cpu":
    # Triton reads it when a kernel is defined: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
