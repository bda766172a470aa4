"""Blocks that are worked on in groups, one after the other, give what they give at once, wherever the rest waits."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastfisher as ff
from fastfisher.errors import DoesNotFitError
from fastfisher.fisher import offload
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.prune import pruner
from fastfisher.prune.groups import Storage, cut
from fastfisher.prune.plan import choose_storage
from fastfisher.prune.settings import Settings
from tests.prune.models import batches, classifier, images

WAYS = [
    Storage(3, "recomputed", "rebuilt", visits=2),
    Storage(3, "recomputed", "stored", "file", visits=2),
    Storage(3, "stored", "rebuilt", "file", visits=2),
    Storage(3, "stored", "stored", "memory", visits=2),
    Storage(50, "stored", "stored", "file", visits=2),  # of one block each
]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"num_recomputations": 0},
    "dual": {"num_recomputations": 1, "num_grads": 12},
    "steps": {"num_recomputations": 2},
    "sum": {"update": "sum", "num_recomputations": 0, "grad_batch_size": 2, "num_grads": 16},
    "layers": {"scope": "layer", "update": None, "num_recomputations": 0},
    "diagonal": {"method": "diagonal"},
    "woodtaylor": {"method": "woodtaylor", "num_recomputations": 1},
    "centered": {"method": "woodtaylor", "centered": True, "num_recomputations": 0},
    "absolute": {"damping_mode": "absolute", "damping": 1e-3, "num_recomputations": 0},
    "exact": {"fisher_type": "exact", "num_recomputations": 0},
    "bf16": {"grad_dtype": "bfloat16", "num_recomputations": 0},
    "2:4": {"pattern": "2:4", "sparsity": None, "num_recomputations": 0},
    "block4": {"pattern": "block4", "num_recomputations": 0},
    "caps": {"max_layer_sparsity": {"3": 0.3}, "num_recomputations": 0},
    "flops": {"cost": "flops", "num_recomputations": 0},
}

DEFAULTS: dict[str, Any] = {
    "sparsity": 0.5,
    "method": "woodfisher",
    "scope": "global",
    "block_size": 100,
    "num_grads": 1000,
    "grad_batch_size": 1,
    "damping": 0.1,
    "damping_mode": "relative",
    "update": "joint",
    "seed": 0,
}


def run(options: dict[str, Any], data: Any = None) -> tuple[nn.Module, ff.Report]:
    model = classifier(dtype=torch.float64)
    given: dict[str, Any] = {"sparsity": 0.6, "block_size": 16, "num_grads": 32, **options}
    report = ff.prune(model, data or batches(*images(32, dtype=torch.float64), 8), **given)
    return model, report


@functools.cache
def at_once(case: str) -> tuple[nn.Module, ff.Report]:
    return run(CASES[case])


PAIRS = [
    pytest.param(case, WAYS[(i + j) % len(WAYS)], id=f"{case}-{i + j}")
    for i, case in enumerate(CASES)
    for j in ((0, 2, 3, 4) if case in ("steps", "woodtaylor") else (0, 2))
]


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_groups_give_what_all_blocks_at_once_give(
    monkeypatch: pytest.MonkeyPatch, case: str, way: Storage
) -> None:
    whole, expected = at_once(case)
    monkeypatch.setattr(pruner, "checked_plan", lambda *args, **kwargs: (way.groups, 1 << 30))
    monkeypatch.setattr(pruner, "storage_for", lambda *args, **kwargs: way)
    model, report = run(CASES[case])
    assert any(f"{way.groups} groups of blocks in turn" in note for note in report.notes)
    assert report.num_zeros == expected.num_zeros
    assert report.damping_used == pytest.approx(expected.damping_used, rel=1e-12)
    assert report.form == expected.form
    for (name, found), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found == 0, other == 0), name
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-11)


def test_gradients_that_are_not_finite_are_the_same_in_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = images(40, dtype=torch.float64)
    inputs[3] = torch.nan
    inputs[11, 0, 0, 0] = torch.inf
    data = batches(inputs, labels, 8)
    for num_grads in (32, 40):  # with others in their place, and without
        whole, expected = run({"num_grads": num_grads, "num_recomputations": 0}, data)
        with monkeypatch.context() as patch:
            patch.setattr(pruner, "checked_plan", lambda *args, **kwargs: (4, 1 << 30))
            patch.setattr(pruner, "storage_for", lambda *args, **kwargs: Storage(4, visits=2))
            model, report = run({"num_grads": num_grads, "num_recomputations": 0}, data)
        assert report.non_finite_grads == expected.non_finite_grads == 2
        for found, other in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-11)


def test_a_memory_limit_makes_groups_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 10))
    data = [(torch.randn(300, 100), torch.randint(10, (300,)))]
    options: dict[str, Any] = {"sparsity": 0.5, "num_grads": 300, "block_size": 100, "num_recomputations": 0}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole = ff.plan(model, data, **options)
    limit = whole.peak_bytes // 3
    plan = ff.plan(model, data, memory_limit=limit, **options)
    assert plan.storage.groups > 1
    assert plan.peak_bytes <= limit
    assert str(plan.storage) in str(plan)
    ff.prune(model, data, **options)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    report = ff.prune(model, data, memory_limit=limit, **options)
    assert any("groups of blocks in turn" in note for note in report.notes)
    differ = sum(int(((model.state_dict()[n] == 0) != (expected[n] == 0)).sum()) for n in expected)
    assert differ <= 20  # equal but for rounding in float32


def test_what_waits_in_a_file_leaves_none_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = offload.put_away({"a": [torch.arange(5.0)], "b": None, "c": torch.empty(0, 3)}, "file")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(offload.taken_back(tensor, torch.device("cpu"))["a"][0], torch.arange(5.0))
    assert tensor["c"].shape == (0, 3)
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: os.open("/nowhere/at/all", os.O_RDONLY))
    with pytest.raises(DoesNotFitError, match="do not fit into"):
        offload.waiting((10,), torch.float32, "file")
    assert list(tmp_path.iterdir()) == []


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**DEFAULTS)
    sizes = pruner.Sizes(num_weights=10**6, num_blocks=10**4, block_size=100, single_block=False, itemsize=4)
    monkeypatch.setattr(offload, "seconds_per_byte", lambda place, device: (1e-9, 1e-9))
    given: dict[str, Any] = {"num_rows": 1000, "inverse": 1.0, "samples": 10**6}
    device = torch.device("cpu")

    def chosen(**other: Any) -> Storage:
        return choose_storage(sizes, settings, 4, device, **given | other)

    # 4 GB of gradients take 4 s to write and 4 to read; 0.4 GB of inverses a tenth
    assert chosen(gradients=0.1).gradients == "recomputed"
    assert chosen(gradients=100.0).gradients == "stored"
    assert chosen(gradients=0.01, inverse=0.1).inverses == "rebuilt"
    assert chosen(gradients=0.01, inverse=10.0).inverses == "stored"
    assert chosen(gradients=None).gradients == "stored"
    assert "read only once" in chosen(gradients=None).why
    assert chosen(gradients=0.1, samples=10**15).gradients == "stored"
    monkeypatch.setattr(offload, "place_for", lambda nbytes, device: None if nbytes > 10**9 else "file")
    assert chosen(gradients=100.0).gradients == "recomputed"
    with pytest.raises(DoesNotFitError, match="take fewer gradients"):
        chosen(gradients=None)


@pytest.mark.parametrize(("groups", "ranks"), [(1, 1), (2, 3), (5, 2), (1, 7)])
def test_parts_cover_a_layout(groups: int, ranks: int) -> None:
    whole = BlockLayout(["a", "b", "c"], [(5, 7), (3,), (40,)], 8)
    live = torch.rand(whole.num_weights, generator=torch.Generator().manual_seed(0)) > 0.3
    grads = {name: torch.randn(2, *shape) for name, shape in zip(whole.names, whole.shapes, strict=True)}
    for layout in (whole, LiveLayout(whole, live)):
        rows = torch.cat([layout.rows(name, grads[name]) for name in layout.names], dim=1)
        parts = [part for group in cut(layout, groups, ranks) for part in group if part is not None]
        found = torch.cat(
            [torch.cat([part.rows(name, grads[name]) for name in part.names], dim=1) for part in parts], dim=1
        )
        assert torch.equal(found, rows)
        assert torch.equal(torch.cat([part.blocks + part.start for part in parts]), layout.blocks)
        told = [part.describe_block(b) for part in parts for b in range(part.num_blocks)]
        assert told == [layout.describe_block(b) for b in range(layout.num_blocks)]
        assert torch.equal(torch.cat([part.groups for part in parts]), layout.groups)
