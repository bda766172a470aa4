"""The promise: diag F⁻¹ and F⁻¹v within 1e-4 of float64, whatever the gradients and however small the damping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.fisher.inverse import FisherInverse
from tests.cases import KINDS, dense_inverse
from tests.cases import gradients as gradients_here
from tests.device import DEVICE

DAMPING = 1e-3
PROMISE = 1e-4
RHOS = (1e-1, 1e1, 1e3, 1e5, 1e7)


def gradients(*args: object, **kwargs: object) -> Tensor:
    """Those of the table, on the device that is tested."""
    return gradients_here(*args, **kwargs).to(DEVICE)  # type: ignore[arg-type]


def vectors(grads: Tensor) -> Tensor:
    """Random vectors and vectors in the span of the gradients, [d, 4], the last along the strongest of them."""
    generator = torch.Generator().manual_seed(1)
    G = grads.double()
    m, d = G.shape
    random, weights = (
        torch.randn(d, generator=generator).double(),
        torch.randn(m, generator=generator).double(),
    )
    v = torch.stack([random, G.T @ weights, G[0], G.T @ (G @ random)], dim=1).float()
    v[:, v.norm(dim=0) == 0] = 1
    return v


def errors(inverse: FisherInverse, grads: Tensor, damping: float = DAMPING) -> tuple[float, float]:
    """The largest relative error of the diagonal by entry, and of F⁻¹v by norm."""
    here = grads.cpu()
    diagonal, product = dense_inverse(here, inverse.num_grads, damping)
    v = vectors(here)
    truth = product(v)
    diagonal_error = ((inverse.diag().cpu().double() - diagonal) / diagonal).abs().max()
    product_error = ((inverse @ v.to(DEVICE)).cpu().double() - truth).norm(dim=0) / truth.norm(dim=0)
    return float(diagonal_error), float(product_error.max())


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("block_size", [1, 2, 17, 50, 100])
@pytest.mark.parametrize("num_grads", [16, 64, 256])
def test_grid(num_grads: int, block_size: int, rho: float) -> None:
    for kind in KINDS:
        grads = gradients(kind, num_grads, block_size, rho=rho, damping=DAMPING)
        inverse = FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING)
        assert max(errors(inverse, grads)) <= PROMISE, (kind, inverse)


@pytest.mark.parametrize("rho", [1e1, 1e7])
@pytest.mark.parametrize(
    ("num_grads", "block_size"), [(1024, 100), (16, 300), (256, 300), (300, 300), (1024, 300)]
)
def test_grid_of_larger_blocks(num_grads: int, block_size: int, rho: float) -> None:
    for kind in ("independent", "correlated", "aligned", "deficient", "zero", "duplicate"):
        grads = gradients(kind, num_grads, block_size, rho=rho, damping=DAMPING)
        inverse = FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING)
        assert max(errors(inverse, grads)) <= PROMISE, (kind, inverse)


@pytest.mark.parametrize(("num_grads", "kind"), [(1024, "independent"), (64, "aligned"), (256, "duplicate")])
def test_grid_of_a_thousand_weights(num_grads: int, kind: str) -> None:
    grads = gradients(kind, num_grads, 1000, rho=1e7, damping=DAMPING)
    inverse = FisherInverse.from_grads(grads, block_size=1000, damping=DAMPING)
    assert max(errors(inverse, grads)) <= PROMISE, inverse


@pytest.mark.parametrize("form", ["primal", "dual", "rank1", "woodbury"])
@pytest.mark.parametrize(("num_grads", "block_size"), [(16, 8), (16, 50), (64, 50), (80, 33)])
def test_grid_of_forms_that_were_asked_for(num_grads: int, block_size: int, form: str) -> None:
    for rho in RHOS:
        for kind in KINDS:
            grads = gradients(kind, num_grads, block_size, rho=rho, damping=DAMPING)
            inverse = FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING, form=form)
            assert inverse.form == form
            assert max(errors(inverse, grads)) <= PROMISE, (kind, rho, inverse)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_grid_without_kernels(form: str) -> None:
    with ops.use_backend("reference"):
        for rho in (1e1, 1e5, 1e7):
            for kind in KINDS:
                grads = gradients(kind, 40, 30 if form == "primal" else 90, rho=rho, damping=DAMPING)
                inverse = FisherInverse.from_grads(grads, block_size=grads.shape[1], damping=DAMPING)
                assert inverse.form == form
                assert max(errors(inverse, grads)) <= PROMISE, (kind, rho, inverse)


@pytest.mark.parametrize("form", ["primal", "dual", "rank1", "woodbury"])
def test_float64_gradients_give_a_float64_inverse(form: str) -> None:
    grads = gradients("correlated", 40, 30, rho=1e2, damping=DAMPING).double()
    inverse = FisherInverse.from_grads(grads, block_size=30, damping=DAMPING, form=form)
    assert inverse.diag().dtype == torch.float64
    assert inverse.num_mended == 0
    diagonal, product = dense_inverse(grads.cpu(), 40, DAMPING)
    v = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inverse.diag().cpu(), diagonal, rtol=1e-10, atol=0)
    torch.testing.assert_close((inverse @ v.to(DEVICE)).cpu(), product(v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_grads", "block_size"), [(40, 30), (20, 60)])
def test_half_precision_gradients_are_read_exactly(
    dtype: torch.dtype, num_grads: int, block_size: int
) -> None:
    grads = gradients("independent", num_grads, block_size, rho=1e3, damping=DAMPING).to(dtype)
    inverse = FisherInverse.from_grads(grads, block_size=block_size, damping=DAMPING)
    assert inverse.diag().dtype == torch.float32
    assert max(errors(inverse, grads)) <= PROMISE
