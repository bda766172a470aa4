"""A first look at speed on the user's own machine; the body of `fastfisher bench`.

A few calls of the public functions are timed beside what a careful user writes in plain PyTorch on the same gradients,
and both are compared with float64.  On a CPU both have one thread: PyTorch's batches of small matrices can be many
times slower on several, above all beside other programs.  benchmarks/README.md, in the repository, has the thorough
tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastfisher import __version__, ops
from fastfisher.errors import FastFisherError
from fastfisher.fisher.inverse import FisherInverse

TOLERANCE = 1e-4  # worst relative error of the checked entries; above it a row shows no ratio
DAMPING = 1e-5
GRADIENT_SCALE = 1e-2  # standard deviation
PRUNED_FRACTION = 0.5
ROUNDS = 50  # at most
WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 21}  # d; less would leave most of a GPU idle


@dataclass(frozen=True)
class Case:
    """One line to be: two functions that do the same, and what float64 says of some of the numbers they return."""

    what: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    checked: slice
    truth: Tensor

    def error(self, returned: Tensor) -> float:
        """Worst error of the checked numbers, relative to the largest of them."""
        return float((returned[self.checked].double() - self.truth).abs().max() / self.truth.abs().max())


@dataclass(frozen=True)
class Row:
    """One line: what was done, and of both the worst relative error and the median seconds."""

    what: str
    error: float
    plain_error: float
    seconds: float
    plain_seconds: float

    @property
    def ratio(self) -> float | None:
        """Plain PyTorch's time over ours, None unless both are right."""
        right = self.error <= TOLERANCE and self.plain_error <= TOLERANCE
        return self.plain_seconds / self.seconds if right else None

    @property
    def verdict(self) -> str:
        """What the row comes to."""
        if not self.error <= TOLERANCE:
            return "WRONG"
        if self.ratio is None:
            return "right, plain PyTorch is not"
        return "faster" if self.ratio >= 1 else "slower"


@dataclass(frozen=True)
class Result:
    """Where it ran, on how many weights, in whole blocks, and what came out."""

    device: str
    weights: int
    torch: str
    fastfisher: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Everything, ratios and verdicts included, as numbers and texts."""
        rows = [{**asdict(row), "ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        return {**asdict(self), "rows": rows}


def _blocks(grads: Tensor, block_size: int) -> Tensor:
    """[m, d] -> [K, m, B]."""
    return grads.unflatten(1, (-1, block_size)).transpose(0, 1)


def _ridge(num_blocks: int, size: int, value: float, like: Tensor) -> Tensor:
    """value I of every block, [K, size, size]."""
    return torch.eye(size, dtype=like.dtype, device=like.device).mul_(value).repeat(num_blocks, 1, 1)


def _plain_inverse(grads: Tensor, block_size: int) -> Tensor:
    """F⁻¹ by Gram matrix and Cholesky factor, [K, B, B]."""
    G = _blocks(grads, block_size)
    F = _ridge(len(G), block_size, DAMPING, grads).baddbmm_(G.mT, G, alpha=1 / G.shape[1])
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(F).L)


def _plain_dual_diagonal(grads: Tensor, block_size: int) -> Tensor:
    """diag F⁻¹ = (1 − Σᵢ Vᵢ²) / λ with V = L⁻¹ G, L Lᵀ = m λ I + G Gᵀ, [d]."""
    G = _blocks(grads, block_size)
    C = _ridge(len(G), G.shape[1], G.shape[1] * DAMPING, grads).baddbmm_(G, G.mT)
    V_t = torch.linalg.solve_triangular(
        torch.linalg.cholesky_ex(C).L.mT, G.mT, upper=True, left=False
    )  # [K, B, m]
    return (1 - V_t.square().sum(2)).div_(DAMPING).flatten()


def _exact_inverse(grads: Tensor) -> Tensor:
    """F⁻¹ of one block in float64.   grads: [m, B]."""
    G = grads.double()
    return torch.linalg.inv(_ridge(1, G.shape[1], DAMPING, G)[0] + G.T @ G / len(G))


def _inverse_case(grads: Tensor, block_size: int) -> Case:
    """From gradients to an inverse and its diagonal."""
    m, d = grads.shape

    def ours() -> Tensor:
        return FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING).diag()

    def plain() -> Tensor:
        if m < block_size:
            return _plain_dual_diagonal(grads, block_size)
        return _plain_inverse(grads, block_size).diagonal(dim1=1, dim2=2).flatten()

    last = slice(d - block_size, d)
    truth = _exact_inverse(grads[:, last]).diagonal()
    return Case(f"inverse m={m} B={block_size:,}", ours, plain, last, truth)


def _update_case(grads: Tensor, weight: Tensor, block_size: int) -> Case:
    """From an inverse to the weights after removing half of them."""
    m, d = grads.shape
    finv = FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING)
    f_inv, mask = _plain_inverse(grads, block_size), weight.abs() > weight.abs().median()
    inv_diag = finv.diag()

    def plain() -> Tensor:
        x = torch.where(mask, 0, weight / inv_diag).unflatten(0, (-1, block_size, 1))
        return (weight - torch.bmm(f_inv, x).flatten()) * mask

    last = slice(d - block_size, d)
    exact, w = _exact_inverse(grads[:, last]), weight[last].double()
    removed = torch.where(mask[last], 0, w / exact.diagonal())
    truth = (w - exact @ removed) * mask[last]
    return Case(f"update m={m} B={block_size:,}", lambda: finv.prune_update(weight, mask), plain, last, truth)


def _selection_case(saliency: Tensor) -> Case:
    """Which weights to remove: the half with the least saliency, without sorting."""
    d = len(saliency)
    zeros = round(PRUNED_FRACTION * d)
    dead, mask = torch.zeros(2, d, dtype=torch.bool, device=saliency.device)
    invalid = torch.empty(1, dtype=torch.int64, device=saliency.device)

    def ours() -> Tensor:
        ops.prune_mask(saliency, dead, zeros, mask=mask, invalid=invalid)
        return mask

    def plain() -> Tensor:
        return saliency > torch.kthvalue(saliency, zeros).values

    truth = saliency > saliency.sort().values[zeros - 1]
    return Case("selection", ours, plain, slice(0, d), truth.double())


def _makers(device: torch.device) -> list[Callable[[], Case]]:
    """What makes each line, so that their gradients are not in memory together."""
    generator = torch.Generator(device).manual_seed(0)
    d = WEIGHTS[device.type]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def grads(m: int, block_size: int) -> Tensor:
        return normal(m, d // block_size * block_size).mul_(GRADIENT_SCALE)

    return [
        lambda: _inverse_case(grads(256, 50), 50),
        lambda: _inverse_case(grads(256, 128), 128),
        lambda: _inverse_case(grads(100, 1000), 1000),
        lambda: _update_case(grads(128, 128), normal(d // 128 * 128), 128),
        lambda: _selection_case(normal(d).square_()),
    ]


def _median(run: Callable[[], Tensor], device: torch.device, seconds: float) -> tuple[float, Tensor]:
    """Median seconds of a call, repeated for about so long, and what it returned; the first call is not counted."""
    deadline = time.perf_counter() + seconds
    returned = run()
    times: list[float] = []
    while not times or (len(times) < ROUNDS and time.perf_counter() < deadline):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        returned = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times), returned


def _device(name: str | None) -> torch.device:
    """The device of a name, or of none: the GPU where there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if device.type not in WEIGHTS or missing:
        raise FastFisherError(f"device must be cpu, or a GPU that torch sees, such as cuda:0; got {name!r}")
    return device


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(device: str | None = None, seconds: float = 20.0) -> Result:
    """Time the lines on a device, for about so many seconds in all.

    device: "cpu", "cuda" or "cuda:1"; None means a GPU where there is one.
    Raises FastFisherError on a device that is not there, and unless seconds is positive.
    """
    if not seconds > 0:
        raise FastFisherError(f"seconds must be positive, got {seconds:g}")
    where = _device(device)
    rows = []
    with torch.no_grad(), _one_thread():
        makers = _makers(where)
        share = seconds / len(makers) / 2
        for make in makers:
            case = make()
            ours, our_result = _median(case.ours, where, share)
            plain, plain_result = _median(case.plain, where, share)
            rows.append(Row(case.what, case.error(our_result), case.error(plain_result), ours, plain))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu, 1 thread"
    return Result(name, WEIGHTS[where.type], torch.__version__, __version__, rows)
