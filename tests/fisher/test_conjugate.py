"""Conjugate gradients against direct solves."""

from __future__ import annotations

import pytest
import torch

from fastfisher.fisher.conjugate import conjugate_gradients


@pytest.mark.parametrize("preconditioned", [False, True])
def test_every_system_is_solved(preconditioned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 12, 12, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None, None]
    A = (root @ root.mT + torch.eye(12)) * scales
    right = torch.randn(5, 12, 1, generator=generator, dtype=torch.float64)
    right[2] = 0
    kept = right.clone()
    y, residual = conjugate_gradients(
        lambda x: A @ x,
        right,
        dims=(1, 2),
        tolerance=1e-9,
        max_iterations=200,
        diagonal=A.diagonal(dim1=1, dim2=2)[:, :, None] if preconditioned else None,
    )
    assert residual <= 1e-9
    torch.testing.assert_close(y, torch.linalg.solve(A, right), rtol=1e-6, atol=1e-9)
    assert torch.equal(right, kept)


def test_too_few_steps_are_told() -> None:
    A = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64))
    ones = torch.ones(30, 1, dtype=torch.float64)
    arguments = {"dims": (0, 1), "tolerance": 1e-8, "max_iterations": 3}
    _, residual = conjugate_gradients(lambda x: A @ x, ones, **arguments)
    assert residual > 1e-3
