"""What old pruning scripts import: the inverse Fisher of one tensor in blocks, brought up to date with every gradient.

It has the calls of the class in SparseML's OBS pruning, from which the scripts around oBERT took theirs, and its way of
computing; it stands here so that before.py runs without SparseML, which can no longer be installed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class EmpiricalBlockFisherInverse:
    """(damp I + (1/m) sum of g g^T)^-1 in blocks of B, by one Sherman-Morrison step a gradient.

    num_grads: m.   fisher_block_size: B.   num_weights: d.   f_inv: [K, B, B], the last block padded.
    """

    def __init__(
        self, num_grads: int, fisher_block_size: int, num_weights: int, damp: float, device: torch.device
    ) -> None:
        self.m, self.B, self.d = num_grads, fisher_block_size, num_weights
        self.num_blocks = -(-num_weights // fisher_block_size)
        self.f_inv = torch.eye(self.B, device=device).div(damp).repeat(self.num_blocks, 1, 1)

    def add_grad(self, g: Tensor) -> None:
        """f_inv -= v v^T / (m + g.v) with v = f_inv g.   g: [d]."""
        g = self._padded(g)
        v = torch.einsum("kij,kj->ki", self.f_inv, g)
        scale = (self.m + torch.einsum("ki,ki->k", g, v)).sqrt()
        v = v / scale[:, None]
        self.f_inv.baddbmm_(v[:, :, None], v[:, None, :], alpha=-1)

    def diag(self) -> Tensor:
        """The diagonal, [d]."""
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.d]

    def mul(self, v: Tensor) -> Tensor:
        """The product with a vector [d]."""
        return torch.einsum("kij,kj->ki", self.f_inv, self._padded(v)).flatten()[: self.d]

    def _padded(self, v: Tensor) -> Tensor:
        """[d] -> [K, B], with zeros behind."""
        return torch.cat([v, v.new_zeros(self.num_blocks * self.B - self.d)]).view(self.num_blocks, self.B)
