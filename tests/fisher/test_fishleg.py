"""FishLeg's learned inverse against closed forms, dense matrices, autograd, and WoodFisher's block inverse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.auxiliary import SampledSteps
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.fishleg import PARAMETERIZATIONS, FishLegInverse
from fastfisher.fisher.inverse import FisherInverse
from fastfisher.fisher.kronecker import KroneckerTiles
from fastfisher.fisher.roots import BlockRoots


def gradients(m: int, *shape: int, seed: int = 0) -> Tensor:
    """Correlated gradients [m, d] of a weight of this shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])

    def mixing(n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64) + 0.5 * torch.randn(
            n, n, generator=generator, dtype=torch.float64
        )

    g = torch.randn(m, rows, columns, generator=generator, dtype=torch.float64)
    return (mixing(rows) @ g @ mixing(columns)).flatten(1)


def fisher(grads: Tensor, damping: float) -> Tensor:
    return grads.T @ grads / len(grads) + damping * torch.eye(grads.shape[1], dtype=grads.dtype)


def dense(inverse: FishLegInverse) -> Tensor:
    return inverse.columns(torch.arange(inverse.layout.num_weights))


def fitted(grads: Tensor, shape: tuple[int, ...], damping: float, **options: object) -> FishLegInverse:
    """After enough steps on all the gradients."""
    full = options.get("parameterization") == "full"
    block_size = None if full else options.pop("block_size", None)
    layout = BlockLayout(["w"], [shape], block_size)
    inverse = FishLegInverse.start(layout, damping=damping, dtype=grads.dtype, **options)
    for _ in range(60):
        for form in inverse.forms:
            form.step(grads, damping, 1.0)
    inverse.moved()
    return inverse


TWO = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
Q_TWO = torch.tensor([[0.8, -0.4], [-0.4, 1.2]], dtype=torch.float64)


@pytest.mark.parametrize("parameterization", ["full", "block", "kron"])
def test_two_weights(parameterization: str) -> None:
    """F_γ = [[1.5, .5], [.5, 1]]; a row of weights is a Kronecker product whatever F is."""
    inverse = fitted(TWO, (1, 2), 0.5, parameterization=parameterization)
    torch.testing.assert_close(dense(inverse), Q_TWO, atol=1e-9, rtol=0)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(inverse.saliency(w), torch.tensor([0.625, 5 / 3], dtype=torch.float64))
    mask = torch.tensor([False, True])
    for update in ("sum", "joint"):
        new = inverse.prune_update(w, mask, update)
        torch.testing.assert_close(new, torch.tensor([0.0, 2.5], dtype=torch.float64), atol=1e-6, rtol=0)
    if parameterization != "kron":
        assert inverse.loss(TWO) == pytest.approx(-1.0)
        inverse.downdate(mask)
        assert inverse.diag().tolist() == pytest.approx([0.0, 1.0])


def test_diagonal_fisher() -> None:
    """F = diag(1, 3), γ = 1: Q* = diag(½, ¼), A* = −3/8."""
    grads = torch.tensor([[2**0.5, 0.0], [0.0, 6**0.5]], dtype=torch.float64)
    for parameterization in PARAMETERIZATIONS:
        inverse = fitted(grads, (1, 2), 1.0, parameterization=parameterization)
        torch.testing.assert_close(dense(inverse), torch.diag(torch.tensor([0.5, 0.25], dtype=torch.float64)))
        if not inverse.tiled:
            assert inverse.loss(grads) == pytest.approx(-3 / 8)


def test_blocks_learn_the_inverse_of_woodfisher() -> None:
    grads = gradients(200, 6, 10)
    inverse = fitted(grads, (6, 10), 0.05, parameterization="block", block_size=16)
    exact = FisherInverse.from_grads(grads, block_size=16, damping=0.05)
    torch.testing.assert_close(inverse.diag(), exact.diag(), rtol=1e-3, atol=0)
    x = torch.randn(60, 3, dtype=torch.float64)
    torch.testing.assert_close(inverse @ x, exact @ x, rtol=1e-3, atol=1e-3)
    assert inverse.error(grads) < 1e-3
    weight = torch.randn(60, dtype=torch.float64)
    mask = inverse.saliency(weight).argsort().argsort() >= 30
    for update in ("sum", "joint"):
        ours, theirs = (q.prune_update(weight, mask, update) for q in (inverse, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert bool((ours[~mask] == 0).all())
    # the block of the inverse is not the inverse of the block
    whole = torch.linalg.inv(fisher(grads, 0.05)).diagonal()
    assert float((inverse.diag() / whole - 1).abs().max()) > 0.1


def test_a_kronecker_fisher_takes_one_alternation() -> None:
    """F_γ = S ⊗ A exactly: gradients s aᵀ over all pairs of the columns of two roots, hardly any damping."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    grads = torch.stack([torch.outer(s, a) for s in left.T for a in right.T]).flatten(1)
    layout = BlockLayout(["w"], [(3, 4)], None)
    inverse = FishLegInverse.start(layout, damping=1e-9, parameterization="kron", dtype=torch.float64)
    for _ in range(3):
        inverse.forms[0].step(grads, 1e-9, 1.0)
    inverse.moved()
    torch.testing.assert_close(
        inverse.diag(), torch.linalg.inv(fisher(grads, 1e-9)).diagonal(), rtol=0.35, atol=0
    )


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2), (130, 9)])
@pytest.mark.parametrize("parameterization", ["kron", "block-kron"])
def test_products_and_diagonal_against_the_dense_matrix(
    shape: tuple[int, ...], parameterization: str
) -> None:
    grads = gradients(40, *shape)
    layout = BlockLayout(["w"], [shape], None)
    inverse = FishLegInverse.from_grads(
        grads, layout, damping=0.1, damping_mode="relative", parameterization=parameterization, tile=4
    )
    Q = dense(inverse)
    torch.testing.assert_close(Q, Q.T)
    torch.testing.assert_close(Q.diagonal(), inverse.diag())
    assert float(torch.linalg.eigvalsh(Q).min()) > 0
    if parameterization == "kron":
        tiles = inverse.forms[0]
        assert isinstance(tiles, KroneckerTiles)
        T, S = (factor[0] for factor in tiles.factors)
        D = tiles.scale[0].flatten()
        torch.testing.assert_close(Q, D[:, None] * torch.kron(T, S) * D)
    weight = torch.randn(layout.num_weights, dtype=torch.float64)
    mask = torch.rand(layout.num_weights) < 0.6
    gone = ~mask
    joint = weight - Q[:, gone] @ torch.linalg.solve(Q[gone][:, gone], weight[gone])
    torch.testing.assert_close(
        inverse.prune_update(weight, mask, "joint")[mask], joint[mask], rtol=1e-2, atol=1e-3
    )
    summed = weight - Q[:, gone] @ (weight[gone] / Q.diagonal()[gone])
    torch.testing.assert_close(inverse.prune_update(weight, mask, "sum")[mask], summed[mask])


def test_tiles_do_not_cross_the_groups_of_a_convolution() -> None:
    grads = gradients(40, 8, 2, 3, 3)
    layout = BlockLayout(["w"], [(8, 2, 3, 3)], None)
    inverse = FishLegInverse.from_grads(
        grads, layout, damping=0.1, damping_mode="relative", parameterization="kron", conv_groups={"w": 2}
    )
    Q = dense(inverse)
    assert bool((Q[:72, 72:] == 0).all())
    assert bool((Q[:72, :72] != 0).any())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_always_symmetric_and_positive_definite(parameterization: str) -> None:
    """Also after steps far too large, on gradients of another scale."""
    layout = BlockLayout(["w", "b"], [(6, 5), (4,)], None if parameterization == "full" else 8)
    inverse = FishLegInverse.start(
        layout, damping=0.1, parameterization=parameterization, dtype=torch.float64
    )
    for i, scale in enumerate((1.0, 100.0, 0.01, 10.0)):
        inverse.aux_step(scale * torch.cat([gradients(5, 6, 5, seed=i), torch.randn(5, 4).double()], dim=1))
        Q = dense(inverse)
        torch.testing.assert_close(Q, Q.T)
        assert float(torch.linalg.eigvalsh(Q).min()) > 0


def test_state_is_kept_and_copied() -> None:
    grads = gradients(64, 6, 10)
    for parameterization in PARAMETERIZATIONS:
        layout = BlockLayout(["w"], [(6, 10)], None if parameterization == "full" else 16)
        one = FishLegInverse.from_grads(grads, layout, damping=0.1, parameterization=parameterization)
        one.downdate(torch.arange(60) % 3 > 0)
        other = FishLegInverse.from_state_dict(one.state_dict())
        assert torch.equal(one.diag(), other.diag())
        for inverse in (one, other):
            inverse.fit(gradients(64, 6, 10, seed=1))
        assert torch.equal(one.diag(), other.diag())
        assert one.history == other.history


def test_downdate_is_exact_for_blocks() -> None:
    """What is left is the inverse over the weights that are left, removed together or one at a time."""
    grads = gradients(200, 4, 8)
    keep = torch.arange(32) % 3 > 0
    together = fitted(grads, (4, 8), 0.05, parameterization="full")
    together.downdate(keep)
    single = fitted(grads, (4, 8), 0.05, parameterization="full")
    for i in (~keep).nonzero().flatten().tolist():
        single.downdate(torch.arange(32) != i)
    exact = torch.zeros(32, 32, dtype=torch.float64)
    exact[keep[:, None] & keep] = torch.linalg.inv(fisher(grads, 0.05)[keep][:, keep]).flatten()
    torch.testing.assert_close(dense(together), exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dense(single), dense(together), rtol=1e-6, atol=1e-8)
    # and stays so: steps touch nothing of what is gone
    together.aux_step(grads)
    assert bool((dense(together)[~keep] == 0).all())
    assert bool((together.saliency(torch.where(keep, 1.0, 0.0))[~keep] == 0).all())


def test_the_loss_falls_and_the_fit_stops() -> None:
    grads, held_out = gradients(64, 6, 10), gradients(64, 6, 10, seed=0)
    layout = BlockLayout(["w"], [(6, 10)], 12)
    inverse = FishLegInverse.start(layout, damping=0.1, parameterization="block", dtype=torch.float64)
    losses = [inverse.loss(grads)]
    for _ in range(8):
        for form in inverse.forms:
            form.step(grads, 0.1, 1.0)
        losses.append(inverse.loss(grads))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    inverse = FishLegInverse.start(layout, damping=0.1, parameterization="block", dtype=torch.float64)
    steps = inverse.fit(grads, held_out=held_out, max_steps=100)
    assert 3 < steps < 100
    assert inverse.history[-1]["error"] < 0.1


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_slopes_of_the_surrogate_against_autograd(parameterization: str) -> None:
    layout = BlockLayout(["w", "b"], [(4, 5), (3,)], None if parameterization == "full" else 6)
    inverse = FishLegInverse.start(
        layout, damping=0.1, parameterization=parameterization, dtype=torch.float64, tile=3
    )
    generator = torch.Generator().manual_seed(0)
    for x in inverse.variables():
        x += 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    for form in inverse.forms:
        if isinstance(form, KroneckerTiles):
            form.scale *= form.inside
    inverse.moved()
    r, u = torch.randn(2, 23, generator=generator, dtype=torch.float64)
    slopes = [slope for form in inverse.forms for slope in form.slopes(r, u)]

    def value() -> float:
        inverse.moved()
        return float(r @ inverse.mul(u))

    for x, slope in zip(inverse.variables(), slopes, strict=True):
        for place in torch.randperm(x.numel(), generator=generator)[:6].tolist():
            flat, step = x.view(-1), 1e-5
            if float(slope.reshape(-1)[place]) == 0:
                continue
            old = float(flat[place])
            flat[place] = old + step
            above = value()
            flat[place] = old - step
            below = value()
            flat[place] = old
            assert float(slope.reshape(-1)[place]) == pytest.approx(
                (above - below) / (2 * step), rel=1e-5, abs=1e-8
            )


@pytest.mark.parametrize("u", ["gaussian", "rademacher"])
def test_slope_of_sampled_u_is_unbiased(u: str) -> None:
    """E over u of the surrogate's slope is that of A, by a z-test on every entry of R.

    At R = I of the first oracle it is [[1, 1], [1, 0]].
    """
    layout = BlockLayout(["w"], [(1, 2)], None)
    inverse = FishLegInverse.start(
        layout, damping=0.5, parameterization="full", scale=1.0, dtype=torch.float64
    )
    sampler = SampledSteps(inverse, u=u, preconditioner=False, seed=1)
    F = TWO.T @ TWO / 2
    draws = []
    for _ in range(2000):
        x = sampler.draw()
        draws.append(inverse.forms[0].slopes(F @ x + 0.5 * x - x, x)[0][0])  # Q = I
    slopes = torch.stack(draws)
    expected = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    error = slopes.std(dim=0) / len(slopes) ** 0.5
    assert bool(((slopes.mean(dim=0) - expected).abs() < 4 * error + 1e-12).all())


def test_sampled_steps_lower_the_loss_and_keep_removed_weights_out() -> None:
    grads = gradients(64, 6, 10)
    for parameterization in ("block", "kron", "diagonal"):
        layout = BlockLayout(["w"], [(6, 10)], 12)
        inverse = FishLegInverse.start(
            layout, damping=0.5, parameterization=parameterization, dtype=torch.float64
        )
        inverse.downdate(torch.arange(60) % 4 > 0)
        before = inverse.loss(grads)
        sampler = SampledSteps(inverse, lr=0.02, preconditioner=False)
        for _ in range(150):
            sampler.step(lambda v: grads.T @ (grads @ v) / len(grads))
        assert inverse.loss(grads) < before
        assert bool((inverse.diag()[::4] == 0).all())
        assert bool((dense(inverse)[::4] == 0).all())


def test_bad_input_is_refused() -> None:
    layout = BlockLayout(["w"], [(6, 10)], 12)
    with pytest.raises(FastFisherError, match=r"parameterization must be one of .*; got 'blocks'"):
        FishLegInverse.start(layout, damping=0.1, parameterization="blocks")
    with pytest.raises(FastFisherError, match="damping must be positive and finite, got -1"):
        FishLegInverse.start(layout, damping=-1)
    with pytest.raises(FastFisherError, match="takes block_size=None, got 12"):
        FishLegInverse.start(layout, damping=0.1, parameterization="full")
    inverse = FishLegInverse.start(layout, damping=0.1)
    with pytest.raises(FastFisherError, match=r"grads must be \[k, 60\], got \[3, 61\]"):
        inverse.aux_step(torch.randn(3, 61))
    with pytest.raises(FastFisherError, match="update must be one of sum, joint, got 'greedy'"):
        inverse.prune_update(torch.randn(60), torch.ones(60, dtype=torch.bool), "greedy")
    with pytest.raises(FastFisherError, match="'kron' has no blocks"):
        FishLegInverse.start(layout, damping=0.1, parameterization="kron").blockwise()


@pytest.mark.parametrize("parameterization", ["block", "kron"])
def test_gradients_without_bound_raise_and_name_the_layer(parameterization: str) -> None:
    layout = BlockLayout(["w"], [(6, 10)], 12)
    inverse = FishLegInverse.start(layout, damping=0.1, parameterization=parameterization)
    grads = torch.randn(8, 60)
    grads[0, 0] = math.inf
    with pytest.raises(FisherError, match=r"damping=0\.1"):
        inverse.aux_step(grads)


def test_single_weights_step_as_the_op_does() -> None:
    grads = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    layout, live = BlockLayout.from_sizes([300], block_size=1), torch.ones(300, dtype=torch.bool)
    ours, op = (BlockRoots.start(layout, layout.blocks, 10.0, live, torch.float32) for _ in range(2))
    loss, largest = torch.empty(2, 300, dtype=torch.float64)
    for _ in range(5):
        before = ours.loss(grads, 0.1)
        ours.step(grads, 0.1, 0.7)
        ops.fishleg_block_step_(op.root, op.top, grads, op.blocks, 40, 0.1, 0.7, loss, largest)
        assert before == pytest.approx(float(loss.sum()), rel=1e-5)
        torch.testing.assert_close(ours.root, op.root, rtol=1e-5, atol=0)
    kept = ours.root.clone()
    grads[3, 7] = torch.inf
    with pytest.raises(FisherError, match=r"diverged in .*; use a larger damping"):
        ours.step(grads, 0.1, 1.0)
    assert float(ours.root[7, 0, 0]) == float(kept[7, 0, 0])
