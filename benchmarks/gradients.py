"""Per-sample gradients: `python -m benchmarks.gradients`.

Three networks, one micro-batch each.  Ways: the obvious `torch.func.vmap(grad)`, into a dict of tensors; ours, by
layers, into the rows [k, d] of a buffer; and two that make no per-sample gradient at all and are floors: plain autograd
of the batch, and its forward and backward down to the first layer without any weight gradient.  The ways take turns, so
that what disturbs the machine disturbs all.  Both results are compared with float64, and a ratio is printed only where
ours agrees.  Peak memory is measured in a process of its own, beside the bytes that the micro-batch was sized with.
Writes results/gradients-<machine>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks import machine, memory
from benchmarks.paper.networks import ResNet20
from fastfisher.fisher.batches import Samples, read_batch
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.gradients import ACTIVATION_FACTOR, GradientStream
from fastfisher.fisher.objective import Objective

RESULTS = Path(__file__).parent / "results"
BAR = {"cpu": 2.5, "cuda": 3.0}  # times as fast as vmap(grad), asked of the first network
VMAP, OURS, PLAIN, FLOOR = (
    "vmap(grad)",
    "by layers",
    "plain autograd of the batch",
    "without weight gradients",
)
WAYS = (VMAP, OURS, PLAIN, FLOOR)
AGREES = 1e-4  # largest difference from float64, of the largest gradient
ROUNDS = 15


class Attention(nn.Module):
    """Softmax attention of 4 heads.   x [n, T, D] -> the like."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, T, D = x.shape
        q, k, v = self.qkv(x).view(n, T, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (D // 4) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, T, D))


class Transformer(nn.Module):
    """Two layers of width 128 over 64 tokens, ten classes.   ids [n, 64] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        D = 128
        self.tokens, self.positions = nn.Embedding(1000, D), nn.Embedding(64, D)
        self.attention = nn.ModuleList(Attention(D) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(D, 4 * D) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(4 * D, D) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.head = nn.Linear(D, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.narrow[i](F.gelu(self.wide[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "ResNet-20, 32 x 32": (ResNet20, lambda k: torch.randn(k, 3, 32, 32)),
    "MLP 784-500-500-10": (_mlp, lambda k: torch.randn(k, 784)),
    "transformer, 2 x 128": (Transformer, lambda k: torch.randint(1000, (k, 64))),
}


class Case:
    """A network and a micro-batch of k samples, and the ways through it."""

    def __init__(self, name: str, k: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        build, inputs = NETWORKS[name]
        self.model = build().to(device).eval()
        self.x, self.y = inputs(k).to(device), torch.randint(10, (k,)).to(device)
        parameters = dict(self.model.named_parameters())
        self.names = [name for name, p in parameters.items() if p.dim() > 1]
        self.layout = BlockLayout(self.names, [parameters[name].shape for name in self.names], None)
        self.k = k

    def ours(self) -> GradientStream:
        """A stream of one piece, with all rows in its buffer."""
        return GradientStream(
            Objective(self.model, self.names),
            [(self.x, self.y)],
            self.layout,
            num_grads=self.k,
            memory_limit=1 << 34,
        )

    def functional(self, w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The mean loss at weights w."""
        rest = {n: p.detach() for n, p in self.model.named_parameters() if n not in w}
        return F.cross_entropy(functional_call(self.model, {**rest, **w}, (x,)), y)

    def vmapped(self) -> dict[str, Tensor]:
        """The rows of each tensor [k, *shape]."""
        w = {name: self.model.get_parameter(name).detach() for name in self.names}
        one = grad(lambda w, x, y: self.functional(w, x[None], y[None]))
        return vmap(one, in_dims=(None, 0, 0))(w, self.x, self.y)

    def plain(self) -> None:
        """One gradient of the batch."""
        w = {name: self.model.get_parameter(name).detach().requires_grad_() for name in self.names}
        torch.autograd.grad(self.functional(w, self.x, self.y), list(w.values()))

    def floor(self) -> None:
        """The gradient at the first layer's output."""
        first = next(m for m in self.model.modules() if m._parameters)
        seen: list[Tensor] = []
        handle = first.register_forward_hook(lambda m, args, output: seen.append(output.requires_grad_()))
        try:
            loss = self.functional({}, self.x, self.y)
        finally:
            handle.remove()
        torch.autograd.grad(loss, seen[0])

    def runs(self) -> dict[str, Callable[[], Any]]:
        """What each way repeats; ours without the comparison that a run makes once."""
        samples: Samples = read_batch((self.x, self.y))
        stream = self.ours()
        buffer = next(iter(stream))

        def again() -> None:
            stream.differentiate(samples, buffer)

        return {VMAP: self.vmapped, OURS: again, PLAIN: self.plain, FLOOR: self.floor}

    def errors(self) -> dict[str, float]:
        """Largest difference from float64 of the two results, of the largest gradient."""
        wide = copy.copy(self)
        wide.model = copy.deepcopy(self.model).double()
        wide.x = self.x.double() if self.x.is_floating_point() else self.x
        expected = self.layout.flatten(wide.vmapped())
        largest = expected.abs().max()
        found = {VMAP: self.layout.flatten(self.vmapped()), OURS: next(iter(self.ours()))}
        return {way: float((rows - expected).abs().max() / largest) for way, rows in found.items()}


def measure(name: str, k: int, rounds: int, device: str) -> dict[str, Any]:
    """Median seconds of every way, errors, and how ours came about."""
    case = Case(name, k, device)
    runs = case.runs()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds + 2):
        for way in WAYS:
            started = time.perf_counter()
            runs[way]()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[way].append(time.perf_counter() - started)
    objective = case.ours().objective
    how = sorted(set(objective.explain().values()))
    return {
        "k": k,
        "weights": case.layout.num_weights,
        "seconds": {way: statistics.median(found) for way, found in times.items()},
        "least": {way: min(found) for way, found in times.items()},
        "errors": case.errors(),
        "how": how,
    }


def peak(name: str, k: int) -> dict[str, int]:
    """Peak bytes of ours above model and data, and the bytes allowed for it; run in a process of its own."""
    torch.set_num_threads(1)
    small = Case(name, 2)
    next(iter(small.ours()))  # loads what there is to load
    case = Case(name, k)
    stream = case.ours()
    activation = stream.objective.activation_bytes(read_batch((case.x[:1], case.y[:1])))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory._resident("VmRSS")
    next(iter(stream))
    row = 4 * case.layout.num_weights
    return {
        "peak_bytes": memory._resident("VmHWM") - before,
        "rows_bytes": k * row,
        "activation_bytes": k * activation,
        "allowed_bytes": 2 * k * row + ACTIVATION_FACTOR * k * activation,
    }


def apart(name: str, k: int) -> dict[str, int]:
    """`peak` in a process of its own; empty off Linux."""
    if sys.platform != "linux":
        return {}
    command = [sys.executable, "-m", "benchmarks.gradients", "--peak", name, "--samples", str(k)]
    output = subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, int] = json.loads(output)
    return found


def page(result: Mapping[str, Any]) -> str:
    """The table as text."""
    lines = [
        "| network | k | "
        + " | ".join(f"{way}, ms" for way in WAYS)
        + " | ours vs vmap(grad) | largest error "
        "| peak, MB | allowed, MB |",
        "|--|--:|" + "--:|" * (len(WAYS) + 4),
    ]
    for name, row in result["rows"].items():
        seconds, error = row["seconds"], row["errors"][OURS]
        ratio = f"{seconds[VMAP] / seconds[OURS]:.2f}x" if error <= AGREES else "–"
        held = row["memory"]
        sizes = [f"{held[key] / 1e6:,.0f}" if held else "–" for key in ("peak_bytes", "allowed_bytes")]
        times = " | ".join(f"{1e3 * seconds[way]:.1f}" for way in WAYS)
        lines.append(f"| {name} | {row['k']} | {times} | {ratio} | {error:.0e} | {' | '.join(sizes)} |")
    bar = result["bar"]
    lines += [
        "",
        f"{bar['network']}: {bar['measured']:.2f}x of vmap(grad), asked at least {bar['asked']}x, "
        f"{'cleared' if bar['passed'] else 'NOT cleared'}; without any weight gradient it would be "
        f"{bar['at_best']:.2f}x.",
    ]
    return "\n".join(lines)


def judge(rows: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
    """The bar of the first network, and what no way of making weight gradients could pass."""
    name, row = next(iter(rows.items()))
    seconds = row["seconds"]
    ratio = seconds[VMAP] / seconds[OURS]
    right = row["errors"][OURS] <= AGREES
    return {
        "network": name,
        "asked": BAR[device],
        "measured": ratio,
        "at_best": seconds[VMAP] / seconds[FLOOR],
        "passed": right and ratio >= BAR[device],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--peak", metavar="NETWORK", help="measure the memory of one network and print it")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.peak:
        print(json.dumps(peak(options.peak, options.samples)))
        return 0
    rows = {}
    for name in NETWORKS:
        rows[name] = measure(name, options.samples, options.rounds, options.device)
        rows[name]["memory"] = apart(name, options.samples) if options.device == "cpu" else {}
    found = {"threads": torch.get_num_threads(), "rows": rows, "bar": judge(rows, options.device)}
    machine.write_result(options.out, "gradients", found, options.device)
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
