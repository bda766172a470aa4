"""Nothing stays behind of some rounds of use, and the checker notices every kind of leak that is planted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import soak

CPU = torch.device("cpu")


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with soak.temporary_files(tmp_path):
        use = soak.Use(tmp_path, CPU, steps_an_epoch=2)
        rows = soak.run(use, CPU, seconds=0)
    assert not soak.verdict(rows)
    assert use.counts["prune"] > 3 * 10  # every method, and the calls that fail
    assert len(rows) == soak.FEWEST


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_a_leak_of_any_kind_is_named(tmp_path: Path) -> None:
    end = threading.Event()
    model, children = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    held: list[Any] = []

    def keep(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: held.append(make())

    def child() -> None:
        children.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL))

    def file() -> Any:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        return name

    plants = {
        "bytes of resident memory": keep(lambda: np.ones(4 << 20)),
        "tensors": keep(lambda: torch.zeros(3)),
        "Python objects": keep(lambda: [[] for _ in range(20)]),
        "hooks of modules": lambda: model.register_forward_hook(lambda *_: None),
        "hooks of optimizers": lambda: optimizer.register_step_post_hook(lambda *_: None),
        "hooks of tensors": lambda: model.weight.register_hook(lambda _: None),
        "Python threads": lambda: threading.Thread(target=end.wait, daemon=True).start(),
        "threads": lambda: None,  # those of Python are among them
        "open files": keep(Path(os.devnull).open),
        "files in the folder for temporary ones": keep(file),
        "child processes": child,
    }

    def leak() -> None:
        for plant in plants.values():
            plant()

    try:
        with soak.temporary_files(tmp_path):
            said = soak.verdict(soak.run(leak, CPU, seconds=0))
    finally:
        end.set()
        for process in children:
            process.kill()
            process.wait()
        for handle in held:
            getattr(handle, "close", lambda: None)()
    assert [sentence.split(" grew from ")[0] for sentence in said] == [
        name for name in soak.MEASURES if "device" not in name
    ]
    assert plants.keys() == {name for name in soak.MEASURES if "device" not in name}
    assert any(f"in {soak.FEWEST} rounds, 1.00 a round" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("values", "each"),
    [
        ([7.0] * 12, None),
        ([5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7], None),  # a cache that fills
        ([5, 5, 5, 5, 5, 5, 5, 9, 9, 9, 9, 9], None),  # and one that fills late
        ([9, 3, 5, 8, 4, 9, 3, 7, 9, 4, 8, 9], None),  # noise
        (list(range(12)), 1.0),
        ([i // 3 for i in range(12)], 0.33),
        ([i + 3 * (i % 2) for i in range(24)], 1.0),
        ([-float(i) for i in range(12)], None),
    ],
    ids=("level", "early", "late", "noise", "line", "stairs", "zigzag", "falling"),
)
def test_a_rise_is_a_leak_where_it_goes_on(values: list[float], each: float | None) -> None:
    assert soak.rise(values, 1.5) == (None if each is None else pytest.approx(each, abs=0.05))
    assert soak.rise(values, 30) is None
