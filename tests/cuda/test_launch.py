"""What the CUDA half of the native backend takes, why it refuses the rest, and that its calls fit the extension."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastfisher.kernels import cuda, native


class OnGpu(Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def arguments(op: str, size: int, dtype: torch.dtype = torch.float32) -> list[object]:
    """One block of this size, as the schema of the op lists its arguments."""
    state, grads = torch.eye(size, dtype=dtype)[None].as_subclass(OnGpu), torch.ones(1, size)
    blocks, estimates = torch.tensor([[0, size]]), torch.zeros(2, 1, dtype=torch.float64)
    top = torch.ones(1, size, dtype=dtype)
    mask, failed = torch.zeros(size, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    return {
        "spd_inverse_": [state, 0.1, *estimates],
        "sherman_morrison_": [state, grads, blocks, 1],
        "woodbury_": [state, grads, blocks, 1],
        "fisher_accumulate_": [state, grads, blocks, 1],
        "fishleg_block_step_": [state, top, grads, blocks, 1, 0.1, 1.0, *estimates],
        "obs_solve_": [state[0, 0], state, None, blocks, 1, 0.1, mask, failed],
        "inverse_from_grads": [state, grads, blocks, 1, 0.1, *estimates],
        "inverse_diagonal_from_grads": [state[0, 0], grads, blocks, size, 1, 0.1, *estimates],
    }[op]


OPS = tuple(cuda.BLOCK_SIZE)
# The ops that hold any block of up to 256 weights in float32, and 176 in float64.
WHOLE = (
    "spd_inverse_",
    "sherman_morrison_",
    "woodbury_",
    "inverse_from_grads",
    "inverse_diagonal_from_grads",
)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A build for two architectures, on a GPU of the older one."""
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(cuda_spd_inverse=None))
    monkeypatch.setattr(cuda, "_build_info", SimpleNamespace(CUDA_REASON="", CUDA_ARCHS=("80", "90a")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(shared_memory_per_multiprocessor=164 << 10),
    )
    monkeypatch.setattr(torch.version, "hip", None)
    cuda._device_reason.cache_clear()
    yield
    cuda._device_reason.cache_clear()


@pytest.mark.usefixtures("capability")
def test_sizes_that_fit() -> None:
    for op in WHOLE:
        for dtype, size in ((torch.float32, 256), (torch.float64, 176), (torch.float32, 9)):
            assert cuda.why_not(op, *arguments(op, size, dtype)) is None
        for dtype, size in ((torch.float32, 256), (torch.float64, 176)):
            reason = cuda.why_not(op, *arguments(op, size + 1, dtype))
            name = str(dtype).removeprefix("torch.")
            assert reason == f"a block of {name} fits on chip up to B = {size}, got {size + 1}"
    for op in OPS:
        smallest = 5 if op == "spd_inverse_" else 9
        assert cuda.why_not(op, *arguments(op, smallest)) is None
        reason = cuda.why_not(op, *arguments(op, smallest - 1))
        assert reason == f"it is for B >= {smallest}, got {smallest - 1}"


@pytest.mark.usefixtures("capability")
def test_calls_that_are_not_for_cuda() -> None:
    reason = "it is for float32, the matrix units of float64 are Triton's"
    assert cuda.why_not("fisher_accumulate_", *arguments("fisher_accumulate_", 50, torch.float64)) == reason
    assert cuda.why_not("fisher_accumulate_", *arguments("fisher_accumulate_", 257)) is not None
    for dtype in (torch.float32, torch.float64):
        step = arguments("fishleg_block_step_", 65, dtype)
        assert str(cuda.why_not("fishleg_block_step_", *step)).endswith("fits on chip up to B = 64, got 65")
        assert cuda.why_not("obs_solve_", *arguments("obs_solve_", 176, dtype)) is None
        solve = arguments("obs_solve_", 177, dtype)
        reason = "a block of float64 fits on chip up to B = 176, got 177"
        assert cuda.why_not("obs_solve_", *solve) == reason
    dual = arguments("obs_solve_", 50)
    dual[2] = torch.eye(1)[None]
    assert cuda.why_not("obs_solve_", *dual) == "it has no kernel for the dual form"
    mixed = [torch.ones(50, dtype=torch.float64), *arguments("obs_solve_", 50)[1:]]
    reason = "it takes weights of the dtype of the inverse, got torch.float64 and torch.float32"
    assert cuda.why_not("obs_solve_", *mixed) == reason


@pytest.mark.usefixtures("capability")
def test_sums_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(shared_memory_per_multiprocessor=100 << 10),
    )
    for op in cuda.SUMMING:
        assert cuda.why_not(op, *arguments(op, 128)) is None
        reason = cuda.why_not(op, *arguments(op, 200))
        assert reason == "it takes 160 KiB of shared memory, a multiprocessor of this GPU has 100"
    assert cuda.why_not("sherman_morrison_", *arguments("sherman_morrison_", 200)) is None


@pytest.mark.usefixtures("capability")
def test_older_and_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("spd_inverse_", 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "it was built for compute capability 8.0, this GPU has 7.5"
    assert cuda.why_not("spd_inverse_", *args) == reason
    cuda._device_reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert cuda.why_not("spd_inverse_", *args) == "it runs on GPUs of NVIDIA"


@pytest.mark.usefixtures("capability")
def test_a_build_without_cuda_repeats_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_native", SimpleNamespace())
    monkeypatch.setattr(cuda, "_build_info", SimpleNamespace(CUDA_REASON="no CUDA toolkit was found"))
    reason = "the extension has no CUDA kernels (no CUDA toolkit was found)"
    assert cuda.build_reason() == cuda.why_not("spd_inverse_", *arguments("spd_inverse_", 20)) == reason
    monkeypatch.setattr(cuda, "_build_info", None)
    assert cuda.build_reason() == "the extension has no CUDA kernels (it is missing or of an older build)"


def test_gpu_tensors_are_judged_by_the_cuda_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not", lambda op, *args: f"asked for {op}")
    for op in OPS:
        assert native._also_on_gpu(op)(*arguments(op, 200)) == f"asked for {op}"
    assert native._also_on_gpu("spd_inverse_")(torch.eye(3)[None], 0.1) == native.why_not()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be handed addresses of the CPU")
@pytest.mark.parametrize("op", OPS)
def test_calls_fit_the_extension(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.build_reason():
        pytest.skip(cuda.build_reason())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(device_index=0, cuda_stream=0)
    )
    functions = {
        "spd_inverse_": native._spd_inverse,
        "sherman_morrison_": native._sherman_morrison,
        "woodbury_": native._woodbury,
        "fisher_accumulate_": native._fisher_accumulate,
        "fishleg_block_step_": native._fishleg_block_step,
        "obs_solve_": native._obs_solve,
        "inverse_from_grads": native._inverse_from_grads,
        "inverse_diagonal_from_grads": native._inverse_diagonal_from_grads,
    }
    # Arguments of the wrong kind would raise a TypeError; what is missing here is only the driver.
    with pytest.raises(RuntimeError, match="CUDA: "):
        functions[op](*arguments(op, 150))
