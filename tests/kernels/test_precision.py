"""Split TF32 products, as the matrix units compute them, keep a Gram matrix within the law that float32 is held to.

The interpreter multiplies in plain float32, so the arithmetic of the units is emulated here: operands of 10 bits, the
larger two thirds of the products of their halves, and running sums that are truncated after every step.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfisher.kernels.triton import tuning
from tests.cases import KINDS, gradients
from tests.ops.test_conformance import error

STEP = 8  # products that a unit sums before it truncates


def tf32(x: Tensor) -> Tensor:
    """The nearest number with 10 bits after the first."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    """float64 -> the float32 that is next to it towards zero, as float64."""
    near = x.float()
    away = near.double().abs() > x.abs()
    return torch.where(away, torch.nextafter(near, torch.zeros_like(near)), near).double()


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by three products of halves, the small ones first."""
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for k in range(0, a.shape[1], STEP):
        piece = slice(k, k + STEP)
        for left, right in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            total = truncated(total + left[:, piece].double() @ right[piece].double())
    return total.float()


def gram(G: Tensor, rows: int) -> Tensor:
    """GᵀG / m in short sums of `rows` gradients, as the kernels take them."""
    total = torch.zeros(G.shape[1], G.shape[1])
    for first in range(0, len(G), rows):
        piece = G[first : first + rows]
        total += split_product(piece.T.contiguous(), piece) * (1 / len(G))
    return total


def rows_at_once() -> int:
    """The longest sum of the tuning table."""
    return max(row.parameters["ROWS"] for row in tuning.TABLE if row.parameters.get("PRECISION") == "tf32x3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [1.0, 1e5])
@pytest.mark.parametrize(("num_grads", "block_size"), [(64, 20), (512, 50), (2048, 16)])
def test_gram_matrix_keeps_the_law(kind: str, rho: float, num_grads: int, block_size: int) -> None:
    G = gradients(kind, num_grads, block_size, rho=rho, damping=1e-2)
    truth = G.double().T @ G.double() / num_grads
    allowed = 2 * error(G.T @ G / num_grads, truth) + 16 * torch.finfo(torch.float32).eps
    assert (
        error(gram(G, rows_at_once()), truth) <= allowed / 2
    )  # with room for units that truncate more often


def test_one_long_sum_would_not() -> None:
    G = gradients("aligned", 4096, 8, rho=1.0, damping=1e-2)
    truth = G.double().T @ G.double() / len(G)
    allowed = 2 * error(G.T @ G / len(G), truth) + 16 * torch.finfo(torch.float32).eps
    assert error(gram(G, len(G)), truth) > allowed > error(gram(G, rows_at_once()), truth)


def test_a_single_tf32_product_would_not() -> None:
    G = gradients("independent", 64, 20, rho=1.0, damping=1e-2)
    truth = G.double().T @ G.double()
    assert error(tf32(G).T @ tf32(G), truth) > 100 * error(split_product(G.T.contiguous(), G), truth)
