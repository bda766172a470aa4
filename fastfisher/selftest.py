"""Does every kernel compute here what its reference does in float64?   Small problems, seconds; a part of `doctor`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import BackendError
from fastfisher.ops._registry import ORDER

TOLERANCE = 1e-4  # of the largest value; a sound kernel stays a hundred times below it on these problems
DAMPING = 0.1
NO_TIME = "no time was left for it"


@dataclass(frozen=True)
class Check:
    """One kernel on one problem: its worst relative error, or why it was not run."""

    op: str
    backend: str
    device: str
    error: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel ran and agrees."""
        return not self.reason and self.error <= TOLERANCE


def _blocks(block_size: int, num_weights: int) -> Tensor:
    starts = torch.arange(0, num_weights, block_size)
    return torch.stack([starts, (starts + block_size).clamp(max=num_weights)], dim=1)


def problems() -> Iterator[tuple[str, list[object]]]:
    """An op and its arguments on the CPU, in float32 where it has a choice: three blocks, the last one short."""
    generator = torch.Generator().manual_seed(0)
    d, B, m, k = 70, 32, 40, 12

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    blocks, grads, few = _blocks(B, d), normal(m, d), normal(k, d)
    K = len(blocks)
    gram = torch.zeros(K, B, B)
    factor = torch.zeros(K, k, k, dtype=torch.float64)
    for b, (start, stop) in enumerate(blocks.tolist()):
        G, H = grads[:, start:stop], few[:, start:stop].double()
        gram[b, : stop - start, : stop - start] = G.T @ G / m
        ridge = k * DAMPING * torch.eye(k, dtype=torch.float64)
        factor[b] = torch.linalg.cholesky(H @ H.T + ridge, upper=True)
    inverse = torch.linalg.inv(gram.double() + DAMPING * torch.eye(B, dtype=torch.float64)).float()
    inverse = ((inverse + inverse.mT) / 2).contiguous()
    weight, x = normal(d), normal(d, 2)
    inv_diag, keep = normal(d).abs() + 0.5, normal(d) > 0
    running = torch.eye(B).repeat(K, 1, 1) / DAMPING

    def estimates() -> list[Tensor]:
        return list(torch.zeros(2, K, dtype=torch.float64))

    yield "inverse_from_grads", [torch.zeros(K, B, B), grads, blocks, m, DAMPING, *estimates()]
    yield "inverse_diagonal_from_grads", [torch.zeros(d), grads, blocks, B, m, DAMPING, *estimates()]
    yield "spd_inverse_", [gram.clone(), DAMPING, *estimates()]
    yield "fisher_accumulate_", [torch.zeros(K, B, B), grads, blocks, m]
    yield "sherman_morrison_", [running.clone(), grads, blocks, m]
    yield "woodbury_", [running.clone(), grads, blocks, m]
    yield "inverse_diagonal", [inverse, None, blocks, 0.0, torch.zeros(d)]
    yield "block_matvec", [inverse, None, blocks, 0.0, x, torch.zeros_like(x)]
    yield "obs_saliency", [weight, inv_diag, torch.zeros(d)]
    yield (
        "prune_mask",
        [weight.abs(), keep, d // 2, torch.zeros_like(keep), torch.zeros(1, dtype=torch.int64)],
    )
    yield "obs_update_", [weight.clone(), inverse, None, blocks, 0.0, inv_diag, keep]
    failed = torch.zeros(K, dtype=torch.bool)
    yield "obs_solve_", [weight.clone(), inverse, None, blocks, m, DAMPING, keep, failed]
    order, loss = torch.zeros(d, dtype=torch.int64), torch.zeros(d, dtype=torch.float64)
    rules = [None, 0, 1, order, loss, failed]
    yield "obs_eliminate", [weight, inverse, None, blocks, 0.0, *rules]
    yield "obs_eliminate", [weight, few, factor, blocks, DAMPING, *rules]
    yield "dual_factor_", [torch.zeros_like(factor), few, blocks, k, DAMPING, estimates()[0]]
    yield "inverse_diagonal", [few, factor, blocks, DAMPING, torch.zeros(d)]
    yield "block_matvec", [few, factor, blocks, DAMPING, x, torch.zeros_like(x)]
    yield "fisher_vector_product", [few, blocks, k, x, torch.zeros_like(x)]
    root, top = torch.zeros(K, B, B), normal(K, B)
    for b, (start, stop) in enumerate(blocks.tolist()):
        root[b, : stop - start, : stop - start] = torch.linalg.cholesky(inverse[b])[
            : stop - start, : stop - start
        ]
    yield "fishleg_block_step_", [root.clone(), top, few, blocks, k, DAMPING, 0.5, *estimates()]
    yield "factor_diagonal", [root, blocks, torch.zeros(d)]
    yield "block_factor_matvec", [root, blocks, x, torch.zeros_like(x)]
    yield "factor_downdate_", [root.clone(), blocks, keep]
    left, right, scale = normal(2, 20, 20), normal(2, 12, 12), normal(2, 20, 12)
    tiles = normal(3, 2, 20, 12)
    yield "kron_matvec", [left + left.mT, right + right.mT, scale, tiles, torch.zeros_like(tiles)]
    images, slopes = normal(2, 6, 7, 8), normal(2, 10, 3, 8)
    strides = [(2, 1), (0, 1), (1, 1)]
    yield "conv_weight_grads", [torch.zeros(2, 10, 3, 3, 3), images, slopes, *strides, 2]
    if torch.cuda.is_available():  # a block that only the CUDA kernels hold on chip
        wide, B = normal(10, 150), 150
        args = [wide, torch.tensor([[0, B]]), 10, DAMPING]
        one = torch.zeros(1, dtype=torch.float64)
        yield "inverse_from_grads", [torch.zeros(1, B, B), *args, one, one.clone()]


def _run(op: str, args: list[object], backend: str, device: torch.device, wide: bool) -> list[Tensor]:
    """What an op writes, on copies of the arguments."""
    copies = []
    for arg in args:
        if isinstance(arg, Tensor):
            arg = arg.to(device, copy=True)
            if wide and arg.is_floating_point():
                arg = arg.double()
        copies.append(arg)
    with ops.use_backend(backend):
        getattr(torch.ops.fastfisher, op)(*copies)
    return [copies[i].cpu() for i in ops.OPS[op].written]  # type: ignore[attr-defined]


def _error(op: str, got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference over the largest value; a condition is an estimate and left out."""
    worst = 0.0
    for i, one, exact in zip(ops.OPS[op].written, got, truth, strict=True):
        if ops.OPS[op].arguments[i] in ("condition", "amplification"):
            continue
        if not one.is_floating_point():
            worst = max(worst, float((one != exact).sum()))
            continue
        if ops.OPS[op].name == "fisher_accumulate_":
            one, exact = one.tril(), exact.tril()
        difference = (one.double() - exact).abs().max() / exact.abs().max()
        worst = float(difference) if not difference <= worst else worst  # NaN stays
    return worst


def check(device: torch.device, backend: str, seconds: float) -> list[Check]:
    """Every op that the backend runs on the device.   seconds: after which no further kernel is started."""
    cpu = torch.device("cpu")
    found = []
    started = time.perf_counter()
    for op, args in problems():
        there = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
        if ops.OPS[op].why_not(backend, there) is not None:
            continue
        if time.perf_counter() - started > seconds:
            found.append(Check(op, backend, str(device), 0.0, NO_TIME))
            continue
        try:
            got = _run(op, args, backend, device, wide=False)
        except (BackendError, RuntimeError) as error:
            found.append(
                Check(op, backend, str(device), 0.0, f"{type(error).__name__}: {error}".split("\n")[0])
            )
            continue
        found.append(
            Check(op, backend, str(device), _error(op, got, _run(op, args, "reference", cpu, wide=True)))
        )
    return found


def backends(device: torch.device) -> list[str]:
    """The backends with kernels of their own for a device, in the order in which they are asked."""
    return [name for name in ORDER[device.type] if name != "reference"]
