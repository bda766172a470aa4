"""The Conv1D of transformers: x W + b with a weight [in, out], in GPT-2 the place of every linear layer."""

from __future__ import annotations

import sys

from torch import nn


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether it is one.  transformers is not imported: where nobody has, there is none."""
    library = sys.modules.get("transformers.pytorch_utils")
    kind = getattr(library, "Conv1D", None)
    return kind is not None and isinstance(module, kind)
