"""The machine a result was measured on: what it is, the best rates it reached in the same run, and a study's file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastfisher as ff
from fastfisher.kernels import cuda

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def commit() -> str:
    """Short hash of the checked-out commit, with "-dirty" when code differs from it; "unknown" without git."""
    try:
        short = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [
                "git",
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                "csrc",
                "fastfisher",
                "benchmarks",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    # Results and the page generated from them may change between runs of one state of the code.
    dirty = [line for line in changed if not line[3:].startswith(("benchmarks/results", "benchmarks/README"))]
    return f"{short}-dirty" if dirty else short


def gpu_reason() -> str:
    """Why nothing can run on a GPU here, "" where it can."""
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} finds no GPU here, and this needs one"


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Processor, cores, memory, versions and, for a GPU, what it is, for the head of every result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    found: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(memory),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": blas.group(1) if blas else "unknown",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "fastfisher": ff.__version__,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda or "unknown",
            "triton": _version("triton"),
            "cuda_kernels": cuda.build_reason() or "built",
        }
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def slug(device: str = "cpu") -> str:
    """The machine in a file name: "amd-epyc-2cores", "nvidia-h200"."""
    if device == "cuda":
        return _words(torch.cuda.get_device_name())
    name = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", "", cpu_name().lower())
    return f"{_words(name)}-{os.cpu_count()}cores"


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(folder: Path, table: str, found: Mapping[str, Any], device: str = "cpu") -> Path:
    """Write what a study found, after its date, machine and commit, to <folder>/<table>-<machine>.json."""
    result = {
        "table": table,
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "machine": describe(device),
        "commit": commit(),
        **found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{table}-{slug(device)}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    return target


def peak_probes(
    size: int, copy_bytes: int, device: str = "cpu"
) -> dict[str, tuple[Callable[[], object], float]]:
    """Probes of the attainable peaks: name -> (call, operations or bytes of one call).

    Two libraries multiply matrices in a CPU build of torch, BLAS behind `mm` and oneDNN behind `linear` layers; on
    some processors one runs at half the rate of the other, so both are measured and the better one counts.  On a GPU
    "float32 mm" is IEEE arithmetic; TF32 and bfloat16 are there to tell what the matrix units could do.   size: of
    the square matrices.
    """
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    wide_a, wide_b, wide_out = a.double(), b.double(), out.double()
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    flops = 2.0 * size**3
    probes: dict[str, tuple[Callable[[], object], float]] = {
        "float32 mm": (lambda: torch.mm(a, b, out=out), flops),
        "float64 mm": (lambda: torch.mm(wide_a, wide_b, out=wide_out), flops),
        "copy": (lambda: target.copy_(source), 2.0 * source.nbytes),
    }
    if device == "cuda":
        half_a, half_b, half_out = a.bfloat16(), b.bfloat16(), out.bfloat16()
        probes["tf32 mm"] = (lambda: tf32_product(a, b, out), flops)
        probes["bf16 mm"] = (lambda: torch.mm(half_a, half_b, out=half_out), flops)
    elif torch.backends.mkldnn.is_available():
        probes["float32 oneDNN"] = (lambda: onednn_product(a, b), flops)
    return probes


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T through oneDNN, as an inference-time linear layer runs it."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def tf32_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b with operands rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        torch.mm(a, b, out=out)
    finally:
        torch.set_float32_matmul_precision(before)


def attainable(rates: dict[str, float], device: str = "cpu") -> dict[str, float | str]:
    """Peaks from the measured rates (per second, units of one): GFLOP/s in both formats and GB/s, and which probe
    gave them.

    No library here runs float64 products through the widest vectors on every CPU, so half the float32 rate (half as
    many numbers a vector) counts where it is the larger.
    """
    float32 = max((name for name in rates if name.startswith("float32")), key=lambda name: rates[name])
    float64, source = rates["float64 mm"], "float64 mm"
    if device == "cpu" and float64 < rates[float32] / 2:
        float64, source = rates[float32] / 2, f"half of {float32}"
    return {
        "float32_gflops": rates[float32] / 1e9,
        "float32_source": float32,
        "float64_gflops": float64 / 1e9,
        "float64_source": source,
        "copy_gbs": rates["copy"] / 1e9,
    }


def main() -> int:
    """Whether there is a GPU, for the Makefile: exit code 2 and the reason where there is none."""
    reason = gpu_reason()
    if reason:
        print(reason, file=sys.stderr)
    return 2 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
