"""The published experiments on made-up images and untrained networks: everything runs, and the files say what was
done.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.paper import data, experiment, mlpnet_mnist, page, recomputed, resnet20_cifar10
from benchmarks.paper.networks import MLPNet, ResNet20


def _tiles(path: Path, count: int, columns: int, seed: int) -> np.ndarray:
    """Write `count` random images as tiles, lossless, and return them: uint8 [count, 32, 32, 3]."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    rows = (
        images.reshape(-1, columns, 32, 32, 3).swapaxes(1, 2).reshape(count // columns * 32, columns * 32, 3)
    )
    Image.fromarray(rows).save(path, lossless=True)
    return images


def _save(model: nn.Module, path: Path) -> None:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names and shapes of the real one, and little in it."""
    made = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    arrays = {
        f"x_{part}": random.integers(0, 256, (40, 28, 28), dtype=np.uint8) for part in ("train", "test")
    }
    arrays |= {f"y_{part}": random.integers(0, 10, 40, dtype=np.uint8) for part in ("train", "test")}
    np.savez(made / "mnist.npz", **arrays)
    (made / "mlpnet").mkdir()
    for seed in range(2):
        for kind in ("full_ep2", "full_ep25"):
            _save(MLPNet(), made / "mlpnet" / f"{kind}_seed{seed}.safetensors")
    for i in range(1, 5):
        _tiles(made / f"cifar10_train_{i}.webp", 8, 4, i)
    _tiles(made / "cifar10_test_first1000.webp", 8, 4, 5)
    labels = random.integers(0, 10, 40, dtype=np.uint8)
    np.savez(made / "cifar10_labels.npz", y_train=labels, y_test_first1000=labels[:8])
    _save(ResNet20(), made / "resnet20_cifar10_woodfisher.safetensors")
    return made


def test_networks_have_the_published_sizes() -> None:
    assert sum(p.numel() for p in MLPNet().parameters()) == 32_360
    network = ResNet20()
    parameters = dict(network.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 272_474
    assert sum(parameters[name].numel() for name in ResNet20.prunable()) == 267_264
    assert "layer2.0.downsample.0.weight" in parameters
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_tiles_come_back_in_order(tmp_path: Path) -> None:
    images = _tiles(tmp_path / "tiles.webp", 6, 3, 0)
    assert data._tiles(tmp_path / "tiles.webp").permute(0, 2, 3, 1).equal(torch.from_numpy(images))


def test_missing_data_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"mnist\.npz is not in .*--data or FASTFISHER_DATA"):
        data.mnist(tmp_path, 4, 0)


def test_data_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit, match=tmp_path.name):
        mlpnet_mnist.main(["--samples", "4"])


def _check_files(out: Path, name: str, sparsities: list[float], seeds: int, command: str) -> dict:
    with (out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = {row["method"] for row in rows} - {"dense"}
    assert len(rows) == seeds * (1 + len(methods) * len(sparsities))
    assert all(0 <= float(row["test_accuracy_percent"]) <= 100 for row in rows)
    assert Image.open(out / f"{name}.png").width > 500
    record = json.loads((out / f"{name}.json").read_text())
    assert record["command"].startswith(command)
    assert record["machine"]["cpu"]
    assert record["held"] == experiment.verdict(record["bars"])
    return record


def test_mlpnet_experiment_runs(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--samples", "12", "--seeds", "2"]
    mlpnet_mnist.main([*arguments, "--sparsities", "0.5", "0.8"])
    record = _check_files(
        tmp_path,
        "mlpnet_mnist",
        [0.5, 0.8],
        2,
        "python -m benchmarks.paper.mlpnet_mnist --samples 12 --seeds 2",
    )
    assert len(record["bars"]) == 2


def test_resnet_experiment_runs_on_means_of_mini_batches(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--samples", "12", "--grad-batch-size", "3"]
    resnet20_cifar10.main([*arguments, "--seeds", "1", "--sparsities", "0.7", "--name", "small"])
    record = _check_files(
        tmp_path, "small", [0.7], 1, "python -m benchmarks.paper.resnet20_cifar10 --samples 12"
    )
    assert len(record["bars"]) == 6


def test_recomputed_experiment_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputed, "DAMPINGS", (0.1, 1.0))
    arguments = [
        "mlpnet",
        "--data",
        str(folder),
        "--out",
        str(tmp_path),
        "--samples",
        "20",
        "--num-grads",
        "8",
    ]
    recomputed.main([*arguments, "--seeds", "2", "--sparsities", "0.5", "0.9"])
    command = "python -m benchmarks.paper.recomputed mlpnet --samples 20 --num-grads 8 --seeds 2 --sparsities 0.5 0.9"
    record = _check_files(tmp_path, "recomputed_mlpnet", [0.5, 0.9], 2, command)
    assert record["command"] == command
    assert len(record["bars"]) == 1
    assert set(record["settings"]["chosen"]) == {
        f"{m} {s}" for m in ("woodfisher", "woodtaylor") for s in (0.5, 0.9)
    }


def test_pruning_for_the_table_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(1)
    model = MLPNet().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layout = experiment.layout_of(model, ["fc3.weight"])
    split = data.Split(torch.randn(6, 1, 28, 28), torch.arange(6))
    grads = experiment.gradients(model, layout, split)
    assert grads.shape == (6, 200)
    curves = experiment.Curves()
    experiment.prune_all(curves, model, layout, {}, [experiment.Line("magnitude", "global")], [0.5], split)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert len(curves.values["magnitude", 0.5]) == 1


def test_page_shows_every_result_and_rendering_changes_no_number(folder: Path, tmp_path: Path) -> None:
    results, written = tmp_path / "results", tmp_path / "docs" / "paper.md"
    arguments = ["--out", str(results), "--data", str(folder), "--name", "small"]
    mlpnet_mnist.main([*arguments, "--samples", "12", "--seeds", "2", "--sparsities", "0.5", "0.8"])
    page.main(["--results", str(results), "--page", str(written)])
    text = written.read_text()
    record = json.loads((results / "small.json").read_text())
    assert f"Claim: {record['claim']}" in text
    assert f"Held: **{record['held']}**" in text
    assert f"![{record['title']}](../results/small.png)" in text
    assert f"`{record['command']}`" in text
    (first,) = [line for line in text.splitlines() if line.startswith("| magnitude, global")]
    curves = experiment.read_csv(results / "small.csv", experiment.ACCURACY)
    mean = np.mean(curves.values["magnitude, global", 0.5])
    deviation = np.std(curves.values["magnitude, global", 0.5], ddof=1)
    assert f" {mean:.1f} ± {deviation:.1f} |" in first
    (heading,) = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert f"(#{page.anchor(heading)})" in text

    before = (results / "small.csv").read_text()
    mlpnet_mnist.main([*arguments, "--render"])
    again = json.loads((results / "small.json").read_text())
    assert (results / "small.csv").read_text() == before
    assert again == record


def test_page_names_results_without_a_claim(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(SystemExit, match="old hold no claim: run their command with --render"):
        page.page(tmp_path, ".")


def test_verdicts_come_from_the_bars() -> None:
    bars = [experiment.at_least("a", 2, 1), experiment.at_most("b", 2, 1)]
    assert experiment.verdict(bars[:1]) == "yes"
    assert experiment.verdict(bars) == "NO, 1 of 2 bars cleared"
    assert experiment.count(1, "seed") == "1 seed"
    assert experiment.count(3, "seed") == "3 seeds"
