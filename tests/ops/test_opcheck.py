"""torch.library.opcheck and torch.compile(fullgraph=True) over every op, and what meta tensors do."""

from __future__ import annotations

import pytest
import torch

from fastfisher import ops
from tests.cases import Case
from tests.ops.test_conformance import ROWS, Row, available, run, same

CASE = Case("opcheck", (23, 9), 10, num_rows=6, num_grads=7)


def arguments(row: Row) -> list[object]:
    """Arguments without NaN: opcheck compares with allclose, which takes NaN for a difference."""
    args = row.make(CASE, torch.float32)
    return [
        arg.nan_to_num(1) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    ]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_opcheck(row: Row, backend: str) -> None:
    args = arguments(row)
    available(row, backend, args)
    with ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.fastfisher, row.op).default, tuple(args))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_compiled_is_bitwise_the_same(row: Row) -> None:
    args = arguments(row)
    op = getattr(torch.ops.fastfisher, row.op)
    torch.compiler.reset()  # every row is another graph, and dynamo keeps a few of one function only

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args: object) -> None:
        op(*args)

    expected = run(row, args, "reference")
    with ops.use_backend("reference"):
        compiled(*args)
    for i, out in zip(ops.OPS[row.op].written, expected, strict=True):
        assert same(args[i], out)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_meta_tensors_are_checked_and_nothing_runs(row: Row) -> None:
    args = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments(row)]
    getattr(torch.ops.fastfisher, row.op)(*args)
    names = ops.OPS[row.op].arguments
    one = next(name for name in ("condition", "inv_diag", "x", "dead", "blocks") if name in names)
    args[names.index(one)] = args[names.index(one)][1:]  # type: ignore[index]
    with pytest.raises(ValueError, match="must be"):
        getattr(torch.ops.fastfisher, row.op)(*args)


def test_compiled_public_function() -> None:
    state, grads, blocks = torch.eye(4).repeat(2, 1, 1), torch.ones(3, 8), torch.tensor([[0, 4], [4, 8]])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inverse_diagonal(state: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        ops.sherman_morrison_(state, grads, blocks, 3)
        out = torch.empty(8)
        ops.inverse_diagonal(state, blocks, out=out)
        return out

    torch.testing.assert_close(inverse_diagonal(state, grads), torch.full((8,), 1 - 1 / 5))
