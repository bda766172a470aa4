"""A Conv1D of transformers, weight [in, out], is pruned as the Linear layer that computes the same."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.fisher.kfac import kfac_factors
from fastfisher.fisher.objective import Objective
from fastfisher.prune.targets import find_targets
from tests.fisher.test_kfac import groups
from tests.prune.models import batches


class Conv1D(nn.Module):
    """The layer of transformers, which is not needed here."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


@pytest.fixture(autouse=True)
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers had been imported."""
    library = ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)


def twins() -> tuple[nn.Sequential, nn.Sequential]:
    """One network in float64, with Linear layers and with Conv1D in place of the first two."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    layers = [Conv1D(m) if i < 3 and isinstance(m, nn.Linear) else m for i, m in enumerate(linear)]
    other = nn.Sequential(*layers)
    other[4] = nn.Linear(4, 3).double()
    other[4].load_state_dict(linear[4].state_dict())
    return linear, other


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (48,), generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac", "sparsity": 0.6, "num_recomputations": 1},
        {"method": "kfac", "sparsity": 0.6, "update": "sum"},
        {"method": "woodfisher", "sparsity": 0.6, "block_size": None},
        {"method": "woodtaylor", "pattern": "2:4"},
        {"method": "woodfisher", "pattern": "block4", "sparsity": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values()))[:40],
)
def test_the_result_is_that_of_the_linear_layer(options: dict[str, Any]) -> None:
    linear, other = twins()
    reports = [
        ff.prune(model, batches(*data(), 8), num_grads=48, damping=0.3, **options)
        for model in (linear, other)
    ]
    assert reports[0].num_zeros == reports[1].num_zeros > 0
    for one, two in ((0, 0), (2, 2), (4, 4)):
        expected, found = linear[one].weight, other[two].weight
        found = found.T if isinstance(other[two], Conv1D) else found
        assert torch.equal(expected == 0, found == 0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_it_is_a_target_and_takes_names_as_others_do() -> None:
    _, model = twins()
    assert list(find_targets(model).parameters) == ["0.weight", "2.weight", "4.weight"]
    assert list(find_targets(model, ignore="0").parameters) == ["2.weight", "4.weight"]


def test_kfac_factors_change_places() -> None:
    linear, other = twins()
    names = ["0.weight", "2.weight", "4.weight"]
    (a, _), (b, _) = (
        kfac_factors(Objective(model, names), groups(*data()), names) for model in (linear, other)
    )
    for name in names[:2]:
        torch.testing.assert_close(a[name], b[name][::-1])
    torch.testing.assert_close(a["4.weight"], b["4.weight"])
    other[2].weight = nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    tied = nn.ModuleDict({"one": nn.Linear(12, 8), "two": other[2]}).double()
    tied["one"].weight = tied["two"].weight
    with pytest.raises(FastFisherError, match="shared by layers of different kinds"):
        kfac_factors(Objective(tied, ["one.weight"]), [], ["one.weight"])
