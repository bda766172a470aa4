"""A gradual run that can be killed at any moment and goes on from its checkpoint; `test_resume.py` kills it.

    python -m tests.prune.resume_run FOLDER [POINT N before|after]

At the n-th pass of a point, before or after its work, the process sends itself SIGKILL; "half" dies with half of a
checkpoint written.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastfisher as ff
from fastfisher import io, runlog
from fastfisher.fisher.inverse import FisherAccumulator
from fastfisher.prune import gradual, pruner, steps, update
from fastfisher.prune.masks import HeldSparsity
from tests.prune.models import classifier, images

EPOCHS = 7
# What a step and a save pass through, in this order.
POINTS: dict[str, tuple[Any, str]] = {
    "gradients": (FisherAccumulator, "add"),
    "inverse": (FisherAccumulator, "finish"),
    "select": (steps.Run, "select"),
    "update": (steps, "updated"),
    "loss": (pruner, "_check_loss"),
    "write": (update, "_write"),
    "hold": (HeldSparsity, "hold"),
    "pruned": (gradual, "prune_once"),
    "log": (runlog, "append"),
    "optimizer": (torch.optim.AdamW, "step"),
    "save": (torch, "save"),
    "flush": (os, "fsync"),
    "replace": (os, "replace"),
    "load": (io, "load_checkpoint"),
    "resume": (gradual.Pruner, "load_state_dict"),
}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit


def kill_at(point: str, n: int, when: str) -> None:
    """Let this process die at the n-th pass, before or after the work of the point."""
    owner, name = POINTS["save" if point == "half" else point]
    work: Callable[..., Any] = getattr(owner, name)
    passes = itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(passes) == n
        if last and point != "half" and when == "before":
            die()
        result = work(*args, **kwargs)
        if last and point == "half":
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        if last:
            die()
        return result

    setattr(owner, name, dying)


def train(folder: str, death: tuple[str, int, str] | None = None) -> None:
    """Train and prune to the end, from the checkpoint in the folder where there is one."""
    torch.set_num_threads(1)
    if death is not None:
        kill_at(*death)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    gradually = ff.Pruner(
        model,
        schedule=ff.CubicSchedule(0.3, 0.9, begin=1, end=5, every=2),
        num_grads=24,
        block_size=16,
        strict=True,
        log=Path(folder, "run.jsonl"),
    )
    gradually.attach(optimizer)
    loader = DataLoader(TensorDataset(*images(32)), batch_size=8, shuffle=True)
    checkpoint, start = Path(folder, "last.pt"), 0
    torch.manual_seed(0)
    if checkpoint.exists():
        state = io.load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        gradually.load_state_dict(state["pruner"])
        torch.set_rng_state(state["rng"])
        start = state["epoch"]
    for epoch in range(start, EPOCHS):
        gradually.step(loader, epoch=epoch)
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        gradually.record({"loss": float(F.cross_entropy(model.eval()(x), y).detach())}, epoch=epoch)
        io.save_checkpoint(
            checkpoint,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            pruner=gradually.state_dict(),
            rng=torch.get_rng_state(),
            epoch=epoch + 1,
        )
    gradually.finalize()


if __name__ == "__main__":
    train(sys.argv[1], (sys.argv[2], int(sys.argv[3]), sys.argv[4]) if sys.argv[2:] else None)
