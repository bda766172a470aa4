"""A gradual run that is killed with SIGKILL, anywhere and again and again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfisher as ff
from fastfisher import runlog
from tests.prune import resume_run

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed by signals"),
    pytest.mark.xdist_group("resume"),
]
KILLS_PER_RUN = 6


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes by forking one that has imported torch and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler when an optimizer is made, which takes seconds
    context.set_forkserver_preload(["tests.prune.resume_run", "torch._dynamo", "pytest"])
    return context


def run(
    server: Any, folder: Path, death: tuple[str, int, str] | None = None, delay: float | None = None
) -> int:
    """Train in a process of its own, killed at a point or after seconds; returns its exit code."""
    process = server.Process(target=resume_run.train, args=(str(folder), death))
    process.start()
    process.join(delay)
    process.kill()  # nothing, where it is over
    process.join()
    return int(process.exitcode)


@pytest.fixture(scope="module")
def whole(server: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What an uninterrupted run saved at its end, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    run(server, folder, ("load", 1, "before"))  # the server is started
    start = time.perf_counter()
    (folder / "last.pt").unlink(missing_ok=True)
    (folder / "run.jsonl").unlink()
    assert run(server, folder) == 0
    return ff.load_checkpoint(folder / "last.pt"), time.perf_counter() - start


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal bit for bit, but for what a report tells of times and memory."""
    if where.endswith(".reports"):
        found, expected = json.loads(found), json.loads(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected.keys() - {"seconds", "peak_memory", "command"}:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert found == expected, where


def assert_whole(folder: Path, expected: dict[str, Any]) -> None:
    assert_same(ff.load_checkpoint(folder / "last.pt"), expected)
    log = runlog.read(folder / "run.jsonl")
    assert [when for when, _ in log.steps] == [1, 3, 5]
    assert_same([report.to_dict() for _, report in log.steps], json.loads(expected["pruner"]["reports"]))
    assert [when for when, _ in log.scores] == list(range(resume_run.EPOCHS))


@pytest.mark.parametrize("point", [*resume_run.POINTS, "half"])
def test_killed_at_a_point_again_and_again(
    server: Any, whole: tuple[dict[str, Any], float], tmp_path: Path, point: str
) -> None:
    chance, kills = random.Random(point), 0
    if point in ("load", "resume"):
        run(server, tmp_path, ("replace", 3, "after"))  # it takes a checkpoint to be loaded
    for i in range(KILLS_PER_RUN):
        n = 1 if point in ("load", "resume") or i < 2 else chance.randint(1, 3)
        code = run(server, tmp_path, (point, n, ("before", "after")[i % 2]))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert run(server, tmp_path) == 0
    assert_whole(tmp_path, whole[0])


def test_killed_at_random_times(server: Any, whole: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    chance, kills, seconds = random.Random(0), 0, whole[1]
    for i in range(12):  # four, but for a machine whose speed changes
        folder = tmp_path / str(i)
        folder.mkdir()
        for attempt in range(KILLS_PER_RUN):
            start = time.perf_counter()
            code = run(server, folder, delay=seconds * chance.uniform(0.2, 0.9))
            if code == 0:
                if attempt == 0:  # faster than the run that was timed, which a busy machine held up
                    seconds = min(seconds, time.perf_counter() - start)
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert run(server, folder) == 0
        assert_whole(folder, whole[0])
        if i >= 3 and kills >= 4:
            return
    pytest.fail(f"12 runs were killed {kills} times")
