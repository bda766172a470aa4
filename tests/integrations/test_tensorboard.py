"""The figures of a gradual run in TensorBoard: written by the real SummaryWriter, read back from its event files."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastfisher as ff
from tests.prune.models import batches, classifier, images

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


@pytest.mark.filterwarnings("ignore:no optimizer is attached")
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_events_are_read_back(tmp_path: Path, unit: str) -> None:
    data = batches(*images(48), 16)
    with SummaryWriter(str(tmp_path)) as writer:
        pruner = ff.Pruner(
            classifier(), schedule=[(10, 0.5), (30, 0.8)], num_grads=16, block_size=16, writer=writer
        )
        for when in range(0, 50, 10):
            pruner.step(data, **{unit: when})
            pruner.record({"accuracy": when / 80}, **{unit: when})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    one, two = pruner.reports
    expected = {
        "fastfisher/accuracy": [(when, when / 80) for when in range(0, 50, 10)],
        "fastfisher/sparsity": [(10, one.num_zeros / 666), (30, two.num_zeros / 666)],
        "fastfisher/loss before pruning": [(10, one.loss_dense), (30, two.loss_dense)],
        "fastfisher/loss after pruning": [(10, one.loss_pruned), (30, two.loss_pruned)],
    }
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [when for when, _ in found[tag]] == [when for when, _ in points]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6)
