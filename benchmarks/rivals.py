"""What a careful user writes in plain PyTorch today: the rivals every ratio of this folder is taken against.

*loop* is the formula of the older pruners, one batched rank-1 Sherman-Morrison update a gradient (WoodFisher, eq.
3.4), with its buffers allocated once.  *strong* is the best known dense route: a batched Gram matrix, Cholesky and
Cholesky inverse, or the m x m dual form, in the dtype of the gradients.  Gradients come in parts `[K, k, B]`, one for
each length of block, or one in which short blocks are filled up with zeros.  `calls`: how many times they come, as in
a stream of which a part is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, for the shapes it is called with.

    What was compiled before is forgotten: torch keeps a few shapes of a function and then stops compiling it.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


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


def diagonals(states: list[Tensor]) -> list[Tensor]:
    """Diagonal of every block, written out: [K, B, B] -> [K, B]."""
    return [state.diagonal(dim1=1, dim2=2).contiguous() for state in states]


def loop_(f_inv: Tensor, grads: Tensor, num_grads: int, steps: int | None = None) -> None:
    """f_inv -= v v^T / (m + g.v) with v = f_inv g, one gradient after the other.   f_inv [K, B, B], grads [K, k, B].

    `addcmul_` on broadcast views makes the update one pass over f_inv; it is faster than `baddbmm_` and `einsum`
    here.   steps: how many gradients; None means all.
    """
    num_blocks, size = f_inv.shape[:2]
    v = f_inv.new_empty(num_blocks, size, 1)
    scaled = torch.empty_like(v)
    curvature = f_inv.new_empty(num_blocks, 1, 1)
    for i in range(steps or grads.shape[1]):
        g = grads[:, i].unsqueeze(-1)  # [K, B, 1]
        torch.bmm(f_inv, g, out=v)
        torch.bmm(g.mT, v, out=curvature)
        torch.div(v, curvature.add_(num_grads), out=scaled)
        f_inv.addcmul_(scaled, v.mT, value=-1)


def loop_step_(f_inv: Tensor, g: Tensor, num_grads: int) -> None:
    """One step of `loop_`, for a compiler that plans its own buffers.   f_inv [K, B, B], g [K, B, 1]."""
    v = torch.bmm(f_inv, g)
    f_inv.addcmul_(v / (num_grads + torch.bmm(g.mT, v)), v.mT, value=-1)


def compiled_loop() -> Callable[..., None]:
    """`loop_` with its step compiled; the loop over gradients itself would be unrolled."""
    step = compiled(loop_step_)

    def run(f_inv: Tensor, grads: Tensor, num_grads: int, steps: int | None = None) -> None:
        for i in range(steps or grads.shape[1]):
            step(f_inv, grads[:, i].unsqueeze(-1), num_grads)

    return run


def loop_build(
    parts: list[Tensor],
    num_grads: int,
    damping: float,
    calls: int = 1,
    loop: Callable[..., None] = loop_,
    steps: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse by `loop_` from I / damping: blocks [K, B, B] for each part, and their diagonals [K, B]."""
    states = []
    for part in parts:
        state = scaled_identity(part.shape[0], part.shape[2], 1 / damping, part)
        for _ in range(calls):
            loop(state, part, num_grads, steps)
        states.append(state)
    return states, diagonals(states)


class ScriptLoop:
    """F^-1 as pruning scripts keep it, [K, B, B] from I / damping, updated whenever a gradient comes (WoodFisher, eq.
    3.4).

    The steps are those of SparseML's class: padding by a copy, two contractions, an outer product by `baddbmm_`; so it
    is slower than `loop_`, whose buffers are allocated once.
    """

    def __init__(self, num_grads: int, block_size: int, num_weights: int, damping: float) -> None:
        self.num_grads, self.num_weights = num_grads, num_weights
        num_blocks = -(-num_weights // block_size)
        self.f_inv = scaled_identity(num_blocks, block_size, 1 / damping, torch.empty(0))

    def rows(self, x: Tensor) -> Tensor:
        """A vector [d] with zeros behind it, as [K, B]."""
        num_blocks, size = self.f_inv.shape[:2]
        return torch.cat([x, x.new_zeros(num_blocks * size - len(x))]).view(num_blocks, size)

    def add_grad(self, g: Tensor) -> None:
        """f_inv -= v v^T / (m + g.v) with v = f_inv g.   g: [d]."""
        g = self.rows(g)
        v = torch.einsum("kij,kj->ki", self.f_inv, g)
        v /= (self.num_grads + torch.einsum("ki,ki->k", g, v)).sqrt().unsqueeze(1)
        self.f_inv.baddbmm_(v.unsqueeze(2), v.unsqueeze(1), alpha=-1)

    def diag(self) -> Tensor:
        """[d]."""
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.num_weights]

    def mul(self, v: Tensor) -> Tensor:
        """F^-1 v, [d]."""
        return torch.bmm(self.f_inv, self.rows(v).unsqueeze(2)).flatten()[: self.num_weights]


def spd_inverse(matrix: Tensor) -> Tensor:
    """Inverse of every block: [K, B, B] -> [K, B, B]."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


def spd_inverse_by_solve(matrix: Tensor) -> Tensor:
    """The same as L^-T L^-1, L^-1 by a triangular solve: on GPUs some libraries invert a batch matrix after matrix."""
    factor = torch.linalg.cholesky_ex(matrix).L
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.bmm(inverse.mT, inverse)


def spd_inverse_by_lu(matrix: Tensor) -> Tensor:
    """The same by LU factors, which takes twice the operations but has its own batched routine on GPUs."""
    return torch.linalg.inv_ex(matrix).inverse


def strong_primal_build(
    parts: list[Tensor],
    num_grads: int,
    damping: float,
    calls: int = 1,
    invert: Callable[[Tensor], Tensor] = spd_inverse,
) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse by Gram, Cholesky and Cholesky inverse: blocks [K, B, B] for each part, and their diagonals
    [K, B].
    """
    states = []
    for part in parts:
        fisher = scaled_identity(part.shape[0], part.shape[2], damping, part)
        for _ in range(calls):
            fisher.baddbmm_(part.mT, part, alpha=1 / num_grads)
        states.append(invert(fisher))
    return states, diagonals(states)


def strong_dual_build(
    parts: list[Tensor], num_grads: int, damping: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse as (I - V^T V) / damping with V = L^-1 G, L L^T = m damping I + G G^T: V^T [K, B, m] for each part,
    and its diagonal [K, B].   Solving for V^T from the right takes half the time of V from the left.
    """
    states, found = [], []
    for part in parts:
        gram = scaled_identity(part.shape[0], part.shape[1], num_grads * damping, part)
        gram.baddbmm_(part, part.mT)
        factor = torch.linalg.cholesky_ex(gram).L
        v = torch.linalg.solve_triangular(factor.mT, part.mT, upper=True, left=False)  # [K, B, m]
        states.append(v)
        found.append(torch.linalg.vector_norm(v, dim=2).square_().neg_().add_(1).div_(damping))
    return states, found


def fisher_accumulate_(fisher: Tensor, grads: Tensor, num_grads: int) -> None:
    """fisher += G^T G / m.   fisher [K, B, B], grads [K, k, B]."""
    fisher.baddbmm_(grads.mT, grads, alpha=1 / num_grads)


def fishleg_step_(
    root: Tensor, top: Tensor, grads: Tensor, num_grads: int, damping: float
) -> tuple[Tensor, Tensor]:
    """R -= eta (R M - R), M = Z^T Z / m + damping R^T R, Z = G R, eta = 1/2 / max(1, 1.1 largest eigenvalue of M).

    The eigenvalue is found by three power iterations from `top`.   root [K, B, B], top [K, B], grads [K, k, B].
    Returns loss and eigenvalue, [K].
    """
    z = torch.bmm(grads, root)
    m = torch.bmm(root.mT, root)
    torch.baddbmm(m, z.mT, z, beta=damping, alpha=1 / num_grads, out=m)
    v = torch.nn.functional.normalize(top.unsqueeze(-1), dim=1)
    w = torch.empty_like(v)
    for _ in range(3):
        torch.bmm(m, v, out=w)
        largest = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        torch.div(w, largest, out=v)
    rm = torch.bmm(root, m)
    flat, product = root.flatten(1), rm.flatten(1)
    loss = torch.linalg.vecdot(product, flat) / 2 - torch.linalg.vecdot(flat, flat)
    eta = 0.5 / (1.1 * largest).clamp(min=1)  # [K, 1, 1]
    root.mul_(1 + eta).addcmul_(rm, eta, value=-1)
    top.copy_(v.squeeze(-1))
    return loss, largest.flatten()


def fishleg_steps_(
    root: Tensor, top: Tensor, grads: Tensor, num_grads: int, damping: float, at_once: int
) -> tuple[Tensor, Tensor]:
    """The same for `at_once` blocks at a time: 1 is the loop over blocks, some tens keep the matrices in cache."""
    parts = zip(root.split(at_once), top.split(at_once), grads.split(at_once), strict=True)
    found = [fishleg_step_(R, v, G, num_grads, damping) for R, v, G in parts]
    loss, largest = zip(*found, strict=True)
    return torch.cat(loss), torch.cat(largest)


def factor_diagonal(root: Tensor) -> Tensor:
    """Row sums of R o R: [K, B, B] -> [K, B]."""
    return torch.linalg.vecdot(root, root, dim=2)


def block_factor_matvec(root: Tensor, x: Tensor) -> Tensor:
    """R (R^T x).   root [K, B, B], x [K, B]."""
    return torch.bmm(root, torch.bmm(root.mT, x.unsqueeze(2))).squeeze(2)


def factor_downdate_(root: Tensor, mask: Tensor) -> None:
    """R -= Q_P Q_PP^-1 R_P, Q = R R^T, and R_P = 0 for the removed rows P.   root [K, B, B], mask [K, B].

    As in `obs_solve_primal_`, the rows that stay become those of the identity, so that one batched factor does.
    """
    pruned = ~mask
    Q = torch.bmm(root, root.mT)
    system = torch.where(pruned.unsqueeze(-1) & pruned.unsqueeze(-2), Q, 0)
    system.diagonal(dim1=1, dim2=2).add_(mask)
    x = torch.cholesky_solve(root * pruned.unsqueeze(-1), torch.linalg.cholesky_ex(system).L)
    root.baddbmm_(Q, x, alpha=-1).mul_(mask.unsqueeze(-1))


def factor_downdate_loop_(root: Tensor, mask: Tensor) -> None:
    """The same block after block, by an orthonormal basis of the removed rows."""
    for R, keep in zip(root, mask, strict=True):
        V = torch.linalg.qr(R[~keep].mT).Q
        R -= (R @ V) @ V.mT
        R[~keep] = 0


def kron_matvec(left: Tensor, right: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """D o (T (D o x) S), [N, o, i]."""
    return torch.bmm(torch.bmm(left, scale * x), right).mul_(scale)


def conv_weight_grads(x: Tensor, grad: Tensor) -> Tensor:
    """All samples as groups of one convolution, 3 x 3 and padded by 1.   x [m, C, H, W], grad [m, O, H, W]."""
    m, channels = x.shape[:2]
    shape = (m * grad.shape[1], channels, 3, 3)
    flat = x.flatten(0, 1)[None], grad.flatten(0, 1)[None]
    rows = conv2d_weight(flat[0], shape, flat[1], padding=1, groups=m)
    return rows.unflatten(0, (m, -1))


def conv_weight_grads_loop(x: Tensor, grad: Tensor) -> Tensor:
    """Sample after sample."""
    shape = (grad.shape[1], x.shape[1], 3, 3)
    samples = zip(x.split(1), grad.split(1), strict=True)
    return torch.stack([conv2d_weight(x, shape, g, padding=1) for x, g in samples])


def conv_weight_grads_unfolded(x: Tensor, grad: Tensor) -> Tensor:
    """All patches written out, and one matrix product for each sample."""
    patches = torch.nn.functional.unfold(x, 3, padding=1)  # [m, 9 C, P]
    return torch.bmm(grad.flatten(2), patches.mT).unflatten(2, (-1, 3, 3))


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


def fisher_vector_product(grads: Tensor, num_grads: int, x: Tensor) -> Tensor:
    """G^T (G x) / m, in float64.   grads [K, m, B], x [K, B] -> [K, B]."""
    wide = grads.double()
    return torch.bmm(wide.mT, torch.bmm(wide, x.double().unsqueeze(-1))).squeeze(-1).div_(num_grads)


def obs_saliency(weight: Tensor, inv_diag: Tensor) -> Tensor:
    """w^2 / (2 inv_diag): [d] -> [d]."""
    return weight.square() / (2 * inv_diag)


def prune_mask(saliency: Tensor, dead: Tensor, num_zeros: int) -> Tensor:
    """True for all but the num_zeros least salient, dead ones first; among equals all or none go.   [d] -> bool [d]."""
    ranked = torch.where(dead, -torch.inf, saliency)
    return ranked > torch.kthvalue(ranked, num_zeros).values


def prune_mask_by_sort(saliency: Tensor, dead: Tensor, num_zeros: int) -> Tensor:
    """The same by a sort, which GPUs do with all their processors, unlike one long selection."""
    ranked = torch.where(dead, -torch.inf, saliency)
    return ranked > ranked.sort().values[num_zeros - 1]


def obs_update_(weight: Tensor, f_inv: Tensor, inv_diag: Tensor, mask: Tensor) -> None:
    """w -= F^-1 (w / inv_diag on the pruned), pruned set to 0.   all [K, B], f_inv [K, B, B]; mask True = keep."""
    x = torch.where(mask, 0, weight / inv_diag)
    weight.sub_(torch.bmm(f_inv, x.unsqueeze(-1)).squeeze(-1)).mul_(mask)


def obs_update_dual_(
    weight: Tensor, grads: Tensor, factor: Tensor, damping: float, inv_diag: Tensor, mask: Tensor
) -> None:
    """The same from the dual form, in float64.   weight, inv_diag, mask [K, B], grads [K, m, B], factor [K, m, m]."""
    x = torch.where(mask, 0, weight / inv_diag)
    weight.sub_(block_matvec_dual(grads, factor, damping, x)).mul_(mask)


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


def obs_eliminate(weight: Tensor, f_inv: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """One weight of every block at a time: the cheapest, then F^-1 downdated by a batched outer product.

    weight [K, B], f_inv [K, B, B]; length [K], of which the blocks have so many weights.   Returns their order [K, B]
    and losses [K, B] float32; what comes after a block's end means nothing.
    """
    num_blocks, size = weight.shape
    weight, f_inv = weight.clone(), f_inv.clone()
    gone = torch.arange(size, device=weight.device) >= length[:, None]  # [K, B]
    order = torch.empty(num_blocks, size, dtype=torch.int64, device=weight.device)
    loss = torch.empty_like(weight)
    for i in range(size):
        cost = weight.square() / (2 * f_inv.diagonal(dim1=1, dim2=2))
        loss[:, i], place = cost.masked_fill_(gone, torch.inf).min(dim=1)
        order[:, i] = place
        at = place[:, None, None]
        column = f_inv.gather(2, at.expand(-1, size, 1))  # [K, B, 1]
        pivot = column.gather(1, at)  # [K, 1, 1]
        weight -= (column * (weight.gather(1, place[:, None])[:, :, None] / pivot)).squeeze(-1)
        f_inv.baddbmm_(column / pivot, column.mT, alpha=-1)
        gone.scatter_(1, place[:, None], True)
    return order, loss
