"""Where a library is missing, one sentence says which extra brings it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("name", "extra"), [("transformers", "hf"), ("lightning", "lightning")])
def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    home = f"fastfisher.integrations.{name}"
    monkeypatch.delitem(sys.modules, home, raising=False)
    for module in (name, "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(
        ImportError, match=rf"^PruningCallback needs .*: pip install 'fastfisher\[{extra}\]'$"
    ):
        importlib.import_module(home)


def test_the_rest_imports_none_of_them() -> None:
    code = (
        "import sys, fastfisher as ff; ff.Pruner, ff.to_torch_masks, ff.compat; import fastfisher.integrations.loop\n"
        "sys.exit(bool({'transformers', 'lightning', 'accelerate', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
