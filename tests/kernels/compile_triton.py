"""Compile the Triton kernels as the ops launch them, for GPUs that need not be there, and report what each one uses.

    python -m tests.kernels.compile_triton [architecture ...]

The ops are called on CPU tensors with a launcher that only notes kernels and arguments.  Run without TRITON_INTERPRET:
a kernel is either interpreted or compiled.  Prints a table, or with --json the rows of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastfisher.kernels.triton import FILES, tuning

ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "u1",
}
RUNTIME_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture: registers of a thread, bytes spilled, bytes of shared memory."""

    op: str
    case: str
    kernel: str
    architecture: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    error: str = ""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: where it is found, and how it is called."""

    op: str
    case: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def problems() -> Iterator[tuple[str, str, tuple]]:
    """(op, case, arguments) for every kernel and every way of cutting a block that the ops know."""

    def layout(B: int, tensors: int = 3) -> Tensor:
        starts = torch.arange(0, tensors * B, B)
        return torch.stack([starts, starts + B], dim=1)

    def estimates(count: int) -> list[Tensor]:
        return list(torch.zeros(2, count, dtype=torch.float64))

    k = 48
    half = torch.bfloat16
    for state in (torch.float32, torch.float64):
        name = str(state).removeprefix("torch.")
        for B in (1, 8, 16, 32, 50, 100, 200):
            blocks, d = layout(B), 3 * B
            F = torch.zeros(3, B, B, dtype=state)
            grads = torch.zeros(k, d, dtype=torch.float32)
            case = f"B={B} {name}"
            yield "inverse_from_grads", case, (F, grads, blocks, k, 0.1, *estimates(3))
            if B in (50, 200):
                diagonal = torch.zeros(d, dtype=state)
                yield "inverse_diagonal_from_grads", case, (diagonal, grads, blocks, B, k, 0.1, *estimates(3))
            if B in (8, 50):
                halves = grads.to(half)
                yield (
                    "inverse_from_grads",
                    f"{case}, {half} gradients",
                    (F, halves, blocks, k, 0.1, *estimates(3)),
                )
            yield "spd_inverse_", case, (F, 0.1, *estimates(3))
            yield "fisher_accumulate_", case, (F, grads, blocks, k)
            yield "sherman_morrison_", case, (F, grads, blocks, k)
            yield "woodbury_", case, (F, grads, blocks, k)
            if B in (50, 200):
                yield "woodbury_", f"{case}, {half} gradients", (F, grads.to(half), blocks, k)
            weight, mask = torch.zeros(d, dtype=state), torch.zeros(d, dtype=torch.bool)
            yield "block_matvec", case, (F, None, blocks, 0.0, weight[:, None], weight[:, None].clone())
            yield "obs_update_", case, (weight, F, None, blocks, 0.0, weight.clone(), mask)
            order, loss = torch.zeros(d, dtype=torch.int64), torch.zeros(d, dtype=torch.float64)
            found = (order, loss, torch.zeros(3, dtype=torch.bool))
            if B in (16, 50, 200):
                groups = torch.arange(d)
                yield "obs_eliminate", case, (weight, F, None, blocks, 0.0, None, 0, 1, *found)
                yield "obs_eliminate", f"2:4 {case}", (weight, F, None, blocks, 0.0, groups, 2, 1, *found)
                yield "obs_eliminate", f"sets of 4 {case}", (weight, F, None, blocks, 0.0, None, 0, 4, *found)
            yield (
                "obs_solve_",
                case,
                (weight, F, None, blocks, k, 0.1, mask, torch.zeros(3, dtype=torch.bool)),
            )
            yield "inverse_diagonal", case, (F, None, blocks, 0.0, weight)
            top = torch.zeros(3, B, dtype=state)
            yield "fishleg_block_step_", case, (F, top, grads, blocks, k, 0.1, 1.0, *estimates(3))
            if B in (8, 50, 200):
                halves = grads.to(half)
                args = (F, top, halves, blocks, k, 0.1, 1.0, *estimates(3))
                yield "fishleg_block_step_", f"{case}, {half} gradients", args
                yield "factor_diagonal", case, (F, blocks, weight)
                yield "block_factor_matvec", case, (F, blocks, weight[:, None], weight[:, None].clone())
                yield "factor_downdate_", case, (F, blocks, mask)
                x = torch.zeros(2, 3, B, B, dtype=state)
                yield "kron_matvec", case, (F, F, x[0], x, x.clone())
        for channels in (3, 64):
            x, g = torch.zeros(2, channels, 9, 8, dtype=state), torch.zeros(2, channels, 9, 8, dtype=state)
            rows = torch.zeros(2, channels, channels, 3, 3, dtype=state)
            yield "conv_weight_grads", f"C={channels} {name}", (rows, x, g, (1, 1), (1, 1), (1, 1), 1)
        weight = torch.zeros(3000, dtype=state)
        yield "obs_saliency", name, (weight, weight.clone(), weight.clone())
        mask = torch.zeros(3000, dtype=torch.bool)
        yield "prune_mask", name, (weight, mask, 7, mask.clone(), torch.zeros(1, dtype=torch.int64))
        for m in (10, 100, 300):
            blocks, grads = layout(1000), torch.zeros(m, 3000, dtype=state)
            factor = torch.zeros(3, m, m, dtype=torch.float64)
            case, x = f"m={m} {name}", weight[:, None]
            yield (
                "dual_factor_",
                f"{case}, {half} gradients",
                (factor, grads.to(half), blocks, m, 0.1, estimates(3)[0]),
            )
            yield (
                "inverse_diagonal",
                f"dual {case}, {half} gradients",
                (grads.to(half), factor, blocks, 0.1, weight),
            )
            yield "dual_factor_", case, (factor, grads, blocks, m, 0.1, estimates(3)[0])
            yield "inverse_diagonal", f"dual {case}", (grads, factor, blocks, 0.1, weight)
            yield "block_matvec", f"dual {case}", (grads, factor, blocks, 0.1, x, x.clone())
            yield "fisher_vector_product", case, (grads, blocks, m, x, x.clone())
            failed = torch.zeros(3, dtype=torch.bool)
            yield "obs_solve_", f"dual {case}", (weight, grads, factor, blocks, m, 0.1, mask, failed)


def jobs(architecture: int) -> list[Job]:
    """Every different kernel that the problems launch on an architecture, noted instead of launched."""
    found: dict[tuple, Job] = {}
    current = ("", "")

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, options: dict[str, Any]) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, aligned = [], []
        for position, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                continue
            if isinstance(value, Tensor):
                signature.append((parameter.name, f"*{TYPES[value.dtype]}"))
                if value.data_ptr() % 16 == 0:
                    aligned.append(position)
            else:
                signature.append((parameter.name, parameter.annotation_type))
        constants = [(p.name, values[p.name]) for p in kernel.params if p.is_constexpr]
        runtime = tuple((key, options[key]) for key in RUNTIME_OPTIONS if key in options)
        job = Job(
            *current,
            kernel.fn.__module__,
            kernel.fn.__name__,
            tuple(signature),
            tuple(constants),
            tuple(aligned),
            runtime,
        )
        found.setdefault(
            (job.module, job.kernel, job.signature, str(job.constants), job.aligned, runtime), job
        )

    modules = [
        importlib.import_module(f"fastfisher.kernels.triton.{name}") for name in sorted({*FILES.values()})
    ]
    modules += [importlib.import_module(f"fastfisher.kernels.triton.{name}") for name in ("blocked", "small")]
    real = modules[0].launch
    tuning.architecture = lambda device: architecture  # type: ignore[assignment]
    try:
        for module in modules:
            module.launch = note
        for op, case, args in problems():
            current = (op, case)
            getattr(importlib.import_module(f"fastfisher.kernels.triton.{FILES[op]}"), op.rstrip("_"))(*args)
    finally:
        for module in modules:
            module.launch = real
    return list(found.values())


def compile_job(job: Job, architecture: int) -> Usage:
    """Compile one kernel and read what ptxas says of it."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    constants = dict(job.constants)
    signature = {p.name: dict(job.signature).get(p.name, "constexpr") for p in kernel.params}
    source = ASTSource(
        kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in job.aligned}
    )
    options = {**dict(job.options), "enable_fp_fusion": True}
    name = f"{job.module.rsplit('.', 1)[1]}.{job.kernel}"
    head = (job.op, job.case, name, architecture, options.get("num_warps", 4))
    with tempfile.TemporaryDirectory() as folder, _captured(Path(folder) / "messages") as messages:
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        except (RuntimeError, triton.TritonError) as error:
            text = f"{messages.read_text()}\n{error}"
            lines = [line for line in text.splitlines() if "error:" in line] or text.strip().splitlines()
            return Usage(*head, 0, 0, 0, " | ".join(lines[:3]) if lines else repr(error))
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target (\S+?),?$", compiled.asm["ptx"], re.MULTILINE)
        assert target is not None
        command = [_ptxas(architecture), "-v", f"-arch={target[1]}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None, report
    return Usage(*head, int(registers[1]), int(spilled[1]) if spilled else 0, compiled.metadata.shared)


def _ptxas(architecture: int) -> str:
    """The assembler that Triton takes for an architecture; its oldest releases have one for all."""
    wants = inspect.signature(get_ptxas).parameters
    path: str = (get_ptxas(architecture) if wants else get_ptxas()).path
    return path


@contextlib.contextmanager
def _captured(path: Path) -> Iterator[Path]:
    """What the compiler writes to the error stream goes to a file: it dumps a whole program with every error."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield path
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def usages(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> list[Usage]:
    """Compile everything, on all processors."""
    work = [
        (job, arch)
        for arch in architectures
        for job in jobs(arch)
        if only in f"{job.op} {job.module}.{job.kernel}"
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_job, *zip(*work, strict=True)))


def table(rows: list[Usage]) -> str:
    """The rows as text."""
    head = ("kernel", "of", "case", "sm", "warps", "registers", "spilled", "shared", "error")
    cells = [
        (
            r.kernel,
            r.op,
            r.case,
            str(r.architecture),
            str(r.num_warps),
            str(r.registers),
            str(r.spilled),
            str(r.shared),
            r.error,
        )
        for r in rows
    ]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *cells)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", type=int, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels and ops whose names hold this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = usages(tuple(options.architectures), options.only)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows]))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
