"""ResNet-50 on a tiny ImageFolder: gradual and one-shot, killed and resumed; the real one's plan.

torchrun and Hugging Face's datasets are in tests/integrations/test_torchrun.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfisher as ff
from benchmarks.networks import SHAPES
from fastfisher import runlog
from fastfisher.errors import FastFisherError
from fastfisher.fisher.gradients import chunks
from fastfisher.prune.plan import GRADIENT_BYTES

Image = pytest.importorskip("PIL.Image")

from examples import imagenet_resnet50 as imagenet  # noqa: E402

CLASSES = ("cat", "dog", "newt")


def image_folder(root: Path) -> Path:
    """Three colours as classes, 8 images each to train on and 4 to evaluate on, and weights of a narrow network."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = torch.randint(30, 50, (2,), generator=generator).tolist()
                pixels = torch.randint(100, (height, width, 3), generator=generator, dtype=torch.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.JPEG")
    torch.manual_seed(0)
    state = imagenet.ResNet50(len(CLASSES), 4).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, root / "dense.pth")
    return root


def arguments(root: Path, **options: Any) -> list[str]:
    given = {
        "data": root,
        "weights": root / "dense.pth",
        "width": 4,
        "size": 32,
        "batch_size": 8,
        "num_grads": 4,
        "grad_batch_size": 2,
        "workers": 0,
        **options,
    }
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("imagenet"))


class Killed(BaseException):
    pass


def test_a_gradual_run_that_is_killed_within_an_epoch_ends_with_the_same_bits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"mode": "gradual", "sparsity": 0.9, "epochs": 3, "save_every": 1}
    whole = imagenet.main(arguments(root, out=tmp_path / "whole", **options))
    save = ff.save_checkpoint

    def killed(path: Path, **states: Any) -> None:
        save(path, **states)
        if (states["epoch"], states["seen"]) == (1, 16):
            raise Killed

    monkeypatch.setattr(ff, "save_checkpoint", killed)
    with pytest.raises(Killed):
        imagenet.main(arguments(root, out=tmp_path / "killed", **options))
    monkeypatch.setattr(ff, "save_checkpoint", save)
    assert imagenet.main(arguments(root, out=tmp_path / "killed", **options)) == whole
    assert "going on at image 16 of epoch 1" in capsys.readouterr().out

    one, two = (imagenet.ResNet50(len(CLASSES), 4) for _ in range(2))
    report = ff.load(tmp_path / "whole" / "model.safetensors", one)
    ff.load(tmp_path / "killed" / "model.safetensors", two)
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    weights = [p for p in one.parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert report is not None
    assert zeros == report.num_zeros == round(0.9 * sum(p.numel() for p in weights))
    log = runlog.read(tmp_path / "killed" / "log.jsonl")
    assert [when for when, _ in log.steps] == [1, 2]
    assert [when for when, _ in log.scores] == [0, 1, 2]


def test_one_shot_prunes_once_and_trains_on_where_epochs_are_given(root: Path, tmp_path: Path) -> None:
    score = imagenet.main(arguments(root, out=tmp_path, mode="one-shot", method="magnitude"))
    pruned = imagenet.ResNet50(len(CLASSES), 4)
    report = ff.load(tmp_path / "model.safetensors", pruned)
    assert report is not None
    assert report.num_zeros == round(0.8 * report.num_weights)
    dense = torch.load(root / "dense.pth")["state_dict"]
    for key, value in pruned.named_parameters():
        assert torch.equal(value, torch.where(value == 0, 0, dense[f"module.{key}"])), key
    assert score == runlog.read(tmp_path / "log.jsonl").scores[-1][1]["accuracy"]

    imagenet.main(arguments(root, out=tmp_path, mode="one-shot", method="magnitude", epochs=1))
    tuned = imagenet.ResNet50(len(CLASSES), 4)
    ff.load(tmp_path / "model.safetensors", tuned)
    for key, value in tuned.named_parameters():
        assert torch.equal(value == 0, pruned.get_parameter(key) == 0) or value.dim() == 1, key
    assert not torch.equal(tuned.fc.bias, pruned.fc.bias)


def test_schedule_and_rates_are_those_of_the_authors() -> None:
    options = argparse.Namespace(mode="gradual", sparsity=0.9, epochs=100, lr=0.005)
    found = imagenet.schedule(options)
    due = sorted({found.due(epoch)[0] for epoch in range(1, 100)})
    assert due == [*range(1, 40, 5), 40]
    assert found.due(0) is None
    assert found.due(1)[1] == pytest.approx(0.05)
    assert found.due(21)[1] == pytest.approx(0.9 - 0.85 * (19 / 39) ** 3)
    assert found.due(99)[1] == 0.9
    rate = 0.005
    for epoch in range(100):
        assert imagenet.rate(options, epoch) == pytest.approx(rate), epoch
        if 40 <= epoch <= 90 and (epoch - 40) % 6 == 0:  # what the authors' loop does at the end of an epoch
            rate *= 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 80}, r"Did you mean 0\.80"),
        ({"data": "/nowhere"}, r"there is no folder '/nowhere/train'"),
        ({"weights": "/nowhere.pth"}, r"--weights '/nowhere.pth' cannot be read"),
        ({"width": 8}, r"has no 'conv1.weight' of the shape \[8, 3, 7, 7\]"),
        ({"batch_size": 64}, r"at most the 24 images; got 64"),
        ({"data": "hf:nothing", "mode": "plan"}, r"needs the package datasets|nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_error_is_one_sentence(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*$"):
        imagenet.main(arguments(root, out=tmp_path, **change))


def test_images_are_asked_for_where_there_are_none(root: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FastFisherError, match=r"there are no images in '.*train/cat'"):
        imagenet.read(str(tmp_path))
    shutil.copytree(root / "train", tmp_path / "train", dirs_exist_ok=True)
    shutil.copytree(root / "val" / "dog", tmp_path / "val" / "dog")
    with pytest.raises(FastFisherError, match=r"train and val differ in their classes \(first: cat\)"):
        imagenet.read(str(tmp_path))


def test_crops_depend_on_key_and_index_alone(root: Path) -> None:
    source = imagenet.Folder(root / "train")
    one, other = imagenet.Crops(source, 16, "3"), imagenet.Crops(source, 16, "4")
    assert torch.equal(one[5][0], imagenet.Crops(source, 16, "3")[5][0])
    assert not torch.equal(one[5][0], other[5][0])
    middle, label = imagenet.Crops(source, 16)[23]
    assert (label, middle.shape) == (2, (3, 16, 16))
    assert float((middle * imagenet.STD + imagenet.MEAN)[2].mean()) == pytest.approx(170 / 255, abs=0.03)


def test_the_processes_share_every_batch(root: Path) -> None:
    source = imagenet.Folder(root / "train")
    options = argparse.Namespace(batch_size=8, seed=0, size=16, workers=0)
    order = imagenet.shuffled(24, "train 0 2")
    assert sorted(order) == list(range(24)) != order
    for seen in (0, 8):
        shares = [
            imagenet.training_batches(source, options, imagenet.World(rank, 2, torch.device("cpu")), 2, seen)
            for rank in range(2)
        ]
        found = [
            [i for share in step for i in share]
            for step in zip(*(s.batch_sampler for s in shares), strict=True)
        ]
        assert [sorted(batch) for batch in found] == [sorted(order[i : i + 8]) for i in range(seen, 24, 8)]


@pytest.mark.parametrize(("block", "num_grads", "batch"), [(1000, 80, 100), (2000, 400, 400)])
def test_the_plan_of_the_real_network_follows_the_formula(block: int, num_grads: int, batch: int) -> None:
    torch.manual_seed(0)
    model = imagenet.ResNet50()
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert sorted(shapes) == sorted(SHAPES["ResNet-50"])
    options = argparse.Namespace(
        method="woodfisher", block_size=block, num_grads=num_grads, grad_batch_size=batch, seed=0
    )
    images = torch.randn(1, 3, 224, 224)
    found = ff.plan(
        model,
        [(images, torch.zeros(1, dtype=torch.long))],
        sparsity=0.9,
        memory_limit="500 GB",
        **imagenet.settings(options),
    )
    d, m = 25_502_912, num_grads
    blocks = sum(-(-torch.Size(shape).numel() // block) for shape in shapes)
    assert (found.sizes.num_weights, found.sizes.num_blocks, found.form) == (d, blocks, "dual")
    bytes_of = {phase.name: phase.bytes for phase in found.phases}
    gradients, factors = 4 * d * m, 8 * blocks * m * m
    rows, _ = chunks(4 * d, m, GRADIENT_BYTES)
    base = (2 * 4 + 1) * d
    assert bytes_of["fisher"] == base + rows * 4 * d + gradients
    assert bytes_of["inverse"] == base + gradients + factors
    assert bytes_of["select and update"] == 8 * 4 * d + gradients + factors
    # 85 MB of activations an image, those of a whole mini-batch at once; and the gradient of the weights
    each = (bytes_of["gradients"] - bytes_of["fisher"]) / batch
    assert each == pytest.approx(85e6 + 4 * d, rel=0.2)
    assert found.fits
    assert found.seconds is not None
    assert found.seconds > 0


def test_the_batch_script_is_one() -> None:
    script = Path(imagenet.__file__).with_suffix(".sbatch")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
