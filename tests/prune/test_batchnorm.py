"""Statistics of BatchNorm layers: the data's own, with everything else as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from tests.prune.models import assert_same, batches, classifier, images, picture


def test_statistics_are_those_of_the_data() -> None:
    model = classifier()
    model.train()
    norm = model[1]
    norm.momentum = 0.3
    norm.num_batches_tracked.fill_(7)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    inputs, labels = images(40)
    assert ff.reestimate_batchnorm(model, batches(inputs, labels, 8), batch_size=20) == 1
    seen = model[0](inputs).detach()  # [40, 4, 5, 5]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    halves = [half.var((0, 2, 3)) for half in seen.split(20)]
    torch.testing.assert_close(norm.running_var, (halves[0] + halves[1]) / 2)
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.3, 7)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_only_as_many_samples_as_wanted_are_read() -> None:
    def stream() -> Any:
        yield images(8)
        yield images(8, seed=2)
        raise AssertionError("read too far")

    model = classifier()
    ff.reestimate_batchnorm(model, stream(), num_samples=12)
    inputs = torch.cat([images(8)[0], images(8, seed=2)[0][:4]])
    torch.testing.assert_close(model[1].running_mean, model[0](inputs).detach().mean((0, 2, 3)))


def test_a_failure_leaves_the_statistics_as_they_were() -> None:
    model = classifier()
    before = picture(model)
    calls = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        ff.reestimate_batchnorm(model, batches(*images(20), 10), batch_size=10, forward=forward)
    assert_same(before, picture(model))
    with pytest.raises(FastFisherError, match="the data yield no sample"):
        ff.reestimate_batchnorm(model, [])
    assert_same(before, picture(model))


def test_networks_without_statistics_are_left_alone() -> None:
    assert ff.reestimate_batchnorm(nn.Linear(3, 2), []) == 0
    free = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert ff.reestimate_batchnorm(free, [torch.randn(4, 3)]) == 0


def test_dictionaries_and_plain_tensors_are_batches_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x = torch.randn(9, 3)
    for batch in ({"x": x}, x):
        model = Named()
        assert ff.reestimate_batchnorm(model, [batch]) == 1
        torch.testing.assert_close(model.norm.running_mean, x.mean(0))
        torch.testing.assert_close(model.norm.running_var, x.var(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "num_samples must be None or at least 1; got 0"), ({"batch_size": 1}, "got 1")],
)
def test_bad_input_is_one_sentence(options: dict[str, int], message: str) -> None:
    with pytest.raises(FastFisherError, match=message):
        ff.reestimate_batchnorm(classifier(), batches(*images(8), 4), **options)
