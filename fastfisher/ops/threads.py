"""Who uses how many threads: torch's own operations, and the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from fastfisher import environment

_kernel_threads: ContextVar[int | None] = ContextVar("fastfisher_kernel_threads", default=None)


def kernel_threads() -> int:
    """The number of threads for a kernel: FASTFISHER_NUM_THREADS, else what torch is set to."""
    return _kernel_threads.get() or environment.num_threads() or torch.get_num_threads()


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Run torch's own operations on one thread meanwhile; kernels keep their number.

    Two reasons: the matrix routines behind torch round differently on another number of threads, and the idle threads
    of torch's pool spin for milliseconds on the cores that the next kernel needs.
    """
    threads = torch.get_num_threads()
    token = _kernel_threads.set(kernel_threads())
    try:
        if threads > 1:
            torch.set_num_threads(1)
        yield
    finally:
        _kernel_threads.reset(token)
        if threads > 1:
            torch.set_num_threads(threads)
