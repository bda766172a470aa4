"""Second-order pruning: the inverse empirical Fisher in blocks, and what it says about which weights to remove.

The public names are imported when they are first used, so that `import fastfisher` alone costs milliseconds and does
not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfisher import compat as compat
    from fastfisher import errors as errors
    from fastfisher import ops as ops
    from fastfisher.fisher.blocks import BlockLayout as BlockLayout
    from fastfisher.fisher.fishleg import FishLegInverse as FishLegInverse
    from fastfisher.fisher.inverse import FisherAccumulator as FisherAccumulator
    from fastfisher.fisher.inverse import FisherInverse as FisherInverse
    from fastfisher.fisher.inverse import inverse_diagonal as inverse_diagonal
    from fastfisher.integrations.semi_structured import to_semi_structured as to_semi_structured
    from fastfisher.integrations.torch_prune import from_torch_masks as from_torch_masks
    from fastfisher.integrations.torch_prune import to_torch_masks as to_torch_masks
    from fastfisher.io import export_packed as export_packed
    from fastfisher.io import load as load
    from fastfisher.io import load_checkpoint as load_checkpoint
    from fastfisher.io import load_packed as load_packed
    from fastfisher.io import save as save
    from fastfisher.io import save_checkpoint as save_checkpoint
    from fastfisher.ops import explain as explain
    from fastfisher.ops import use_backend as use_backend
    from fastfisher.prune.batchnorm import reestimate_batchnorm as reestimate_batchnorm
    from fastfisher.prune.gradual import Pruner as Pruner
    from fastfisher.prune.masks import HeldSparsity as HeldSparsity
    from fastfisher.prune.masks import hold_sparsity as hold_sparsity
    from fastfisher.prune.pruner import plan as plan
    from fastfisher.prune.pruner import prune as prune
    from fastfisher.prune.schedule import CubicSchedule as CubicSchedule
    from fastfisher.prune.schedule import ExponentialSchedule as ExponentialSchedule
    from fastfisher.prune.schedule import LinearSchedule as LinearSchedule
    from fastfisher.prune.tune import Tuning as Tuning
    from fastfisher.prune.tune import tune as tune
    from fastfisher.report import Report as Report

__version__ = "0.1.0"

# name -> module it lives in; a name that is a module itself stands beside its own path
_HOME = {
    "BlockLayout": "fastfisher.fisher.blocks",
    "CubicSchedule": "fastfisher.prune.schedule",
    "ExponentialSchedule": "fastfisher.prune.schedule",
    "FisherAccumulator": "fastfisher.fisher.inverse",
    "FisherInverse": "fastfisher.fisher.inverse",
    "FishLegInverse": "fastfisher.fisher.fishleg",
    "HeldSparsity": "fastfisher.prune.masks",
    "LinearSchedule": "fastfisher.prune.schedule",
    "Pruner": "fastfisher.prune.gradual",
    "Report": "fastfisher.report",
    "Tuning": "fastfisher.prune.tune",
    "compat": "fastfisher.compat",
    "errors": "fastfisher.errors",
    "explain": "fastfisher.ops",
    "hold_sparsity": "fastfisher.prune.masks",
    "export_packed": "fastfisher.io",
    "from_torch_masks": "fastfisher.integrations.torch_prune",
    "inverse_diagonal": "fastfisher.fisher.inverse",
    "load": "fastfisher.io",
    "load_checkpoint": "fastfisher.io",
    "load_packed": "fastfisher.io",
    "ops": "fastfisher.ops",
    "plan": "fastfisher.prune.pruner",
    "prune": "fastfisher.prune.pruner",
    "reestimate_batchnorm": "fastfisher.prune.batchnorm",
    "save": "fastfisher.io",
    "save_checkpoint": "fastfisher.io",
    "to_semi_structured": "fastfisher.integrations.semi_structured",
    "to_torch_masks": "fastfisher.integrations.torch_prune",
    "tune": "fastfisher.prune.tune",
    "use_backend": "fastfisher.ops",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastfisher' has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(home)
    value = module if home == f"fastfisher.{name}" else getattr(module, name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package, in which `prune` stays the function when the folder of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds every imported submodule in its parent, which would replace the function.
        if not (name == "prune" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
