"""Conjugate gradients for many systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    dims: tuple[int, ...],
    tolerance: float,
    max_iterations: int,
    diagonal: Tensor | None = None,
) -> tuple[Tensor, float]:
    """y with product(y) = right, and the largest relative residual, which is above the tolerance after too many steps.

    product: symmetric and positive definite.   dims: those of `right` that one system takes; along the others lie
    systems of their own.   diagonal: of the product, as a preconditioner; the residual is measured by its inverse.
    """

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dim=dims, keepdim=True)

    def scaled(x: Tensor) -> Tensor:
        return x if diagonal is None else x / diagonal

    y, residual = torch.zeros_like(right), right.clone()
    direction = scaled(residual)
    square = dot(residual, direction)
    goal = tolerance**2 * square
    size = square.clamp(min=1e-300)
    for _ in range(max_iterations):
        if bool((square <= goal).all()):
            return y, min(tolerance, float((square / size).max()) ** 0.5)
        image = product(direction)
        step = square / dot(direction, image).clamp(min=1e-300)
        y += step * direction
        residual = residual - step * image  # not in place: `direction` may be the same numbers
        ahead = scaled(residual)
        before, square = square, dot(residual, ahead)
        direction = ahead + (square / before.clamp(min=1e-300)) * direction
    return y, float((square / size).max()) ** 0.5
