"""FishLeg's auxiliary loss as published: u is drawn, and Adam follows the slope of a surrogate.

One step, with r a stopgrad:   v = Q u,   r = F v + γ v − u,   r ← Q r (preconditioned),   Adam on ∇_λ rᵀ Q(λ) u.

Without the preconditioner that is an unbiased estimate of ∇_λ A, of half of it for forms that are squares.
Source: FishLeg (Garcia et al., 2023); FishLeg Surgeon (McGowan et al., 2024), whose preconditioner it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfisher.errors import FisherError
from fastfisher.fisher.fishleg import FishLegInverse

Product = Callable[[Tensor], Tensor]


class SampledSteps:
    """Adam on what a `FishLegInverse` has learned, with u drawn anew for every step.

    u: "gaussian" or "rademacher", drawn on the CPU from the seed; or "gradient", the one that `step` is given.
    lr: Adam's, relative to the largest entry that each factor has at the beginning.
    preconditioner: whether r is multiplied by Q.
    """

    def __init__(
        self,
        inverse: FishLegInverse,
        *,
        u: str = "gaussian",
        lr: float = 1e-3,
        preconditioner: bool = True,
        seed: int = 0,
    ) -> None:
        self.inverse = inverse
        self.u = u
        self.preconditioner = preconditioner
        self.generator = torch.Generator().manual_seed(seed)
        self.adam = torch.optim.Adam(
            [{"params": [x], "lr": lr * float(x.abs().max())} for x in inverse.variables()]
        )

    def draw(self) -> Tensor:
        """u [d], 0 for weights that were removed."""
        d = self.inverse.layout.num_weights
        if self.u == "rademacher":
            u = torch.randint(0, 2, (d,), generator=self.generator).to(self.inverse.dtype) * 2 - 1
        else:
            u = torch.randn(d, generator=self.generator, dtype=self.inverse.dtype)
        return u.to(self.inverse.device) * self.inverse.live

    def step(self, product: Product, gradient: Tensor | None = None) -> float:
        """One step; returns ½ uᵀQF_γQu − uᵀQu, the auxiliary loss of this u before it.

        product: v [d] -> F v, an estimate will do.   gradient: u where it is to be "gradient".
        Raises FisherError where the loss is not finite.
        """
        inverse = self.inverse
        u = (
            self.draw()
            if gradient is None or self.u != "gradient"
            else gradient.to(inverse.dtype) * inverse.live
        )
        v = inverse.mul(u)
        image = (product(v).to(inverse.dtype) + inverse.damping * v) * inverse.live
        loss = float(v.double() @ image.double()) / 2 - float(u.double() @ v.double())
        if not math.isfinite(loss):
            raise FisherError(
                f"the auxiliary loss of the {inverse.parameterization!r} inverse is {loss} at "
                f"damping={inverse.damping:g}; use a smaller aux_lr or a larger damping"
            )
        r = image - u
        if self.preconditioner:
            r = inverse.mul(r)
        slopes = [slope for form in inverse.forms for slope in form.slopes(r, u)]
        for variable, slope in zip(inverse.variables(), slopes, strict=True):
            variable.grad = slope
        self.adam.step()
        self.adam.zero_grad()
        inverse.moved()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Adam's averages and the generator."""
        return {"adam": self.adam.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self.adam.load_state_dict(state["adam"])
        self.generator.set_state(state["generator"])
