"""diag F⁻¹ straight from the gradients: the promise of the inverse without keeping one."""

from __future__ import annotations

import pytest
import torch

import fastfisher as ff
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher import parts
from tests.cases import KINDS, dense_inverse, gradients

DAMPING = 1e-3


@pytest.mark.parametrize("rho", [1e-1, 1e3, 1e7])
@pytest.mark.parametrize(
    ("num_grads", "block_size"), [(64, 1), (64, 17), (256, 50), (16, 100), (100, 100), (64, 300)]
)
def test_diagonal_keeps_the_promise(num_grads: int, block_size: int, rho: float) -> None:
    for kind in KINDS:
        grads = gradients(kind, num_grads, block_size, rho=rho, damping=DAMPING)
        exact, _ = dense_inverse(grads, num_grads, DAMPING)
        diagonal = ff.inverse_diagonal(grads, block_size=block_size, damping=DAMPING)
        assert diagonal.dtype == torch.float32
        assert float(((diagonal.double() - exact) / exact).abs().max()) <= 1e-4, kind


@pytest.mark.parametrize(("num_grads", "block_size"), [(40, 15), (12, 15), (12, None)])
def test_it_is_the_diagonal_of_the_inverse(num_grads: int, block_size: int | None) -> None:
    grads = gradients("correlated", num_grads, 70, rho=10, damping=DAMPING)
    options = {
        "block_size": block_size,
        "damping": 0.3,
        "damping_mode": "relative",
        "num_grads": 50,
        "sizes": [40, 30],
    }
    diagonal = ff.inverse_diagonal(grads, **options)  # type: ignore[arg-type]
    inverse = ff.FisherInverse.from_grads(grads, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(diagonal, inverse.diag(), rtol=1e-6, atol=0)


def test_named_gradients_give_named_diagonals() -> None:
    grads = {"a": torch.randn(20, 3, 2), "b": torch.randn(20, 5)}
    diagonal = ff.inverse_diagonal(grads, block_size=4, damping=DAMPING)
    assert {name: tuple(value.shape) for name, value in diagonal.items()} == {"a": (3, 2), "b": (5,)}


def test_groups_of_dual_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients("independent", 12, 200, rho=10, damping=DAMPING)
    whole = ff.inverse_diagonal(grads, block_size=20, damping=DAMPING)
    monkeypatch.setattr(parts, "GROUP_BYTES", {"cpu": 3 * 8 * 12 * 12})
    assert torch.equal(ff.inverse_diagonal(grads, block_size=20, damping=DAMPING), whole)


def test_a_dual_block_that_float64_loses_is_computed_in_the_primal_form() -> None:
    grads = gradients("independent", 20, 100, rho=30, damping=1e-2)
    grads[:, :50] = 0
    grads[3, 0] = 1e8
    exact = [dense_inverse(grads[:, part], 20, 1e-2)[0] for part in (slice(0, 50), slice(50, 100))]
    diagonal = ff.inverse_diagonal(grads, block_size=50, damping=1e-2)
    torch.testing.assert_close(diagonal.double(), torch.cat(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_grads", [8, 40])
def test_a_gradient_that_is_not_finite_is_named(num_grads: int) -> None:
    grads = torch.randn(num_grads, 60)
    grads[3, 45] = torch.nan
    with pytest.raises(FisherError, match=r"tensor0\[40:60\] \(block 2 of 3\) cannot be computed in float64"):
        ff.inverse_diagonal(grads, block_size=20, damping=1e-2)


def test_bad_input_is_named() -> None:
    with pytest.raises(FastFisherError, match="num_grads must be at least the 4 rows of grads, got 3"):
        ff.inverse_diagonal(torch.randn(4, 9), block_size=3, damping=1.0, num_grads=3)
    with pytest.raises(FastFisherError, match="damping must be positive and finite, got 0"):
        ff.inverse_diagonal(torch.randn(4, 9), block_size=3, damping=0)
