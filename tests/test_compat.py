"""The stand-ins of existing scripts against the scripts' own loop in float64, however and whenever they are read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fastfisher.compat import EmpiricalBlockFisherInverse, HInvFastBlock, importance_scores
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.inverse import FisherInverse
from tests.cases import gradients

DAMPING = 1e-3
PROMISE = 1e-4

# num_grads, block size, weights: below and above the buffer of 128, dual and primal, ragged, one block, B > d
SHAPES = [(20, 8, 50), (24, 32, 75), (270, 7, 30), (170, 20, 60), (70, 100, 210), (5, 40, 17), (131, 1, 9)]


def loop(grads: Tensor, m: int, B: int, damping: float) -> Tensor:
    """F⁻¹ [K, B, B] by rank-1 steps from I/λ in float64, as the scripts do it."""
    K = -(-grads.shape[1] // B)
    rows = torch.zeros(len(grads), K * B, dtype=torch.float64)
    rows[:, : grads.shape[1]] = grads
    f_inv = (torch.eye(B, dtype=torch.float64) / damping).repeat(K, 1, 1)
    for g in rows.view(-1, K, B):
        v = torch.einsum("kij,kj->ki", f_inv, g)
        f_inv -= torch.einsum("ki,kj->kij", v, v) / (m + (g * v).sum(1))[:, None, None]
    return f_inv


def product(f_inv: Tensor, v: Tensor) -> Tensor:
    """F⁻¹ v, [d], of an inverse [K, B, B]."""
    padded = torch.zeros(f_inv.shape[0] * f_inv.shape[1], dtype=torch.float64)
    padded[: len(v)] = v
    return torch.bmm(f_inv, padded.view(len(f_inv), -1, 1)).flatten()[: len(v)]


def filled(grads: Tensor, m: int, B: int, damping: float = DAMPING) -> EmpiricalBlockFisherInverse:
    finv = EmpiricalBlockFisherInverse(m, B, grads.shape[1], damping, torch.device("cpu"))
    for g in grads:
        finv.add_grad(g)
    return finv


def assert_near(found: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == truth.shape
    assert float((found.double() - truth).abs().max()) <= tolerance * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "B", "d"), SHAPES)
def test_equals_the_scripts_loop(m: int, B: int, d: int, dtype: torch.dtype) -> None:
    grads = gradients("independent", m, d, rho=10, damping=DAMPING).to(dtype)
    truth = loop(grads, m, B, DAMPING)
    finv = filled(grads, m, B)
    v = torch.randn(d, generator=torch.Generator().manual_seed(1))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_near(finv.diag(), truth.diagonal(dim1=1, dim2=2).flatten()[:d], tolerance)
    assert_near(finv.mul(v.double()), product(truth, v), tolerance if dtype == torch.float64 else 1e-5)
    assert_near(finv.f_inv, truth, tolerance)
    assert finv.F_inv is finv.f_inv
    assert finv.f_inv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (finv.m, finv.B, finv.d, finv.num_blocks, finv.damp) == (m, B, d, -(-d // B), DAMPING)
    assert finv.dev == torch.device("cpu")


@pytest.mark.parametrize(("m", "B", "d"), [(270, 7, 30), (70, 100, 210), (24, 32, 75)])
@pytest.mark.parametrize("read", ["diag", "mul", "f_inv"])
def test_readings_between_gradients_change_nothing(m: int, B: int, d: int, read: str) -> None:
    grads = gradients("correlated", m, d, rho=1e3, damping=DAMPING)
    readers: dict[str, Callable[[EmpiricalBlockFisherInverse], Tensor]] = {
        "diag": lambda finv: finv.diag(),
        "mul": lambda finv: finv.mul(torch.ones(d)),
        "f_inv": lambda finv: finv.f_inv,
    }
    finv = EmpiricalBlockFisherInverse(m, B, d, DAMPING, torch.device("cpu"))
    assert_near(readers[read](finv), readers[read](filled(grads[:0], m, B)).double())
    for i, g in enumerate(grads, 1):
        finv.add_grad(g)
        if i in (1, 2, B, 127, 128, 129, 130, 256, m - 1):
            assert_near(finv.f_inv, loop(grads[:i], m, B, DAMPING), PROMISE)
            readers[read](finv)
    assert_near(readers[read](finv), readers[read](filled(grads, m, B)).double(), PROMISE)
    assert_near(finv.f_inv, loop(grads, m, B, DAMPING), PROMISE)


@pytest.mark.parametrize("kind", ["correlated", "aligned", "deficient", "scaled"])
@pytest.mark.parametrize(("m", "B", "d"), [(190, 20, 50), (64, 50, 100), (30, 60, 120)])
def test_right_where_the_float32_loop_is_wrong(m: int, B: int, d: int, kind: str) -> None:
    grads = gradients(kind, m, d, rho=1e7, damping=DAMPING)
    truth = loop(grads, m, B, DAMPING)
    finv = filled(grads, m, B)
    diagonal = truth.diagonal(dim1=1, dim2=2).flatten()[:d]
    assert float(((finv.diag().double() - diagonal) / diagonal).abs().max()) <= PROMISE
    for v in (torch.ones(d), grads[0]):
        assert_near(finv.mul(v), product(truth, v.double()), PROMISE)
    assert_near(finv.f_inv, truth, PROMISE)


def test_float32_loop_is_wrong_there() -> None:
    grads = gradients("correlated", 150, 50, rho=1e7, damping=DAMPING)
    truth = loop(grads, 150, 20, DAMPING).diagonal(dim1=1, dim2=2)
    f_inv = (torch.eye(20) / DAMPING).repeat(3, 1, 1)
    for g in torch.nn.functional.pad(grads, (0, 10)).view(-1, 3, 20):
        v = torch.einsum("kij,kj->ki", f_inv, g)
        f_inv -= torch.einsum("ki,kj->kij", v, v) / (150 + (g * v).sum(1))[:, None, None]
    error = ((f_inv.diagonal(dim1=1, dim2=2).double() - truth) / truth).abs().nan_to_num(torch.inf).max()
    assert float(error) > 10 * PROMISE


def test_before_the_first_gradient_it_is_the_damping() -> None:
    finv = EmpiricalBlockFisherInverse(4, 8, 20, 0.5, "cpu")
    assert torch.equal(finv.diag(), torch.full((20,), 2.0))
    assert torch.equal(finv.mul(torch.arange(20.0)), 2 * torch.arange(20.0))
    assert torch.equal(finv.f_inv, 2 * torch.eye(8).repeat(3, 1, 1))


def test_gradients_are_copied_and_may_come_in_any_shape() -> None:
    grads = gradients("independent", 3, 24, rho=10, damping=DAMPING)
    truth = filled(grads, 3, 8)
    finv = EmpiricalBlockFisherInverse(3, 8, 24, DAMPING, "cpu")
    buffer = torch.empty(4, 6)
    for g in grads:  # a script's .grad, written over by the next backward pass
        finv.add_grad(buffer.copy_(g.view(4, 6)))
    buffer.zero_()
    assert torch.equal(finv.f_inv, truth.f_inv)
    ragged = EmpiricalBlockFisherInverse(3, 16, 20, DAMPING, "cpu")
    for g in grads:  # already padded to K * B = 32
        ragged.add_grad(torch.cat([g[:20], torch.zeros(12)]).requires_grad_())
    assert torch.equal(ragged.f_inv, filled(grads[:, :20], 3, 16).f_inv)
    assert torch.equal(ragged.mul(torch.ones(32)), ragged.mul(torch.ones(20)))


def test_memory_is_let_go_after_the_last_gradient() -> None:
    finv = filled(gradients("independent", 150, 20, rho=10, damping=DAMPING), 150, 10)
    assert finv._buffer is not None
    assert len(finv._buffer) == 128
    finv.diag()
    assert finv._buffer is None
    assert finv._fisher == []
    twin = copy.deepcopy(finv)
    assert torch.equal(twin.f_inv, finv.f_inv)


def test_bad_input_is_one_sentence() -> None:
    finv = filled(torch.ones(2, 10), 2, 4)
    with pytest.raises(FastFisherError, match="num_grads=2 gradients have come already"):
        finv.add_grad(torch.ones(10))
    finv.diag()
    with pytest.raises(FastFisherError, match="num_grads=2 gradients have come already"):
        finv.add_grad(torch.ones(10))
    with pytest.raises(FastFisherError, match=r"v must hold num_weights=10 numbers, got \[9\]"):
        finv.mul(torch.ones(9))
    more = EmpiricalBlockFisherInverse(3, 4, 10, 0.1, "cpu")
    with pytest.raises(FastFisherError, match=r"g must hold num_weights=10 numbers, got \[2, 4\]"):
        more.add_grad(torch.ones(2, 4))
    with pytest.raises(FastFisherError, match=r"g must be of a float dtype, got torch.int64"):
        more.add_grad(torch.ones(10, dtype=torch.int64))
    more.add_grad(torch.ones(10))
    with pytest.raises(FastFisherError, match=r"g must be torch.float32 as before, got torch.float64"):
        more.add_grad(torch.ones(10, dtype=torch.float64))
    for arguments, message in (
        ((0, 4, 10, 0.1), "num_grads must be a whole number of at least 1, got 0"),
        ((3, 2.5, 10, 0.1), "fisher_block_size must be a whole number of at least 1, got 2.5"),
        ((3, 4, -1, 0.1), "num_weights must be a whole number of at least 1, got -1"),
        ((3, 4, 10, 0.0), "damp must be positive and finite, got 0.0"),
    ):
        with pytest.raises(FastFisherError, match=message):
            EmpiricalBlockFisherInverse(*arguments, "cpu")  # type: ignore[arg-type]
    for m in (1, 200):
        broken = filled(torch.full((m, 10), torch.nan), m, 4)
        for _ in range(2):  # it does not become another answer when it is asked for again
            with pytest.raises(FisherError, match="not finite"):
                broken.diag()


@pytest.mark.parametrize(("m", "blocksize", "d"), [(40, 12, 50), (20, 64, 100), (30, None, 45), (6, 90, 30)])
def test_mfac_blocks_equal_the_loop(m: int, blocksize: int | None, d: int) -> None:
    grads = gradients("correlated", m, d, rho=1e3, damping=DAMPING)
    before = grads.clone()
    hinv = HInvFastBlock(grads, blocksize, 8, torch.device("cpu"), damp=DAMPING)
    truth = loop(grads, m, blocksize or d, DAMPING)
    v = torch.randn(d, generator=torch.Generator().manual_seed(1))
    assert_near(hinv.diag(), truth.diagonal(dim1=1, dim2=2).flatten()[:d], PROMISE)
    assert_near(hinv.mul(v), product(truth, v.double()), PROMISE)
    assert (hinv.m, hinv.d, hinv.dtype, hinv.damp) == (m, d, torch.float32, DAMPING)
    assert torch.equal(grads, before)
    assert torch.equal(HInvFastBlock(grads, blocksize, damp=DAMPING).diag(), hinv.diag())


def test_mfac_bad_input_is_one_sentence() -> None:
    with pytest.raises(FastFisherError, match=r"grads must be \[m, d\]"):
        HInvFastBlock(torch.ones(3))
    with pytest.raises(FastFisherError, match="blocksize must be a whole number of at least 1, got 1e-05"):
        HInvFastBlock(torch.ones(3, 4), 1e-5)  # type: ignore[arg-type]
    with pytest.raises(FastFisherError, match="damping must be positive"):
        HInvFastBlock(torch.ones(3, 4), damp=-1.0)


def test_scores_prune_what_woodfisher_prunes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    pairs = [(model[0], "weight"), (model[1], "weight")]
    grads = gradients("independent", 40, 50, rho=1e3, damping=DAMPING)
    whole = FisherInverse.from_grads(grads, sizes=[30, 20], block_size=10, damping=DAMPING)
    weight = torch.cat([module.weight.detach().flatten() for module, _ in pairs])
    saliency = whole.saliency(weight)
    each = [filled(grads[:, :30], 40, 10), filled(grads[:, 30:], 40, 10)]
    scores = importance_scores(pairs, each)
    assert torch.allclose(torch.cat([s.flatten() for s in scores.values()]), saliency, rtol=1e-5)
    scores = importance_scores(pairs, whole)
    torch_prune.global_unstructured(
        pairs, pruning_method=torch_prune.L1Unstructured, importance_scores=scores, amount=20
    )
    kept = torch.cat([module.weight_mask.flatten() for module, _ in pairs]).bool()
    assert torch.equal(~kept, torch.zeros(50, dtype=torch.bool).index_fill(0, saliency.argsort()[:20], True))


def test_scores_refuse_another_number_of_weights() -> None:
    layer = nn.Linear(6, 5)
    finv = filled(torch.ones(2, 10), 2, 4)
    with pytest.raises(FastFisherError, match="the tensors hold 30 weights, the inverse 10"):
        importance_scores([(layer, "weight")], finv)
    with pytest.raises(FastFisherError, match=r"the tensors hold \[30\] weights, the inverses \[10\]"):
        importance_scores([(layer, "weight")], [finv])
