"""What several processes tell each other, and what they gain: `python -m benchmarks.ranks`.

One network is pruned by 1, 2 and 4 processes with one thread each, over gloo.  The bytes that each sends are counted at
torch.distributed's calls and told for each weight, beside the fewest: a gradient leaves its process but for the share
of the blocks that it owns, and a new weight goes to all others.
Writes results/ranks-<machine>.json and .png, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.distributed as dist
from torch import nn

import fastfisher as ff
from benchmarks import machine
from benchmarks.scaling import exponent

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

RESULTS = Path(__file__).parent / "results"
PROCESSES = (1, 2, 4)
ROUNDS = 3
WIDTH, NUM_GRADS, BLOCK = 700, 128, 64
# What this process puts into the network, of the tensors that each call is given.
SENT: dict[str, Callable[..., float]] = {
    "all_to_all_single": lambda received, sent, sizes, to_each, **_: (
        sent.nbytes - to_each[dist.get_rank()] * sent.itemsize
    ),
    "all_reduce": lambda tensor, **_: 2 * tensor.nbytes * (1 - 1 / dist.get_world_size()),
    "all_gather": lambda everyone, mine, **_: mine.nbytes * (dist.get_world_size() - 1),
    "broadcast": lambda tensor, group_src, **_: (
        tensor.nbytes * (dist.get_world_size() - 1) if group_src == dist.get_rank() else 0
    ),
}


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 10))


def fewest(size: int, num_grads: int) -> float:
    """Bytes for each weight that all processes together must send: of gradients, and of the new weights in float32."""
    return 4 * num_grads * (size - 1) / size + 4 * (size - 1)


def work(rank: int, size: int, folder: str, width: int) -> None:
    """What one process does: prune, several times, and write down its seconds and bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    sent = dict.fromkeys(SENT, 0.0)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            sent[name] += SENT[name](*args, **kwargs)
            return call(*args, **kwargs)

        return counting

    for name in SENT:
        setattr(dist, name, counted(name, getattr(dist, name)))
    per = NUM_GRADS // size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_GRADS, width, generator=generator)[rank * per : (rank + 1) * per]
    y = torch.randint(10, (NUM_GRADS,), generator=generator)[rank * per : (rank + 1) * per]
    seconds = []
    for _ in range(ROUNDS + 1):
        model = network(width)
        sent.update(dict.fromkeys(SENT, 0.0))
        dist.barrier()
        start = time.perf_counter()
        ff.prune(
            model,
            [(x, y)],
            sparsity=0.8,
            num_grads=NUM_GRADS,
            block_size=BLOCK,
            num_recomputations=0,
            process_group=dist.group.WORLD,
        )
        seconds.append(time.perf_counter() - start)
    Path(folder, f"{rank}.json").write_text(json.dumps({"seconds": seconds[1:], "sent": sent}))
    dist.destroy_process_group()


def measure(size: int, width: int) -> dict[str, Any]:
    """Seconds of the slowest process, and bytes of all together."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (size, folder, width), nprocs=size)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    times = [max(one["seconds"][i] for one in found) for i in range(ROUNDS)]
    weights = sum(p.numel() for name, p in network(width).named_parameters() if name.endswith("weight"))
    return {
        "processes": size,
        "seconds": statistics.median(times),
        "weights": weights,
        "sent": {name: sum(one["sent"][name] for one in found) / weights for name in SENT},
        "fewest": fewest(size, NUM_GRADS),
    }


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bytes for each weight, and seconds with their fitted exponent, over the processes, all logarithmic."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8))
    several = [row for row in rows if row["processes"] > 1]  # one process sends nothing
    sizes = [row["processes"] for row in several]
    left.loglog(sizes, [sum(row["sent"].values()) for row in several], "o-", label="measured")
    left.loglog(sizes, [row["fewest"] for row in several], "s--", label="fewest")
    left.set_xticks(sizes, map(str, sizes))
    left.set_ylabel("bytes sent for each weight")
    sizes, seconds = [row["processes"] for row in rows], [row["seconds"] for row in rows]
    right.loglog(sizes, seconds, "o-", label="measured")
    right.loglog(sizes, [seconds[0] / size for size in sizes], "--", label="one process, shared out")
    right.set_xticks(sizes, map(str, sizes))
    right.set_ylabel("seconds")
    right.set_title(f"exponent {exponent(sizes, seconds):.2f}", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("processes")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text."""
    lines = [
        "| processes | seconds | bytes sent for each weight | of these gradients | fewest |",
        "|--:" * 5 + "|",
    ]
    for row in rows:
        total = sum(row["sent"].values())
        lines.append(
            f"| {row['processes']} | {row['seconds']:.3g} | {total:.1f} | {row['sent']['all_to_all_single']:.1f} "
            f"| {row['fewest']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="draw this result again, measure nothing")
    options = parser.parse_args(arguments)
    if options.redraw:
        draw(options.redraw.with_suffix(".png"), json.loads(options.redraw.read_text())["rows"])
        return 0
    sizes, width = ((1, 2), 24) if options.tiny else (PROCESSES, WIDTH)
    rows = [measure(size, width) for size in sizes]
    settings = {"width": width, "num_grads": NUM_GRADS, "block_size": BLOCK, "cores": os.cpu_count()}
    target = machine.write_result(options.out, "ranks", {"settings": settings, "rows": rows})
    draw(target.with_suffix(".png"), rows)
    print(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
