"""The CUDA ops on CPU tensors: the files of csrc/cuda compiled against emulate.h and called through ctypes.

`run(op, *args)` takes an op's arguments as its schema lists them; `why_not(op, *args)` says what the kernels cannot do.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock  # torch brings it along
from torch import Tensor

from fastfisher.kernels import cuda
from fastfisher.kernels.native import DTYPE_CODES

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda"
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402  (the build of the extension, from the folder above)

# fma() is a function of the C library, and slow, where the processor's own is not asked for. ivopts of g++ 12 rewrites
# addresses so that its later passes take a function that stores for one that does not, and drop its calls.
FAST = ["-O2", "-march=native", "-fno-ivopts"]
SANITIZE = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def build(name: str, programs: dict[str, list[str]], flags: list[str], link: list[str]) -> Path:
    """Compile the kernels for the processor and link each program with files of this folder; returns their folder."""
    folder = ROOT / "build" / "emulated" / name
    folder.mkdir(parents=True, exist_ok=True)
    kernels = {path: ["-x", "c++"] for path in setup.cuda_sources()}
    with FileLock(folder / "lock"):  # tests run in several processes
        setup.compile_and_link(
            {
                folder / program: {**kernels, **{HERE / source: [] for source in sources}}
                for program, sources in programs.items()
            },
            folder=folder,
            flags=[
                *("-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
                *(f"-I{path}" for path in (HERE / "include", HERE, ROOT / "csrc", ROOT / "tests")),
                *flags,
            ],
            link=link,
        )
    return folder


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build("library", {"kernels.so": ["entry.cpp"]}, FAST, ["-shared"]) / "kernels.so"))


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why nothing can be emulated here, or None; compiles on the first call."""
    try:
        _library()
    except setup.BuildUnavailableError as error:
        return str(error)
    return None


def available() -> bool:
    """Whether the kernels could be compiled for this processor."""
    return missing() is None


def set_seed(seed: int) -> None:
    """Choose the order in which the threads of a block take turns."""
    _library().set_seed(ctypes.c_uint32(seed))


def last_launch() -> tuple[int, int]:
    """Threads and bytes of shared memory of a thread block of the last launch."""
    threads, shared = ctypes.c_int64(), ctypes.c_int64()
    _library().last_launch(ctypes.byref(threads), ctypes.byref(shared))
    return threads.value, shared.value


def _call(name: str, *args: object) -> None:
    """Call a function of entry.cpp; tensors are handed over by address, None is a null pointer."""

    def convert(arg: object) -> object:
        if isinstance(arg, Tensor):
            return ctypes.c_void_p(arg.data_ptr())
        if isinstance(arg, bool):
            return ctypes.c_bool(arg)
        return {int: ctypes.c_int64, float: ctypes.c_double}.get(type(arg), ctypes.c_void_p)(arg)  # type: ignore[arg-type]

    code = getattr(_library(), name)(*map(convert, args))
    if code != 0:
        raise RuntimeError(f"{name} returned the CUDA error {code}")


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64


def _grads(grads: Tensor) -> tuple[object, ...]:
    return grads, DTYPE_CODES[grads.dtype], grads.shape[0], grads.stride(0)


def spd_inverse_(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    """As the op."""
    count, size = matrix.shape[:2]
    _call("spd_inverse", _is_double(matrix), matrix, count, size, float(damping), condition, amplification)


def sherman_morrison_(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """As the op."""
    count, size = f_inv.shape[:2]
    _call(
        "sherman_morrison",
        *(_is_double(f_inv), f_inv, *_grads(grads), blocks, count, size, float(num_grads)),
    )


# On a GPU the native backend takes one gradient after the other.
def woodbury_(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """As the op."""
    sherman_morrison_(f_inv, grads, blocks, num_grads)


def fisher_accumulate_(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """As the op."""
    count, size = fisher.shape[:2]
    _call("fisher_accumulate", fisher, *_grads(grads), blocks, count, size, float(num_grads))


def fishleg_block_step_(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    """As the op."""
    count, size = root.shape[:2]
    _call(
        "fishleg_block_step",
        *(_is_double(root), root, top, *_grads(grads), blocks, count, size),
        *(float(num_grads), float(damping), float(rate), loss, largest),
    )


def obs_solve_(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    mask: Tensor,
    failed: Tensor,
) -> None:
    """As the op."""
    count, size = state.shape[:2]
    _call("obs_solve", _is_double(weight), weight, state, blocks, count, size, mask, failed)


def inverse_from_grads(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    """As the op."""
    count, size = f_inv.shape[:2]
    _call(
        "inverse_from_grads",
        *(_is_double(f_inv), f_inv, None, *_grads(grads), blocks, count, size),
        *(float(num_grads), float(damping), condition, amplification),
    )


def inverse_diagonal_from_grads(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    """As the op."""
    _call(
        "inverse_from_grads",
        *(_is_double(inv_diag), None, inv_diag, *_grads(grads), blocks, blocks.shape[0], block_size),
        *(float(num_grads), float(damping), condition, amplification),
    )


OPS = {
    function.__name__: function
    for function in (
        spd_inverse_,
        sherman_morrison_,
        woodbury_,
        fisher_accumulate_,
        fishleg_block_step_,
        obs_solve_,
        inverse_from_grads,
        inverse_diagonal_from_grads,
    )
}


def why_not(op: str, *args: object) -> str | None:
    """Why the emulated GPU cannot run this call, or None."""
    if op not in OPS:
        return "it has no CUDA kernel"
    return cuda.unfit(op, *args) or missing()


def run(op: str, *args: object) -> None:
    """Run an op on the emulated GPU; the arguments are those of its schema."""
    OPS[op](*args)  # type: ignore[operator]
