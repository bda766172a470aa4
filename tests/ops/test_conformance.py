"""The first law: on every case, every backend of every op is about as close to float64 as its reference is.

On a processor the Triton kernels run in their interpreter and the CUDA kernels on an emulated GPU; with
FASTFISHER_TEST_DEVICE=cuda all of them run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastfisher import environment, ops
from fastfisher.kernels import native
from tests.cases import CASES, QUICK, SLOW, SLOW_DUAL, Case
from tests.cuda import emulated
from tests.device import DEVICE, on_device

Args = list[object]
DTYPES = (torch.float32, torch.float64)
EMULATED = "emulated CUDA"
BACKENDS = ("native", "reference", "triton", *([EMULATED] if DEVICE.type == "cpu" else []))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poisoned(case: Case, dtype: torch.dtype) -> Tensor:
    """A state [K, B, B] of NaN; what an op may read is written over it."""
    return torch.full(
        (len(case.blocks()), case.layout().block_size, case.layout().block_size), torch.nan, dtype=dtype
    )


def exact_state(case: Case, dtype: torch.dtype) -> Tensor:
    """F⁻¹ of the case, computed in float64 and rounded; NaN in the padding."""
    state = poisoned(case, dtype)
    G = case.grads().double()
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        n = stop - start
        F = (
            case.damping * torch.eye(n, dtype=torch.float64)
            + G[:, start:stop].T @ G[:, start:stop] / case.num_grads
        )
        inverse = torch.linalg.inv(F)
        state[b, :n, :n] = (inverse + inverse.T) / 2
    return state


def exact_factor(case: Case) -> Tensor:
    """U of C = m λ I + G Gᵀ = Uᵀ U, float64."""
    G = case.grads().double()
    shift = case.num_grads * case.damping * torch.eye(case.num_rows, dtype=torch.float64)
    blocks = case.blocks().tolist()
    return torch.stack(
        [torch.linalg.cholesky(shift + G[:, a:b] @ G[:, a:b].T).T.contiguous() for a, b in blocks]
    )


def vector(case: Case, dtype: torch.dtype, *shape: int, salt: int = 0) -> Tensor:
    """Random numbers [d, *shape]."""
    generator = torch.Generator().manual_seed(case.seed + salt)
    return torch.randn(case.num_weights, *shape, generator=generator).to(dtype)


def mask(case: Case) -> Tensor:
    """Two of five weights removed at random."""
    return vector(case, torch.float32, salt=5) > -0.25


def exact_diagonal(case: Case, dtype: torch.dtype) -> Tensor:
    """diag F⁻¹, 1 where a weight belongs to no block."""
    diagonal = torch.ones(case.num_weights, dtype=dtype)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        diagonal[start:stop] = exact_state(case, dtype)[b].diagonal()[: stop - start]
    return diagonal


def running(case: Case, dtype: torch.dtype) -> Args:
    """I/λ, gradients, blocks, m."""
    state = poisoned(case, dtype)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        state[b, : stop - start, : stop - start] = torch.eye(stop - start) / case.damping
    return [state, case.grads(), case.blocks(), case.num_grads]


def gram(case: Case, dtype: torch.dtype) -> Args:
    """A lower triangle to add to; the upper one and the padding are NaN."""
    state = poisoned(case, dtype)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        rows, cols = torch.tril_indices(stop - start, stop - start)
        state[b, rows, cols] = torch.linspace(-1, 1, len(rows)).to(dtype)
    return [state, case.grads(), case.blocks(), case.num_grads]


def estimates(case: Case) -> list[Tensor]:
    """Condition and amplification, NaN before."""
    return [torch.full((len(case.blocks()),), torch.nan, dtype=torch.float64) for _ in range(2)]


def matrices(case: Case, dtype: torch.dtype) -> Args:
    """GᵀG / m in the lower triangle, NaN in the upper one; zeros in the padding, which the damping makes invertible."""
    G = case.grads().double()
    state = poisoned(case, dtype)
    lower = torch.tril_indices(state.shape[1], state.shape[1])
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        F = torch.zeros(state.shape[1], state.shape[1], dtype=torch.float64)
        F[: stop - start, : stop - start] = G[:, start:stop].T @ G[:, start:stop] / case.num_grads
        state[b, lower[0], lower[1]] = F[lower[0], lower[1]].to(dtype)
    return [state, case.damping, *estimates(case)]


def builds(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of inverse_from_grads; the state is NaN before."""
    state = poisoned(case, dtype)
    return [state, case.grads(), case.blocks(), case.num_grads, case.damping, *estimates(case)]


def diagonal_builds(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of inverse_diagonal_from_grads; the diagonal is NaN before."""
    diagonal = torch.full((case.num_weights,), torch.nan, dtype=dtype)
    size = case.layout().block_size
    return [diagonal, case.grads(), case.blocks(), size, case.num_grads, case.damping, *estimates(case)]


def factors(case: Case, dtype: torch.dtype) -> Args:
    """NaN to be overwritten; the condition is compared by a test of its own."""
    factor = torch.full((len(case.blocks()), case.num_rows, case.num_rows), torch.nan, dtype=torch.float64)
    condition = torch.full((len(case.blocks()),), torch.nan, dtype=torch.float64)
    return [factor, case.grads(), case.blocks(), case.num_grads, case.damping, condition]


def states(case: Case, dtype: torch.dtype, form: str) -> Args:
    """state, factor, blocks, damping."""
    if form == "primal":
        return [exact_state(case, dtype), None, case.blocks(), 0.0]
    return [case.grads(), exact_factor(case), case.blocks(), case.damping]


def diagonals(form: str) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of inverse_diagonal."""
    return lambda case, dtype: [
        *states(case, dtype, form),
        torch.full((case.num_weights,), torch.nan, dtype=dtype),
    ]


def products(form: str, columns: int) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of block_matvec."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        x = vector(case, dtype, columns)
        return [*states(case, dtype, form), x, torch.full_like(x, torch.nan)]

    return make


def fisher_products(columns: int) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of fisher_vector_product."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        x = vector(case, dtype, columns)
        return [case.grads(), case.blocks(), case.num_grads, x, torch.full_like(x, torch.nan)]

    return make


def masks(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of prune_mask: many equal saliencies, some dead weights, three of five removed."""
    saliency = (vector(case, torch.float32) * 4).round().abs().to(dtype)
    dead = vector(case, torch.float32, salt=2) > 1
    invalid = torch.zeros(1, dtype=torch.int64)
    return [saliency, dead, case.num_weights * 3 // 5, torch.zeros_like(dead), invalid]


def saliencies(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of obs_saliency."""
    w = vector(case, dtype)
    return [w, vector(case, dtype, salt=1).abs() + 0.1, torch.full_like(w, torch.nan)]


def updates(form: str) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of obs_update_."""
    return lambda case, dtype: [
        vector(case, dtype),
        *states(case, dtype, form),
        exact_diagonal(case, dtype),
        mask(case),
    ]


def solves(form: str) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of obs_solve_."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        state, factor, blocks, damping = states(case, dtype, form)
        failed = torch.ones(len(case.blocks()), dtype=torch.bool)
        return [vector(case, dtype), state, factor, blocks, case.num_grads, damping, mask(case), failed]

    return make


def eliminations(form: str, keep: int = 0, together: int = 1) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of obs_eliminate; groups of four, from the start of each block, where `keep` of each must stay."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        groups = torch.arange(case.num_weights)
        for start, stop in case.blocks().tolist():
            groups[start:stop] -= torch.arange(stop - start) % 4
        order = torch.full((case.num_weights,), -1)
        loss = torch.full((case.num_weights,), 7.0, dtype=torch.float64)
        failed = torch.ones(len(case.blocks()), dtype=torch.bool)
        rules = [groups if keep else None, keep, together]
        return [vector(case, dtype), *states(case, dtype, form), *rules, order, loss, failed]

    return make


def exact_root(case: Case, dtype: torch.dtype) -> Tensor:
    """R with R Rᵀ = F⁻¹, NaN in the padding: half-way between a Cholesky factor and a symmetric root."""
    state = exact_state(case, torch.float64)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        n = stop - start
        values, vectors = torch.linalg.eigh(state[b, :n, :n])
        state[b, :n, :n] = vectors * values.clamp(min=0).sqrt()
    return state.to(dtype)


def steps(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of fishleg_block_step_: a root not far from that of F⁻¹, every seventh row of it zero.

    The first block's power iteration has nothing to start from.
    """
    root = exact_root(case, dtype)
    top = torch.full(root.shape[:2], torch.nan, dtype=dtype)
    noise = vector(case, dtype, 2, salt=3)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        n = stop - start
        R = root[b, :n, :n]
        R *= 1 + 0.3 * noise[start:stop, :1]
        R += 0.1 * R.diagonal().mean() * noise[start:stop, 1]
        R[6::7] = 0
        top[b, :n] = noise[start:stop, 0] if b else 0
    found = estimates(case)
    return [root, top, case.grads(), case.blocks(), case.num_grads, case.damping, 0.7, *found]


def factor_diagonals(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of factor_diagonal."""
    return [
        exact_root(case, dtype),
        case.blocks(),
        torch.full((case.num_weights,), torch.nan, dtype=dtype),
    ]


def factor_products(columns: int) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of block_factor_matvec."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        x = vector(case, dtype, columns)
        return [exact_root(case, dtype), case.blocks(), x, torch.full_like(x, torch.nan)]

    return make


def downdates(case: Case, dtype: torch.dtype) -> Args:
    """Arguments of factor_downdate_: two of five weights leave, one of which has left before, and two of one row."""
    root = exact_root(case, dtype)
    keep = mask(case)
    for b, (start, stop) in enumerate(case.blocks().tolist()):
        n = stop - start
        removed = (~keep[start:stop]).nonzero().flatten()
        if len(removed) > 3:
            root[b, removed[0], :n] = 0
            root[b, removed[2], :n] = 2 * root[b, removed[1], :n]
    return [root, case.blocks(), keep]


def kron_products(columns: int) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of kron_matvec: as many tiles as the case has blocks, of up to B rows and k columns."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        generator = torch.Generator().manual_seed(case.seed)
        N, o, i = len(case.blocks()), min(case.layout().block_size, 150), case.num_rows

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        left, right = normal(N, o, o), normal(N, i, i)
        x = normal(columns, N, o, i)
        return [left + left.mT, right + right.mT, normal(N, o, i), x, torch.full_like(x, torch.nan)]

    return make


def convolutions(*, groups: int, last: bool) -> Callable[[Case, torch.dtype], Args]:
    """Arguments of conv_weight_grads: as many samples and channels as the case has blocks and rows, within reason."""

    def make(case: Case, dtype: torch.dtype) -> Args:
        generator = torch.Generator().manual_seed(case.seed)
        most_in, most_out = (3, 4) if groups > 2 else (20, 40)
        k = min(len(case.blocks()), 3)
        each, out = min(case.num_rows, most_in), min(case.layout().block_size, most_out)
        stride, padding, dilation, kernel = (1 + case.seed % 2, 2), (1, 0), (1, 2), (3, 1 + case.seed % 3)
        size = (5 + case.seed % 7, 8 + case.seed % 5)
        sizes = [
            (s + 2 * p - d * (n - 1) - 1) // j + 1
            for s, p, d, n, j in zip(size, padding, dilation, kernel, stride, strict=True)
        ]
        x = torch.randn(k, groups * each, *size, generator=generator).to(dtype)
        grad = torch.randn(k, groups * out, *sizes, generator=generator).to(dtype)
        if last:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        length = groups * out * each * kernel[0] * kernel[1]
        room = torch.full((k, length + 3), torch.nan, dtype=dtype)
        rows = room[:, 1 : 1 + length].view(k, groups * out, each, *kernel)
        return [rows, x, grad, stride, padding, dilation, groups]

    return make


@dataclass(frozen=True)
class Row:
    """An op, how its arguments are made, and which of its outputs are compared as numbers."""

    op: str
    variant: str
    make: Callable[[Case, torch.dtype], Args]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op}{self.variant}"


ROWS = [
    Row("sherman_morrison_", "", running, (0,)),
    Row("woodbury_", "", running, (0,)),
    Row("fisher_accumulate_", "", gram, (0,)),
    Row("fishleg_block_step_", "", steps, (0, 1, 7, 8)),
    Row("factor_diagonal", "", factor_diagonals, (2,)),
    Row("block_factor_matvec", "", factor_products(3), (3,)),
    Row("block_factor_matvec", " vector", factor_products(1), (3,)),
    Row("factor_downdate_", "", downdates, (0,)),
    Row("kron_matvec", "", kron_products(2), (4,)),
    Row("conv_weight_grads", "", convolutions(groups=1, last=False), (0,)),
    Row("conv_weight_grads", " channels last", convolutions(groups=2, last=True), (0,)),
    Row("conv_weight_grads", " many groups", convolutions(groups=19, last=False), (0,)),
    Row("spd_inverse_", "", matrices, (0, 2, 3)),
    Row("inverse_from_grads", "", builds, (0, 5, 6)),
    Row("inverse_diagonal_from_grads", "", diagonal_builds, (0, 6, 7)),
    Row("fisher_vector_product", "", fisher_products(3), (4,)),
    Row("fisher_vector_product", " vector", fisher_products(1), (4,)),
    Row("dual_factor_", "", factors, (0,)),
    Row("inverse_diagonal", " primal", diagonals("primal"), (4,)),
    Row("inverse_diagonal", " dual", diagonals("dual"), (4,)),
    Row("block_matvec", " primal", products("primal", 3), (5,)),
    Row("block_matvec", " primal vector", products("primal", 1), (5,)),
    Row("block_matvec", " dual", products("dual", 3), (5,)),
    Row("obs_eliminate", " primal", eliminations("primal"), (8, 9, 10)),
    Row("obs_eliminate", " dual", eliminations("dual"), (8, 9, 10)),
    Row("obs_eliminate", " primal 2:4", eliminations("primal", keep=2), (8, 9, 10)),
    Row("obs_eliminate", " dual 2:4", eliminations("dual", keep=2), (8, 9, 10)),
    Row("obs_eliminate", " primal sets of 3", eliminations("primal", together=3), (8, 9, 10)),
    Row("obs_eliminate", " dual sets of 4", eliminations("dual", together=4), (8, 9, 10)),
    Row("obs_saliency", "", saliencies, (2,)),
    Row("prune_mask", "", masks, (3, 4)),
    Row("obs_update_", " primal", updates("primal"), (0,)),
    Row("obs_update_", " dual", updates("dual"), (0,)),
    Row("obs_solve_", " primal", solves("primal"), (0, 7)),
    Row("obs_solve_", " dual", solves("dual"), (0, 7)),
]


def row_of(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if str(row) == name)


def call(op: str, args: Args, backend: str) -> None:
    """Run one backend of an op on the CPU tensors given, wherever it runs."""
    if backend == EMULATED:
        return emulated.run(op, *args)
    there = [on_device(arg) if isinstance(arg, Tensor) and backend != "reference" else arg for arg in args]
    with ops.use_backend(backend):
        getattr(torch.ops.fastfisher, op)(*there)
    for i in ops.OPS[op].written:
        if args[i] is not there[i]:
            args[i].copy_(there[i])  # type: ignore[attr-defined]
    return None


def run(row: Row, args: Args, backend: str) -> list[Tensor]:
    """The outputs of one backend on a copy of the arguments."""
    written = ops.OPS[row.op].written
    copy = [arg.clone() if isinstance(arg, Tensor) and i in written else arg for i, arg in enumerate(args)]
    call(row.op, copy, backend)
    return [copy[i] for i in written]  # type: ignore[misc]


def wide(args: Args) -> Args:
    """The same arguments with every float tensor in float64."""
    return [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]


def perturbed(args: Args) -> Args:
    """The same arguments with every float64 number off by a few roundings.

    In float64 the reference is its own truth, so its error is measured by what such a change does to its result.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float64).eps

    def shake(x: Tensor) -> Tensor:
        return x * (1 + 8 * eps * torch.randn(x.shape, generator=generator, dtype=torch.float64))

    return [shake(arg) if isinstance(arg, Tensor) and arg.dtype == torch.float64 else arg for arg in args]


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, NaN included."""
    return torch.equal(torch.nan_to_num(a, 7.25), torch.nan_to_num(b, 7.25)) and torch.equal(
        a.isnan(), b.isnan()
    )


def error(out: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest value, block by block for a state; NaN must stand in the same places."""
    out, truth = out.double(), truth.double()
    assert torch.equal(out.isnan(), truth.isnan())
    groups = len(truth) if truth.ndim == 3 else 1
    difference = (out - truth).nan_to_num(0).abs().reshape(groups, -1).amax(dim=1)
    scale = truth.nan_to_num(0).abs().reshape(groups, -1).amax(dim=1)
    return float((difference / scale.clamp(min=1e-300)).max())


def available(row: Row, backend: str, args: Args) -> None:
    """Skip where a backend is not built or has no kernel of this size; anything else it refuses is a failure."""
    if backend == EMULATED:
        reason = emulated.why_not(row.op, *args)
    elif backend == "reference":
        return
    else:
        there = tuple(on_device(arg) if isinstance(arg, Tensor) else arg for arg in args)
        reason = ops.OPS[row.op].why_not(backend, there)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


# One case for each way of cutting a block and of storing gradients.
FEW = ("B3", "B17", "B50", "k33", "many tensors", "misaligned", "float16", "bfloat16 misaligned")


def backends(op: str) -> list[str]:
    """The backends that have kernels for an op."""
    kernels = {EMULATED: emulated.OPS, "native": emulated.OPS if DEVICE.type == "cuda" else ops.OPS}
    return [backend for backend in BACKENDS if op in kernels.get(backend, ops.OPS)]


# 140 and 300 are blocks of several tiles; the interpreter takes half a minute for the latter.
FAILING = (1, 5, 40, 100, 140, 300)


def failures(op: str, values: tuple[float, ...]) -> list[tuple[str, int, torch.dtype, float]]:
    """Every backend with block sizes, dtypes and what makes a block fail; the interpreter has one of large blocks."""
    return [
        (backend, size, dtype, value)
        for backend, size in sizes(op, FAILING)
        for dtype in DTYPES
        for value in values
        if not (DEVICE.type == "cpu" and backend == "triton" and size >= 100)
        or (dtype == torch.float32 and value is values[0])
    ]


def sizes(op: str, blocks: tuple[int, ...]) -> list[tuple[str, int]]:
    """Every backend of an op with every block size, as far as the interpreter goes."""
    interpreted = DEVICE.type == "cpu"
    return [
        (backend, size)
        for backend in backends(op)
        for size in blocks
        if not (interpreted and backend == "triton" and size > 150)
    ]


def triples(cases: list[Case] = CASES, row: str = "", *, interpreted: bool = True) -> list[object]:
    """Every case with every row (or one) and every backend that has kernels for it, as far as the interpreter goes.

    interpreted: with Triton's kernels on a CPU, whose programs run one after the other.
    """
    found: list[object] = []
    rows = [row_of(row)] if row else ROWS
    for case in cases:
        for one in rows:
            for backend in backends(one.op):
                slow = case.name in SLOW or ("dual" in str(one) and case.name in SLOW_DUAL)
                rules = one.variant.endswith((":4", "sets of 3", "sets of 4"))
                if rules and case.name in SLOW:
                    continue  # the reference takes seconds for them
                slow = slow or (one.op in ("obs_eliminate", "factor_downdate_") and case.name not in QUICK)
                if one.op == "conv_weight_grads" and case.name not in FEW:
                    continue  # gradients of another kind are not its matter
                if (slow or not interpreted) and backend == "triton" and DEVICE.type == "cpu":
                    continue
                found.append(pytest.param(case, one, backend, id=f"{case}-{one}-{backend}"))
    return found


def check_error(case: Case, row: Row, backend: str) -> None:
    """The law, for both dtypes."""
    for dtype in DTYPES:
        args = row.make(case, dtype)
        available(row, backend, args)
        truth = run(row, wide(args), "reference")
        reference = run(row, args if dtype == torch.float32 else perturbed(wide(args)), "reference")
        out = run(row, args, backend)
        eps = torch.finfo(dtype).eps
        for position, i in enumerate(ops.OPS[row.op].written):
            if i not in row.outputs:
                continue
            if out[position].dtype == torch.bool:
                assert torch.equal(out[position], truth[position])
                continue
            # in float64 the reference's error is only guessed, and one draw of it
            allowed = 2 * error(reference[position], truth[position]) + (16 if eps > 1e-10 else 64) * eps
            if ops.OPS[row.op].arguments[i] in ("condition", "amplification"):
                allowed += 1e-6  # they are estimates, whatever the dtype
            assert error(out[position], truth[position]) <= allowed


@pytest.mark.parametrize(("case", "row", "backend"), triples())
def test_error_is_at_most_twice_that_of_the_reference(case: Case, row: Row, backend: str) -> None:
    check_error(case, row, backend)


@pytest.mark.parametrize("isa", environment.ISAS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_instruction_set(row: Row, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in native.isas():
        pytest.skip(f"{isa} is not in this build or not on this processor")
    monkeypatch.setenv(environment.ISA.name, isa)
    for case in CASES:
        if case.name in FEW:
            check_error(case, row, "native")


@pytest.mark.parametrize(
    ("case", "row", "backend"), triples([case for case in CASES if case.name in FEW], interpreted=False)
)
def test_repeated_bitwise_equal(case: Case, row: Row, backend: str) -> None:
    args = row.make(case, torch.float32)
    available(row, backend, args)
    for one, two in zip(run(row, args, backend), run(row, args, backend), strict=True):
        assert same(one, two)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the processor's")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeated_and_on_two_threads_bitwise_equal(case: Case, row: Row, backend: str) -> None:
    args = row.make(case, torch.float32)
    available(row, backend, args)
    with threads(1):
        first, second = run(row, args, backend), run(row, args, backend)
    with threads(2):
        third = run(row, args, backend)
    for one, two, three in zip(first, second, third, strict=True):
        assert same(one, two)
        assert same(one, three)


@pytest.mark.parametrize(("case", "row", "backend"), triples(row="dual_factor_"))
def test_dual_condition_lies_between_its_bounds(case: Case, row: Row, backend: str) -> None:
    args = row.make(case, torch.float32)
    available(row, backend, args)
    factor, condition = run(row, args, backend)
    assert torch.equal(factor, factor.triu())
    for U, estimate in zip(factor, condition.tolist(), strict=True):
        C = U.T @ U
        scale = C.diagonal().rsqrt()
        inverse = torch.linalg.inv(scale[:, None] * C * scale)
        lower = float(torch.linalg.matrix_norm(inverse, 2)) / 4
        assert lower * (1 - 1e-6) <= estimate <= float(inverse.norm()) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("backend", "size", "dtype", "bad"), failures("spd_inverse_", (-1.0, 0.0, torch.nan, torch.inf)), ids=str
)
def test_inverse_fills_a_failed_block_with_nan(
    backend: str, dtype: torch.dtype, bad: float, size: int
) -> None:
    matrix = torch.eye(size, dtype=dtype).repeat(3, 1, 1) * 4
    matrix[1, size // 2, size // 2] = bad
    condition, amplification = torch.zeros(2, 3, dtype=torch.float64)
    args = [matrix, 0.0, condition, amplification]
    available(row_of("spd_inverse_"), backend, args)
    call("spd_inverse_", args, backend)
    assert matrix[1].isnan().all()
    assert condition[1] == amplification[1] == torch.inf
    assert torch.equal(matrix[::2], torch.eye(size, dtype=dtype).repeat(2, 1, 1) / 4)
    torch.testing.assert_close(condition[::2], torch.full((2,), float(size), dtype=torch.float64))
    torch.testing.assert_close(amplification[::2], torch.full((2,), float(size), dtype=torch.float64))


@pytest.mark.parametrize(
    ("backend", "size", "dtype", "bad"), failures("inverse_from_grads", (torch.nan, torch.inf)), ids=str
)
def test_build_fills_a_failed_block_with_nan(backend: str, dtype: torch.dtype, bad: float, size: int) -> None:
    grads = torch.ones(2, 3 * size)
    grads[1, size + size // 2] = bad
    blocks = torch.arange(0, 3 * size, size)[:, None] + torch.tensor([0, size])
    state, diagonal = torch.zeros(3, size, size, dtype=dtype), torch.zeros(3 * size, dtype=dtype)
    condition, amplification = torch.zeros(2, 3, dtype=torch.float64)
    rest = [2, 1.0, condition, amplification]
    available(row_of("inverse_from_grads"), backend, [state, grads, blocks, *rest])
    for op, args in (
        ("inverse_from_grads", [state, grads, blocks, *rest]),
        ("inverse_diagonal_from_grads", [diagonal, grads, blocks, size, *rest]),
    ):
        call(op, args, backend)
        assert condition[1] == amplification[1] == torch.inf
        assert condition[::2].isfinite().all()
        assert amplification[::2].isfinite().all()
    assert state[1].isnan().all()
    assert diagonal[size : 2 * size].isnan().all()
    # (I + 1 1ᵀ)⁻¹ = I − 1 1ᵀ / (1 + n)
    exact = torch.eye(size, dtype=dtype) - 1 / (1 + size)
    torch.testing.assert_close(state[::2], exact.repeat(2, 1, 1))
    torch.testing.assert_close(diagonal[2 * size :], exact.diagonal())


def mask_of(saliency: Tensor, dead: Tensor, zeros: int, backend: str) -> tuple[Tensor, int]:
    """What prune_mask writes."""
    mask, invalid = torch.empty_like(dead), torch.empty(1, dtype=torch.int64)
    args = [saliency, dead, zeros, mask, invalid]
    available(row_of("prune_mask"), backend, args)
    call("prune_mask", args, backend)
    return mask, int(invalid)


@pytest.mark.parametrize("backend", backends("prune_mask"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_has_exactly_as_many_zeros_as_asked_for(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 70_000  # of more than two programs of any backend
    scale = 10.0 ** -torch.randint(0, 30, (n,), generator=generator)
    saliency = torch.rand(n, generator=generator).to(dtype).pow(8) * scale.to(dtype)
    saliency[30_000:40_000] = saliency[29_999]
    saliency[::1_000] = 0
    saliency[500::1_000] = -0.0
    dead = torch.rand(n, generator=generator) < 0.1
    for zeros in (0, 1, 6_000, 35_000, 39_000, n - 1, n):
        mask, invalid = mask_of(saliency, dead, zeros, backend)
        order = torch.where(dead, -1, saliency).sort(stable=True).indices
        expected = torch.ones_like(dead)
        expected[order[: max(zeros, int(dead.sum()))]] = False
        assert torch.equal(mask, expected), zeros
        assert invalid == -1


@pytest.mark.parametrize("backend", backends("prune_mask"))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_mask_names_the_first_saliency_that_is_not_finite(backend: str, bad: float) -> None:
    saliency = torch.ones(5_000)
    saliency[[7, 3_000, 4_000]] = bad
    dead = torch.zeros(5_000, dtype=torch.bool)
    dead[7] = True
    mask, invalid = mask_of(saliency, dead, 9, backend)
    assert invalid == 3_000
    assert torch.equal(mask, ~dead)


@pytest.mark.parametrize("backend", backends("dual_factor_"))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [4, 70])
def test_dual_factor_fills_a_failed_block_with_nan(backend: str, bad: float, k: int) -> None:
    grads = torch.randn(k, 30, generator=torch.Generator().manual_seed(0))
    grads[2, 15] = bad
    blocks = torch.tensor([[0, 10], [10, 20], [20, 30]])
    factor, condition = torch.zeros(3, k, k, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    args = [factor, grads, blocks, k, 0.1, condition]
    available(row_of("dual_factor_"), backend, args)
    call("dual_factor_", args, backend)
    assert factor[1].isnan().all()
    assert condition[1] == torch.inf
    assert factor[::2].isfinite().all()
    assert condition[::2].isfinite().all()


@pytest.mark.parametrize("backend", backends("woodbury_"))
@pytest.mark.parametrize("size", [10, 40, 100])
def test_woodbury_fills_a_failed_block_with_nan(backend: str, size: int) -> None:
    f_inv = torch.eye(size).repeat(2, 1, 1)
    f_inv[0] *= -100  # no inverse Fisher: the capacitance becomes negative
    args = [f_inv, torch.ones(3, 2 * size), torch.tensor([[0, size], [size, 2 * size]]), 3]
    available(row_of("woodbury_"), backend, args)
    call("woodbury_", args, backend)
    assert f_inv[0].isnan().all()
    assert f_inv[1].isfinite().all()


@pytest.mark.parametrize("backend", backends("obs_solve_"))
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("size", [10, 70])
def test_joint_update_leaves_a_failed_block_alone(backend: str, form: str, size: int) -> None:
    weight = torch.arange(1.0, 2 * size + 1)
    keep = torch.arange(2 * size) % 2 == 0
    blocks = torch.tensor([[0, size], [size, 2 * size]])
    state, factor = torch.eye(size).repeat(2, 1, 1), None
    if form == "primal":
        state[0] = -state[0]
    else:
        state, factor = torch.ones(3, 2 * size), torch.zeros(2, 3, 3, dtype=torch.float64)
        state[1, 4] = torch.nan
    failed = torch.zeros(2, dtype=torch.bool)
    args = [weight, state, factor, blocks, 3, 0.1, keep, failed]
    available(row_of(f"obs_solve_ {form}"), backend, args)
    call("obs_solve_", args, backend)
    assert failed.tolist() == [True, False]
    assert torch.equal(weight[:size], torch.arange(1.0, size + 1))
    assert torch.equal(weight[size:][~keep[size:]], torch.zeros(size // 2))


@pytest.mark.parametrize("backend", backends("obs_update_"))
@pytest.mark.parametrize("op", ["obs_update_", "obs_solve_"])
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("keep_all", [True, False])
def test_updates_with_everything_kept_or_removed(backend: str, op: str, form: str, keep_all: bool) -> None:
    case = next(case for case in CASES if case.name == "gap")
    row = row_of(f"{op} {form}")
    args = row.make(case, torch.float32)
    available(row, backend, args)
    position = next(
        i
        for i, arg in enumerate(args)
        if isinstance(arg, Tensor) and len(arg) == 100 and arg.dtype == torch.bool
    )
    args[position] = torch.full((100,), keep_all)
    weight = run(row, args, backend)[0]
    before = args[0]
    assert isinstance(before, Tensor)
    inside = torch.ones(100, dtype=torch.bool)
    inside[25:50] = False
    assert torch.equal(weight[~inside], before[~inside])
    assert torch.equal(weight[inside], before[inside] if keep_all else torch.zeros(75))


@pytest.mark.parametrize("backend", backends("obs_update_"))
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_state_and_weight_of_different_dtypes(backend: str, weight_dtype: torch.dtype, form: str) -> None:
    case = next(case for case in CASES if case.name == "many tensors")
    state_dtype = torch.float64 if weight_dtype == torch.float32 else torch.float32
    for op, make in (("block_matvec", products(form, 2)), ("inverse_diagonal", diagonals(form))):
        row = row_of(f"{op} {form}")
        args = [*states(case, state_dtype, form), *make(case, weight_dtype)[4:]]
        available(row, backend, args)
        assert error(run(row, args, backend)[0], run(row, wide(args), "reference")[0]) <= 1e-6
    for op, args in (
        ("obs_update_", [vector(case, weight_dtype), *updates(form)(case, state_dtype)[1:]]),
        ("obs_solve_", [vector(case, weight_dtype), *solves(form)(case, state_dtype)[1:]]),
    ):
        row = row_of(f"{op} {form}")
        assert error(run(row, args, backend)[0], run(row, wide(args), "reference")[0]) <= 1e-5
