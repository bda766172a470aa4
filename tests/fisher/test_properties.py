"""What always holds, for gradients that hypothesis chooses (the checks at the end of the mathematics)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfisher.fisher.inverse import FisherInverse
from tests.cases import KINDS, gradients

FORMS = ("primal", "dual", "rank1", "woodbury")
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Problem:
    """Gradients, their tensors, blocks and damping, and a random choice of weights to remove."""

    grads: Tensor
    sizes: tuple[int, ...]
    block_size: int | None
    damping: float
    seed: int

    def inverse(self, form: str = "auto", grads: Tensor | None = None) -> FisherInverse:
        """F⁻¹ of the problem, or of other gradients in its place."""
        return FisherInverse.from_grads(
            self.grads if grads is None else grads,
            block_size=self.block_size,
            damping=self.damping,
            form=form,
            sizes=self.sizes,
        )

    def matrix(self, form: str = "auto") -> Tensor:
        """F⁻¹ [d, d] in float64."""
        return self.inverse(form) @ torch.eye(sum(self.sizes), dtype=torch.float64)

    def fisher(self) -> Tensor:
        """F [d, d] in float64."""
        F = torch.zeros(sum(self.sizes), sum(self.sizes), dtype=torch.float64)
        for start, stop in self.inverse().layout.blocks.tolist():
            G = self.grads[:, start:stop].double()
            F[start:stop, start:stop] = G.T @ G / len(G) + self.damping * torch.eye(stop - start)
        return F

    def weight(self) -> Tensor:
        """Random weights [d]."""
        return torch.randn(sum(self.sizes), generator=torch.Generator().manual_seed(self.seed))

    def mask(self) -> Tensor:
        """A random choice of weights to keep."""
        return torch.rand(sum(self.sizes), generator=torch.Generator().manual_seed(self.seed + 1)) > 0.5


@st.composite
def problems(draw: st.DrawFn, max_rho: float = 1e3) -> Problem:
    """Small problems of every kind."""
    sizes = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    d = sum(sizes)
    damping = 10 ** draw(st.floats(-6, 1))
    rho = 10 ** draw(st.floats(-2, torch.tensor(max_rho).log10().item()))
    seed = draw(st.integers(0, 1000))
    grads = gradients(
        draw(st.sampled_from(KINDS)), draw(st.integers(1, 15)), d, rho=rho, damping=damping, seed=seed
    )
    block_size = draw(st.one_of(st.none(), st.integers(1, d)))
    return Problem(grads, sizes, block_size, damping, seed)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative difference in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


@SETTINGS
@given(problems(max_rho=1e7))
def test_symmetric_and_positive_definite(problem: Problem) -> None:
    F_inv = problem.matrix()
    assert distance(F_inv, F_inv.T) <= 1e-6
    assert float(torch.linalg.eigvalsh((F_inv + F_inv.T) / 2).min()) > 0


@SETTINGS
@given(problems())
def test_all_forms_agree(problem: Problem) -> None:
    expected = torch.linalg.inv(problem.fisher())
    for form in FORMS:
        assert distance(problem.matrix(form), expected) <= 1e-4


@SETTINGS
@given(problems(max_rho=1e7))
def test_diagonal_is_positive_and_at_most_one_over_the_damping(problem: Problem) -> None:
    for form in FORMS:
        diagonal = problem.inverse(form).diag().double() * problem.damping
        assert float(diagonal.min()) > 0
        assert float(diagonal.max()) <= 1 + 1e-4


@SETTINGS
@given(problems())
def test_zero_gradients_give_the_order_of_magnitudes(problem: Problem) -> None:
    for form in FORMS:
        inverse = problem.inverse(form, torch.zeros_like(problem.grads))
        assert distance(inverse.diag(), torch.full((sum(problem.sizes),), 1 / problem.damping)) <= 1e-6
        saliency = inverse.saliency(problem.weight())
        assert torch.equal(saliency.argsort(stable=True), problem.weight().square().argsort(stable=True))


@SETTINGS
@given(problems(max_rho=1e7))
def test_blocks_of_one_weight_are_the_diagonal_fisher(problem: Problem) -> None:
    inverse = FisherInverse.from_grads(problem.grads, block_size=1, damping=problem.damping)
    diagonal = 1 / (problem.damping + problem.grads.double().square().mean(dim=0))
    torch.testing.assert_close(inverse.diag().double(), diagonal, rtol=1e-5, atol=0)


@SETTINGS
@given(problems())
def test_joint_update_costs_at_most_what_the_sum_costs(problem: Problem) -> None:
    F, w, keep = problem.fisher(), problem.weight(), problem.mask()
    for form in FORMS:
        inverse = problem.inverse(form)
        losses = []
        for update in ("joint", "sum"):
            pruned = inverse.prune_update(w, keep, update)
            assert torch.equal(pruned[~keep], torch.zeros(int((~keep).sum())))
            step = (pruned - w).double()
            losses.append(float(step @ F @ step) / 2)
        assert losses[0] <= losses[1] * (1 + 1e-3) + 1e-12 * float(w.double() @ F @ w.double())


@SETTINGS
@given(problems())
def test_order_of_the_gradients_changes_nothing_but_rounding(problem: Problem) -> None:
    order = torch.randperm(len(problem.grads), generator=torch.Generator().manual_seed(problem.seed))
    for form in FORMS:
        a, b = problem.inverse(form), problem.inverse(form, problem.grads[order])
        assert distance(b.diag(), a.diag()) <= 1e-4
        assert distance(b @ problem.weight(), a @ problem.weight()) <= 1e-4


@SETTINGS
@given(problems())
def test_blocks_are_independent(problem: Problem) -> None:
    inverse = problem.inverse()
    start, stop = inverse.layout.blocks[-1].tolist()
    changed = problem.grads.clone()
    changed[:, start:stop] *= 3
    other = problem.inverse(grads=changed)
    assert torch.equal(other.diag()[:start], inverse.diag()[:start])
    assert distance((other @ problem.weight())[:start], (inverse @ problem.weight())[:start]) <= 1e-6


@SETTINGS
@given(problems())
def test_product_undoes_the_fisher(problem: Problem) -> None:
    p = problem.weight().double()
    for form in FORMS:
        assert distance(problem.inverse(form) @ (problem.fisher() @ p), p) <= 1e-4
