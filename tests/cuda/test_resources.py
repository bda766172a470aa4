"""What the compiled kernels take of a multiprocessor: nothing spills, and at least one thread block fits.

The registers are those in the extension that was built here; how kernels are launched comes from the emulated GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import tables
from tests.cuda import emulated

# Bytes of shared memory of a multiprocessor, by architecture; 64 Ki registers in 4 quarters, 64 warps and 32 blocks in
# all of them, and 1 KiB of shared memory that the system keeps for every block.
SHARED_MEMORY = {"80": 164 << 10, "90": 228 << 10, "100": 228 << 10}

# The op, the dtype and the largest B of every way of cutting a block into tiles.
Kernel = tuple[str, torch.dtype, int]
STREAMING = ("inverse_from_grads", "sherman_morrison", "fisher_accumulate")
KERNELS: list[Kernel] = [
    *(("spd_inverse", torch.float32, B) for B in (16, 64, 128, 256)),
    *(("spd_inverse", torch.float64, B) for B in (64, 176)),
    *((op, torch.float32, B) for op in STREAMING for B in (16, 36, 56, 70, 128, 256)),
    *((op, torch.float64, B) for op in (*STREAMING[:2], "obs_solve") for B in (16, 64, 176)),
    *(("fishleg_block_step", torch.float32, B) for B in (16, 36, 56, 64)),
    *(("fishleg_block_step", torch.float64, B) for B in (16, 64)),
]


@dataclass(frozen=True)
class Usage:
    """Registers of a thread, and bytes of its stack and of what it spills."""

    registers: int
    stack: int
    local: int


def cuobjdump() -> str:
    """The program that looks into the extension: the toolkit's, else the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    beside = (
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    )
    found = shutil.which("cuobjdump") or (str(beside) if beside and beside.is_file() else None)
    if found is None:
        pytest.skip("there is no cuobjdump, in a CUDA toolkit or in triton")
    return found


@pytest.fixture(scope="module")
def usages() -> dict[tuple[str, Kernel], Usage]:
    """What every kernel in the extension uses, by architecture and kernel."""
    info = pytest.importorskip("fastfisher._build_info", reason="nothing was built here")
    if info.CUDA_REASON:
        pytest.skip(info.CUDA_REASON)
    file = importlib.import_module("fastfisher._native").__file__
    text = subprocess.run(
        [cuobjdump(), "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    found: dict[tuple[str, Kernel], Usage] = {}
    arch = ""
    for line in text.splitlines():
        if line.startswith("arch = sm_"):
            arch = line.removeprefix("arch = sm_")
        elif name := re.search(r"\d+([a-z_]+)_kernelI\w+TilingI([fd])Li\d+ELi(\d+)E", line):
            kernel = (name[1], torch.float32 if name[2] == "f" else torch.float64, int(name[3]))
        elif numbers := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, kernel] = Usage(*map(int, numbers.groups()))
    assert {arch for arch, _ in found} == set(info.CUDA_ARCHS)
    return found


def launch(op: str, dtype: torch.dtype, size: int) -> tuple[int, int]:
    """Threads and shared bytes of a thread block; the gradients are more than are summed up in one go."""
    if not emulated.available():
        pytest.skip(str(emulated.missing()))
    if op == "spd_inverse":
        matrix = torch.eye(size, dtype=dtype).repeat(200 if size <= 16 else 1, 1, 1)
        estimates = torch.empty(2, len(matrix), dtype=torch.float64)
        emulated.spd_inverse_(matrix, 1.0, *estimates)
    else:
        state, grads = torch.eye(size, dtype=dtype)[None], torch.ones(129, size)
        blocks = torch.tensor([[0, size]])
        estimates = torch.empty(2, 1, dtype=torch.float64)
        if op == "sherman_morrison":
            emulated.sherman_morrison_(state, grads, blocks, 129)
        elif op == "fisher_accumulate":
            emulated.fisher_accumulate_(state, grads, blocks, 129)
        elif op == "obs_solve":
            mask, failed = torch.zeros(size, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
            emulated.obs_solve_(torch.ones(size, dtype=dtype), state, None, blocks, 1, 1.0, mask, failed)
        elif op == "fishleg_block_step":
            top = torch.ones(1, size, dtype=dtype)
            emulated.fishleg_block_step_(state, top, grads, blocks, 129, 1.0, 1.0, *estimates)
        else:
            emulated.inverse_from_grads(state, grads, blocks, 129, 1.0, *estimates)
    return emulated.last_launch()


def blocks_resident(arch: str, registers: int, threads: int, shared: int) -> dict[str, int]:
    """How many thread blocks a multiprocessor holds, by what limits it."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    return {
        "registers": 4 * (16384 // of_a_warp) // warps,
        "shared memory": SHARED_MEMORY[arch] // (shared + 1024),
        "warps": 64 // warps,
        "blocks": 32,
    }


def test_nothing_spills_and_a_block_fits(usages: dict[tuple[str, Kernel], Usage]) -> None:
    archs = [arch for arch in SHARED_MEMORY if any(arch == built for built, _ in usages)]
    assert {kernel for _, kernel in usages} == set(KERNELS)
    table = ["sm   kernel              dtype    B    registers  threads  shared  blocks  warps  limited by"]
    wrong = []
    for kernel in KERNELS:
        threads, shared = launch(*kernel)
        for arch in archs:
            usage = usages[arch, kernel]
            resident = blocks_resident(arch, usage.registers, threads, shared)
            limit = min(resident, key=lambda name: resident[name])
            blocks = resident[limit]
            op, dtype, size = kernel
            table.append(
                f"{arch:<4} {op:<19} {str(dtype)[6:]:<8} {size:<4} {usage.registers:<10} {threads:<8} {shared:<7} "
                f"{blocks:<7} {blocks * threads // 32:<6} {limit}"
            )
            if usage.stack or usage.local or not blocks:
                wrong.append(table[-1])
    tables.show("CUDA kernels", "\n".join(table))
    assert not wrong, "\n".join(wrong)
