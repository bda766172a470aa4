"""The interface of the inverse: forms, mending, products, updates, streaming, saving, and bad input."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher import parts
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.inverse import FisherAccumulator, FisherInverse
from tests.cases import gradients

DAMPING = 1e-2
FORMS = ("primal", "dual", "rank1", "woodbury")
SIZES = (23, 7, 40)


def grads_(
    m: int = 12, d: int = sum(SIZES), kind: str = "independent", rho: float = 30.0, seed: int = 0
) -> Tensor:
    """Some gradients."""
    return gradients(kind, m, d, rho=rho, damping=DAMPING, seed=seed)


def dense(grads: Tensor, blocks: Tensor, num_grads: int, damping: float) -> Tensor:
    """F [d, d] in float64, zero outside the blocks."""
    F = torch.zeros(grads.shape[1], grads.shape[1], dtype=torch.float64)
    for start, stop in blocks.tolist():
        G = grads[:, start:stop].double()
        F[start:stop, start:stop] = (
            damping * torch.eye(stop - start, dtype=torch.float64) + G.T @ G / num_grads
        )
    return F


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to a relative difference in norm."""
    assert a.shape == b.shape
    assert float((a.double() - b.double()).norm() / b.double().norm()) <= tolerance


def make(
    grads: Tensor | None = None, block_size: int | None = 10, form: str = "auto", **options: object
) -> FisherInverse:
    """An inverse over three tensors."""
    return FisherInverse.from_grads(
        grads_() if grads is None else grads,
        block_size=block_size,
        damping=DAMPING,
        form=form,
        sizes=SIZES,
        **options,  # type: ignore[arg-type]
    )


def test_form_is_chosen_by_gradients_and_block_size() -> None:
    assert make(grads_(12), 10).form == "primal"
    assert make(grads_(10), 10).form == "primal"
    assert make(grads_(9), 10).form == "dual"
    assert make(grads_(9), None).form == "dual"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [1, 10, 40, None])
@pytest.mark.parametrize("num_grads", [None, 30])
def test_every_form_is_the_dense_inverse(form: str, block_size: int | None, num_grads: int | None) -> None:
    inverse = make(block_size=block_size, form=form, num_grads=num_grads)
    F = dense(grads_(), inverse.layout.blocks, num_grads or 12, DAMPING)
    close(inverse @ torch.eye(70), torch.linalg.inv(F))
    close(inverse.diag(), torch.linalg.inv(F).diagonal())
    assert inverse.form == form
    assert inverse.num_grads == (num_grads or 12)
    assert inverse.condition.shape == (inverse.num_blocks,)


@pytest.mark.parametrize("form", FORMS)
def test_products_take_vectors_matrices_and_named_tensors(form: str) -> None:
    named = {"a": (5, 2, 3), "b": (4,), "c": ()}
    grads = {
        name: grads_(9, torch.Size(shape).numel(), seed=i).reshape(9, *shape)
        for i, (name, shape) in enumerate(named.items())
    }
    inverse = FisherInverse.from_grads(grads, block_size=7, damping=DAMPING, form=form)
    v = torch.randn(35, 3, generator=torch.Generator().manual_seed(0))
    expected = inverse @ v
    assert torch.equal(inverse.mul(v[:, 0]), expected[:, 0]) or torch.allclose(
        inverse @ v[:, 0], expected[:, 0], rtol=1e-5
    )
    assert (inverse @ v.double()).dtype == torch.float64
    assert (inverse @ v.half()).dtype == torch.float32
    close(inverse @ v.double(), expected)
    close(inverse @ v.T.contiguous().T, expected, 0)
    result = inverse @ inverse.layout.unflatten(v[:, 0].contiguous())
    assert isinstance(result, Mapping)
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == named
    close(inverse.layout.flatten(result), expected[:, 0])


def test_relative_damping_is_a_share_of_the_mean_fisher_diagonal() -> None:
    expected = 0.1 * float(grads_().double().square().mean()) * 12 / 20
    for form in FORMS:
        inverse = FisherInverse.from_grads(
            grads_(), block_size=10, damping=0.1, damping_mode="relative", form=form, num_grads=20
        )
        assert inverse.damping == pytest.approx(expected, rel=1e-12)
        close(inverse @ torch.eye(70), torch.linalg.inv(dense(grads_(), inverse.layout.blocks, 20, expected)))


@pytest.mark.parametrize("form", FORMS)
def test_zero_gradients_leave_the_damping(form: str) -> None:
    inverse = make(torch.zeros(4, 70), form=form)
    torch.testing.assert_close(inverse.diag(), torch.full((70,), 1 / DAMPING), rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse @ torch.ones(70), torch.full((70,), 1 / DAMPING), rtol=1e-6, atol=0)


def mixed() -> Tensor:
    """Two blocks of ten that float32 can hold, and one between them, of a strong, deficient rank, that it cannot."""
    bad = gradients("deficient", 12, 10, rho=1e7, damping=DAMPING)
    return torch.cat([grads_(12, 10, seed=1), bad, grads_(12, 10, seed=2)], dim=1)


@pytest.mark.parametrize("form", ["primal", "rank1", "woodbury"])
def test_only_the_block_that_float32_cannot_hold_is_mended(form: str) -> None:
    inverse = FisherInverse.from_grads(mixed(), block_size=10, damping=DAMPING, form=form)
    assert inverse.num_mended == 1
    assert [part.state.dtype for part in inverse.parts] == [torch.float32, torch.float64]
    assert [part.block_ids.tolist() for part in inverse.parts] == [[0, 2], [1]]
    F = dense(mixed(), inverse.layout.blocks, 12, DAMPING)
    close(inverse @ torch.eye(30), torch.linalg.inv(F))
    # what comes first and last is bit for bit what it is without a bad neighbour
    alone = FisherInverse.from_grads(mixed()[:, 20:].contiguous(), block_size=10, damping=DAMPING, form=form)
    if form == "primal":
        assert torch.equal(alone.diag(), inverse.diag()[20:])


def test_a_dual_block_that_float64_loses_is_inverted_in_the_primal_form() -> None:
    # 1 − Σᵢ Vᵢ² of the first weight is 2e-17: nothing is left of it in float64
    grads = grads_(20, 100)
    grads[:, :50] = 0
    grads[3, 0] = 1e8
    inverse = FisherInverse.from_grads(grads, block_size=50, damping=DAMPING)
    assert (inverse.form, [part.kind for part in inverse.parts]) == ("dual", ["dual", "primal"])
    F = dense(grads, inverse.layout.blocks, 20, DAMPING)
    torch.testing.assert_close(inverse.diag().double(), torch.linalg.inv(F).diagonal(), rtol=1e-6, atol=0)
    weight, keep = torch.ones(100), torch.arange(100) % 3 > 0
    assert torch.equal(inverse.prune_update(weight, keep, "sum") == 0, ~keep)
    assert torch.equal(inverse.prune_update(weight, keep, "joint") == 0, ~keep)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_raises_with_parameter_block_and_damping(form: str, value: float) -> None:
    grads = grads_()
    grads[3, 35] = value
    message = r"the inverse Fisher of tensor2\[0:10\] \(block 4 of 8\) .* 12 gradients at damping=0.01"
    with pytest.raises(FisherError, match=message):
        make(grads, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_damping_lost_in_float64_raises(form: str) -> None:
    grads = gradients("deficient", 8, 30, rho=1e20, damping=DAMPING)
    with pytest.raises(FisherError, match="too small"):
        FisherInverse.from_grads(grads, block_size=30, damping=DAMPING, form=form)


def test_saliency_is_that_of_the_dense_inverse() -> None:
    inverse = make()
    w = torch.linspace(-1, 1, 70)
    F_inv = torch.linalg.inv(dense(grads_(), inverse.layout.blocks, 12, DAMPING))
    close(inverse.saliency(w), w.double().square() / (2 * F_inv.diagonal()))
    assert inverse.saliency(w.double()).dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [10, 33, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_the_dense_inverse(
    form: str, block_size: int | None, dtype: torch.dtype
) -> None:
    inverse = make(block_size=block_size, form=form)
    generator = torch.Generator().manual_seed(3)
    w, keep = torch.randn(70, generator=generator).to(dtype), torch.rand(70, generator=generator) > 0.4
    before = w.clone()
    F = dense(grads_(), inverse.layout.blocks, 12, DAMPING)
    F_inv, Q = torch.linalg.inv(F), ~keep
    summed = w.double() - F_inv @ torch.where(keep, 0, w.double() / F_inv.diagonal())
    joint = w.double() - F_inv[:, Q] @ torch.linalg.solve(F_inv[Q][:, Q], w.double()[Q])
    for update, expected in (("sum", summed), ("joint", joint)):
        pruned = inverse.prune_update(w, keep, update)
        assert pruned.dtype == dtype
        assert torch.equal(pruned[Q], torch.zeros(int(Q.sum()), dtype=dtype))
        close(pruned, torch.where(keep, expected, 0), 1e-4)
    assert torch.equal(w, before)
    assert torch.equal(inverse.prune_update(w, torch.ones(70, dtype=torch.bool)), w)


def accumulate(grads: Tensor, pieces: Sequence[int], **options: object) -> FisherInverse:
    """The inverse from gradients that come in pieces."""
    layout = BlockLayout.from_sizes(SIZES, 10)
    accumulator = FisherAccumulator(layout, num_grads=len(grads), damping=DAMPING, **options)  # type: ignore[arg-type]
    for piece in grads.split(list(pieces)):
        accumulator.add(piece)
    return accumulator.finish()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1,) * 12])
def test_streamed_gradients_give_the_same_inverse(form: str, pieces: tuple[int, ...]) -> None:
    inverse = accumulate(grads_(), pieces, form=form)
    whole = make(form=form)
    assert inverse.form == form
    assert inverse.diag().dtype == torch.float32
    close(inverse @ torch.eye(70), whole @ torch.eye(70))
    close(inverse.diag(), whole.diag())
    w, keep = torch.linspace(-1, 1, 70), torch.arange(70) % 3 > 0
    for update in ("sum", "joint"):
        close(inverse.prune_update(w, keep, update), whole.prune_update(w, keep, update))


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_with_relative_damping(form: str, dtype: torch.dtype) -> None:
    inverse = accumulate(grads_(), (5, 7), form=form, damping_mode="relative", dtype=dtype)
    expected = DAMPING * float(grads_().double().square().mean())
    assert inverse.damping == pytest.approx(expected, rel=1e-12)
    close(
        inverse @ torch.eye(70), torch.linalg.inv(dense(grads_(), inverse.layout.blocks, 12, expected)), 1e-4
    )


def test_streamed_block_is_mended_without_its_gradients() -> None:
    layout = BlockLayout.from_sizes([30], 10)
    accumulator = FisherAccumulator(layout, num_grads=12, damping=DAMPING)
    accumulator.add(mixed())
    inverse = accumulator.finish()
    assert inverse.num_mended == 1
    close(inverse @ torch.eye(30), torch.linalg.inv(dense(mixed(), layout.blocks, 12, DAMPING)))


@pytest.mark.parametrize("form", FORMS)
def test_a_state_in_several_buffers_is_the_same_inverse(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = torch.cat([mixed(), grads_(12, 50, seed=3)], dim=1)
    options = {"block_size": 10, "damping": DAMPING, "form": form}
    whole = FisherInverse.from_grads(grads, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(parts, "LAZY_MEMORY", ())  # as on a GPU
    monkeypatch.setattr(parts, "GROUP_BYTES", {"cpu": 2 * 10 * 10 * 4})
    pieces = FisherInverse.from_grads(grads, **options)  # type: ignore[arg-type]
    if form != "dual":
        assert len(pieces.parts) > len(whole.parts)
    assert pieces.num_mended == whole.num_mended
    assert torch.equal(pieces.diag(), whole.diag())
    assert torch.equal(pieces @ grads[0], whole @ grads[0])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_are_not_all(form: str) -> None:
    grads = grads_(20)
    exact = torch.linalg.inv(dense(grads, make().layout.blocks, 30, DAMPING))
    close(make(grads, form=form, num_grads=30) @ torch.eye(70), exact)
    accumulator = FisherAccumulator(make().layout, num_grads=30, num_rows=20, damping=DAMPING, form=form)
    accumulator.add(grads[:7])
    accumulator.add(grads[7:])
    close(accumulator.finish() @ torch.eye(70), exact)
    with pytest.raises(FastFisherError, match="num_rows must be at least 1, got 0"):
        FisherAccumulator(make().layout, num_grads=30, num_rows=0, damping=DAMPING)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("form", FORMS)
def test_several_rows_to_a_gradient(form: str, mode: str) -> None:
    if mode == "relative" and form in ("rank1", "woodbury"):
        pytest.skip("a running inverse needs the damping first")
    grads = grads_(20, rho=1.0)
    damping = DAMPING * float(grads.double().square().sum()) / (4 * 70) if mode == "relative" else DAMPING
    exact = torch.linalg.inv(dense(grads, make().layout.blocks, 4, damping))
    accumulator = FisherAccumulator(
        make().layout, num_grads=4, num_rows=20, damping=DAMPING, damping_mode=mode, form=form
    )
    accumulator.add(grads[:7])
    accumulator.add(grads[7:])
    close(accumulator.finish() @ torch.eye(70), exact)


@pytest.mark.parametrize("form", ["rank1", "woodbury"])
def test_running_inverse_that_cannot_be_mended_raises(form: str) -> None:
    accumulator = FisherAccumulator(
        BlockLayout.from_sizes([30], 10), num_grads=12, damping=DAMPING, form=form
    )
    accumulator.add(mixed())
    with pytest.raises(
        FisherError, match=r"tensor0\[10:20\] \(block 1 of 3\) lost its accuracy.*damping=0.01"
    ):
        accumulator.finish()


def test_accumulator_counts_its_gradients() -> None:
    accumulator = FisherAccumulator(BlockLayout.from_sizes(SIZES, 10), num_grads=12, damping=DAMPING)
    with pytest.raises(FastFisherError, match="num_grads=12 were announced, got only 0"):
        accumulator.finish()
    accumulator.add(grads_(12)[:11])
    with pytest.raises(FastFisherError, match="num_grads=12 were announced, got only 11"):
        accumulator.finish()
    with pytest.raises(FastFisherError, match="num_grads=12 were announced, got 13 so far"):
        accumulator.add(grads_(2))
    with pytest.raises(FastFisherError, match=r"grads must be \[k, 70\], got \[1, 69\]"):
        accumulator.add(torch.ones(1, 69))
    with pytest.raises(FastFisherError, match=r"grads must be torch.float32 as before, got torch.float64"):
        accumulator.add(torch.ones(1, 70, dtype=torch.float64))
    accumulator.add(grads_(12)[11:])
    close(accumulator.finish().diag(), make().diag())


@pytest.mark.parametrize("form", FORMS)
def test_bitwise_equal_when_repeated_and_on_two_threads(form: str) -> None:
    def everything() -> list[Tensor]:
        inverse = FisherInverse.from_grads(
            grads_(40, 2000), block_size=33, damping=0.1, damping_mode="relative", form=form
        )
        one_block = FisherInverse.from_grads(grads_(40, 2000), block_size=None, damping=DAMPING)
        w, keep = torch.linspace(-1, 1, 2000), torch.arange(2000) % 3 > 0
        outs = [
            inverse.diag(),
            inverse @ w,
            inverse.prune_update(w, keep),
            inverse.prune_update(w, keep, "joint"),
        ]
        return [*outs, one_block.diag(), one_block @ w, one_block.prune_update(w, keep, "joint")]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = everything(), everything()
        torch.set_num_threads(2)
        third = everything()
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form: str) -> None:
    inverse = FisherInverse.from_grads(mixed(), block_size=10, damping=DAMPING, form=form)
    file = io.BytesIO()
    torch.save(inverse.state_dict(), file)
    file.seek(0)
    loaded = FisherInverse.from_state_dict(torch.load(file, weights_only=True))
    assert repr(loaded) == repr(inverse)
    assert torch.equal(loaded.diag(), inverse.diag())
    assert torch.equal(loaded @ torch.eye(30), inverse @ torch.eye(30))
    w, keep = torch.linspace(-1, 1, 30), torch.arange(30) % 2 > 0
    assert torch.equal(loaded.prune_update(w, keep, "joint"), inverse.prune_update(w, keep, "joint"))
    state = sum(part["state"].untyped_storage().nbytes() for part in inverse.state_dict()["parts"])
    assert state == sum(part.state.numel() * part.state.element_size() for part in inverse.parts)


def test_gradients_are_left_as_they_are_and_not_shared() -> None:
    for m in (5, 12):
        grads = grads_(m)
        before = grads.clone()
        inverse = make(grads)
        assert torch.equal(grads, before)
        diagonal = inverse.diag()
        grads.fill_(torch.nan)
        assert torch.equal(make(before).diag(), diagonal)
        assert torch.equal(inverse @ torch.ones(70), make(before) @ torch.ones(70))


def test_gradients_that_require_grad_are_detached() -> None:
    assert not make(grads_().requires_grad_()).diag().requires_grad
    assert not (make() @ torch.ones(70, requires_grad=True)).requires_grad


Call = Callable[[], object]
BAD: list[tuple[Call, str]] = [
    (lambda: make(torch.ones(0, 70)), r"grads must be \[k, d\] with every size at least 1, got \[0, 70\]"),
    (lambda: make(torch.ones(70)), r"grads must be \[k, d\] with every size at least 1, got \[70\]"),
    (lambda: make(torch.ones(4, 69)), "sizes must add up to d=69, got 70"),
    (lambda: make(torch.ones(12, 70, dtype=torch.int64)), "grads must be .*got int64"),
    (lambda: make(torch.ones(70, 12).T), r"inner stride 1 .*got strides \[1, 12\]"),
    (lambda: make(block_size=71), "block_size=71 exceeds the 70 weights"),
    (lambda: make(block_size=0), "block_size must be at least 1, got 0"),
    (lambda: make(form="exact"), "form must be one of auto, primal, dual, rank1, woodbury, got 'exact'"),
    (lambda: make(num_grads=11), "num_grads must be at least the 12 rows of grads, got 11"),
    (lambda: make(num_grads=0), "num_grads must be at least the 12 rows of grads, got 0"),
    (lambda: make(damping_mode="mean"), "damping_mode must be one of absolute, relative, got 'mean'"),
    (lambda: FisherInverse.from_grads(grads_(), block_size=5, damping=0), "damping must be positive .*got 0"),
    (lambda: FisherInverse.from_grads(grads_(), block_size=5, damping=-1e-5), "got -1e-05"),
    (lambda: FisherInverse.from_grads(grads_(), block_size=5, damping=float("nan")), "got nan"),
    (
        lambda: make(torch.zeros(4, 70), damping_mode="relative"),
        "positive, finite mean Fisher diagonal, got 0",
    ),
    (
        lambda: FisherInverse.from_grads(
            {"a": torch.ones(3, 2), "b": torch.ones(4, 2)}, block_size=2, damping=1
        ),
        "b must be",
    ),
    (
        lambda: FisherInverse.from_grads({"a": torch.ones(0, 2)}, block_size=2, damping=1),
        r"'a'\] must be \[k, \*shape\]",
    ),
    (
        lambda: FisherInverse.from_grads({"a": torch.ones(3, 2)}, block_size=2, damping=1, sizes=[2]),
        "sizes go with",
    ),
    (lambda: make() @ torch.ones(69), r"v must be \[70\] or \[70, n\], got \[69\]"),
    (lambda: make() @ torch.ones(70, 2, 2), r"v must be .* got \[70, 2, 2\]"),
    (lambda: make() @ torch.ones(70, 0), r"v must be .* got \[70, 0\]"),
    (lambda: make() @ torch.ones(70, dtype=torch.int32), "v must be of a float dtype, got torch.int32"),
    (lambda: make() @ torch.ones(70, device="meta"), "x must be on cpu as state is, got meta"),
    (lambda: make() @ {"tensor0": torch.ones(23)}, "'tensor1' is missing"),
    (lambda: make().saliency(torch.ones(71)), r"weight must be \[70\], got \[71\]"),
    (lambda: make().saliency(torch.ones(70).bfloat16()), "weight must be float32 or float64, got bfloat16"),
    (lambda: make().prune_update(torch.ones(70), torch.ones(70)), "mask must be bool, got float32"),
    (
        lambda: make().prune_update(torch.ones(70), torch.ones(7, dtype=torch.bool)),
        r"mask must be \[70\], got \[7\]",
    ),
    (
        lambda: make().prune_update(torch.ones(70), torch.ones(70, dtype=torch.bool), "all"),
        "sum, joint, got 'all'",
    ),
    (
        lambda: accumulate(grads_(), (12,), form="rank1", damping_mode="relative"),
        "got damping_mode='relative'",
    ),
    (
        lambda: accumulate(grads_(), (12,), dtype=torch.float16),
        "dtype must be float32 or float64, got torch.float16",
    ),
    (lambda: accumulate(torch.ones(0, 70), ()), "num_grads must be at least 1, got 0"),
    (
        lambda: accumulate(torch.ones(4, 70, dtype=torch.int64), (4,)),
        "grads must be of a float dtype, got torch.int64",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(call: Call, message: str) -> None:
    with pytest.raises(FastFisherError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


PEAK = """
import resource, sys, torch
from fastfisher.fisher.inverse import FisherInverse
m, d, B = (int(arg) for arg in sys.argv[1:])
torch.set_num_threads(1)
G = torch.randn(m, d)
FisherInverse.from_grads(G[:, : 8 * B].contiguous(), block_size=B, damping=1e-2).diag()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inverse = FisherInverse.from_grads(G, block_size=B, damping=1e-2)
unit = 1 if sys.platform == "darwin" else 1024
extra = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
state = sum(t.numel() * t.element_size() for p in inverse.parts for t in (p.state, p.factor) if t is not None)
print(inverse.form, inverse.num_mended, extra / state)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is missing on Windows")
@pytest.mark.parametrize(
    ("m", "d", "block_size", "form"), [(100, 400_000, 50, "primal"), (64, 200_000, 1000, "dual")]
)
def test_peak_memory_above_the_gradients(m: int, d: int, block_size: int, form: str) -> None:
    command = [sys.executable, "-c", PEAK, str(m), str(d), str(block_size)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert output[:2] == [form, "0"]
    assert float(output[2]) <= 1.25


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("form", "block_size"), [("primal", 7), ("dual", 7), ("dual", None), ("primal", None)]
)
def test_centered_inverse_is_that_of_the_covariance(form: str, block_size: int | None, mode: str) -> None:
    grads = gradients("independent", 12, 20, rho=10, damping=1e-2) + 0.5
    layout = BlockLayout.from_sizes([20], block_size)
    accumulator = FisherAccumulator(
        layout, num_grads=12, damping=1e-2, damping_mode=mode, form=form, centered=True
    )
    for piece in grads.split(5):
        accumulator.add(piece)
    finv = accumulator.finish()
    mean = grads.double().mean(0)
    torch.testing.assert_close(finv.mean, mean)
    centered = grads.double() - mean
    damping = 1e-2 * (float(centered.square().mean()) if mode == "relative" else 1)
    assert finv.damping == pytest.approx(damping, rel=1e-6)
    for start, stop in layout.blocks.tolist():
        rows = centered[:, start:stop]
        exact = torch.linalg.inv(rows.T @ rows / 12 + damping * torch.eye(stop - start, dtype=torch.float64))
        torch.testing.assert_close(finv.diag()[start:stop].double(), exact.diagonal(), rtol=1e-4, atol=0)


def test_the_mean_gradient_is_kept_where_it_is_asked_for() -> None:
    grads = gradients("independent", 6, 20, rho=10, damping=1e-2)
    layout = BlockLayout.from_sizes([20], 7)
    for wanted in (False, True):
        accumulator = FisherAccumulator(layout, num_grads=6, damping=1e-2, mean=wanted)
        accumulator.add(grads)
        finv = accumulator.finish()
        if wanted:
            torch.testing.assert_close(finv.mean, grads.double().mean(0))
        else:
            assert finv.mean is None


def test_a_running_inverse_cannot_be_centered() -> None:
    layout = BlockLayout.from_sizes([20], 7)
    with pytest.raises(FastFisherError, match="form='rank1' cannot be centered"):
        FisherAccumulator(layout, num_grads=6, damping=1e-2, form="rank1", centered=True)
    with pytest.raises(FastFisherError, match="centered=True needs all num_grads=6 gradients, got 3 rows"):
        FisherAccumulator(layout, num_grads=6, num_rows=3, damping=1e-2, centered=True)
