"""The ImageNet example under torchrun, killed and started again, and on images of Hugging Face's datasets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastfisher as ff
from fastfisher import runlog
from tests.test_imagenet import CLASSES, arguments, image_folder, imagenet

pytest.importorskip("datasets")  # make test-integrations installs it

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("imagenet"))


def torchrun(root: Path, out: Path, kill_after: str | None = None) -> str:
    """Two processes of the example to the end, or until they print a text; returns what they printed."""
    words = arguments(root, out=out, mode="gradual", sparsity=0.9, epochs=3, save_every=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, str(ROOT / "examples" / "imagenet_resnet50.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if kill_after is not None and kill_after in line:
            break
    if kill_after is not None:
        # torchrun's processes are sessions of their own, and would go on without it
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == (0 if kill_after is None else -signal.SIGKILL)
    return printed


@pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(),
    reason="processes are found in /proc, and meet by gloo",
)
def test_two_processes_killed_and_started_again_end_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    whole = torchrun(root, tmp_path / "whole")
    assert whole.count("dense: accuracy") == 1
    torchrun(root, tmp_path / "killed", kill_after="epoch 1:")
    assert "going on at image" in torchrun(root, tmp_path / "killed")
    one, two = (imagenet.ResNet50(len(CLASSES), 4) for _ in range(2))
    report = ff.load(tmp_path / "whole" / "model.safetensors", one)
    ff.load(tmp_path / "killed" / "model.safetensors", two)
    assert report is not None
    assert report.num_zeros == round(0.9 * report.num_weights)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    log = runlog.read(tmp_path / "whole" / "log.jsonl")
    assert [when for when, _ in log.scores] == [0, 1, 2]


def test_hugging_face_datasets_give_the_images_of_the_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (folder, _), (named, val) = imagenet.read(str(root)), imagenet.read(f"hf:{root}")
    assert (named.classes, len(named), len(val)) == (list(CLASSES), 24, 12)

    def pictures(source: imagenet.Source) -> list[tuple[int, bytes]]:
        return sorted((source[i][1], source[i][0].tobytes()) for i in range(len(source)))

    assert pictures(named) == pictures(folder)
    score = imagenet.main(arguments(root, data=f"hf:{root}", out=tmp_path / "run", mode="one-shot"))
    assert score == runlog.read(tmp_path / "run" / "log.jsonl").scores[-1][1]["accuracy"]
