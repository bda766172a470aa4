"""What a careful user writes in plain PyTorch today: the rivals every ratio of this folder is taken against.

*loop* is the formula of the older pruners, one batched rank-1 Sherman-Morrison update a gradient (WoodFisher, eq.
3.4), with its buffers allocated once.  *strong* is the best known dense route: a batched Gram matrix, Cholesky and
Cholesky inverse, or the m x m dual form, in the dtype of the gradients.  Gradients come as in the package, `[m, d]`;
blocks are ranges of B weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_parts(grads: Tensor, block_size: int) -> list[Tensor]:
    """[m, d] -> views [K, m, B]: all full blocks in one, and the short last block, if any, in another."""
    num_weights = grads.shape[1]
    full = num_weights // block_size
    parts = []
    if full:
        parts.append(grads[:, : full * block_size].unflatten(1, (full, block_size)).transpose(0, 1))
    if num_weights > full * block_size:
        parts.append(grads[:, full * block_size :].unsqueeze(0))
    return parts


def scaled_identity(num_blocks: int, size: int, value: float, like: Tensor) -> Tensor:
    """value * I for every block: [K, B, B]."""
    matrix = like.new_zeros(num_blocks, size, size)
    matrix.diagonal(dim1=1, dim2=2).fill_(value)
    return matrix


def loop_(f_inv: Tensor, grads: Tensor, num_grads: int) -> None:
    """f_inv -= v v^T / (m + g.v) with v = f_inv g, one gradient after the other.   f_inv [K, B, B], grads [K, k, B].

    `addcmul_` on broadcast views makes the update one pass over f_inv; it is faster than `baddbmm_` and `einsum`
    here.
    """
    num_blocks, size = f_inv.shape[:2]
    v = f_inv.new_empty(num_blocks, size, 1)
    scaled = torch.empty_like(v)
    curvature = f_inv.new_empty(num_blocks, 1, 1)
    for i in range(grads.shape[1]):
        g = grads[:, i].unsqueeze(-1)  # [K, B, 1]
        torch.bmm(f_inv, g, out=v)
        torch.bmm(g.mT, v, out=curvature)
        torch.div(v, curvature.add_(num_grads), out=scaled)
        f_inv.addcmul_(scaled, v.mT, value=-1)


def loop_build(grads: Tensor, block_size: int, damping: float) -> tuple[list[Tensor], Tensor]:
    """The inverse by `loop_` from I / damping: blocks [K, B, B] for each part, and the inverse diagonal [d]."""
    states = []
    for part in block_parts(grads, block_size):
        state = scaled_identity(part.shape[0], part.shape[2], 1 / damping, grads)
        loop_(state, part, grads.shape[0])
        states.append(state)
    return states, torch.cat([state.diagonal(dim1=1, dim2=2).flatten() for state in states])


def strong_primal_build(grads: Tensor, block_size: int, damping: float) -> tuple[list[Tensor], Tensor]:
    """The inverse by Gram, Cholesky and Cholesky inverse: blocks [K, B, B] for each part, and the inverse diagonal
    [d].
    """
    states = []
    for part in block_parts(grads, block_size):
        fisher = scaled_identity(part.shape[0], part.shape[2], damping, grads)
        fisher.baddbmm_(part.mT, part, alpha=1 / grads.shape[0])
        factor = torch.linalg.cholesky_ex(fisher).L
        states.append(torch.cholesky_inverse(factor))
    return states, torch.cat([state.diagonal(dim1=1, dim2=2).flatten() for state in states])


def strong_dual_build(grads: Tensor, block_size: int, damping: float) -> tuple[list[Tensor], Tensor]:
    """The inverse as (I - V^T V) / damping with V = L^-1 G, L L^T = m damping I + G G^T: V^T [K, B, m] for each part,
    and the inverse diagonal [d].   Solving for V^T from the right takes half the time of V from the left.
    """
    num_grads = grads.shape[0]
    states, diagonals = [], []
    for part in block_parts(grads, block_size):
        gram = scaled_identity(part.shape[0], num_grads, num_grads * damping, grads)
        gram.baddbmm_(part, part.mT)
        factor = torch.linalg.cholesky_ex(gram).L
        v = torch.linalg.solve_triangular(factor.mT, part.mT, upper=True, left=False)  # [K, B, m]
        states.append(v)
        diagonals.append(torch.linalg.vector_norm(v, dim=2).square_().neg_().add_(1).div_(damping).flatten())
    return states, torch.cat(diagonals)


def fisher_accumulate_(fisher: Tensor, grads: Tensor, num_grads: int) -> None:
    """fisher += G^T G / m.   fisher [K, B, B], grads [K, k, B]."""
    fisher.baddbmm_(grads.mT, grads, alpha=1 / num_grads)


def spd_inverse(matrix: Tensor) -> Tensor:
    """Inverse of every block: [K, B, B] -> [K, B, B]."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


def woodbury_(f_inv: Tensor, grads: Tensor, num_grads: int) -> None:
    """f_inv -= V C^-1 V^T with V = f_inv G^T, C = m I + G V.   f_inv [K, B, B], grads [K, k, B]."""
    v = torch.bmm(f_inv, grads.mT)  # [K, B, k]
    capacitance = torch.bmm(grads, v)
    capacitance.diagonal(dim1=1, dim2=2).add_(num_grads)
    factor = torch.linalg.cholesky_ex(capacitance).L
    half = torch.linalg.solve_triangular(factor, v.mT, upper=False)  # [K, k, B]
    f_inv.baddbmm_(half.mT, half, alpha=-1)


def dual_factor(grads: Tensor, damping: float) -> Tensor:
    """Upper triangle U of m damping I + G G^T = U^T U, in float64.   grads [K, m, B] -> [K, m, m]."""
    num_blocks, num_grads = grads.shape[:2]
    wide = grads.double()
    gram = scaled_identity(num_blocks, num_grads, num_grads * damping, wide).baddbmm_(wide, wide.mT)
    return torch.linalg.cholesky_ex(gram, upper=True).L


def inverse_diagonal_primal(f_inv: Tensor) -> Tensor:
    """[K, B, B] -> [K, B]."""
    return f_inv.diagonal(dim1=1, dim2=2).contiguous()


def inverse_diagonal_dual(grads: Tensor, factor: Tensor, damping: float) -> Tensor:
    """(1 - sum_i V_iq^2) / damping with V = U^-T G, in float64.   grads [K, m, B], factor [K, m, m] -> [K, B]."""
    v = torch.linalg.solve_triangular(factor.mT, grads.double(), upper=False)
    return (1 - v.square_().sum(1)) / damping


def block_matvec_primal(f_inv: Tensor, x: Tensor) -> Tensor:
    """F^-1 x: [K, B, B] and [K, B] -> [K, B]."""
    return torch.bmm(f_inv, x.unsqueeze(-1)).squeeze(-1)


def block_matvec_dual(grads: Tensor, factor: Tensor, damping: float, x: Tensor) -> Tensor:
    """(x - G^T C^-1 G x) / damping, in float64.   grads [K, m, B], factor [K, m, m], x [K, B] -> [K, B]."""
    wide, column = grads.double(), x.double().unsqueeze(-1)
    inner = torch.cholesky_solve(torch.bmm(wide, column), factor, upper=True)  # [K, m, 1]
    return torch.baddbmm(column, wide.mT, inner, alpha=-1).squeeze(-1).div_(damping)


def obs_saliency(weight: Tensor, inv_diag: Tensor) -> Tensor:
    """w^2 / (2 inv_diag): [d] -> [d]."""
    return weight.square() / (2 * inv_diag)


def obs_update_(weight: Tensor, f_inv: Tensor, inv_diag: Tensor, mask: Tensor) -> None:
    """w -= F^-1 (w / inv_diag on the pruned), pruned set to 0.   all [K, B], f_inv [K, B, B]; mask True = keep."""
    x = torch.where(mask, 0, weight / inv_diag)
    weight.sub_(torch.bmm(f_inv, x.unsqueeze(-1)).squeeze(-1)).mul_(mask)


def obs_solve_primal_(weight: Tensor, f_inv: Tensor, mask: Tensor) -> None:
    """w -= F^-1[:, Q] (F^-1[Q, Q])^-1 w_Q, pruned set to 0.   weight, mask [K, B], f_inv [K, B, B].

    Rows and columns of kept weights are replaced by those of I, so that all blocks have one size and one batched
    solve does.
    """
    pruned = ~mask
    both = pruned.unsqueeze(-1) & pruned.unsqueeze(-2)
    system = torch.where(both, f_inv, 0)
    system.diagonal(dim1=1, dim2=2).add_(mask)
    factor = torch.linalg.cholesky_ex(system).L
    x = torch.cholesky_solve((weight * pruned).unsqueeze(-1), factor)
    weight.sub_(torch.bmm(f_inv, x).squeeze(-1)).mul_(mask)


def obs_solve_dual_(weight: Tensor, grads: Tensor, damping: float, mask: Tensor) -> None:
    """w_R += G_R^T (m damping I + G_R G_R^T)^-1 G_Q w_Q, w_Q = 0, solved in float64.   weight, mask [K, B], grads [K,
    m, B].
    """
    num_blocks, num_grads = grads.shape[:2]
    kept = grads.double() * mask.unsqueeze(1)
    removed = torch.bmm(grads.double(), (weight * ~mask).double().unsqueeze(-1))  # [K, m, 1]
    gram = scaled_identity(num_blocks, num_grads, num_grads * damping, kept).baddbmm_(kept, kept.mT)
    inner = torch.cholesky_solve(removed, torch.linalg.cholesky_ex(gram).L)
    weight.mul_(mask).add_(torch.bmm(kept.mT, inner).squeeze(-1))
