"""Copies of a model in several processes, whose data and running statistics differ, are pruned alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastfisher as ff
from tests.prune.models import batches, classifier, images

PROCESSES = 2


def train(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(classifier().to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batches(*images(32, seed=rank), 16)
    pruner = ff.Pruner(model, schedule=[(0, 0.5), (1, 0.8)], num_grads=32, block_size=16, strict=True)
    pruner.attach(optimizer)
    for epoch in range(3):
        pruner.step(data, epoch=epoch)
        model.train()
        for inputs, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    pruner.finalize()
    torch.save({"masks": pruner.masks, "model": model.module.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_all_processes_have_the_masks_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, (tmp_path,), nprocs=PROCESSES)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    weights: dict[str, Any] = dict(nn.Module.named_parameters(classifier()))
    assert not torch.equal(one["model"]["1.running_mean"], two["model"]["1.running_mean"])
    assert all(torch.equal(mask, two["masks"][name]) for name, mask in one["masks"].items())
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in weights)
    assert sum(int((~mask).sum()) for mask in one["masks"].values()) == round(0.8 * 666)
