"""The table of benchmark problems: sizes, floors on work and traffic, predictions, and the bars to clear.

A floor counts what any program must do, in the number formats of the contract: every multiplication and addition once
(symmetry used, no recomputation), every input byte read once, every output byte written once.  Letters are those of
the package: d weights, m gradients, B weights a block.  The weights are one tensor, or those of a network; the last
block of a tensor is short when B does not divide it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.networks import SIZES

TOLERANCE = 1e-4  # worst relative error of the checked entries against float64; above it no ratio is printed
DAMPING = 1e-5
GRADIENT_SCALE = (
    1e-2  # standard deviation: variance over damping is 10, a value at which every form works in float32
)
PRUNED_FRACTION = 0.5
CACHE_LINE = 64  # bytes
# Rivals keep whole Gram matrices, factors and inverses beside each other: they get so many blocks at a time that this
# suffices, and where these are not all blocks, their time is scaled up and the row says from which fraction.
PIECE_BYTES = 4 << 30


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
    at the copy rate.
    bars: rival -> least ratio (rival's time over ours), float32, single thread.
    limits: "floor", "seconds", "memory" -> the most that our time may be in rooflines, or in seconds, and the peak of
    memory in bytes of gradients and state.
    contenders: who runs, by name; () means those that contenders.py has for the op.
    network, tensors: the weights are those of its first tensors; "" for one tensor of num_weights.
    per_call: how many gradients come at a time, each time the same ones; 0 means all of them at once.
    """

    op: str
    num_weights: int
    num_grads: int
    block_size: int
    form: str = "primal"
    expected_share: float = 0.5
    bars: dict[str, float] = field(default_factory=dict, compare=False)
    limits: dict[str, float] = field(default_factory=dict, compare=False)
    contenders: tuple[str, ...] = ()
    network: str = ""
    tensors: int = 0
    per_call: int = 0

    @property
    def name(self) -> str:
        form = " dual" if self.form == "dual" else ""
        of = f" {self.network}" if self.network else ""
        if self.network and self.tensors < len(SIZES[self.network]):
            of += f" ({self.tensors} of {len(SIZES[self.network])} tensors)"
        calls = f" in calls of {self.per_call:,}" if self.per_call else ""
        sizes = f"d={self.num_weights:,} m={self.num_grads:,} B={self.block_size:,}"
        return f"{self.op}{form}{of} {sizes}{calls}"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Weights of each tensor."""
        return SIZES[self.network][: self.tensors] if self.network else (self.num_weights,)

    @property
    def num_blocks(self) -> int:
        return sum(-(-size // self.block_size) for size in self.sizes)

    @property
    def num_tiles(self) -> int:
        """Tiles [B, B] of weights that kron_matvec is given."""
        return max(1, self.num_weights // self.block_size**2)

    @property
    def convolution(self) -> tuple[int, int, int]:
        """Channels in and out of the 3 x 3 convolution of about d weights, and sides of the images, all padded by 1."""
        return self.block_size, max(1, self.num_weights // (9 * self.block_size)), 14

    @property
    def num_rows(self) -> int:
        """Gradients at hand, k."""
        return self.per_call or self.num_grads

    @property
    def num_calls(self) -> int:
        """How many times the gradients at hand are handed over."""
        return self.num_grads // self.num_rows

    def sum_over_blocks(self, power: int) -> int:
        """Sum of n**power over the blocks, n = weights of the block."""
        total = 0
        for size in self.sizes:
            full, rest = divmod(size, self.block_size)
            total += full * self.block_size**power + rest**power
        return total

    @property
    def floor(self) -> Floor:
        return FLOORS[self.op, self.form](self)

    def predicted_seconds(self, peak_gflops: float, peak_gbs: float) -> float:
        floor = self.floor
        return (floor.flops / (self.expected_share * peak_gflops) + floor.bytes / peak_gbs) / 1e9

    def prefix(self, tensors: int) -> Problem:
        """The same on the first tensors of its network only."""
        return replace(self, tensors=tensors, num_weights=sum(SIZES[self.network][:tensors]))

    @property
    def device_bytes(self) -> int:
        """What a device must have room for: inputs, results, what our kernels put beside them, a rival's piece."""
        grads = 4 * self.num_rows * self.num_weights
        if self.form == "dual":  # whoever builds it keeps a copy of the gradients as the state
            states = _factor_bytes(self) * 2 + (grads if self.op in ("build", "prune") else 0)
        else:
            state = 4 * self.num_blocks * self.block_size**2
            # the others change a state, a fresh copy of which is made for each run
            states = (0 if self.op in STATELESS else 1 if self.op in ONE_STATE else 2) * state
            states += 2 * state if self.per_call else 0  # gathered in float64
        return grads + states + VECTORS * 8 * self.num_weights + 2 * PIECE_BYTES

    def fitted(self, usable_bytes: float) -> Problem:
        """The largest prefix of the network for which so much memory suffices; a single tensor stays as it is."""
        if not self.network:
            return self
        fitting = (n for n in range(self.tensors, 1, -1) if self.prefix(n).device_bytes <= usable_bytes)
        return self.prefix(next(fitting, 1))


STATELESS = (
    "prune_mask",
    "fisher_vector_product",
    "inverse_diagonal_from_grads",
    "kron_matvec",
    "conv_weight_grads",
)
ONE_STATE = (
    "build",
    "inverse_from_grads",
    "inverse_diagonal",
    "block_matvec",
    "factor_diagonal",
    "block_factor_matvec",
    "obs_saliency",
    "obs_update_",
)
VECTORS = 8  # of d numbers each: weights, mask, x, diagonals and their likes


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
    """At once: the Fisher is never written.   In calls: its triangle, in float64, is written in each of them and read
    in the next, at last to be inverted.
    """
    flops = _gram_flops(p) + _inverse_flops(p)
    if not p.per_call:
        return Floor(_grads_bytes(p) + _state_bytes(p), flops)
    triangle = 4 * (p.sum_over_blocks(2) + p.sum_over_blocks(1))
    return Floor(_grads_bytes(p) + 2 * p.num_calls * triangle + _state_bytes(p), flops, "float64")


def _diagonal_primal(p: Problem) -> Floor:
    """Cholesky n^3/3 and the inverse of the factor n^3/3, whose columns' square norms the diagonal is: n^2."""
    flops = _gram_flops(p) + 2 * p.sum_over_blocks(3) // 3 + p.sum_over_blocks(2)
    return Floor(_grads_bytes(p) + 4 * p.num_weights, flops)


def _sherman_morrison(p: Problem) -> Floor:
    """Each step: n x n product 2 n^2, one triangle of the rank-1 update n^2."""
    return Floor(_grads_bytes(p) + 2 * _state_bytes(p), 3 * p.num_grads * p.sum_over_blocks(2))


def _fishleg_step(p: Problem) -> Floor:
    """Z = G R: 2 k n^2; M = Z^T Z / m + gamma R^T R, one triangle; its three products with a vector: 6 n^2; R M: 2 n^3;
    loss and new R: 6 n^2.   Root and start vectors in and out, two estimates out.
    """
    k, n1, n2, n3 = p.num_grads, p.num_weights, p.sum_over_blocks(2), p.sum_over_blocks(3)
    flops = 2 * k * n2 + k * (n2 + n1) + (n3 + n2) + 12 * n2 + 2 * n3
    return Floor(_grads_bytes(p) + 2 * _state_bytes(p) + 8 * n1 + 16 * p.num_blocks, flops)


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


def _diagonal_dual(p: Problem) -> Floor:
    """The same work when only the diagonal is wanted: gradients in, diagonal out."""
    return Floor(_grads_bytes(p) + 4 * p.num_weights, _build_dual(p).flops, "float64")


def _prune_dual(p: Problem) -> Floor:
    """Weights and diagonal in, new weights out; the product F^-1 x of the update reads the inverse."""
    product = _block_matvec_dual(p)
    return Floor(product.bytes + 4 * p.num_weights, product.flops, "float64")


def _block_matvec_dual(p: Problem) -> Floor:
    """G x and G^T y: 2 m each a weight; two triangular solves: m^2 each a block."""
    m = p.num_grads
    flops = 4 * m * p.num_weights + 2 * p.num_blocks * m * m
    return Floor(_grads_bytes(p) + _factor_bytes(p) + 8 * p.num_weights, flops, "float64")


def _factor_downdate(p: Problem) -> Floor:
    """q = half of n removed: their basis 2 q^2 n, and twice its product with the n - q rows left, 2 q n each.

    R and the mask in, R out.
    """
    q, n3 = PRUNED_FRACTION, p.sum_over_blocks(3)
    flops = 2 * q**2 * n3 + 4 * q * (1 - q) * n3
    return Floor(2 * _state_bytes(p) + p.num_weights, int(flops), "float64")


def _kron_matvec(p: Problem) -> Floor:
    """Two products and two scalings of every tile [B, B]; two factors, scale and x in, the result out."""
    return Floor(
        20 * p.num_tiles * p.block_size**2, p.num_tiles * (4 * p.block_size**3 + 2 * p.block_size**2)
    )


def _conv_weight_grads(p: Problem) -> Floor:
    """A matrix product over the pixels for each of m samples; images and gradients in, rows out."""
    channels, out, side = p.convolution
    rows, pixels = 9 * channels * out, side**2
    return Floor(4 * p.num_grads * (rows + (channels + out) * pixels), 2 * p.num_grads * rows * pixels)


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


def _obs_eliminate(p: Problem) -> Floor:
    """A Cholesky factorisation of F^-1 whose pivots are chosen on the way, n^3/3; at each of n steps the costs, 3 n,
    and the new diagonal and weights, 4 n.   Weight in; order and loss, 8 bytes each, out.
    """
    flops = p.sum_over_blocks(3) / 3 + 7 * p.sum_over_blocks(2)
    return Floor(_state_bytes(p) + 20 * p.num_weights, int(flops), "float64")


def _obs_eliminate_dual(p: Problem) -> Floor:
    """V = L^-1 G, m^2 a weight; at each step the column of F^-1, 2 m for every weight that is left, n / 2 on average.
    The rest as above.
    """
    m, n2 = p.num_grads, p.sum_over_blocks(2)
    flops = m * m * p.num_weights + m * n2 + p.sum_over_blocks(3) / 3 + 7 * n2
    return Floor(_grads_bytes(p) + _factor_bytes(p) + 20 * p.num_weights, int(flops), "float64")


FLOORS: dict[tuple[str, str], Callable[[Problem], Floor]] = {
    ("build", "primal"): _build_primal,
    ("build", "dual"): _build_dual,
    ("diagonal", "dual"): _diagonal_dual,
    ("prune", "dual"): _prune_dual,
    ("inverse_from_grads", "primal"): _build_primal,
    ("inverse_diagonal_from_grads", "primal"): _diagonal_primal,
    # G x and G^T of it, in float64: two multiplications and two additions a number.
    ("fisher_vector_product", "primal"): lambda p: Floor(
        _grads_bytes(p) + 8 * p.num_weights, 4 * p.num_grads * p.num_weights, "float64"
    ),
    ("sherman_morrison_", "primal"): _sherman_morrison,
    ("woodbury_", "primal"): _woodbury,
    ("fishleg_block_step_", "primal"): _fishleg_step,
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
    ("obs_eliminate", "primal"): _obs_eliminate,
    ("obs_eliminate", "dual"): _obs_eliminate_dual,
    ("factor_diagonal", "primal"): lambda p: Floor(
        _state_bytes(p) + 4 * p.num_weights, 2 * p.sum_over_blocks(2)
    ),
    ("block_factor_matvec", "primal"): lambda p: Floor(
        _state_bytes(p) + 8 * p.num_weights, 4 * p.sum_over_blocks(2)
    ),
    ("factor_downdate_", "primal"): _factor_downdate,
    ("kron_matvec", "primal"): _kron_matvec,
    ("conv_weight_grads", "primal"): _conv_weight_grads,
    ("obs_saliency", "primal"): lambda p: Floor(12 * p.num_weights, 3 * p.num_weights),
    # Saliency, and a byte each for the dead weights and the mask.
    ("prune_mask", "primal"): lambda p: Floor(6 * p.num_weights, 0),
    ("obs_update_", "primal"): _obs_update,
    ("obs_update_", "dual"): lambda p: Floor(
        _block_matvec_dual(p).bytes + 5 * p.num_weights, _block_matvec_dual(p).flops, "float64"
    ),
    ("obs_solve_", "primal"): _obs_solve_primal,
    ("obs_solve_", "dual"): _obs_solve_dual,
}

RESNET20, FIFTH = 272_474, 54_494  # weights of ResNet-20, and a fifth of them for the large blocks

PROBLEMS = (
    Problem("build", RESNET20, 256, 50, expected_share=0.5, bars={"loop": 25, "strong": 3}),
    Problem("build", RESNET20, 256, 100, expected_share=0.5, bars={"loop": 25, "strong": 3}),
    Problem("build", FIFTH, 256, 1000, "dual", 0.6, bars={"loop": 50, "strong": 1.5}),
    Problem("inverse_from_grads", RESNET20, 256, 100, expected_share=0.5),
    Problem("inverse_diagonal_from_grads", RESNET20, 256, 100, expected_share=0.5),
    Problem("sherman_morrison_", RESNET20, 256, 50, expected_share=0.25, bars={"loop": 10}),
    Problem("woodbury_", RESNET20, 32, 100, expected_share=0.4),
    Problem("fishleg_block_step_", 1 << 18, 32, 64, expected_share=0.8, bars={"loop": 6, "strong": 2}),
    Problem("fisher_accumulate_", RESNET20, 256, 50, expected_share=0.6),
    Problem("fisher_accumulate_", RESNET20, 256, 100, expected_share=0.6),
    Problem("spd_inverse_", RESNET20, 256, 50, expected_share=0.2),
    Problem("spd_inverse_", RESNET20, 256, 100, expected_share=0.3),
    Problem("dual_factor_", FIFTH, 256, 1000, "dual", 0.6),
    Problem("inverse_diagonal", RESNET20, 256, 100),
    Problem("inverse_diagonal", FIFTH, 256, 1000, "dual", 0.6),
    Problem("block_matvec", RESNET20, 256, 100),
    Problem("block_matvec", FIFTH, 256, 1000, "dual", 0.2),
    Problem("fisher_vector_product", FIFTH, 256, 1000, expected_share=0.2),
    Problem("obs_eliminate", RESNET20, 256, 50, expected_share=0.2, bars={"strong": 20.0}),
    Problem("obs_eliminate", FIFTH, 256, 1000, "dual", 0.2, contenders=("ours",)),
    Problem("factor_diagonal", 1 << 18, 32, 64),
    Problem("block_factor_matvec", 1 << 18, 32, 64),
    Problem("factor_downdate_", 1 << 18, 32, 64, expected_share=0.4),
    Problem("kron_matvec", 1 << 20, 32, 64, expected_share=0.8),
    Problem("conv_weight_grads", 9 * 64**2, 64, 64, expected_share=0.8),
    Problem("obs_saliency", RESNET20, 256, 100),
    Problem("prune_mask", RESNET20, 256, 100),
    Problem("obs_update_", RESNET20, 256, 100),
    Problem("obs_update_", FIFTH, 256, 1000, "dual", 0.2),
    Problem("obs_solve_", RESNET20, 256, 100, expected_share=0.2),
    Problem("obs_solve_", FIFTH, 256, 1000, "dual", 0.6),
)

# Whole builds and what follows them, with bars and limits; where there is a bar against rivals, all of them run.
_ROUTES = ("strong primal", "strong solve", "strong lu")
_RIVALS = ("ours", "loop", *_ROUTES, "strong primal compiled")
# The compiler gains the loop something in the dual form only, and takes long.
_DUAL_RIVALS = (*_RIVALS, "loop compiled", "strong dual", "strong dual compiled")
# Single ops run on each backend that can, to compare CUDA with Triton; contenders of another backend are refused.
_OP = ("ours", "strong", "native", "triton")
_BUILD_OP = ("ours", *_ROUTES, "native", "triton")


def _of(network: str, op: str, num_grads: int, block_size: int, *args: Any, **kwargs: Any) -> Problem:
    """A problem on all tensors of a network."""
    problem = Problem(op, 0, num_grads, block_size, *args, **kwargs)
    return replace(problem, network=network).prefix(len(SIZES[network]))


def _resnet50(op: str, num_grads: int, block_size: int, *args: Any, **kwargs: Any) -> Problem:
    return _of(
        "ResNet-50", op, num_grads, block_size, *args, contenders=kwargs.pop("contenders", _OP), **kwargs
    )


_FUSED = {"floor": 2.0, "memory": 1.15}
_B50 = {"loop": 40.0, "strong": 4.0}

GPU_PROBLEMS = (
    _resnet50("build", 1024, 50, bars=_B50, limits=_FUSED, contenders=_RIVALS),
    _resnet50("build", 1024, 50, bars=_B50, limits={"memory": 1.15}, contenders=_RIVALS, per_call=64),
    _resnet50("build", 512, 128, "primal", 0.6, limits=_FUSED, contenders=("ours", "loop", *_ROUTES)),
    _resnet50(
        "build",
        100,
        1000,
        "dual",
        bars={"loop": 100, "strong": 2},
        limits={"seconds": 0.060, "memory": 1.15},
        contenders=_DUAL_RIVALS,
    ),
    _resnet50("diagonal", 100, 1000, "dual", limits={"seconds": 0.060}, contenders=("ours", "strong dual")),
    _resnet50("prune", 100, 1000, "dual", 0.2, limits={"seconds": 0.015}, contenders=("ours",)),
    _resnet50("inverse_from_grads", 256, 50, contenders=_BUILD_OP),
    # the shares of the CUDA kernels, B = 256 and spd_inverse_, are foretold in their files
    _resnet50("inverse_from_grads", 256, 256, "primal", 0.57, contenders=_BUILD_OP),
    _resnet50("inverse_diagonal_from_grads", 256, 50, contenders=_BUILD_OP),
    _resnet50("inverse_diagonal_from_grads", 256, 256, contenders=_BUILD_OP),
    _resnet50("sherman_morrison_", 256, 50, "primal", 0.25, contenders=("ours", "loop", "native", "triton")),
    _resnet50("sherman_morrison_", 64, 256, contenders=("ours", "loop", "native", "triton")),
    _resnet50("spd_inverse_", 64, 50, "primal", 0.4, contenders=(*_OP, "strong solve", "strong lu")),
    _resnet50("spd_inverse_", 128, 128, "primal", 0.38, contenders=(*_OP, "strong solve", "strong lu")),
    _resnet50("spd_inverse_", 256, 256, "primal", 0.45, contenders=(*_OP, "strong solve", "strong lu")),
    _resnet50("woodbury_", 32, 50, "primal", 0.3),
    _resnet50("woodbury_", 32, 128, "primal", 0.3),
    _resnet50("fishleg_block_step_", 32, 50, contenders=("ours", "strong", "triton")),
    _resnet50("fisher_accumulate_", 256, 50, "primal", 0.6),
    _resnet50("fisher_accumulate_", 256, 128, "primal", 0.8),
    _resnet50("dual_factor_", 100, 1000, "dual"),
    _resnet50("inverse_diagonal", 64, 50),
    _resnet50("inverse_diagonal", 100, 1000, "dual"),
    _resnet50("block_matvec", 64, 50),
    _resnet50("block_matvec", 100, 1000, "dual", 0.2),
    _resnet50("fisher_vector_product", 100, 1000, "primal", 0.2),
    _resnet50("obs_eliminate", 64, 50, contenders=("ours", "strong", "triton")),
    _resnet50("obs_eliminate", 100, 1000, "dual", contenders=("ours",)).prefix(10),
    _resnet50("factor_diagonal", 32, 50, contenders=("ours", "strong", "triton")),
    _resnet50("block_factor_matvec", 32, 50, contenders=("ours", "strong", "triton")),
    _resnet50("factor_downdate_", 32, 50, contenders=("ours", "strong", "triton")),
    _resnet50("kron_matvec", 32, 64, contenders=("ours", "strong", "triton")),
    Problem("conv_weight_grads", 9 * 256**2, 64, 256, contenders=("ours", "strong", "strong unfolded")),
    _resnet50("obs_saliency", 64, 50),
    _resnet50("prune_mask", 64, 50, contenders=("ours", "strong", "strong sort", "native", "triton")),
    _resnet50("obs_update_", 64, 50),
    _resnet50("obs_update_", 100, 1000, "dual", 0.2),
    _resnet50("obs_solve_", 64, 50, "primal", 0.1),
    _resnet50("obs_solve_", 100, 1000, "dual", 0.4),
    _of("BERT-base encoder", "build", 256, 64, limits=_FUSED, contenders=("ours", "loop", *_ROUTES)),
    _of("ViT-B", "build", 256, 64, limits=_FUSED, contenders=("ours", "loop", *_ROUTES)),
)

SWEPT_BLOCKS = (1, 8, 16, 32, 50, 64, 100, 128, 200, 256, 512, 1000)


def _sweeps(d: int, m: int, ms: tuple[int, ...], ds: tuple[int, ...]) -> dict[str, tuple[Problem, ...]]:
    """Builds that differ in one size, in the form that a user gets; ours alone."""

    def build(d: int, m: int, B: int) -> Problem:
        return Problem("build", d, m, B, "primal" if m >= B else "dual", contenders=("ours",))

    return {
        "B": tuple(build(d, m, B) for B in SWEPT_BLOCKS),
        "m": tuple(build(d, m, 50) for m in ms),
        "d": tuple(build(d, m, 50) for d in ds),
    }


# the same shapes of work at a size for tests, ragged tails included
TINY_BLOCKS = {50: 20, 64: 18, 100: 24, 128: 21, 256: 22, 1000: 200}
TINY = tuple(
    replace(p, num_weights=1_030, num_grads=24, block_size=TINY_BLOCKS[p.block_size]) for p in PROBLEMS
)
GPU_TINY = tuple(
    replace(
        p.prefix(2) if p.network else replace(p, num_weights=1_030),
        num_grads=24,
        block_size=TINY_BLOCKS[p.block_size],
        per_call=8 if p.per_call else 0,
        # a compiler takes minutes for what the test would learn in a second
        contenders=tuple(name for name in p.contenders if not name.endswith("compiled")),
    )
    for p in GPU_PROBLEMS
    if p.network in ("ResNet-50", "")
)

TABLES = {"full": PROBLEMS, "tiny": TINY, "gpu": GPU_PROBLEMS, "gpu-tiny": GPU_TINY}
SWEEPS = {
    "gpu": _sweeps(1 << 22, 256, (16, 32, 64, 128, 256, 512, 1024), (1 << 18, 1 << 20, 1 << 22, 1 << 24)),
    "gpu-tiny": _sweeps(2_060, 24, (16, 32), (1_000, 4_000)),
}

# peak memory of a build on a CPU, above its gradients, over the bytes of the state it leaves
MEMORY_BAR = 1.25
NATIVE_BAR = 1.2  # a CUDA kernel that is not so many times as fast as the Triton one is deleted
