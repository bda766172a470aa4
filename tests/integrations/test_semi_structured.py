"""2:4 zeros to torch's semi-structured weights.

torch converts on a GPU only.  Here CPU tensors say that they are on one, so that torch's own conversion runs, that for
CUTLASS, which is written in PyTorch; products need the GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.integrations import semi_structured

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors that claim to be on a GPU, and the conversion that runs on either."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)


def two_of_four(model: nn.Module) -> nn.Module:
    """The model with 2:4 zeros in all weights that can take them."""
    ff.prune(model, None, method="magnitude", pattern="2:4")
    return model


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 128), nn.Linear(128, 64), nn.Linear(64, 10)
    )


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_fits_becomes_sparse_bit_for_bit(dtype: torch.dtype) -> None:
    model = two_of_four(network()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    found = ff.to_semi_structured(model)
    assert found.converted == ["0.weight", "3.weight"]
    assert found.left == {
        "2.weight": "its shape [128, 32] is no multiple of [32, 64], which torch's kernels need",
        "4.weight": "its shape [10, 64] is no multiple of [32, 64], which torch's kernels need",
    }
    assert str(found).startswith("2 weights converted, 2 left\n  2.weight: its shape")
    for name in found.converted:
        weight = model.get_parameter(name)
        assert isinstance(weight, SparseSemiStructuredTensor)
        assert not weight.requires_grad
        assert torch.equal(weight.to_dense(), before[name])
    for name in set(before) - set(found.converted):
        assert torch.equal(model.state_dict()[name], before[name])
    with pytest.raises(FastFisherError, match=r"first, '0.weight': it is semi-structured already"):
        ff.to_semi_structured(model)


@pytest.mark.usefixtures("on_gpu")
def test_what_does_not_fit_is_named() -> None:
    class Own(nn.Linear):
        pass

    tied, transposed = nn.Linear(64, 64), nn.Linear(64, 64)
    other = nn.Linear(64, 64)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {"ok": nn.Linear(64, 64), "own": Own(64, 64), "tied": tied, "other": other, "gaps": transposed}
    )
    two_of_four(model).half()
    transposed.weight = nn.Parameter(transposed.weight.detach().T.contiguous().T)
    model["wide"] = two_of_four(nn.Sequential(nn.Linear(64, 64)))[0]  # float32
    model["dense"] = nn.Linear(64, 64).half()
    with torch.no_grad():
        model["dense"].weight[1:] = 0
    found = ff.to_semi_structured(model)
    assert found.converted == ["ok.weight"]
    assert {name: why.split(",")[0] for name, why in found.left.items()} == {
        "own.weight": "Own is no plain nn.Linear and may use its weight otherwise",
        "tied.weight": "it is shared with another layer",
        "other.weight": "it is shared with another layer",
        "gaps.weight": "it does not lie contiguously in memory",
        "wide.weight": "it is torch.float32",
        "dense.weight": "16 of its 1",
    }
    assert found.left["dense.weight"] == "16 of its 1,024 groups of 4 inputs hold more than 2 nonzeros"


@pytest.mark.usefixtures("on_gpu")
def test_torch_loses_weights_of_float32_which_is_why_they_are_left() -> None:
    model = two_of_four(nn.Sequential(nn.Linear(64, 64)))
    weight = model[0].weight.detach()
    assert not torch.equal(torch.sparse.to_sparse_semi_structured(weight).to_dense(), weight)
    with pytest.raises(FastFisherError, match=r"2:4 products need float16 or bfloat16; call model.half\(\)"):
        ff.to_semi_structured(model)


def test_a_model_on_the_cpu_is_told_so() -> None:
    model = two_of_four(network()).half()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(
        FastFisherError, match=r"'0.weight': it is on cpu, and torch has 2:4 products on CUDA GPUs"
    ):
        ff.to_semi_structured(model)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(FastFisherError, match=r"the model has no nn\.Linear"):
        ff.to_semi_structured(nn.Conv2d(4, 4, 1))


@pytest.mark.usefixtures("on_gpu")
def test_when_torch_refuses_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_of_four(network()).half()
    convert, calls = semi_structured.to_sparse_semi_structured, []

    def second_fails(weight: torch.Tensor) -> torch.Tensor:
        calls.append(weight)
        if len(calls) == 2:
            raise RuntimeError("needs compute\ncapability 8.0")
        return convert(weight)

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", second_fails)
    with pytest.raises(
        FastFisherError, match=r"torch does not convert '3.weight': needs compute capability 8.0"
    ):
        ff.to_semi_structured(model)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.usefixtures("on_gpu")
def test_save_says_that_it_comes_too_late(tmp_path: Path) -> None:
    model = two_of_four(network()).half()
    ff.to_semi_structured(model)
    with pytest.raises(
        FastFisherError, match=r"'0.weight' is semi-structured; save the model before ff.to_semi"
    ):
        ff.save(model, tmp_path / "model.safetensors")


def test_shapes_are_those_of_the_library_that_torch_calls() -> None:
    assert semi_structured._multiples(torch.float16) == (16, 16)
