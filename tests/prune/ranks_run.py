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
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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
# those that are run with FSDP2 too
SHARDED = ("greedy", "steps", "woodtaylor", "kfac", "magnitude")
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


def sharded(model: nn.Module) -> nn.Module:
    """Spread over all processes by FSDP2, the convolutions and the rest each for itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[3], model[8]):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def prune_sharded(rank: int, size: int, folder: str) -> None:
    """A few cases with FSDP2, then a gradual run that is saved by torch.distributed.checkpoint in the middle."""
    join(rank, size, folder)
    found: dict[str, Any] = {}
    for name in SHARDED:
        _, report = prune(shard(rank, size, CASES[name]), CASES[name], sharded)
        found[name] = report.to_dict()
        model = sharded(classifier(dtype=torch.float64))
        ff.prune(model, shard(rank, size, CASES[name]), **(COMMON | CASES[name]))
        found[name + " weights"] = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    model, pruner = train(rank, size, 0, 2)
    dcp.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, checkpoint_id=Path(folder, "half"))
    found["half"] = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    found["sparsity"] = pruner.sparsity
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def train(rank: int, size: int, start: int, stop: int) -> tuple[nn.Module, ff.Pruner]:
    """Epochs start to stop of a gradual run of a sharded model."""
    model = sharded(classifier(dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = ff.Pruner(
        model, schedule=[(0, 0.3), (1, 0.5), (2, 0.8)], num_grads=28, block_size=16, strict=True
    )
    pruner.attach(optimizer)
    data = shard(rank, size, {})
    for epoch in range(start, stop):
        pruner.step(data, epoch=epoch)
        for inputs, labels in batches(*images(8, seed=rank, dtype=torch.float64), 4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model, pruner


def resume_sharded(rank: int, size: int, folder: str, checkpoint: str) -> None:
    """Load what another number of processes has saved, and prune on."""
    join(rank, size, folder)
    model = sharded(classifier(seed=5, dtype=torch.float64))
    pruner = ff.Pruner(
        model, schedule=[(0, 0.3), (1, 0.5), (2, 0.8)], num_grads=28, block_size=16, strict=True
    )
    state = {"model": model.state_dict(), "pruner": pruner.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    pruner.load_state_dict(state["pruner"])
    found = {
        "weights": {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()},
        "sparsity": pruner.sparsity,
        "reports": len(pruner.reports),
    }
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner.step(shard(rank, size, {}), epoch=2)
    found["end"] = pruner.sparsity
    pruner.finalize()
    torch.save(found, Path(folder, f"resumed{rank}.pt"))
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
