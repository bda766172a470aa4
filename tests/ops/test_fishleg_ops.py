"""FishLeg's square root R of the inverse Fisher: numbers worked out by hand, convergence, and exact removals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastfisher import ops

DTYPES = (torch.float32, torch.float64)
# one block of two weights: F = GᵀG/2, F_γ = [[1.5, .5], [.5, 1]] for γ = ½, and its inverse
GRADS, DAMPING = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 0.5
INVERSE = torch.tensor([[0.8, -0.4], [-0.4, 1.2]], dtype=torch.float64)


@pytest.fixture(params=["native", "reference", "triton"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> object:
    """Every backend that can run here."""
    args = (torch.eye(2)[None], torch.ones(1, 2), GRADS, torch.tensor([[0, 2]]), 2, DAMPING, 1.0)
    found = torch.zeros(2, 1, dtype=torch.float64)
    if request.param != "reference":
        reason = ops.OPS["fishleg_block_step_"].why_not(request.param, (*args, *found))
        if reason is not None:
            pytest.skip(reason)
    with ops.use_backend(request.param):
        yield


def one_block(n: int) -> Tensor:
    """Its range."""
    return torch.tensor([[0, n]])


def step(
    root: Tensor, grads: Tensor, damping: float, top: Tensor | None = None, rate: float = 1.0
) -> tuple[float, float]:
    """One step on a single block [n, n], in place; the loss before it and the eigenvalue."""
    n = len(root)
    loss, largest = torch.full((2, 1), torch.nan, dtype=torch.float64)
    top = torch.zeros(n, dtype=root.dtype) if top is None else top
    ops.fishleg_block_step_(
        root[None], top[None], grads, one_block(n), len(grads), damping, rate, loss, largest
    )
    return float(loss), float(largest)


def downdate(root: Tensor, *removed: int) -> None:
    """Remove weights of a single block, in place."""
    keep = torch.ones(len(root), dtype=torch.bool)
    keep[list(removed)] = False
    ops.factor_downdate_(root[None], one_block(len(root)), keep)


def spectrum(n: int, condition: float, damping: float) -> tuple[Tensor, Tensor]:
    """Gradients [n, n] whose F_γ has eigenvalues spread evenly in their logarithm from γ to γ times the condition.

    Returns them in float64, and F_γ⁻¹.
    """
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    values = damping * torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    grads = (n * (values - damping).clamp(min=0)).sqrt()[:, None] * U.T
    return grads, U / values @ U.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_at_the_identity_and_at_the_inverse(dtype: torch.dtype) -> None:
    assert step(torch.eye(2, dtype=dtype), GRADS, DAMPING)[0] == pytest.approx(-0.75, abs=1e-6)
    root = torch.linalg.cholesky(INVERSE).to(dtype).contiguous()
    before = root.clone()
    loss, largest = step(root, GRADS, DAMPING)
    assert (loss, largest) == pytest.approx((-1, 1), abs=1e-6)
    torch.testing.assert_close(root, before)  # M = I: the step stays where it is


def test_step_from_the_identity_is_the_one_worked_out_by_hand() -> None:
    root, top = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    # M = F_γ; its third product with a unit vector, from e₀: (1.5, .5), (2.5, 1.25), (4.375, 2.5)
    largest = (4.375**2 + 2.5**2) ** 0.5 / (2.5**2 + 1.25**2) ** 0.5
    assert step(root, GRADS, DAMPING, top, rate=0.5) == pytest.approx((-0.75, largest))
    eta = 0.25 / (1.1 * largest)
    expected = torch.tensor([[1 - eta * 0.5, -eta * 0.5], [-eta * 0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(root, expected)
    torch.testing.assert_close(
        top, torch.tensor([4.375, 2.5], dtype=torch.float64) / (4.375**2 + 2.5**2) ** 0.5
    )


def test_diagonal_fisher() -> None:
    grads = torch.tensor([[1.0, 0], [0, 3**0.5]], dtype=torch.float64) * 2**0.5  # F = diag(1, 3)
    root = torch.tensor([0.5, 0.25], dtype=torch.float64).sqrt().diag()
    assert step(root.clone(), grads, 1.0)[0] == pytest.approx(-3 / 8)
    for _ in range(40):
        step(root.add_(0), grads, 1.0)
    torch.testing.assert_close(root @ root.T, torch.tensor([0.5, 0.25], dtype=torch.float64).diag())


@pytest.mark.parametrize(("condition", "steps"), [(1e4, 12), (1e6, 16)])
def test_full_batch_steps_find_the_inverse(condition: float, steps: int) -> None:
    damping = 1e-3
    grads, exact = spectrum(60, condition, damping)
    root = torch.eye(60, dtype=torch.float64) / damping**0.5
    top = torch.zeros(60, dtype=torch.float64)
    losses = [step(root, grads, damping, top)[0] for _ in range(steps)]
    assert float((root @ root.T - exact).norm() / exact.norm()) < 0.02
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] > -float(exact.trace()) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_stay(dtype: torch.dtype) -> None:
    grads, _ = spectrum(20, 100.0, 0.1)
    root = torch.eye(20, dtype=dtype)
    root[[3, 19]] = 0
    for _ in range(5):
        step(root, grads, 0.1)
    assert torch.equal(root[[3, 19]], torch.zeros(2, 20, dtype=dtype))
    exact = torch.zeros(20, 20, dtype=torch.float64)
    kept = [i for i in range(20) if i not in (3, 19)]
    F = grads.T @ grads / 20 + 0.1 * torch.eye(20)
    exact[torch.tensor(kept)[:, None], kept] = torch.linalg.inv(F[kept][:, kept])
    for _ in range(15):
        step(root, grads, 0.1)
    torch.testing.assert_close((root @ root.T).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [5, 40])
def test_block_that_is_not_finite_is_left_alone(dtype: torch.dtype, bad: float, size: int) -> None:
    grads = torch.ones(3, 2 * size)
    grads[1, 2] = bad
    root = torch.eye(size, dtype=dtype).repeat(2, 1, 1)
    top = torch.ones(2, size, dtype=dtype)
    blocks = torch.tensor([[0, size], [size, 2 * size]])
    loss, largest = torch.zeros(2, 2, dtype=torch.float64)
    ops.fishleg_block_step_(root, top, grads, blocks, 3, 1.0, 1.0, loss, largest)
    assert loss[0] == largest[0] == torch.inf
    assert torch.equal(root[0], torch.eye(size, dtype=dtype))
    assert torch.equal(top[0], torch.ones(size, dtype=dtype))
    # M = I + 1 1ᵀ: its largest eigenvalue is n + 1, and it begins at that vector
    assert float(largest[1]) == pytest.approx(size + 1, rel=1e-6)
    assert float(loss[1]) == pytest.approx(0, abs=1e-5)


def test_start_that_is_no_vector_counts_as_equal_entries() -> None:
    grads, _ = spectrum(10, 100.0, 0.1)
    tops = [torch.full((10,), value, dtype=torch.float64) for value in (0.0, torch.nan, torch.inf, 3.0)]
    roots = [torch.eye(10, dtype=torch.float64) for _ in tops]
    found = [step(root, grads, 0.1, top) for root, top in zip(roots, tops, strict=True)]
    for one, root, top in zip(found, roots, tops, strict=True):
        assert one == pytest.approx(found[-1])
        torch.testing.assert_close(root, roots[-1])
        torch.testing.assert_close(top, tops[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_removing_one_of_two_weights(dtype: torch.dtype) -> None:
    root = torch.linalg.cholesky(INVERSE).to(dtype).contiguous()
    downdate(root, 0)
    assert torch.equal(root[0], torch.zeros(2, dtype=dtype))
    assert float(root[1] @ root[1]) == pytest.approx(1, rel=1e-6)
    downdate(root, 0)  # nothing is left of it
    assert float(root[1] @ root[1]) == pytest.approx(1, rel=1e-6)
    downdate(root, 0, 1)
    assert torch.equal(root, torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("condition", [1e2, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_removals_leave_the_inverse_of_what_is_left(dtype: torch.dtype, condition: float) -> None:
    n, removed = 40, [0, 3, 4, 17, 39, 21, 22, 5]
    _, Q = spectrum(n, condition, 1.0)
    values, vectors = torch.linalg.eigh(Q)
    start = (vectors * values.sqrt()).to(dtype).contiguous()
    together, one_by_one = start.clone(), start
    downdate(together, *removed)
    for q in removed:
        downdate(one_by_one, q)
    kept = [i for i in range(n) if i not in removed]
    exact = torch.zeros(n, n, dtype=torch.float64)
    exact[torch.tensor(kept)[:, None], kept] = torch.linalg.inv(torch.linalg.inv(Q)[kept][:, kept])
    # rounding of the start, and that of the two inverses in float64 which it is compared with
    tolerance = 4 * torch.finfo(dtype).eps * condition**0.5 + torch.finfo(torch.float64).eps * condition
    for root in (together, one_by_one):
        assert torch.equal(root[removed], torch.zeros(len(removed), n, dtype=dtype))
        error = (root.double() @ root.double().T - exact).abs().max() / exact.abs().max()
        assert float(error) < tolerance
    difference = (together @ together.T - one_by_one @ one_by_one.T).abs().max()
    assert float(difference / exact.abs().max()) < tolerance


def test_diagonal_and_product_are_those_of_the_inverse() -> None:
    root = torch.linalg.cholesky(INVERSE)[None].contiguous()
    diagonal, x = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    product = torch.zeros_like(x)
    ops.factor_diagonal(root, one_block(2), out=diagonal)
    ops.block_factor_matvec(root, one_block(2), x, out=product)
    torch.testing.assert_close(diagonal, INVERSE.diagonal())
    torch.testing.assert_close(product, INVERSE)


def test_kron_product_is_that_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (
        torch.randn(2, 3, 3, generator=generator).double(),
        torch.randn(2, 4, 4, generator=generator).double(),
    )
    left, right = A @ A.mT, B @ B.mT
    scale, x = (
        torch.randn(2, 3, 4, generator=generator).double(),
        torch.randn(5, 2, 3, 4, generator=generator).double(),
    )
    out = torch.zeros_like(x)
    ops.kron_matvec(left, right, scale, x, out=out)
    for t in range(2):
        D = scale[t].flatten().diag()
        dense = D @ torch.kron(left[t], right[t]) @ D
        torch.testing.assert_close(out[:, t].flatten(1), x[:, t].flatten(1) @ dense)
