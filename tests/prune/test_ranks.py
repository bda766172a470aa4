"""Several processes, each with a shard of its own, prune as one does with all data; and none waits for a lost one."""

from __future__ import annotations

import functools
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastfisher.errors import FisherError
from fastfisher.prune.ranks import Ranks
from fastfisher.prune.select import keep_mask
from tests.prune import ranks_run
from tests.prune.ranks_run import CASES

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def spawn(work: Callable[..., None], size: int, folder: Path, *args: Any) -> list[int | None]:
    """Run work(rank, size, folder, ...) in so many processes; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prune.ranks_run", "torch._dynamo", "pytest"])
    processes = [context.Process(target=work, args=(rank, size, str(folder), *args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@functools.cache
def alone(case: str) -> Any:
    """One process with all the data."""
    return ranks_run.prune(ranks_run.shard(0, 1, CASES[case]), CASES[case])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_prune_as_one_process_does(tmp_path: Path, size: int) -> None:
    assert spawn(ranks_run.prune_all, size, tmp_path) == [0] * size
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for case in CASES:
        expected, report = alone(case)
        for weights, told in (one[case] for one in found):
            for figure in ("num_zeros", "loss_dense", "loss_pruned", "damping_used", "predicted_change"):
                value = getattr(report, figure)
                assert told[figure] == (value if value is None else pytest.approx(value, rel=1e-8)), case
            for name, weight in weights.items():
                assert torch.equal(weight == 0, expected[name] == 0), (case, name)
                torch.testing.assert_close(
                    weight, expected[name], rtol=1e-8, atol=1e-10, msg=f"{case} {name}"
                )
                assert torch.equal(weight, found[0][case][0][name]), (case, name)


@pytest.mark.parametrize(("size", "other"), [(2, 3), (3, 1)])
def test_sharded_models_and_checkpoints(tmp_path: Path, size: int, other: int) -> None:
    assert spawn(ranks_run.prune_sharded, size, tmp_path) == [0] * size
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for case in ranks_run.SHARDED:
        expected, report = alone(case)
        for one in found:
            assert one[case]["num_zeros"] == report.num_zeros
            for name, weight in one[f"{case} weights"].items():
                assert torch.equal(weight == 0, expected[name] == 0), (case, name)
                torch.testing.assert_close(weight, expected[name], rtol=1e-8, atol=1e-10)
    half = found[0]["half"]
    assert found[0]["sparsity"] == 0.5
    assert (
        sum(int((weight == 0).sum()) for weight in half.values()) == 333
    )  # of 666, though there was training
    (tmp_path / "meet").unlink()
    assert spawn(ranks_run.resume_sharded, other, tmp_path, str(tmp_path / "half")) == [0] * other
    again = torch.load(tmp_path / "resumed0.pt", weights_only=True)
    assert all(torch.equal(weight, half[name]) for name, weight in again["weights"].items())
    assert (again["sparsity"], again["reports"]) == (0.5, 2)
    assert again["end"] == 1 - (666 - 533) / 666


FAILURES = {
    "loader": (
        ".*rank 2 failed during the data: FastFisherError: every entry of a batch",
        "every entry of a batch",
    ),
    "few": ("num_grads=10000 but the loaders of the ranks give",) * 2,
    "settings": ("the settings of rank",) * 2,
    "weights": ("the weights of rank",) * 2,
    "arithmetic": ("rank 2 failed during the inverse: FisherError: block 7", "block 7 breaks down"),
    "death": ("a process of the 3 that prune together was lost during",) * 2,
}


@pytest.mark.parametrize("how", FAILURES)
def test_one_fails_and_all_say_so(tmp_path: Path, how: str) -> None:
    codes = spawn(ranks_run.fail, 3, tmp_path, how)
    assert codes[:2] == [0, 0]
    for rank, message in enumerate((FAILURES[how][0],) * 2 + (FAILURES[how][1],)):
        if how == "death" and rank == 2:
            continue
        told = (tmp_path / f"{rank}.txt").read_text()
        assert re.search(message, told), told
        assert "[model whole]" in told


@pytest.mark.parametrize("ties", [False, True])
def test_histograms_find_the_weights_that_sorting_finds(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(999, generator=generator, dtype=torch.float64) ** 20
    scores[::7] = 1e300
    if ties:
        scores = (scores * 4).round().clamp(max=2)
    dead = torch.rand(999, generator=generator) < 0.2
    owner = torch.arange(999) // 100
    owner[dead] = -1
    for zeros in (0, 1, 150, 500, 998, 999):
        found = Ranks().keep_mask(scores, dead, zeros, owner)
        assert torch.equal(found, keep_mask(scores, dead, zeros)), zeros
    with pytest.raises(FisherError, match="the saliency of weight 5 is nan"):
        Ranks().keep_mask(torch.where(torch.arange(999) == 5, torch.nan, scores), owner < -1, 10, owner.abs())
