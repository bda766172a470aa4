"""What this installation consists of, what is missing, and what to do about it; the body of `fastfisher doctor`.

Nothing here changes anything.  Each finding is one line: what was looked at, whether it is well, and one sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastfisher import __version__, environment
from fastfisher.memory import format_bytes

OPTIONAL = {
    "matplotlib": "plots (pip install 'fastfisher[viz]')",
    "typer": "the command line (pip install 'fastfisher[cli]')",
    "rich": "the command line (pip install 'fastfisher[cli]')",
    "yaml": "--config files (pip install 'fastfisher[cli]')",
}


OLDEST_TRITON = (3, 4)
SELFTEST_SECONDS = 8.0


@dataclass(frozen=True)
class Finding:
    """One line of the report; a "problem" is what makes `fastfisher doctor` end with an exit code other than 0."""

    subject: str
    state: Literal["ok", "note", "problem"]
    sentence: str


def examine() -> list[Finding]:
    """Look at versions, backends, kernels, optional packages and known traps, in this order."""
    return [
        *_versions(),
        *_torch(),
        _native(),
        _cuda_kernels(),
        _triton(),
        *_selftests(),
        *_variables(),
        *_optional(),
        *_torchvision(),
    ]


def native_reason(error: ImportError) -> str:
    """One sentence that says why `fastfisher._native` could not be imported; `error` is what the import raised."""
    try:
        reason = importlib.import_module("fastfisher._build_info").REASON
    except ModuleNotFoundError:
        return "it was not built: this is a source folder without a build (make build, or pip install .)"
    return reason or f"it was built but does not load: {error}"


def torchvision_sentence(error: BaseException) -> str:
    """What it means that torchvision does not import; the usual cause is named where it is recognised."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "torchvision::nms" in text or "undefined symbol" in text:
        return (
            f"does not import ({text}), because it was built for another torch; fastfisher does not need it, but timm, "
            "transformers and lightning do: install torch and torchvision together from one index, or remove it"
        )
    return f"does not import ({text}); fastfisher does not need it"


def _versions() -> Iterator[Finding]:
    yield Finding("fastfisher", "ok", __version__)
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("processors", "ok", f"{os.cpu_count()}")
    for name in ("torch", "numpy", "safetensors", "tqdm"):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "problem", f"is missing (pip install {name})")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from fastfisher.ops.threads import kernel_threads

    yield Finding("threads", "ok", f"{kernel_threads()} for the kernels, {torch.get_num_threads()} for torch")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        sentence = (
            f"{has.name}, compute capability {has.major}.{has.minor}, {has.multi_processor_count} multiprocessors, "
            f"{format_bytes(has.total_memory)}, torch built for CUDA {torch.version.cuda}"
        )
        yield Finding(f"GPU {index}", "ok", sentence)
    if torch.cuda.is_available():
        devices.append("cuda")
    else:
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        )
        yield Finding("GPU", "note", f"no device here ({built})")

    from fastfisher.ops._registry import OPS, ORDER

    for device in devices:
        # Any op tells which backends serve the device; this one has the shortest arguments.
        args = tuple(torch.ones(1, device=device) for _ in range(3))
        able = [name for name in ORDER[device] if OPS["obs_saliency"].why_not(name, args) is None]
        yield Finding(f"backends, {device}", "ok", f"in this order: {', '.join(able)}")


def _native() -> Finding:
    try:
        native = importlib.import_module("fastfisher._native")
    except ImportError as error:
        return Finding(
            "native kernels", "problem", f"not available, the reference runs: {native_reason(error)}"
        )
    available = list(native.isas())
    chosen = environment.isa() or available[0]
    if chosen not in available:
        return Finding(
            "native kernels",
            "problem",
            f"{environment.ISA.name}={chosen}, but this machine runs only {', '.join(available)}",
        )
    return Finding("native kernels", "ok", f"run with {chosen} (this machine has {', '.join(available)})")


def _cuda_kernels() -> Finding:
    """Whether the extension holds CUDA kernels, and for which GPUs."""
    from fastfisher.kernels.cuda import build_reason

    reason = build_reason()
    if reason:
        return Finding("CUDA kernels", "note", f"not available, Triton serves GPUs alone: {reason}")
    info = importlib.import_module("fastfisher._build_info")
    archs = ", ".join(f"{int(arch.rstrip('af')) / 10:.1f}" for arch in info.CUDA_ARCHS)
    return Finding(
        "CUDA kernels", "ok", f"built for compute capability {archs} with {info.CUDA_TOOLKIT}{_no_device()}"
    )


def _triton() -> Finding:
    """Whether Triton's kernels can run."""
    from fastfisher.kernels.triton import load_error

    reason = load_error()
    if reason:
        return Finding("Triton", "note", f"GPUs are served without it: {reason}")
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return Finding(
            "Triton", "problem", f"{found} is too old, kernels need {oldest} (pip install -U triton)"
        )
    return Finding("Triton", "ok", f"{found}{_no_device()}")


def _no_device() -> str:
    import torch

    return "" if torch.cuda.is_available() else "; no device here"


def _selftests() -> Iterator[Finding]:
    """Every kernel of every device against float64, within SELFTEST_SECONDS in all."""
    import torch

    from fastfisher import selftest

    started = time.perf_counter()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in map(torch.device, devices):
        for backend in selftest.backends(device):
            begun = time.perf_counter()
            checks = selftest.check(device, backend, SELFTEST_SECONDS - (begun - started))
            if not checks:
                continue
            subject = f"self-test, {device.type} {backend}"
            wrong = [check for check in checks if not check.passed and check.reason != selftest.NO_TIME]
            late = [check.op for check in checks if check.reason == selftest.NO_TIME]
            for check in wrong:
                yield Finding(
                    subject, "problem", f"{check.op}: {check.reason or f'relative error {check.error:.1e}'}"
                )
            if late:
                sentence = (
                    f"no time was left for {', '.join(late)}; compiled kernels are kept, so run it once more"
                )
                yield Finding(subject, "note", sentence)
            if not wrong:
                tested = [check for check in checks if check.passed]
                worst = max((check.error for check in tested), default=0.0)
                seconds = time.perf_counter() - begun
                sentence = f"{len(tested)} calls agree with float64, worst error {worst:.0e}, {seconds:.1f} s"
                yield Finding(subject, "ok", sentence)


def _variables() -> Iterator[Finding]:
    for variable in environment.VARIABLES:
        if variable.get() != variable.default:
            yield Finding(variable.name, "note", f"is set to {variable.get()!r}")


def _optional() -> Iterator[Finding]:
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "note", f"is missing; it is needed for {purpose}")


def _torchvision() -> Iterator[Finding]:
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        yield Finding("torchvision", "problem", torchvision_sentence(error))
    else:
        yield Finding("torchvision", "ok", version("torchvision"))
