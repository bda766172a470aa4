"""Every environment variable fastfisher reads: its name, its default, and what it does.

No other file of the package reads `os.environ`.  Variables are read when they are needed, so changing one inside a
running process takes effect at the next call.  Importing this file imports no other package.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastfisher.errors import FastFisherError


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it is called, what counts when it is unset, and one sentence about it."""

    name: str
    default: str
    sentence: str

    def get(self) -> str:
        """The value in the environment, or the default where it is unset or empty."""
        return os.environ.get(self.name, "").strip() or self.default


BACKEND = Variable(
    "FASTFISHER_BACKEND",
    "",
    "Forces one backend (reference, native, triton) for every op; it raises where that backend cannot run.",
)
NUM_THREADS = Variable(
    "FASTFISHER_NUM_THREADS",
    "",
    "Threads of the native kernels; unset means torch.get_num_threads().",
)
ISA = Variable(
    "FASTFISHER_ISA",
    "",
    "Forces the instruction set of the native kernels (portable, avx2, avx512, neon) instead of the best one found.",
)
TRITON_INTERPRET = Variable(
    "TRITON_INTERPRET",
    "",
    "Of Triton itself: 1 runs its kernels in an interpreter on CPU tensors, for tests; set it before the first import.",
)
BUILD = Variable(
    "FASTFISHER_BUILD",
    "auto",
    "Build time: auto goes on without what cannot be compiled, native fails when the extension cannot be, cuda also "
    "when its CUDA kernels cannot be, none never compiles.",
)
CUDA_ARCHS = Variable(
    "FASTFISHER_CUDA_ARCHS",
    "80;90;100",
    "Build time: GPU architectures to compile the CUDA kernels for; newer ones run the code of the last one.",
)

VARIABLES = (BACKEND, NUM_THREADS, ISA, TRITON_INTERPRET, BUILD, CUDA_ARCHS)

ISAS = ("portable", "avx2", "avx512", "neon")


def backend() -> str | None:
    """The forced backend, or None when the order table decides."""
    return BACKEND.get() or None


def triton_interpret() -> bool:
    """Whether Triton interprets its kernels, by the rules of Triton's own switch."""
    return TRITON_INTERPRET.get().lower() in ("1", "y", "yes", "on", "true")


def num_threads() -> int | None:
    """The number of kernel threads asked for, or None for torch's own number.  Raises FastFisherError below 1."""
    text = NUM_THREADS.get()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise FastFisherError(f"{NUM_THREADS.name} must be a whole number of at least 1, got {text!r}")
    return int(text)


def isa() -> str | None:
    """The forced instruction set, or None for the best the machine has.  Raises FastFisherError on an unknown name."""
    text = ISA.get().lower()
    if text and text not in ISAS:
        raise FastFisherError(f"{ISA.name} must be one of {', '.join(ISAS)}, got {text!r}")
    return text or None
