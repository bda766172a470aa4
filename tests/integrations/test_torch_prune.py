"""Plain zeros and torch's masks say the same, and the way there and back changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import fastfisher as ff
from fastfisher.errors import FastFisherError
from tests.prune.models import classifier, images


def pruned(seed: int = 0) -> nn.Module:
    """A network with zeros in the weights of some layers, and a bias of zeros."""
    model = classifier(seed).eval()
    with torch.no_grad():
        for name in ("0.weight", "8.weight"):
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand(weight.shape) < 0.7, 0)
        model.get_parameter("8.bias").zero_()
    return model


def test_there_and_back_is_the_same_model() -> None:
    model = pruned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = images(4)[0]
    output = model(inputs)
    parameters = {id(parameter): parameter.data_ptr() for parameter in model.parameters()}
    assert ff.to_torch_masks(model) == ["0.weight", "8.weight"]
    assert {name for name, _ in model.named_buffers() if name.endswith("_mask")} == {
        "0.weight_mask",
        "8.weight_mask",
    }
    assert torch.equal(model[0].weight_mask, (before["0.weight"] != 0).float())
    assert torch_prune.is_pruned(model)
    assert torch.equal(model(inputs), output)
    assert ff.from_torch_masks(model) == ["0.weight", "8.weight"]
    assert not torch_prune.is_pruned(model)
    assert {id(parameter): parameter.data_ptr() for parameter in model.parameters()} == parameters
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    copy.deepcopy(model)


def test_masks_of_torch_become_exact_zeros() -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 1] = torch.inf, -3
    mask = torch.rand(5, 6) < 0.5
    mask[0, 0] = mask[1, 1] = False
    dense = layer.weight.detach().clone()
    torch_prune.custom_from_mask(layer, "weight", mask)
    torch_prune.l1_unstructured(layer, "bias", 2)
    bias = layer.bias.detach().clone()
    assert sorted(ff.from_torch_masks(layer)) == ["bias", "weight"]
    assert torch.equal(layer.weight, torch.where(mask, dense, 0))
    assert torch.equal(layer.bias, bias)
    assert not torch.signbit(layer.weight[~mask]).any()
    assert list(layer._forward_pre_hooks) == []
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert list(layer.named_buffers()) == []


def test_repeated_pruning_of_torch_is_read_as_its_product() -> None:
    layer = nn.Linear(10, 10)
    torch_prune.random_unstructured(layer, "weight", 0.5)
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    product = layer.weight.detach().clone()
    ff.from_torch_masks(layer)
    assert torch.equal(layer.weight, product)
    assert int((layer.weight == 0).sum()) == 75


def test_masked_weights_stay_zero_while_training_and_tied_ones_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    model[2].weight = model[0].weight
    weight = model[0].weight
    assert ff.to_torch_masks(model) == ["0.weight", "2.weight"]
    assert model[0].weight_orig is model[2].weight_orig is weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert len(ff.from_torch_masks(model)) == 2
    assert model[0].weight is model[2].weight is weight
    assert torch.equal(weight == 0, (torch.arange(6) % 2 == 0).expand(6, 6))


def test_one_parameter_under_two_masks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    torch_prune.custom_from_mask(model[0], "weight", torch.eye(4))
    torch_prune.custom_from_mask(model[1], "weight", 1 - torch.eye(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        FastFisherError, match=r"'0\.weight' and '1\.weight' are one parameter under different masks"
    ):
        ff.from_torch_masks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_go_to_the_targets_alone() -> None:
    model = pruned()
    assert ff.to_torch_masks(model, ignore="8") == ["0.weight"]
    with pytest.raises(FastFisherError, match=r"'0\.weight' has a mask already"):
        ff.to_torch_masks(model)
    ff.from_torch_masks(model)
    assert ff.from_torch_masks(model) == []
    assert ff.to_torch_masks(model, targets=["8.bias"]) == ["8.bias"]
    assert ff.to_torch_masks(nn.Linear(3, 3)) == []
