"""What one of several processes does in `test_ranks.py`: it prunes with the others and writes down what came of it."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastfisher as ff
from fastfisher.fisher import inverse
from fastfisher.prune import pruner
from fastfisher.prune.groups import Storage
from tests.prune.models import batches, classifier, images

# how unequal the shards of the ranks are
SHARES = (5, 2, 6, 3)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"num_recomputations": 0},
    "dual": {"num_recomputations": 1, "num_grads": 13},
    "steps": {"num_recomputations": 2, "num_grads": 25},
    "sum": {"update": "sum", "num_recomputations": 0, "grad_batch_size": 2, "num_grads": 9},
    "layers": {"scope": "layer", "update": None, "num_recomputations": 0},
    "diagonal": {"method": "diagonal"},
    "woodtaylor": {"method": "woodtaylor", "num_recomputations": 1},
    "centered": {"method": "woodtaylor", "centered": True, "num_recomputations": 0},
    "one block": {"block_size": None, "num_recomputations": 0},
    "few blocks": {"block_size": 400, "targets": ["8"], "num_recomputations": 0},
    "2:4": {"pattern": "2:4", "sparsity": None, "num_recomputations": 0},
    "block4": {"pattern": "block4", "num_recomputations": 0},
    "caps": {"max_layer_sparsity": {"3": 0.3}, "num_recomputations": 0},
    "flops": {"cost": "flops", "num_recomputations": 0},
    "groups": {"num_recomputations": 1, "groups": Storage(3, "recomputed", "stored", visits=2)},
    "stored": {"method": "woodtaylor", "groups": Storage(2, "stored", "rebuilt", visits=3)},
    "kfac": {"method": "kfac", "num_recomputations": 0},
    "fishleg": {"method": "fishleg", "num_recomputations": 1},
    "average": {"fisher_average": 0.3, "num_recomputations": 1},
    "magnitude": {"method": "magnitude"},
}
COMMON: dict[str, Any] = {"sparsity": 0.6, "block_size": 16, "num_grads": 28}


def shard(rank: int, size: int, options: dict[str, Any]) -> list[Any]:
    """The samples of one rank, in batches of its own size; of all ranks together as many as a step reads."""
    options = COMMON | options
    per, count = options.get("grad_batch_size", 1), options["num_grads"]
    edges = [count * sum(SHARES[:r]) // sum(SHARES[:size]) * per for r in range(size + 1)]
    inputs, labels = images(count * per, dtype=torch.float64)
    mine = slice(edges[rank], edges[rank + 1])
    return batches(inputs[mine], labels[mine], 4 + rank)


def prune(data: Any, options: dict[str, Any], wrap: Callable[[nn.Module], nn.Module] | None = None) -> Any:
    """The weights and the report of one case."""
    model = classifier(dtype=torch.float64)
    options = COMMON | options
    way = options.pop("groups", None)
    old = pruner.checked_plan, pruner.storage_for
    try:
        if way is not None:
            pruner.checked_plan = lambda *args, **kwargs: (way.groups, 1 << 30)
            pruner.storage_for = lambda *args, **kwargs: way
        report = ff.prune(model if wrap is None else wrap(model), data, **options)
    finally:
        pruner.checked_plan, pruner.storage_for = old
    return {name: p.detach() for name, p in model.named_parameters()}, report


def join(rank: int, size: int, folder: str, seconds: float = 60) -> None:
    """Become one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )


def prune_all(rank: int, size: int, folder: str) -> None:
    """Every case, with a model in DistributedDataParallel."""
    join(rank, size, folder)
    found = {}
    for name, options in CASES.items():
        weights, report = prune(shard(rank, size, options), options, DistributedDataParallel)
        found[name] = weights, report.to_dict()
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def fail(rank: int, size: int, folder: str, how: str) -> None:
    """One process, the last, fails in its own way; what each has seen is written down."""
    join(rank, size, folder, seconds=5)
    options: dict[str, Any] = {"num_recomputations": 1}
    data: Any = shard(rank, size, options)
    last = rank == size - 1
    if last and how == "loader":
        data = [data[0], "nonsense"]
    if how == "few":
        options["num_grads"] = 10_000
    if last and how == "settings":
        options["damping"] = 0.5
    model = classifier(dtype=torch.float64)
    if last and how == "weights":
        next(model.parameters()).data[0] += 1
    calls = 0
    finish = inverse.FisherAccumulator.finish

    def broken(self: Any, damping: float | None = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and last and how == "arithmetic":
            raise ff.errors.FisherError("block 7 breaks down")
        if calls == 2 and last and how == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, damping)

    inverse.FisherAccumulator.finish = broken  # type: ignore[method-assign]
    before = [p.detach().clone() for p in model.parameters()]
    try:
        ff.prune(model, data, process_group=dist.group.WORLD, **(COMMON | options))
        told = "nothing"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is written down
        told = f"{type(error).__name__}: {error}"
        traceback.clear_frames(error.__traceback__)
    whole = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    Path(folder, f"{rank}.txt").write_text(f"{told} [model {'whole' if whole else 'changed'}]")
