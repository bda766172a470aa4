"""Which tensors a pattern picks, and the sentences for those that pick nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastfisher.errors import FastFisherError
from fastfisher.prune.targets import find_targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer1 = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3))
        self.layer2 = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.LayerNorm(4))
        self.head = nn.Linear(4, 6)
        self.free = nn.Parameter(torch.zeros(3, 3))


LAYERS = ["layer1.0.weight", "layer1.2.weight", "layer2.0.weight", "head.weight"]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (None, None, LAYERS),
        (None, "head", LAYERS[:3]),
        (None, ["layer?.0"], ["layer1.2.weight", "head.weight"]),
        (None, "layer1", ["layer2.0.weight", "head.weight"]),
        ("head", None, ["head.weight"]),
        ("head.weight", None, ["head.weight"]),
        ("head.bias", None, ["head.bias"]),
        (["layer1"], None, ["layer1.0.weight", "layer1.2.weight"]),
        ("layer*.0", None, ["layer1.0.weight", "layer2.0.weight"]),
        ("layer*.0.weight", None, ["layer1.0.weight", "layer2.0.weight"]),
        (["embedding", "free"], None, ["free", "embedding.weight"]),
        ("*", None, ["free", "embedding.weight", *LAYERS]),
        ("*", "*.0", ["free", "embedding.weight", "layer1.2.weight", "head.weight"]),
        ("layer1.1.weight", None, ["layer1.1.weight"]),
    ],
)
def test_patterns(
    targets: str | list[str] | None, ignore: str | list[str] | None, expected: list[str]
) -> None:
    found = find_targets(Net(), targets, ignore)
    assert list(found.parameters) == expected
    assert found.num_weights == sum(p.numel() for p in found.parameters.values())


def test_a_pattern_without_a_match_names_its_neighbours() -> None:
    message = "targets=['layer1.3'] matched none of 14 tensors. Closest: 'layer1.2', 'layer1.0', 'layer2.0'."
    with pytest.raises(FastFisherError, match="^" + re.escape(message) + "$"):
        find_targets(Net(), ["head", "layer1.3"])
    with pytest.raises(
        FastFisherError, match=r"ignore=\['heed'\] matched none of 14 tensors\. Closest: 'head'"
    ):
        find_targets(Net(), ignore="heed")


def test_frozen_parameters_are_listed_and_left_alone() -> None:
    model = Net()
    model.layer1.requires_grad_(False)
    found = find_targets(model)
    assert found.frozen == ["layer1.0.weight", "layer1.2.weight"]
    assert list(found.parameters) == LAYERS[2:]
    model.requires_grad_(False)
    with pytest.raises(FastFisherError, match=r"all 4 matched tensors are frozen .*'layer1.0.weight'"):
        find_targets(model)


def test_tied_weights_come_once_by_identity_or_by_memory() -> None:
    model = Net()
    model.head.weight = model.embedding.weight
    found = find_targets(model)
    assert "head.weight" not in found.parameters
    assert found.aliases["embedding.weight"] == ("embedding.weight", "head.weight")
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    assert find_targets(model, "head").aliases == {"embedding.weight": ("embedding.weight", "head.weight")}
    model.head.weight.requires_grad_(False)
    assert find_targets(model).frozen == ["embedding.weight"]


def test_overlapping_memory_in_another_layout_is_refused() -> None:
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 4)])
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    with pytest.raises(
        FastFisherError, match=r"'0\.weight' and '1\.weight' share memory in different layouts"
    ):
        find_targets(model)


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(FastFisherError, match=r"must be a torch.nn.Module, got dict"):
        find_targets({})  # type: ignore[arg-type]
    with pytest.raises(FastFisherError, match="the model ReLU has no parameters"):
        find_targets(nn.ReLU())
    with pytest.raises(FastFisherError, match="none of the 2 tensors is to be pruned; give targets"):
        find_targets(nn.BatchNorm1d(3))
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(model.weight.detach().to(torch.complex64))
    with pytest.raises(FastFisherError, match=r"'weight' has dtype torch\.complex64"):
        find_targets(model)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(FastFisherError, match=r"the targets lie on cpu \('0.weight'\) and meta"):
        find_targets(model)
