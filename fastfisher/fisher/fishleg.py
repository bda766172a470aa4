"""FishLeg's learned inverse: Q ≈ F_γ⁻¹ = (F + γ I)⁻¹ in a fixed form, kept up to date by steps on fresh gradients.

Q is the minimiser of the auxiliary loss

    A(Q) = E_u[½ uᵀ Q F_γ Q u − uᵀ Q u] = ½ tr(Q F_γ Q) − tr Q,   u ~ N(0, I),

whose gradient needs products with F alone.  Among all matrices it is F_γ⁻¹, among block-diagonal ones the inverse of
the blocks, which is WoodFisher's.  Forms ("parameterizations"), all symmetric and positive definite by construction:

    diagonal, block, full   R Rᵀ in blocks of 1, of B, or one over everything; state d B (roots.py)
    kron                    D (T ⊗ S) D for each layer, T = R Rᵀ [o, o], S = L Lᵀ [i, i], D a diagonal [o, i]
    block-kron              the same in tiles of the layer's matrix, so that T and S stay small (kronecker.py)

Two ways to take a step: exact in u, where the expectation is taken analytically (`aux_step` and `fit`, the default:
nothing is drawn, and there is no learning rate), and with u drawn, as published (`SampledSteps`).
Vectors are those of the whole layout, [d] or [d, n], and every part of Q writes its own weights.
Source: FishLeg Surgeon (McGowan et al., 2024), on FishLeg (Garcia et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.inverse import (
    UPDATES,
    FisherInverse,
    absolute_damping,
    check_weight,
    checked_vectors,
    mean_diagonal,
)
from fastfisher.fisher.kronecker import KroneckerTiles
from fastfisher.fisher.parts import Part, block_ids
from fastfisher.fisher.roots import BlockRoots

AUX = ("exact", "sampled")
DRAWS = ("gaussian", "rademacher", "gradient")
PRODUCTS = ("rows", "antithetic")
PARAMETERIZATIONS = ("diagonal", "block", "kron", "block-kron", "full")
# Sides of the tiles of "block-kron": T and S of a tile take no more than a block of so many weights.
TILE = 256
# Of the gradients of a fit every eighth judges when to stop, and by how much the loss has to fall to go on.
HOLD_OUT = 8
FALLING = 1e-3
# A step after which it is this much higher, relatively, has gone astray: it is taken back, and halved down to this.
RISING = 1.0
SMALLEST_RATE = 1 / 64


class FishLegInverse:
    """Q ≈ (F + γ I)⁻¹ of every weight, learned; behind the interface of `FisherInverse`.

    Made by `start` or `from_grads`, moved by `aux_step`, `fit` or `SampledSteps`.
    layout: the weights, and for "block" their blocks.   parameterization: of Q.   damping: γ, absolute.
    horizon: gradients that Q remembers; a batch of k replaces the share k / (seen + k) of what it knows, seen at most
    this many.   live: bool [d], False where a weight was removed; Q is 0 in its row and column.
    history: what every `fit` has logged.
    """

    form = "fishleg"
    mean: Tensor | None = None

    def __init__(
        self,
        layout: BlockLayout,
        forms: Sequence[BlockRoots | KroneckerTiles],
        *,
        parameterization: str,
        damping: float,
        horizon: float,
        live: Tensor,
        seen: float = 0.0,
    ) -> None:
        self.layout = layout
        self.forms = list(forms)
        self.parameterization = parameterization
        self.damping = damping
        self.horizon = horizon
        self.live = live
        self.seen = seen
        self.history: list[dict[str, float]] = []
        self._diagonal: Tensor | None = None

    @classmethod
    def start(
        cls,
        layout: BlockLayout,
        *,
        damping: float,
        parameterization: str = "block",
        scale: float | None = None,
        horizon: float = 2048,
        tile: int = TILE,
        conv_groups: Mapping[str, int] | None = None,
        live: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FishLegInverse:
        """Q = scale I, by default I / γ, where no direction is underestimated.

        layout: its blocks for "block"; "full" wants one block over everything, and the others do not look at them.
        tile: largest side of a tile of "block-kron".   conv_groups: name -> groups of a convolution with more than one.
        live: bool [d], by default all.   dtype: float32 or float64, of the state.
        Raises FastFisherError on anything else.
        """
        if parameterization not in PARAMETERIZATIONS:
            raise FastFisherError(
                f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}; got {parameterization!r}"
            )
        if not (damping > 0 and math.isfinite(damping)):
            raise FastFisherError(f"damping must be positive and finite, got {damping}")
        if parameterization == "full" and not layout.single_block:
            raise FastFisherError(f"parameterization='full' takes block_size=None, got {layout.block_size}")
        scale = 1 / damping if scale is None else scale
        if live is None:
            live = torch.ones(layout.num_weights, dtype=torch.bool, device=device)
        ranges = layout.parameter_ranges
        forms: list[BlockRoots | KroneckerTiles] = []
        single: list[tuple[int, int]] = []  # weights that stand alone
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if parameterization == "diagonal" or ("kron" in parameterization and len(shape) < 2):
                single.append(ranges[name])
            elif "kron" in parameterization:
                tiles = KroneckerTiles.start_at(
                    name,
                    ranges[name],
                    shape,
                    layout.last.get(name, len(shape) - 1),
                    scale=scale,
                    dtype=dtype,
                    device=live.device,
                    groups=(conv_groups or {}).get(name, 1),
                    largest=tile if parameterization == "block-kron" else None,
                )
                forms.append(tiles)
        if parameterization in ("block", "full"):
            forms.append(BlockRoots.start(layout, layout.blocks, scale, live, dtype))
        elif single:
            places = torch.cat([torch.arange(a, b) for a, b in single])
            forms.append(
                BlockRoots.start(layout, torch.stack([places, places + 1], dim=1), scale, live, dtype)
            )
        made = cls(
            layout, forms, parameterization=parameterization, damping=damping, horizon=horizon, live=live
        )
        if not bool(live.all()):
            for form in forms:
                form.downdate(live)
        return made

    @classmethod
    def from_grads(
        cls,
        grads: Tensor,
        layout: BlockLayout,
        *,
        damping: float,
        damping_mode: str = "absolute",
        held_out: Tensor | None = None,
        max_steps: int = 30,
        **options: Any,
    ) -> FishLegInverse:
        """Start, and `fit` to gradients [k, d].   damping_mode: "relative" to the mean of their Fisher's diagonal.

        options: those of `start`.
        """
        if damping_mode == "relative":
            damping = absolute_damping(damping, mean_diagonal(grads))
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        made = cls.start(layout, damping=damping, dtype=dtype, device=grads.device, **options)
        made.fit(grads, held_out=held_out, max_steps=max_steps)
        return made

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.live.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return self.variables()[0].dtype

    @property
    def tiled(self) -> bool:
        """Whether Q consists of Kronecker products."""
        return "kron" in self.parameterization

    @property
    def state_bytes(self) -> int:
        """Bytes of everything that Q keeps between steps."""
        total = 0
        for form in self.forms:
            kept = [*form.variables()]
            kept += [form.second, *form.moments] if isinstance(form, KroneckerTiles) else [form.top]
            total += sum(x.numel() * x.element_size() for x in kept)
        return total

    def __repr__(self) -> str:
        return (
            f"FishLegInverse({self.layout.num_weights} weights, {self.parameterization}, "
            f"{self.state_bytes / 2**20:.1f} MiB, damping={self.damping:g})"
        )

    def variables(self) -> list[Tensor]:
        """What is learned: R of the blocks, or R, L and D of the tiles."""
        return [x for form in self.forms for x in form.variables()]

    def _inv_diag(self) -> Tensor:
        if self._diagonal is None:
            out = torch.zeros(self.layout.num_weights, dtype=self.dtype, device=self.device)
            for form in self.forms:
                form.diag(out)
            self._diagonal = out * self.live
        return self._diagonal

    def diag(self) -> Tensor:
        """The diagonal of Q, a new [d]; 0 where a weight was removed."""
        return self._inv_diag().clone()

    def mul(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """Q v, new.   v: [d], [d, n], or named tensors of the layout's shapes; the result has the same form."""
        if isinstance(v, Mapping):
            return self.layout.unflatten(self.mul(self.layout.flatten(v)))
        wide = checked_vectors(v, self.layout.num_weights)
        x = v.detach().to(self.dtype).reshape(self.layout.num_weights, -1) * self.live[:, None]  # [d, n]
        out = torch.zeros_like(x)
        for form in self.forms:
            form.mul(x, out)
        return (out * self.live[:, None]).to(wide).reshape(v.shape)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """Q @ v, the same as `mul`."""
        return self.mul(v)

    def columns(self, index: Tensor) -> Tensor:
        """Q[:, index], [d, n].   index: int64 [n]."""
        unit = torch.zeros(self.layout.num_weights, len(index), dtype=self.dtype, device=self.device)
        unit[index, torch.arange(len(index), device=index.device)] = 1
        product: Tensor = self.mul(unit)
        return product

    def saliency(self, weight: Tensor) -> Tensor:
        """ρ = w² / (2 diag Q), 0 for weights that are 0.   weight: [d] float32/float64; returns the like."""
        check_weight(weight, self.layout.num_weights)
        w, diagonal = weight.detach().double(), self._inv_diag().double()
        return torch.where(w == 0, 0, w.square() / (2 * diagonal)).to(weight.dtype)

    def blockwise(self) -> FisherInverse:
        """Q written out in blocks, for what goes through blocks; 1 on the diagonal of weights that were removed.

        Raises FastFisherError where the parameterization has no blocks.
        """
        roots = self.forms[0]
        if (
            not isinstance(roots, BlockRoots)
            or len(self.forms) > 1
            or len(roots.blocks) != self.layout.num_blocks
        ):
            raise FastFisherError(
                f"parameterization={self.parameterization!r} has no blocks of weights; use update='sum' or 'joint'"
            )
        state = roots.matrices(0, len(roots.blocks))
        part = Part(state, None, roots.blocks, block_ids(0, len(roots.blocks)))
        unknown = torch.full((len(roots.blocks),), torch.nan, dtype=torch.float64)
        return FisherInverse(
            self.layout,
            [part],
            form="primal",
            damping=self.damping,
            num_grads=1,
            condition=unknown,
            dtype=state.dtype,
        )

    def prune_update(self, weight: Tensor, mask: Tensor, update: str = "sum") -> Tensor:
        """The weights after removing those outside the mask and correcting the others; new, exactly 0 outside.

        weight: [d] float32/float64, left as it is.   mask: bool [d], True = keep.
        update: "sum" adds the corrections of all removed weights, −Q (1_P ∘ w / diag Q); "joint" solves for them
        together, −Q[:, P] (Q[P, P])⁻¹ w_P, block by block or tile by tile.
        Raises FastFisherError on wrong input, FisherError where a joint solve breaks down.
        """
        check_weight(weight, self.layout.num_weights)
        if update not in UPDATES:
            raise FastFisherError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        weight = weight.detach()
        if update == "sum":
            gone = ~mask & self.live
            ratio = torch.where(gone, weight.double() / self._inv_diag().double(), 0)
            return torch.where(mask, weight - self.mul(ratio).to(weight.dtype), 0)
        out = weight.clone(memory_format=torch.contiguous_format)
        for form in self.forms:
            form.joint(weight, mask, out)
        return torch.where(mask, out, 0)

    def downdate(self, mask: Tensor) -> None:
        """Take the weights outside the mask [d] out of Q: exactly for blocks, where Q becomes the inverse of what is
        left if it was that of all; tiles stay those of the whole layer, and `diag` and `mul` leave the weights out.
        """
        for form in self.forms:
            form.downdate(mask)
        self.live &= mask
        self._diagonal = None

    def aux_step(self, grads: Tensor) -> None:
        """One step, exact in u, on a mini-batch of gradients [k, d].

        Raises FisherError where a block diverges.
        """
        grads = self._masked(grads)
        share = len(grads) / (self.seen + len(grads))
        for form in self.forms:
            form.step(grads, self.damping, share)
        self._remember(len(grads))

    def _masked(self, grads: Tensor) -> Tensor:
        if grads.ndim != 2 or grads.shape[1] != self.layout.num_weights:
            raise FastFisherError(f"grads must be [k, {self.layout.num_weights}], got {list(grads.shape)}")
        grads = grads.detach().to(self.dtype)
        # tiles learn from removed weights too
        return grads if self.tiled or bool(self.live.all()) else grads * self.live

    def _remember(self, count: int) -> None:
        self.seen = min(self.seen + count, self.horizon)
        self._diagonal = None
        for form in self.forms:
            if isinstance(form, KroneckerTiles):
                form.keep()

    def moved(self) -> None:
        """To be called after `variables` were written to."""
        self._diagonal = None

    def loss(self, grads: Tensor) -> float:
        """The auxiliary loss A(Q) with the Fisher of gradients [k, d]; tiles measure theirs in units of their D."""
        return self._loss(self._masked(grads))

    def error(self, grads: Tensor, *, probes: int = 8, seed: int = 0) -> float:
        """‖Q F_γ − I‖_F / √d, estimated by random signs, F the Fisher of gradients [k, d] within blocks or tiles.

        Of gradients that Q was not fitted to it holds their own noise too.
        """
        grads = self._masked(grads)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (self.layout.num_weights, probes), generator=generator) * 2 - 1
        z = signs.to(self.device, self.dtype)
        if not self.tiled:
            z *= self.live[:, None]
        image, product = torch.zeros_like(z), torch.zeros_like(z)
        for form in self.forms:
            form.fisher_times(grads, z, image)
        image += self.damping * z
        for form in self.forms:
            form.mul(image, product)
        return float((product - z).norm() / z.norm())

    def fit(self, grads: Tensor, *, held_out: Tensor | None = None, max_steps: int = 30) -> int:
        """Steps on one batch [k, d] until the loss on the held-out gradients stops falling; returns how many.

        held_out: [h, d], by default every eighth of the batch, which is then left out of it.
        The last step is taken back where it raised that loss; one of blocks that doubled it is halved.
        Raises FisherError where halving does not help, and where a factor of a tile is not positive definite.
        """
        if held_out is None and len(grads) >= HOLD_OUT:
            last = torch.arange(len(grads)) % HOLD_OUT == HOLD_OUT - 1
            held_out, grads = grads[last], grads[~last]
        grads = self._masked(grads)
        judge = grads if held_out is None else self._masked(held_out)
        share = len(grads) / (self.seen + len(grads))
        best, done, rate = math.inf if self.tiled else self._loss(judge), 0, 1.0
        while done < max_steps:
            before = [x.clone() for x in self.variables()]
            for form in self.forms:
                # a closed form has no step to shorten
                form.step(grads, self.damping, share if isinstance(form, KroneckerTiles) else share * rate)
            done += 1
            loss = self._loss(judge)
            if loss < best - FALLING * abs(best) or (done == 1 and math.isfinite(loss) and self.tiled):
                best = loss  # the first step changes the D in whose units tiles tell their loss
                continue
            if not loss <= best:
                for x, old in zip(self.variables(), before, strict=True):
                    x.copy_(old)
            if self.tiled or loss <= best + RISING * abs(best):
                break
            rate /= 2
            if rate < SMALLEST_RATE:
                raise FisherError(
                    f"the learned inverse diverged after {done} steps, at a loss of {loss:g} after {best:g}, at "
                    f"damping={self.damping:g}; use a larger damping"
                )
        self._remember(len(grads))
        self.history.append(
            {
                "steps": done,
                "gradients": len(grads),
                "rate": share * rate,
                "loss": best,
                "error": self.error(judge),
            }
        )
        return done

    def _loss(self, grads: Tensor) -> float:
        return sum(form.loss(grads, self.damping) for form in self.forms)

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state_dict` needs: tensors, numbers and names that torch.load(weights_only=True) reads."""
        return {
            **self.layout.state_dict(),
            "parameterization": self.parameterization,
            "damping": self.damping,
            "horizon": self.horizon,
            "seen": self.seen,
            "live": self.live,
            "history": [dict(row) for row in self.history],
            "forms": [form.state_dict() for form in self.forms],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FishLegInverse:
        """The inverse that `state_dict` described; the tensors are copied."""
        layout = BlockLayout.from_state_dict(state)
        live = state["live"].clone()
        forms: list[BlockRoots | KroneckerTiles] = []
        for form in state["forms"]:
            if "root" in form:
                root, top, blocks = (form[key].clone() for key in ("root", "top", "blocks"))
                forms.append(BlockRoots(layout, root, top, blocks, live))
            else:
                forms.append(KroneckerTiles.from_state_dict(form))
        made = cls(
            layout, forms, live=live, seen=state["seen"],
            **{key: state[key] for key in ("parameterization", "damping", "horizon")},
        )  # fmt: skip
        made.history = [dict(row) for row in state["history"]]
        return made
