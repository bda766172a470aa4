"""The table of benchmark problems: sizes, floors on work and traffic, predictions, and the bars to clear.

A floor counts what any program must do, in the number formats of the contract: every multiplication and addition once
(symmetry used, no recomputation), every input byte read once, every output byte written once.  Letters are those of
the package: d weights, m gradients, B weights a block.  All problems are one tensor of d weights, so the last block
is short when B does not divide d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

TOLERANCE = 1e-4  # worst relative error of the checked entries against float64; above it no ratio is printed
DAMPING = 1e-5
GRADIENT_SCALE = (
    1e-2  # standard deviation: variance over damping is 10, a value at which every form works in float32
)
PRUNED_FRACTION = 0.5
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Floor:
    """Least work of one problem: bytes moved to or from memory, operations, and the format the operations run in."""

    bytes: int
    flops: int
    dtype: str = "float32"

    def seconds(self, peak_gflops: float, peak_gbs: float) -> float:
        """The roofline: the slower of arithmetic and traffic when both run at the measured peak."""
        return max(self.flops / peak_gflops, self.bytes / peak_gbs) / 1e9

    def bound(self, peak_gflops: float, peak_gbs: float) -> str:
        """Which of the two the roofline is: "flops" or "bytes"."""
        return "flops" if self.flops / peak_gflops > self.bytes / peak_gbs else "bytes"


@dataclass(frozen=True)
class Problem:
    """One row of the table.

    expected_share: the share of the peak of arithmetic foreseen for this op (Gram-shaped work runs near the matrix
    product, triangular and rank-1 work well below it); the predicted time adds arithmetic at that share and traffic
    at the copy rate. bars: rival -> least ratio (rival's time over ours), float32, single thread.
    """

    op: str
    num_weights: int
    num_grads: int
    block_size: int
    form: str = "primal"
    expected_share: float = 0.5
    bars: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        form = " dual" if self.form == "dual" else ""
        return f"{self.op}{form} d={self.num_weights:,} m={self.num_grads:,} B={self.block_size:,}"

    @property
    def num_blocks(self) -> int:
        return -(-self.num_weights // self.block_size)

    def sum_over_blocks(self, power: int) -> int:
        """Sum of n**power over the blocks, n = weights of the block."""
        full, rest = divmod(self.num_weights, self.block_size)
        return full * self.block_size**power + rest**power

    @property
    def floor(self) -> Floor:
        return FLOORS[self.op, self.form](self)

    def predicted_seconds(self, peak_gflops: float, peak_gbs: float) -> float:
        floor = self.floor
        return (floor.flops / (self.expected_share * peak_gflops) + floor.bytes / peak_gbs) / 1e9


def _grads_bytes(p: Problem) -> int:
    return 4 * p.num_grads * p.num_weights


def _state_bytes(p: Problem) -> int:
    """Primal state: the blocks of the inverse in float32."""
    return 4 * p.sum_over_blocks(2)


def _factor_bytes(p: Problem) -> int:
    """One m x m triangle in float64 for each block."""
    return 4 * p.num_blocks * p.num_grads * (p.num_grads + 1)


def _gram_flops(p: Problem) -> int:
    """m outer products of n weights, one triangle: a multiplication and an addition for n (n + 1) / 2 entries."""
    return p.num_grads * (p.sum_over_blocks(2) + p.sum_over_blocks(1))


def _inverse_flops(p: Problem) -> int:
    """Cholesky n^3/3, inverse of the factor n^3/3, product of the factors n^3/3."""
    return p.sum_over_blocks(3)


def _build_primal(p: Problem) -> Floor:
    return Floor(_grads_bytes(p) + _state_bytes(p), _gram_flops(p) + _inverse_flops(p))


def _sherman_morrison(p: Problem) -> Floor:
    """Each step: n x n product 2 n^2, one triangle of the rank-1 update n^2."""
    return Floor(_grads_bytes(p) + 2 * _state_bytes(p), 3 * p.num_grads * p.sum_over_blocks(2))


def _woodbury(p: Problem) -> Floor:
    """V = F G^T: 2 k n^2; capacitance, one triangle: k^2 n; its factor: k^3/3; L^-1 V^T: k^2 n; update, one triangle:
    k n^2.
    """
    k = p.num_grads
    flops = 3 * k * p.sum_over_blocks(2) + 2 * k * k * p.num_weights + p.num_blocks * k**3 // 3
    return Floor(_grads_bytes(p) + 2 * _state_bytes(p), flops)


def _accumulate(p: Problem) -> Floor:
    """Only the lower triangle of the state moves, in and out."""
    triangle = 2 * (p.sum_over_blocks(2) + p.sum_over_blocks(1))
    return Floor(_grads_bytes(p) + 2 * triangle, _gram_flops(p))


def _spd_inverse(p: Problem) -> Floor:
    """A triangle in, a full matrix out."""
    return Floor(2 * (p.sum_over_blocks(2) + p.sum_over_blocks(1)) + _state_bytes(p), _inverse_flops(p))


def _dual_factor(p: Problem) -> Floor:
    m = p.num_grads
    flops = m * (m + 1) * p.num_weights + p.num_blocks * m**3 // 3
    return Floor(_grads_bytes(p) + _factor_bytes(p), flops, "float64")


def _inverse_diagonal_dual(p: Problem) -> Floor:
    """A triangular solve for every column, then its square norm."""
    m = p.num_grads
    return Floor(
        _grads_bytes(p) + _factor_bytes(p) + 4 * p.num_weights, (m * m + 2 * m) * p.num_weights, "float64"
    )


def _build_dual(p: Problem) -> Floor:
    """Factor and inverse diagonal; the factor is used while it is in cache, the gradients are read once for each of
    the two.
    """
    factor, diagonal = _dual_factor(p), _inverse_diagonal_dual(p)
    return Floor(factor.bytes + _grads_bytes(p) + 4 * p.num_weights, factor.flops + diagonal.flops, "float64")


def _block_matvec_dual(p: Problem) -> Floor:
    """G x and G^T y: 2 m each a weight; two triangular solves: m^2 each a block."""
    m = p.num_grads
    flops = 4 * m * p.num_weights + 2 * p.num_blocks * m * m
    return Floor(_grads_bytes(p) + _factor_bytes(p) + 8 * p.num_weights, flops, "float64")


def _obs_update(p: Problem) -> Floor:
    """Weight in and out, inverse diagonal and mask (one byte) in, beside the state."""
    return Floor(_state_bytes(p) + 13 * p.num_weights, 2 * p.sum_over_blocks(2))


def _obs_solve_primal(p: Problem) -> Floor:
    """q = half of n pruned: factor q^3/3, two solves 2 q^2, the product with [n - q, q]; only those columns are
    read.
    """
    q, n2, n3 = PRUNED_FRACTION, p.sum_over_blocks(2), p.sum_over_blocks(3)
    flops = q**3 * n3 / 3 + 2 * q**2 * n2 + 2 * q * (1 - q) * n2
    return Floor(int(q * _state_bytes(p)) + 9 * p.num_weights, int(flops))


def _obs_solve_dual(p: Problem) -> Floor:
    """Gram of the kept weights, one triangle, m x m factor and solves, G_Q w_Q and G_R^T y."""
    m, d = p.num_grads, p.num_weights
    kept = int((1 - PRUNED_FRACTION) * d)
    flops = m * (m + 1) * kept + p.num_blocks * (m**3 // 3 + 2 * m * m) + 2 * m * d
    return Floor(_grads_bytes(p) + 9 * d, flops, "float64")


FLOORS: dict[tuple[str, str], Callable[[Problem], Floor]] = {
    ("build", "primal"): _build_primal,
    ("build", "dual"): _build_dual,
    ("sherman_morrison_", "primal"): _sherman_morrison,
    ("woodbury_", "primal"): _woodbury,
    ("fisher_accumulate_", "primal"): _accumulate,
    ("spd_inverse_", "primal"): _spd_inverse,
    ("dual_factor_", "dual"): _dual_factor,
    # Entries of a diagonal lie in cache lines of their own.
    ("inverse_diagonal", "primal"): lambda p: Floor((CACHE_LINE + 4) * p.num_weights, 0),
    ("inverse_diagonal", "dual"): _inverse_diagonal_dual,
    ("block_matvec", "primal"): lambda p: Floor(
        _state_bytes(p) + 8 * p.num_weights, 2 * p.sum_over_blocks(2)
    ),
    ("block_matvec", "dual"): _block_matvec_dual,
    ("obs_saliency", "primal"): lambda p: Floor(12 * p.num_weights, 3 * p.num_weights),
    ("obs_update_", "primal"): _obs_update,
    ("obs_solve_", "primal"): _obs_solve_primal,
    ("obs_solve_", "dual"): _obs_solve_dual,
}

RESNET20, FIFTH = 272_474, 54_494  # weights of ResNet-20, and a fifth of them for the large blocks

PROBLEMS = (
    Problem("build", RESNET20, 256, 50, expected_share=0.5, bars={"loop": 25, "strong": 3}),
    Problem("build", RESNET20, 256, 100, expected_share=0.5, bars={"loop": 25, "strong": 3}),
    Problem("build", FIFTH, 256, 1000, "dual", 0.6, bars={"loop": 50, "strong": 1.5}),
    Problem("sherman_morrison_", RESNET20, 256, 50, expected_share=0.25, bars={"loop": 10}),
    Problem("woodbury_", RESNET20, 32, 100, expected_share=0.4),
    Problem("fisher_accumulate_", RESNET20, 256, 50, expected_share=0.6),
    Problem("fisher_accumulate_", RESNET20, 256, 100, expected_share=0.6),
    Problem("spd_inverse_", RESNET20, 256, 50, expected_share=0.2),
    Problem("spd_inverse_", RESNET20, 256, 100, expected_share=0.3),
    Problem("dual_factor_", FIFTH, 256, 1000, "dual", 0.6),
    Problem("inverse_diagonal", RESNET20, 256, 100),
    Problem("inverse_diagonal", FIFTH, 256, 1000, "dual", 0.6),
    Problem("block_matvec", RESNET20, 256, 100),
    Problem("block_matvec", FIFTH, 256, 1000, "dual", 0.2),
    Problem("obs_saliency", RESNET20, 256, 100),
    Problem("obs_update_", RESNET20, 256, 100),
    Problem("obs_solve_", RESNET20, 256, 100, expected_share=0.2),
    Problem("obs_solve_", FIFTH, 256, 1000, "dual", 0.6),
)

TINY_BLOCKS = {
    50: 20,
    100: 24,
    1000: 200,
}  # the same shapes of work at a size for tests, ragged tails included
TINY = tuple(
    Problem(p.op, 1_030, 24, TINY_BLOCKS[p.block_size], p.form, p.expected_share, p.bars) for p in PROBLEMS
)

TABLES = {"full": PROBLEMS, "tiny": TINY}

MEMORY_BAR = 1.25  # peak memory of a build above its gradients, over the bytes of the state it leaves
