"""The `native` backend: hands addresses, shapes and dtypes of checked tensors to the kernels of csrc/, C++ and CUDA.

The extension knows nothing of torch; what a kernel computes and which letters it uses stands in csrc/cpu/kernels.h and
csrc/cuda/kernels.h.  Where the extension is absent, or a call is not its kind (device, dtype), `why_not` says so in a
sentence; so does cuda.py for the ops that also run on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fastfisher import environment
from fastfisher.errors import FastFisherError
from fastfisher.kernels import cuda
from fastfisher.ops._registry import WhyNot, implement
from fastfisher.ops.threads import kernel_threads

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # ff::DType


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastfisher._native"), ""
    except ImportError as error:
        return None, f"the extension fastfisher._native cannot be imported ({error})"


_native, load_error = _load()


def isas() -> list[str]:
    """Instruction sets in this build that this processor runs, best first; empty without the extension."""
    return _native.isas() if _native else []


@lru_cache(maxsize=8)
def _usable_isa(asked: str | None) -> str:
    names = isas()
    if asked is not None and asked not in names:
        raise FastFisherError(
            f"{environment.ISA.name}={asked} is not available here; available: {', '.join(names)}"
        )
    return asked or names[0]


def selected_isa() -> str:
    """The instruction set in force: FASTFISHER_ISA, else the best one.  Raises FastFisherError if unavailable."""
    return _usable_isa(environment.isa())


def advise_huge_pages(tensor: Tensor) -> None:
    """Hint that fresh CPU memory should come in huge pages; its first touch then costs about a third."""
    if _native is not None and tensor.device.type == "cpu":
        _native.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def fill_zero(tensor: Tensor) -> bool:
    """Write zeros into contiguous CPU memory; False where the extension cannot."""
    if _native is None or tensor.device.type != "cpu":
        return False
    _native.fill_zero(kernel_threads(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return True


def why_not(*args: object) -> str | None:
    """None when the kernels can run on these arguments, else the reason."""
    if _native is None:
        return load_error
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.device.type != "cpu":
                return f"it runs on CPU tensors, got one on {arg.device}"
            if arg.is_floating_point() and arg.dtype not in DTYPE_CODES:
                return f"it has no kernel for {arg.dtype}"
    return None


def _also_on_gpu(op: str) -> WhyNot:
    """The predicate of an op with a CUDA kernel; its first argument tells where a call runs."""

    def either(*args: object) -> str | None:
        on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
        return cuda.why_not(op, *args) if on_gpu else why_not(*args)

    return either


def _kernel(name: str, written: Tensor | None = None) -> Callable[..., None]:
    """The C++ function, bound to the instruction set and the number of threads in force.

    written: given by the ops that also run on a GPU; on one, it is the CUDA function of that name instead.
    """
    if written is not None and written.is_cuda:
        return cuda.kernel(name, written.device)
    isa, threads = selected_isa(), kernel_threads()
    function = getattr(_native, name)
    return lambda *args: function(isa, threads, *args)


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64


def _grads(grads: Tensor) -> object:
    assert _native is not None
    return _native.Gradients(grads.data_ptr(), DTYPE_CODES[grads.dtype], grads.shape[0], grads.stride(0))


def _blocks(blocks: Tensor, block_size: int) -> object:
    assert _native is not None
    return _native.Blocks(blocks.data_ptr(), blocks.shape[0], block_size)


def _widest(*tensors: Tensor | None) -> torch.dtype:
    """The one dtype a kernel computes in when its arguments come in several: float32 or float64."""
    return torch.float64 if any(t is not None and _is_double(t) for t in tensors) else torch.float32


def _longest(blocks: Tensor) -> int:
    return int((blocks[:, 1] - blocks[:, 0]).max())


@implement("sherman_morrison_", "native", _also_on_gpu("sherman_morrison_"))
def _sherman_morrison(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    _kernel("sherman_morrison", f_inv)(
        _is_double(f_inv), f_inv.data_ptr(), _grads(grads), _blocks(blocks, f_inv.shape[-1]), num_grads
    )


@implement("woodbury_", "native", _also_on_gpu("woodbury_"))
def _woodbury(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    # on a GPU one gradient after the other is faster, and the same to rounding
    _kernel("sherman_morrison" if f_inv.is_cuda else "woodbury", f_inv)(
        _is_double(f_inv), f_inv.data_ptr(), _grads(grads), _blocks(blocks, f_inv.shape[-1]), num_grads
    )


@implement("fishleg_block_step_", "native", _also_on_gpu("fishleg_block_step_"))
def _fishleg_block_step(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    _kernel("fishleg_block_step", root)(
        _is_double(root),
        root.data_ptr(),
        top.data_ptr(),
        _grads(grads),
        _blocks(blocks, root.shape[-1]),
        num_grads,
        damping,
        rate,
        loss.data_ptr(),
        largest.data_ptr(),
    )


@implement("fisher_accumulate_", "native", _also_on_gpu("fisher_accumulate_"))
def _fisher_accumulate(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    _kernel("fisher_accumulate", fisher)(
        _is_double(fisher), fisher.data_ptr(), _grads(grads), _blocks(blocks, fisher.shape[-1]), num_grads
    )


@implement("spd_inverse_", "native", _also_on_gpu("spd_inverse_"))
def _spd_inverse(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    _kernel("spd_inverse", matrix)(
        _is_double(matrix),
        matrix.data_ptr(),
        matrix.shape[0],
        matrix.shape[-1],
        damping,
        condition.data_ptr(),
        amplification.data_ptr(),
    )


@implement("inverse_from_grads", "native", _also_on_gpu("inverse_from_grads"))
def _inverse_from_grads(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    _kernel("inverse_from_grads", f_inv)(
        _is_double(f_inv),
        f_inv.data_ptr(),
        0,
        _grads(grads),
        _blocks(blocks, f_inv.shape[-1]),
        num_grads,
        damping,
        condition.data_ptr(),
        amplification.data_ptr(),
    )


@implement("inverse_diagonal_from_grads", "native", _also_on_gpu("inverse_diagonal_from_grads"))
def _inverse_diagonal_from_grads(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    _kernel("inverse_from_grads", inv_diag)(
        _is_double(inv_diag),
        0,
        inv_diag.data_ptr(),
        _grads(grads),
        _blocks(blocks, block_size),
        num_grads,
        damping,
        condition.data_ptr(),
        amplification.data_ptr(),
    )


@implement("fisher_vector_product", "native", why_not)
def _fisher_vector_product(grads: Tensor, blocks: Tensor, num_grads: int, x: Tensor, out: Tensor) -> None:
    _kernel("fisher_vector_product")(
        _is_double(out),
        out.data_ptr(),
        x.data_ptr(),
        x.shape[1],
        _grads(grads),
        _blocks(blocks, _longest(blocks)),
        num_grads,
    )


@implement("dual_factor_", "native", why_not)
def _dual_factor(
    factor: Tensor, grads: Tensor, blocks: Tensor, num_grads: int, damping: float, condition: Tensor
) -> None:
    _kernel("dual_factor")(
        factor.data_ptr(),
        _grads(grads),
        _blocks(blocks, _longest(blocks)),
        num_grads,
        damping,
        condition.data_ptr(),
    )


@implement("inverse_diagonal", "native", why_not)
def _inverse_diagonal(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, out: Tensor
) -> None:
    if factor is not None:
        dual = (_grads(state), factor.data_ptr(), damping, _blocks(blocks, _longest(blocks)))
        _kernel("inverse_diagonal_dual")(_is_double(out), out.data_ptr(), *dual)
        return
    dtype = _widest(state, out)
    state, result = state.to(dtype), out.to(dtype)
    _kernel("inverse_diagonal")(
        _is_double(result), result.data_ptr(), state.data_ptr(), _blocks(blocks, state.shape[-1])
    )
    if result is not out:
        out.copy_(result)


@implement("block_matvec", "native", why_not)
def _block_matvec(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, x: Tensor, out: Tensor
) -> None:
    columns = x.shape[1]
    if factor is not None:
        dual = (_grads(state), factor.data_ptr(), damping, _blocks(blocks, _longest(blocks)))
        _kernel("block_matvec_dual")(_is_double(out), out.data_ptr(), x.data_ptr(), columns, *dual)
        return
    dtype = _widest(state, out)
    state, x, result = state.to(dtype), x.to(dtype), out.to(dtype)
    _kernel("block_matvec")(
        _is_double(result),
        result.data_ptr(),
        x.data_ptr(),
        columns,
        state.data_ptr(),
        _blocks(blocks, state.shape[-1]),
    )
    if result is not out:
        out.copy_(result)


@implement("factor_diagonal", "native", why_not)
def _factor_diagonal(root: Tensor, blocks: Tensor, out: Tensor) -> None:
    dtype = _widest(root, out)
    root, result = root.to(dtype), out.to(dtype)
    _kernel("factor_diagonal")(
        _is_double(result), result.data_ptr(), root.data_ptr(), _blocks(blocks, root.shape[-1])
    )
    if result is not out:
        out.copy_(result)


@implement("block_factor_matvec", "native", why_not)
def _block_factor_matvec(root: Tensor, blocks: Tensor, x: Tensor, out: Tensor) -> None:
    dtype = _widest(root, out)
    root, x, result = root.to(dtype), x.to(dtype), out.to(dtype)
    _kernel("block_factor_matvec")(
        _is_double(result),
        result.data_ptr(),
        x.data_ptr(),
        x.shape[1],
        root.data_ptr(),
        _blocks(blocks, root.shape[-1]),
    )
    if result is not out:
        out.copy_(result)


@implement("factor_downdate_", "native", why_not)
def _factor_downdate(root: Tensor, blocks: Tensor, mask: Tensor) -> None:
    _kernel("factor_downdate")(
        _is_double(root), root.data_ptr(), _blocks(blocks, root.shape[-1]), mask.data_ptr()
    )


@implement("kron_matvec", "native", why_not)
def _kron_matvec(left: Tensor, right: Tensor, scale: Tensor, x: Tensor, out: Tensor) -> None:
    _kernel("kron_matvec")(
        _is_double(x),
        out.data_ptr(),
        left.data_ptr(),
        right.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        *x.shape,
    )


@implement("conv_weight_grads", "native", why_not)
def _conv_weight_grads(
    rows: Tensor,
    x: Tensor,
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    k, out, channels, *kernel = rows.shape
    _kernel("conv_weight_grads")(
        _is_double(x),
        rows.data_ptr(),
        rows.stride(0),
        x.data_ptr(),
        grad.data_ptr(),
        k,
        groups,
        channels,
        out // groups,
        [x.shape[2:], grad.shape[2:], kernel, stride, padding, dilation],
        not x.is_contiguous(),
        not grad.is_contiguous(),
    )


@implement("obs_saliency", "native", why_not)
def _obs_saliency(weight: Tensor, inv_diag: Tensor, out: Tensor) -> None:
    dtype = _widest(weight, inv_diag, out)
    weight, inv_diag, result = weight.to(dtype), inv_diag.to(dtype), out.to(dtype)
    _kernel("obs_saliency")(
        _is_double(result), result.data_ptr(), weight.data_ptr(), inv_diag.data_ptr(), weight.numel()
    )
    if result is not out:
        out.copy_(result)


@implement("prune_mask", "native", why_not)
def _prune_mask(saliency: Tensor, dead: Tensor, num_zeros: int, mask: Tensor, invalid: Tensor) -> None:
    _kernel("prune_mask")(
        _is_double(saliency),
        mask.data_ptr(),
        invalid.data_ptr(),
        saliency.data_ptr(),
        dead.data_ptr(),
        saliency.numel(),
        num_zeros,
    )


@implement("obs_update_", "native", why_not)
def _obs_update(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    inv_diag: Tensor,
    mask: Tensor,
) -> None:
    dtype = _widest(weight, inv_diag, state if factor is None else None)
    updated, inv_diag = weight.to(dtype), inv_diag.to(dtype)
    if factor is None:
        state = state.to(dtype)
        _kernel("obs_update")(
            _is_double(updated),
            updated.data_ptr(),
            state.data_ptr(),
            inv_diag.data_ptr(),
            updated.numel(),
            _blocks(blocks, state.shape[-1]),
            mask.data_ptr(),
        )
    else:
        _kernel("obs_update_dual")(
            _is_double(updated),
            updated.data_ptr(),
            _grads(state),
            factor.data_ptr(),
            damping,
            inv_diag.data_ptr(),
            updated.numel(),
            _blocks(blocks, _longest(blocks)),
            mask.data_ptr(),
        )
    if updated is not weight:
        weight.copy_(updated)


@implement("obs_eliminate", "native", why_not)
def _obs_eliminate(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    groups: Tensor | None,
    keep: int,
    together: int,
    order: Tensor,
    loss: Tensor,
    failed: Tensor,
) -> None:
    written = (order.data_ptr(), loss.data_ptr(), failed.data_ptr())
    rules = (0 if groups is None else groups.data_ptr(), keep, together)
    if factor is not None:
        ranges = _blocks(blocks, _longest(blocks))
        dual = (weight.data_ptr(), _grads(state), factor.data_ptr(), damping, ranges)
        _kernel("obs_eliminate_dual")(_is_double(weight), *written, *dual, *rules)
        return
    dtype = _widest(weight, state)
    weight, state = weight.to(dtype), state.to(dtype)
    primal = (weight.data_ptr(), state.data_ptr(), _blocks(blocks, state.shape[-1]))
    _kernel("obs_eliminate")(_is_double(weight), *written, *primal, *rules)


@implement("obs_solve_", "native", _also_on_gpu("obs_solve_"))
def _obs_solve(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    mask: Tensor,
    failed: Tensor,
) -> None:
    if factor is not None:
        _kernel("obs_solve_dual")(
            _is_double(weight),
            weight.data_ptr(),
            _grads(state),
            _blocks(blocks, _longest(blocks)),
            num_grads,
            damping,
            mask.data_ptr(),
            failed.data_ptr(),
        )
        return
    dtype = _widest(weight, state)
    updated, state = weight.to(dtype), state.to(dtype)
    _kernel("obs_solve", updated)(
        _is_double(updated),
        updated.data_ptr(),
        state.data_ptr(),
        _blocks(blocks, state.shape[-1]),
        mask.data_ptr(),
        failed.data_ptr(),
    )
    if updated is not weight:
        weight.copy_(updated)
