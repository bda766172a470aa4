"""What only a GPU can show: streams, graphs, devices, and that no call waits.   make test-gpu"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastfisher as ff
from fastfisher import ops, selftest
from tests.cases import gradients
from tests.device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="FASTFISHER_TEST_DEVICE is not cuda")

PROBLEMS = list(selftest.problems())
BACKENDS = ("native", "triton")


def calls() -> Iterator[object]:
    """Every problem of the self-test with every backend that takes it."""
    for op, args in PROBLEMS if DEVICE.type == "cuda" else []:
        there = tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)
        for backend in BACKENDS:
            if ops.OPS[op].why_not(backend, there) is None:
                form = (
                    " dual"
                    if args[0] is not None and "factor" in ops.OPS[op].arguments and args[1] is not None
                    else ""
                )
                yield pytest.param(op, args, backend, id=f"{op}{form}-{backend}-{len(args[0])}")  # type: ignore[arg-type]


def asynchronous() -> list[object]:
    """The calls that never wait for the device; the dual form of obs_eliminate asks it for its largest block."""
    return [call for call in calls() if not call.id.startswith("obs_eliminate dual")]  # type: ignore[attr-defined]


def moved(args: list[object], device: torch.device = DEVICE) -> list[object]:
    """Copies of the arguments on a device."""
    return [arg.to(device, copy=True) if isinstance(arg, Tensor) else arg for arg in args]


def run(op: str, args: list[object], backend: str) -> None:
    """One call of an op."""
    with ops.use_backend(backend):
        getattr(torch.ops.fastfisher, op)(*args)


def outputs(op: str, args: list[object]) -> list[Tensor]:
    """What the call wrote."""
    return [args[i] for i in ops.OPS[op].written]  # type: ignore[misc]


def expect_same(one: list[Tensor], two: list[Tensor]) -> None:
    """Bitwise equal."""
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize(("op", "args", "backend"), asynchronous())
def test_nothing_waits_for_the_device(op: str, args: list[object], backend: str) -> None:
    run(op, moved(args), backend)  # compiles and loads
    there = moved(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, there, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op", "args", "backend"), asynchronous())
def test_inside_a_cuda_graph(op: str, args: list[object], backend: str) -> None:
    expected, captured = moved(args), moved(args)
    run(op, expected, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(op, moved(args), backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(op, captured, backend)
    for _ in range(2):
        for i in ops.OPS[op].written:
            captured[i].copy_(args[i])  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize()
        expect_same(outputs(op, captured), outputs(op, expected))


@pytest.mark.parametrize(("op", "args", "backend"), list(calls()))
def test_on_a_stream_behind_other_work(op: str, args: list[object], backend: str) -> None:
    expected, late = moved(args), moved(args)
    run(op, expected, backend)
    hold = {i: arg.clone() for i, arg in enumerate(late) if isinstance(arg, Tensor)}
    for i in hold:
        late[i].zero_()  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for i, value in hold.items():
            late[i].copy_(value)  # type: ignore[attr-defined]
        run(op, late, backend)
    side.synchronize()
    expect_same(outputs(op, late), outputs(op, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize(("op", "args", "backend"), list(calls()))
def test_on_a_second_device(op: str, args: list[object], backend: str) -> None:
    expected, there = moved(args), moved(args, torch.device("cuda", 1))
    run(op, expected, backend)
    run(op, there, backend)
    assert torch.cuda.current_device() == 0
    expect_same(outputs(op, there), outputs(op, expected))


@pytest.mark.parametrize("form", ["auto", "rank1", "woodbury"])
@pytest.mark.parametrize(
    ("num_grads", "block_size"), [(64, 8), (64, 50), (300, 100), (300, 200), (40, 300), (20, None)]
)
def test_inverse_follows_the_device(num_grads: int, block_size: int | None, form: str) -> None:
    grads = gradients("correlated", num_grads, 650, rho=1e3, damping=1e-2)
    sizes = [400, 250]
    here = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=1e-2, form=form, sizes=sizes)
    there = ff.FisherInverse.from_grads(
        grads.to(DEVICE), block_size=block_size, damping=1e-2, form=form, sizes=sizes
    )
    assert there.diag().is_cuda
    torch.testing.assert_close(there.diag().cpu(), here.diag(), rtol=2e-4, atol=0)
    v = torch.randn(650, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((there @ v.to(DEVICE)).cpu(), here @ v, rtol=1e-3, atol=1e-3)
    keep = torch.rand(650, generator=torch.Generator().manual_seed(1)) > 0.4
    for update in ("sum", "joint"):
        expected = here.prune_update(v, keep, update=update)
        got = there.prune_update(v.to(DEVICE), keep.to(DEVICE), update=update).cpu()
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
        assert torch.equal(got == 0, ~keep)


@pytest.mark.parametrize("block_size", [50, 300])
def test_diagonal_alone_is_that_of_the_inverse(block_size: int) -> None:
    grads = gradients("deficient", 120, 650, rho=1e5, damping=1e-2).to(DEVICE)
    inverse = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=1e-2)
    diagonal = ff.inverse_diagonal(grads, block_size=block_size, damping=1e-2)
    torch.testing.assert_close(diagonal, inverse.diag(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(("num_grads", "block_size"), [(300, 50), (40, 300)])
def test_gradients_stream_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, num_grads: int, block_size: int, pinned: bool
) -> None:
    monkeypatch.setattr("fastfisher.fisher.streaming.PIECE_BYTES", 7 * 650 * 4)  # 7 gradients at a time
    grads = gradients("independent", num_grads, 650, rho=10, damping=1e-2)
    expected = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=1e-2)
    if pinned:
        grads = grads.pin_memory()
    streamed = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=1e-2, device=DEVICE)
    assert streamed.device.type == "cuda"
    torch.testing.assert_close(streamed.diag().cpu(), expected.diag(), rtol=2e-4, atol=0)


def network() -> torch.nn.Module:
    """A convolution and a linear layer, 1,656 weights, the same ones every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    """128 examples for it."""
    torch.manual_seed(1)
    return [(torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,))) for _ in range(4)]


KINDS = ("diagonal", "block", "kron", "block-kron", "full")
WAYS = [
    {"block_size": 32},
    {"block_size": 32, "update": "joint"},
    {"block_size": 32, "update": "greedy"},
    {"block_size": 300},
    {"block_size": 32, "method": "woodtaylor"},
    {"block_size": 32, "pattern": "1:3", "sparsity": None},
    {"method": "kfac"},
    {"method": "diagonal"},
    *({"method": "fishleg", "fishleg": {"parameterization": kind}} for kind in KINDS),
    {"method": "fishleg", "fishleg": {"parameterization": "block", "aux": "sampled"}},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_pruning_follows_the_model(way: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    # a relative change of 1e-4 in the images moves a tenth of WoodTaylor's mask, and TF32 is coarser
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pruned, losses = [], []
    for device in (torch.device("cpu"), DEVICE):
        model = network().to(device)
        report = ff.prune(model, batches(), num_grads=128, **{"sparsity": 0.7, **way})  # type: ignore[arg-type]
        assert report.num_zeros == round((2 / 3 if "pattern" in way else 0.7) * (216 + 1440))
        pruned.append(torch.cat([p.detach().cpu().flatten() == 0 for p in model.parameters()]))
        with torch.no_grad():
            found = [
                torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device)) for x, y in batches()
            ]
        losses.append(float(torch.stack(found).mean()))
    assert (pruned[0] != pruned[1]).float().mean() < 0.03  # gradients of the two differ by rounding
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("method", ["woodfisher", "fishleg"])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_pruning_while_training_in_half_precision(method: str, precision: torch.dtype) -> None:
    model = network().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    pruner = ff.Pruner(model, schedule=[(0, 0.5), (1, 0.8)], method=method, num_grads=64)
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
    for epoch in range(3):
        pruner.step(batches(), epoch=epoch)
        for x, y in batches():
            with torch.autocast("cuda", dtype=precision):
                loss = torch.nn.functional.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert sum(int((m.weight == 0).sum()) for m in (model[0], model[3])) == round(0.8 * (216 + 1440))


def test_semi_structured_weights_multiply_like_the_dense_ones() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    model = model.to(DEVICE, torch.float16)
    ff.prune(model, None, method="magnitude", pattern="2:4")
    x = torch.randn(64, 128, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        expected = model(x)
        assert ff.to_semi_structured(model).converted == ["0.weight", "2.weight"]
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
