"""Bad input to every op: one sentence with the value, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FastFisherError

BLOCKS = torch.tensor([[0, 4], [4, 7]])


def valid() -> dict[str, dict[str, object]]:
    """Arguments of every op by name: 7 weights, 2 blocks of up to 4, 3 gradients of 5."""
    state = torch.eye(4).repeat(2, 1, 1)
    grads = torch.ones(3, 7)
    factor = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    condition = torch.zeros(2, dtype=torch.float64)
    w, keep = torch.ones(7), torch.ones(7, dtype=torch.bool)
    build = {
        "grads": grads,
        "blocks": BLOCKS,
        "num_grads": 5,
        "condition": condition,
        "amplification": condition.clone(),
        "damping": 0.1,
    }
    either = {"state": state, "factor": None, "blocks": BLOCKS, "damping": 0.1}
    return {
        "sherman_morrison_": {"f_inv": state, "grads": grads, "blocks": BLOCKS, "num_grads": 5},
        "woodbury_": {"f_inv": state, "grads": grads, "blocks": BLOCKS, "num_grads": 5},
        "fisher_accumulate_": {"fisher": state, "grads": grads, "blocks": BLOCKS, "num_grads": 5},
        "fishleg_block_step_": {
            "root": state,
            "top": torch.ones(2, 4),
            "grads": grads,
            "blocks": BLOCKS,
            "num_grads": 5,
            "damping": 0.1,
            "rate": 1.0,
            "loss": torch.zeros(2, dtype=torch.float64),
            "largest": torch.zeros(2, dtype=torch.float64),
        },
        "spd_inverse_": {
            "matrix": state,
            "damping": 0.0,
            "condition": condition,
            "amplification": condition.clone(),
        },
        "inverse_from_grads": {"f_inv": state, **build},
        "inverse_diagonal_from_grads": {"inv_diag": torch.zeros(7), "block_size": 4, **build},
        "fisher_vector_product": {
            "grads": grads,
            "blocks": BLOCKS,
            "num_grads": 5,
            "x": torch.ones(7, 2),
            "out": torch.zeros(7, 2),
        },
        "dual_factor_": {
            "factor": factor,
            "grads": grads,
            "blocks": BLOCKS,
            "num_grads": 5,
            "damping": 0.1,
            "condition": condition,
        },
        "inverse_diagonal": {**either, "out": torch.zeros(7)},
        "block_matvec": {**either, "x": torch.ones(7, 2), "out": torch.zeros(7, 2)},
        "obs_eliminate": {
            "weight": w,
            **either,
            "groups": None,
            "keep": 0,
            "together": 1,
            "order": torch.zeros(7, dtype=torch.int64),
            "loss": torch.zeros(7, dtype=torch.float64),
            "failed": torch.zeros(2, dtype=torch.bool),
        },
        "factor_diagonal": {"root": state, "blocks": BLOCKS, "out": torch.zeros(7)},
        "block_factor_matvec": {
            "root": state,
            "blocks": BLOCKS,
            "x": torch.ones(7, 2),
            "out": torch.zeros(7, 2),
        },
        "factor_downdate_": {"root": state, "blocks": BLOCKS, "mask": keep},
        "kron_matvec": {
            "left": torch.ones(2, 3, 3),
            "right": torch.ones(2, 4, 4),
            "scale": torch.ones(2, 3, 4),
            "x": torch.ones(5, 2, 3, 4),
            "out": torch.zeros(5, 2, 3, 4),
        },
        "conv_weight_grads": {
            "rows": torch.zeros(2, 6, 2, 3, 3),
            "x": torch.ones(2, 4, 5, 6),
            "grad": torch.ones(2, 6, 5, 3),
            "stride": (1, 2),
            "padding": (1, 1),
            "dilation": (1, 1),
            "groups": 2,
        },
        "obs_saliency": {"weight": w, "inv_diag": torch.ones(7), "out": torch.zeros(7)},
        "prune_mask": {
            "saliency": w,
            "dead": ~keep,
            "num_zeros": 3,
            "mask": keep.clone(),
            "invalid": torch.zeros(1, dtype=torch.int64),
        },
        "obs_update_": {"weight": w, **either, "inv_diag": torch.ones(7), "mask": keep},
        "obs_solve_": {
            "weight": w,
            **either,
            "num_grads": 5,
            "mask": keep,
            "failed": torch.zeros(2, dtype=torch.bool),
        },
    }


def dual() -> dict[str, object]:
    """What turns a primal call into a dual one."""
    return {"state": torch.ones(3, 7), "factor": torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)}


Change = Callable[[], dict[str, object]]
META = "meta"

# op, what is changed, what the message says
BAD: list[tuple[str, Change, str]] = [
    ("sherman_morrison_", lambda: {"f_inv": torch.ones(2, 4)}, r"f_inv must be \[K, B, B\], got \[2, 4\]"),
    (
        "sherman_morrison_",
        lambda: {"f_inv": torch.ones(2, 4, 5)},
        r"f_inv must be \[K, B, B\], got \[2, 4, 5\]",
    ),
    ("sherman_morrison_", lambda: {"f_inv": torch.ones(0, 4, 4)}, r"size at least 1, got \[0, 4, 4\]"),
    (
        "woodbury_",
        lambda: {"f_inv": torch.ones(2, 4, 4, dtype=torch.float16)},
        "float32 or float64, got float16",
    ),
    ("woodbury_", lambda: {"f_inv": torch.ones(2, 4, 8)[..., ::2]}, r"f_inv must be contiguous, got strides"),
    ("woodbury_", lambda: {"f_inv": torch.ones(2, 4, 4).to_sparse()}, "f_inv must be a dense tensor"),
    ("fisher_accumulate_", lambda: {"grads": torch.ones(7)}, r"grads must be \[k, d\], got \[7\]"),
    ("fisher_accumulate_", lambda: {"grads": torch.ones(0, 7)}, r"size at least 1, got \[0, 7\]"),
    ("fisher_accumulate_", lambda: {"grads": torch.ones(7, 3).T}, r"inner stride 1 .*got strides \[1, 3\]"),
    (
        "fisher_accumulate_",
        lambda: {"grads": torch.ones(3, 7, dtype=torch.int32)},
        "grads must be .*got int32",
    ),
    ("fisher_accumulate_", lambda: {"grads": torch.ones(3, 6)}, r"within \[0, 6\), got \[0, 7\)"),
    (
        "fisher_accumulate_",
        lambda: {"grads": torch.ones(3, 7, device=META)},
        "grads must be on cpu .*got meta",
    ),
    (
        "fisher_accumulate_",
        lambda: {"blocks": torch.ones(2, 3, dtype=torch.int64)},
        r"\[K, 2\], got \[2, 3\]",
    ),
    ("fisher_accumulate_", lambda: {"blocks": BLOCKS[:1]}, r"blocks must be \[2, 2\], got \[1, 2\]"),
    ("fisher_accumulate_", lambda: {"blocks": BLOCKS.int()}, "blocks must be int64, got int32"),
    ("fisher_accumulate_", lambda: {"blocks": BLOCKS.T.contiguous().T}, "blocks must be contiguous"),
    (
        "fisher_accumulate_",
        lambda: {"blocks": torch.tensor([[0, 5], [5, 7]])},
        r"hold 1 to 4 weights, got \[0, 5\]",
    ),
    ("fisher_accumulate_", lambda: {"blocks": torch.tensor([[0, 4], [4, 4]])}, r"blocks\[1\] .*got \[4, 4\]"),
    (
        "fisher_accumulate_",
        lambda: {"blocks": torch.tensor([[-1, 3], [4, 7]])},
        r"within \[0, 7\), got \[-1, 7\)",
    ),
    (
        "fisher_accumulate_",
        lambda: {"blocks": torch.tensor([[0, 4], [3, 7]])},
        r"disjoint, got \[0, 4\] before \[3, 7",
    ),
    (
        "fisher_accumulate_",
        lambda: {"blocks": torch.tensor([[4, 7], [0, 4]])},
        r"disjoint, got \[4, 7\] before \[0, 4",
    ),
    ("fisher_accumulate_", lambda: {"num_grads": 0}, "num_grads must be at least 1, got 0"),
    ("spd_inverse_", lambda: {"matrix": torch.ones(2, 0, 0)}, r"size at least 1, got \[2, 0, 0\]"),
    ("spd_inverse_", lambda: {"condition": torch.zeros(3, dtype=torch.float64)}, r"must be \[2\], got \[3\]"),
    ("spd_inverse_", lambda: {"condition": torch.zeros(2)}, "condition must be float64, got float32"),
    (
        "spd_inverse_",
        lambda: {"condition": torch.zeros(4, dtype=torch.float64)[::2]},
        "condition must be contiguous",
    ),
    ("spd_inverse_", lambda: {"damping": -1.0}, "damping must be at least 0 and finite, got -1.0"),
    ("spd_inverse_", lambda: {"amplification": torch.zeros(2)}, "amplification must be float64, got float32"),
    ("inverse_from_grads", lambda: {"f_inv": torch.ones(1, 4, 4)}, r"blocks must be \[1, 2\], got \[2, 2\]"),
    ("inverse_from_grads", lambda: {"damping": 0.0}, "damping must be positive and finite, got 0.0"),
    ("inverse_from_grads", lambda: {"num_grads": 0}, "num_grads must be at least 1, got 0"),
    ("inverse_diagonal_from_grads", lambda: {"block_size": 0}, "block_size must be at least 1, got 0"),
    ("inverse_diagonal_from_grads", lambda: {"block_size": 3}, r"hold 1 to 3 weights, got \[0, 4\]"),
    (
        "inverse_diagonal_from_grads",
        lambda: {"inv_diag": torch.zeros(8)},
        r"grads must be \[k, 8\], got \[3, 7\]",
    ),
    (
        "fisher_vector_product",
        lambda: {"x": torch.ones(8, 2), "out": torch.ones(8, 2)},
        r"\[k, 8\], got \[3, 7\]",
    ),
    ("fisher_vector_product", lambda: {"num_grads": 0}, "num_grads must be at least 1, got 0"),
    ("prune_mask", lambda: {"num_zeros": 8}, "num_zeros must be 0 to 7, got 8"),
    ("prune_mask", lambda: {"num_zeros": -1}, "num_zeros must be 0 to 7, got -1"),
    ("prune_mask", lambda: {"dead": torch.zeros(7)}, "dead must be bool, got float32"),
    ("prune_mask", lambda: {"invalid": torch.zeros(1)}, "invalid must be int64, got float32"),
    (
        "dual_factor_",
        lambda: {"factor": torch.zeros(2, 4, 4, dtype=torch.float64)},
        r"\[2, 3, 3\], got \[2, 4, 4\]",
    ),
    ("dual_factor_", lambda: {"factor": torch.zeros(2, 3, 3)}, "factor must be float64, got float32"),
    ("dual_factor_", lambda: {"damping": 0.0}, "damping must be positive and finite, got 0.0"),
    ("dual_factor_", lambda: {"damping": -1.0}, "damping must be positive and finite, got -1.0"),
    ("dual_factor_", lambda: {"damping": float("nan")}, "damping must be positive and finite, got nan"),
    ("dual_factor_", lambda: {"damping": float("inf")}, "damping must be positive and finite, got inf"),
    ("dual_factor_", lambda: {"num_grads": 0}, "num_grads must be at least 1, got 0"),
    ("inverse_diagonal", lambda: {"out": torch.zeros(6)}, r"within \[0, 6\), got \[0, 7\)"),
    ("inverse_diagonal", lambda: {"out": torch.zeros(7, 1)}, r"out must be \[d\], got \[7, 1\]"),
    ("inverse_diagonal", lambda: {"out": torch.zeros(7, dtype=torch.bfloat16)}, "out must be .*got bfloat16"),
    ("inverse_diagonal", lambda: {"out": torch.zeros(14)[::2]}, "out must be contiguous"),
    (
        "inverse_diagonal",
        lambda: {**dual(), "state": torch.ones(3, 8)},
        r"state must be \[k, 7\] .*got \[3, 8\]",
    ),
    (
        "inverse_diagonal",
        lambda: {**dual(), "factor": torch.eye(3).repeat(2, 1, 1)},
        "factor must be float64",
    ),
    ("inverse_diagonal", lambda: {**dual(), "damping": 0.0}, "damping must be positive and finite, got 0.0"),
    ("block_matvec", lambda: {"x": torch.ones(7)}, r"x must be \[d, n\], got \[7\]"),
    ("block_matvec", lambda: {"x": torch.ones(7, 0)}, r"size at least 1, got \[7, 0\]"),
    ("block_matvec", lambda: {"x": torch.ones(2, 7).T}, "x must be contiguous"),
    (
        "block_matvec",
        lambda: {"x": torch.ones(7, 2, dtype=torch.float64)},
        "out must be float64, got float32",
    ),
    ("block_matvec", lambda: {"out": torch.zeros(7, 3)}, r"out must be \[7, 2\], got \[7, 3\]"),
    (
        "block_matvec",
        lambda: {**dual(), "blocks": BLOCKS[:1]},
        r"factor must be \[1, 3, 3\], got \[2, 3, 3\]",
    ),
    ("obs_saliency", lambda: {"weight": torch.ones(0)}, r"size at least 1, got \[0\]"),
    ("obs_saliency", lambda: {"inv_diag": torch.ones(6)}, r"inv_diag must be \[7\], got \[6\]"),
    ("obs_saliency", lambda: {"out": torch.zeros(7, dtype=torch.int64)}, "out must be .*got int64"),
    (
        "obs_update_",
        lambda: {"weight": torch.ones(7).half()},
        "weight must be float32 or float64, got float16",
    ),
    ("obs_update_", lambda: {"inv_diag": torch.ones(1)}, r"inv_diag must be \[7\], got \[1\]"),
    ("obs_update_", lambda: {"mask": torch.ones(7)}, "mask must be bool, got float32"),
    ("obs_update_", lambda: {"mask": torch.ones(8, dtype=torch.bool)}, r"mask must be \[7\], got \[8\]"),
    (
        "obs_update_",
        lambda: {"mask": torch.ones(7, dtype=torch.bool, device=META)},
        "mask must be on cpu .*got meta",
    ),
    ("obs_update_", lambda: {"weight": torch.ones(7).requires_grad_()}, "weight is written .*requires grad"),
    ("obs_solve_", lambda: {"failed": torch.zeros(3, dtype=torch.bool)}, r"failed must be \[2\], got \[3\]"),
    ("obs_solve_", lambda: {"failed": torch.zeros(2)}, "failed must be bool, got float32"),
    ("obs_eliminate", lambda: {"order": torch.zeros(7)}, "order must be int64, got float32"),
    ("obs_eliminate", lambda: {"loss": torch.zeros(7)}, "loss must be float64, got float32"),
    (
        "obs_eliminate",
        lambda: {"groups": torch.zeros(6, dtype=torch.int64)},
        r"groups must be \[7\], got \[6\]",
    ),
    ("obs_eliminate", lambda: {"keep": -1}, "keep must be at least 0, got -1"),
    ("obs_eliminate", lambda: {"together": 0}, "together must be at least 1, got 0"),
    (
        "obs_eliminate",
        lambda: {"groups": torch.zeros(7, dtype=torch.int64), "together": 2},
        "together must be 1 with them, got 2",
    ),
    ("fishleg_block_step_", lambda: {"top": torch.ones(2, 3)}, r"top must be \[2, 4\], got \[2, 3\]"),
    ("fishleg_block_step_", lambda: {"top": torch.ones(2, 4).double()}, "top must be float32, got float64"),
    ("fishleg_block_step_", lambda: {"damping": 0.0}, "damping must be positive and finite, got 0"),
    ("fishleg_block_step_", lambda: {"rate": 0.0}, r"rate must be in \(0, 1\], got 0"),
    ("fishleg_block_step_", lambda: {"rate": 1.5}, r"rate must be in \(0, 1\], got 1.5"),
    ("fishleg_block_step_", lambda: {"loss": torch.zeros(2)}, "loss must be float64, got float32"),
    ("factor_diagonal", lambda: {"root": torch.ones(2, 4, 3)}, r"root must be \[K, B, B\], got \[2, 4, 3\]"),
    ("factor_diagonal", lambda: {"out": torch.zeros(6)}, r"within \[0, 6\), got \[0, 7\)"),
    ("block_factor_matvec", lambda: {"out": torch.zeros(7, 3)}, r"out must be \[7, 2\], got \[7, 3\]"),
    ("factor_downdate_", lambda: {"mask": torch.ones(7)}, "mask must be bool, got float32"),
    ("kron_matvec", lambda: {"x": torch.ones(5, 2, 4, 3)}, r"x must be \[n, 2, 3, 4\], got \[5, 2, 4, 3\]"),
    ("kron_matvec", lambda: {"left": torch.ones(2, 4, 4)}, r"left must be \[2, 3, 3\], got \[2, 4, 4\]"),
    ("kron_matvec", lambda: {"right": torch.ones(2, 4, 4).double()}, "right must be float32, got float64"),
    ("conv_weight_grads", lambda: {"rows": torch.zeros(2, 6, 2, 9)}, r"kernel\], got \[2, 6, 2, 9\]"),
    (
        "conv_weight_grads",
        lambda: {"rows": torch.zeros(0, 6, 2, 3, 3)},
        r"size at least 1, got \[0, 6, 2, 3, 3\]",
    ),
    (
        "conv_weight_grads",
        lambda: {"rows": torch.zeros(200).as_strided((2, 6, 2, 3, 3), (50, 18, 9, 3, 1))},
        "samples of 108 numbers, .* 50 numbers from one to the next",
    ),
    (
        "conv_weight_grads",
        lambda: {"x": torch.ones(2, 2, 5, 6)},
        r"x must be \[2, 4, H, W\], got \[2, 2, 5, 6\]",
    ),
    ("conv_weight_grads", lambda: {"groups": 4}, "groups must divide the 6 output channels of rows, got 4"),
    (
        "conv_weight_grads",
        lambda: {"stride": (0, 1)},
        r"stride must be two numbers of at least 1, got \[0, 1\]",
    ),
    ("conv_weight_grads", lambda: {"padding": (1,)}, r"padding must be two numbers of at least 0, got \[1\]"),
    ("conv_weight_grads", lambda: {"stride": (1, 1)}, r"grad must be \[2, 6, 5, 6\], got \[2, 6, 5, 3\]"),
    (
        "conv_weight_grads",
        lambda: {"grad": torch.ones(2, 6, 5, 3).double()},
        "grad must be float32, got float64",
    ),
    ("conv_weight_grads", lambda: {"x": torch.ones(2, 4, 5, 12)[..., ::2]}, "x must be contiguous"),
    ("obs_solve_", lambda: {**dual(), "num_grads": 0}, "num_grads must be at least 1, got 0"),
]


def call(op: str, args: dict[str, object]) -> None:
    """The op with arguments by name."""
    getattr(torch.ops.fastfisher, op)(*(args[name] for name in ops.OPS[op].arguments))


@pytest.mark.parametrize("op", list(ops.OPS))
def test_valid_arguments_pass(op: str) -> None:
    call(op, valid()[op])
    if "factor" in valid()[op]:
        call(op, {**valid()[op], **({} if op == "dual_factor_" else dual())})


@pytest.mark.parametrize(
    ("op", "change", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_argument_is_named_and_nothing_is_written(op: str, change: Change, message: str) -> None:
    args = {**valid()[op], **change()}
    tensors = {name: arg for name, arg in args.items() if isinstance(arg, Tensor) and not arg.is_meta}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with pytest.raises(FastFisherError, match=message) as caught:
        call(op, args)
    assert "\n" not in str(caught.value)
    for name, tensor in tensors.items():
        assert tensor.layout is not torch.strided or torch.equal(tensor, before[name])


@pytest.mark.parametrize("op", list(ops.OPS))
def test_written_tensor_may_not_share_memory_with_another(op: str) -> None:
    for i in ops.OPS[op].written:
        name = ops.OPS[op].arguments[i]
        for other, arg in valid()[op].items():
            args = valid()[op]
            target = args[name]
            assert isinstance(target, Tensor)
            if other == name or not isinstance(arg, Tensor):
                continue
            room = torch.zeros(4096, dtype=torch.uint8)
            used = target.numel() * target.element_size()
            # the last byte of the one lies in the first number of the other
            offset = (used - 1) // 8 * 8
            args[name] = room[:used].view(target.dtype).view(target.shape).copy_(target)
            size = arg.numel() * arg.element_size()
            args[other] = room[offset : offset + size].view(arg.dtype).view(arg.shape)
            if other != "blocks":
                args[other].copy_(arg)
            with pytest.raises(FastFisherError, match=r"must not overlap .* in memory|blocks"):
                call(op, args)


def test_neighbours_in_one_storage_do_not_overlap() -> None:
    room = torch.ones(21)
    ops.obs_saliency(room[:7], room[7:14], out=room[14:])
    assert torch.equal(room[14:], torch.full((7,), 0.5))


def test_gradients_beside_each_other_in_rows_are_read_in_place() -> None:
    wide = torch.arange(30.0).reshape(3, 10)
    state, expected = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    ops.fisher_accumulate_(state, wide[:, 2:9], BLOCKS, 3)
    ops.fisher_accumulate_(expected, wide[:, 2:9].contiguous(), BLOCKS, 3)
    assert torch.equal(state, expected)
