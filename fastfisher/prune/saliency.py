"""How much the loss rises when one weight is removed: weight [d] (and inverse Fisher) -> saliency [d].

All three return float32 (float64 for float64 weights), are non-negative, and rank weights across layers.
"""

from __future__ import annotations

from torch import Tensor

from fastfisher.fisher.inverse import FisherInverse


def magnitude(weight: Tensor) -> Tensor:
    """|w_q|, the order of ½ w_q² without its underflow.   Source: WoodFisher, eq. 2.21."""
    return weight.abs()


def diagonal(weight: Tensor, finv: FisherInverse) -> Tensor:
    """½ w_q² (F_qq + λ), from an inverse with blocks of one weight.   Source: WoodFisher, eq. 2.20."""
    if finv.block_size != 1:
        raise ValueError(f"the diagonal Fisher has block_size=1, got {finv.block_size}")
    return finv.saliency(weight)


def woodfisher(weight: Tensor, finv: FisherInverse) -> Tensor:
    """w_q² / (2 [F⁻¹]_qq), the rise of the quadratic model after the best update.   Source: WoodFisher, eq. 2.13."""
    return finv.saliency(weight)


def newton_step(finv: FisherInverse) -> Tensor:
    """u = F⁻¹ ∇L, float64 [d]; w − u is the minimiser of the quadratic model with its gradient term.

    With w − u in place of w, `woodfisher` and the updates are those of WoodTaylor: (w_q − u_q)² / (2 [F⁻¹]_qq) is eq.
    5.8, and what the update adds to w − u is eq. 5.6.   finv holds ∇L as its `mean`.
    """
    if finv.mean is None:
        raise ValueError("the inverse holds no mean gradient; accumulate with mean=True")
    return finv.mul(finv.mean)


SCORES = {"woodfisher": woodfisher, "woodtaylor": woodfisher, "diagonal": diagonal}
