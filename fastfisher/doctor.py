"""What this installation consists of, what is missing, and what to do about it; the body of `fastfisher doctor`.

Nothing here changes anything.  Each finding is one line: what was looked at, whether it is well, and one sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastfisher import __version__, environment

OPTIONAL = {
    "matplotlib": "plots (pip install 'fastfisher[viz]')",
    "typer": "the command line (pip install 'fastfisher[cli]')",
    "rich": "the command line (pip install 'fastfisher[cli]')",
    "yaml": "--config files (pip install 'fastfisher[cli]')",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; a "problem" is what makes `fastfisher doctor` end with an exit code other than 0."""

    subject: str
    state: Literal["ok", "note", "problem"]
    sentence: str


def examine() -> list[Finding]:
    """Look at versions, backends, the native extension, optional packages and known traps, in this order."""
    return [*_versions(), *_torch(), _native(), *_variables(), *_optional(), *_torchvision()]


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
    if torch.cuda.is_available():
        devices.append("cuda")
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("CUDA", "ok", f"torch sees {', '.join(names)}")
    else:
        yield Finding("CUDA", "note", "torch sees no GPU")

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
