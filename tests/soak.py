"""Two hours of use in ten minutes, and what of it stays behind: `make soak`, or

    python -m tests.soak [--seconds 600] [--device cuda]

A round does once what users do: prune by a third of the methods, train under a Pruner and go on from its checkpoint,
plan, build inverses and throw them away, save, load, fail in the middle.  After each round what the process holds is
read.  Something leaks if it rises from each third of the rounds to the next, by more than its slack over all of them; a
cache that fills once does not.  The exit code is 0 where nothing leaks, 1 where something does, with a sentence each.

Two hours are 7,200 calls of the library, one a second of a grid of runs, and 36,000 optimizer steps under a Pruner,
five a second of a training run.  The loop ends when both are done, or the seconds are over.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fastfisher as ff
from fastfisher.compat import EmpiricalBlockFisherInverse
from fastfisher.errors import FastFisherError
from tests.prune.models import batches, classifier, images

CALLS, STEPS = 7_200, 36_000
WARM_UP = 3  # rounds that fill caches and import what is imported late
FEWEST = 9  # rounds that make three thirds

# What is read after a round, and by how much it may rise over all rounds.
MEASURES = {
    "bytes of resident memory": 8 << 20,
    "bytes on the device": 0,
    "bytes reserved on the device": 2 << 20,
    "tensors": 0,
    "Python objects": 100,
    "hooks of modules": 0,
    "hooks of optimizers": 0,
    "hooks of tensors": 0,
    "Python threads": 0,
    "threads": 0,
    "open files": 0,
    "files in the folder for temporary ones": 0,
    "child processes": 0,
}


def _hooks(owner: Any) -> int:
    """How many are registered in the dictionaries called ..._hooks of a module, an optimizer or a Python module."""
    return sum(
        len(value)
        for name, value in vars(owner).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    )


_WATCHED = (Tensor, nn.Module, Optimizer)


@contextmanager
def frozen() -> Iterator[list[Any]]:
    """What exists already is neither searched nor counted inside; yields those of it that may get hooks."""
    gc.collect()
    # by type, as isinstance would ask proxies, which answer by importing what they stand for
    old = [each for each in gc.get_objects() if issubclass(type(each), _WATCHED)]
    gc.freeze()
    try:
        yield old
    finally:
        gc.unfreeze()


def read(device: torch.device, old: Sequence[Any]) -> dict[str, float]:
    """What this process holds now, by the names of MEASURES; what the system does not tell is left out.

    old: tensors, modules and optimizers from before.
    """
    gc.collect()
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        found["bytes on the device"] = torch.cuda.memory_allocated(device)
        found["bytes reserved on the device"] = torch.cuda.memory_reserved(device)
    new = gc.get_objects()
    found["Python objects"] = len(new)
    watched = [*old, *(each for each in new if issubclass(type(each), _WATCHED))]
    del new
    tensors, modules, optimizers = (
        [each for each in watched if issubclass(type(each), kind)] for kind in _WATCHED
    )
    found["tensors"] = len(tensors)
    found["hooks of modules"] = sum(map(_hooks, [sys.modules[nn.Module.__module__], *modules]))
    found["hooks of optimizers"] = sum(map(_hooks, [sys.modules[Optimizer.__module__], *optimizers]))
    found["hooks of tensors"] = sum(
        len(getattr(each, name, None) or ())
        for each in tensors
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    del watched, tensors, modules, optimizers
    found["Python threads"] = threading.active_count()
    found["files in the folder for temporary ones"] = sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["bytes of resident memory"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["threads"] = len(os.listdir("/proc/self/task"))
        found["open files"] = len(os.listdir("/proc/self/fd"))
        found["child processes"] = sum(
            len(Path(f"/proc/self/task/{task}/children").read_text().split())
            for task in os.listdir("/proc/self/task")
        )
    return found


def rise(values: Sequence[float], slack: float) -> float | None:
    """How much each round adds, by a line through the values; None where that is no leak.

    A leak rises by more than slack along the line and from the largest value of the first half to that of the second,
    and from each third to the next: a single step is a cache that was filled.
    """
    n = len(values)
    slope = float(np.polyfit(np.arange(n), values, 1)[0])
    half = max(values[n // 2 :]) - max(values[: n // 2])
    one, two, three = (float(np.median(part)) for part in np.array_split(np.asarray(values), 3))
    return slope if min(slope * (n - 1), half) > slack and one < two < three else None


def verdict(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence for everything that leaks."""
    said = []
    for name, slack in MEASURES.items():
        values = [row[name] for row in rows if name in row]
        each = rise(values, slack) if len(values) >= FEWEST else None
        if each is not None:
            said.append(
                f"{name} grew from {values[0]:,.0f} to {values[-1]:,.0f} in {len(values)} rounds, {each:,.2f} a round"
            )
    return said


@contextmanager
def temporary_files(folder: Path) -> Iterator[None]:
    """Whatever makes temporary files makes them in this folder."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class Fault(Exception):
    """What a broken loader raises."""


class Use:
    """What users do, once a round, with small networks; some are new each time, some stay for the whole run.

    steps_an_epoch: of an optimizer.   counts: the calls of the library so far, by name, and "optimizer steps".
    """

    def __init__(self, folder: Path, device: torch.device, steps_an_epoch: int = 50) -> None:
        self.folder, self.device, self.steps_an_epoch = folder, device, steps_an_epoch
        self.data = [(x.to(device), y.to(device)) for x, y in batches(*images(32), 8)]
        self.kept = classifier().to(device)
        self.start = copy.deepcopy(self.kept.state_dict())
        self.kept_optimizer = torch.optim.AdamW(self.kept.parameters(), 1e-3)
        self.counts: Counter[str] = Counter()
        self.rounds = 0

    @property
    def calls(self) -> int:
        return sum(self.counts.values()) - self.counts["optimizer steps"]

    def __call__(self) -> None:
        self.rounds += 1
        for action in (
            self.prune,
            self.train,
            self.train_and_leave,
            self.invert,
            self.fail,
            self.files,
            self.others,
        ):
            action()
        self.kept.load_state_dict(self.start)

    def called(self, name: str, **options: Any) -> Any:
        """Call a public function of the library, and count it."""
        self.counts[name] += 1
        return getattr(ff, name)(**options)

    def prune(self) -> None:
        """A third of the methods, on the network that stays and on copies."""
        methods: list[tuple[str, dict[str, Any]]] = [
            ("woodfisher", {}),
            ("woodfisher", {"block_size": None, "update": "joint"}),
            ("woodtaylor", {"num_recomputations": 2}),
            ("fishleg", {}),
            ("fishleg", {"fishleg": {"parameterization": "block-kron"}}),
            ("kfac", {}),
            ("hessian", {"targets": "10", "damping": 10.0, "damping_mode": "absolute"}),
            ("diagonal", {"fisher_type": "exact"}),
            ("obd", {}),
            ("magnitude", {"pattern": "2:4", "sparsity": None}),
        ]
        for i, (method, options) in enumerate(methods[self.rounds % 3 :: 3]):
            model = self.kept if (self.rounds // 3 + i) % 2 else copy.deepcopy(self.kept)
            given = {"sparsity": 0.7, "num_grads": 16, "block_size": 16, "num_recomputations": 0, **options}
            self.called("prune", model=model, data=self.data, method=method, eval_fn=self.accuracy, **given)
            self.kept.load_state_dict(self.start)

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.data[0][0]).argmax(1) == self.data[0][1]).double().mean())

    def steps(self, model: nn.Module, optimizer: Optimizer, count: int) -> None:
        model.train()
        for i in range(count):
            x, y = self.data[i % len(self.data)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        self.counts["optimizer steps"] += count

    def train(self) -> None:
        """A gradual run of the network and optimizer that stay, which is attached, finished, and let go."""
        pruner = self.pruner(self.kept, ("woodfisher", "fishleg", "woodtaylor")[self.rounds % 3])
        pruner.attach(self.kept_optimizer)
        for epoch in range(4):
            self.counts["Pruner.step"] += 1
            pruner.step(self.data, epoch=epoch)
            self.steps(self.kept, self.kept_optimizer, self.steps_an_epoch)
            pruner.record({"accuracy": self.accuracy(self.kept)}, epoch=epoch)
        pruner.finalize()

    def pruner(self, model: nn.Module, method: str) -> ff.Pruner:
        self.counts["Pruner"] += 1
        log = self.folder / "log.jsonl"
        log.unlink(missing_ok=True)
        return ff.Pruner(
            model,
            schedule=ff.CubicSchedule(0.3, 0.8, begin=1, end=3),
            method=method,
            num_grads=16,
            block_size=16,
            log=log,
        )

    def train_and_leave(self) -> None:
        """A run that goes on from its checkpoint, and is dropped, as when a notebook's cell is run anew."""
        for _ in range(2):
            model = classifier().to(self.device)
            optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
            pruner = self.pruner(model, "woodfisher")
            pruner.attach(optimizer)
            start, path = 0, self.folder / "last.pt"
            if path.exists():
                state = self.called("load_checkpoint", path=path)
                for name, part in (("model", model), ("optimizer", optimizer), ("pruner", pruner)):
                    part.load_state_dict(state[name])
                start = state["epoch"]
            for epoch in range(start, start + 2):
                self.counts["Pruner.step"] += 1
                pruner.step(self.data, epoch=epoch)
                self.steps(model, optimizer, self.steps_an_epoch)
            self.called(
                "save_checkpoint",
                path=path,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                pruner=pruner.state_dict(),
                epoch=epoch + 1,
            )
        path.unlink()

    def invert(self) -> None:
        """Inverses that are built, used and thrown away, one of them before it is finished."""
        grads = torch.randn(24, 600, device=self.device)
        for block_size in (16, 200, None):
            self.counts["FisherInverse"] += 1
            inverse = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=1e-2)
            inverse.diag()
            inverse @ grads[0]
        layout = ff.BlockLayout(["weight"], [(20, 30)], block_size=16)
        self.counts["FisherAccumulator"] += 1
        ff.FisherAccumulator(layout, num_grads=48, damping=1e-2).add(grads)
        self.counts["FishLegInverse"] += 1
        ff.FishLegInverse.from_grads(grads, layout, damping=0.1, damping_mode="relative").diag()
        self.called("inverse_diagonal", grads=grads, block_size=16, damping=1e-2)
        self.counts["EmpiricalBlockFisherInverse"] += 1
        old = EmpiricalBlockFisherInverse(8, 16, 600, 1e-3, self.device)
        for row in grads[:8]:
            old.add_grad(row)
        old.diag()

    def fail(self) -> None:
        """Calls that end in the middle, by an error of the user's or by Ctrl-C."""

        def broken_loader() -> Iterator[Any]:
            yield self.data[0]
            raise Fault("the loader broke")

        def interrupted(model: nn.Module, batch: Any) -> Tensor:
            raise KeyboardInterrupt

        def nan(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1]) * float("nan")

        common = {
            "model": self.kept,
            "sparsity": 0.5,
            "num_grads": 16,
            "block_size": 16,
            "num_recomputations": 0,
        }
        for method in ("woodfisher", "kfac", "fishleg"):
            for given, expected in (
                ({"data": broken_loader()}, Fault),
                ({"data": self.data, "loss_fn": interrupted}, KeyboardInterrupt),
                ({"data": self.data, "loss_fn": nan}, FastFisherError),
                ({"data": self.data, "sparsity": 50}, FastFisherError),
            ):
                self.expect(expected, "prune", **{**common, **given, "method": method})
        pruner = self.pruner(self.kept, "fishleg")
        pruner.attach(self.kept_optimizer)
        self.counts["Pruner.step"] += 1
        try:
            pruner.step(broken_loader(), epoch=3)
        except Fault:
            pass
        else:
            raise AssertionError("Pruner.step did not raise Fault")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that was not completed
            pruner.finalize()

    def expect(self, expected: type[BaseException], name: str, **options: Any) -> None:
        try:
            self.called(name, **options)
        except expected:
            return
        raise AssertionError(f"{name} did not raise {expected.__name__}")

    def files(self) -> None:
        """Files written, read, and broken; always of the same weights, as numpy keeps a type for each size."""
        model = classifier().to(self.device)
        path = self.folder / "model.safetensors"
        report = self.called("prune", model=model, data=None, sparsity=0.6, method="magnitude")
        report.save(self.folder / "report")
        self.called("save", model=model, path=path, report=report)
        self.called("load", path=path, model=model)
        self.called("export_packed", model=model, path=path)
        model.load_state_dict(self.called("load_packed", path=path))
        path.write_bytes(path.read_bytes()[:-100])
        self.expect(FastFisherError, "load_packed", path=path)

    def others(self) -> None:
        """Plan, hold_sparsity, torch's masks, BatchNorm."""
        self.called("plan", model=self.kept, data=self.data, sparsity=0.8, num_grads=16, block_size=16)
        self.called("prune", model=self.kept, data=None, sparsity=0.5, method="magnitude")
        held = self.called("hold_sparsity", model=self.kept, optimizer=self.kept_optimizer)
        self.steps(self.kept, self.kept_optimizer, 5)
        held.remove()
        model = copy.deepcopy(self.kept)
        self.called("to_torch_masks", model=model)
        self.called("from_torch_masks", model=model)
        self.called("reestimate_batchnorm", model=model, data=self.data)


def run(
    use: Callable[[], None],
    device: torch.device,
    *,
    seconds: float,
    done: Callable[[], bool] = lambda: False,
    fewest: int = FEWEST,
    tell: Callable[[int, Mapping[str, float]], None] = lambda number, row: None,
) -> list[dict[str, float]]:
    """Rounds until it is done or the time is over, but at least `fewest`, and what was read after each of them."""
    end = time.monotonic() + seconds
    for _ in range(WARM_UP):
        use()
    rows: list[dict[str, float]] = []
    with frozen() as old:
        while len(rows) < fewest or (time.monotonic() < end and not done()):
            use()
            rows.append(read(device, old))
            tell(len(rows), rows[-1])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The whole run, with a line every ten seconds and a table at the end; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Two hours of use in ten minutes, and what of it stays behind."
    )
    parser.add_argument("--seconds", type=float, default=600, help="at most, but for the first rounds (600)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    started = told = time.monotonic()

    def tell(number: int, row: Mapping[str, float]) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            held = row.get("bytes of resident memory", 0) / 2**20
            print(
                f"{told - started:4.0f} s: round {number}, {use.calls:,} of {CALLS:,} calls, "
                f"{use.counts['optimizer steps']:,} of {STEPS:,} optimizer steps; {held:.1f} MiB, "
                f"{row['tensors']:,.0f} tensors",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder, temporary_files(Path(folder)):
        use = Use(Path(folder), device)
        rows = run(
            use,
            device,
            seconds=options.seconds,
            done=lambda: use.calls >= CALLS and use.counts["optimizer steps"] >= STEPS,
            tell=tell,
        )
    hours = 2 * min(use.calls / CALLS, use.counts["optimizer steps"] / STEPS)
    print(f"{len(rows)} rounds in {time.monotonic() - started:.0f} s: {use.calls:,} calls and ", end="")
    print(f"{use.counts['optimizer steps']:,} optimizer steps, as many as in {hours:.1f} hours of use")
    print(", ".join(f"{count:,} {name}" for name, count in sorted(use.counts.items())))
    for name in MEASURES:
        values = [row[name] for row in rows if name in row]
        if values:
            thirds = "  ".join(f"{np.median(part):14,.0f}" for part in np.array_split(values, 3))
            print(f"{name:>40}, medians of the thirds: {thirds}")
    said = verdict(rows)
    print("\n".join(f"leak: {sentence}" for sentence in said) or "nothing grew")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
