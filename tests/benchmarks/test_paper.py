"""The published experiments on made-up images and untrained networks: everything runs, and the files say what was
done.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fastfisher as ff
from benchmarks.paper import (
    __main__ as everything,
)
from benchmarks.paper import (
    char_transformer,
    chunk_size,
    data,
    experiment,
    fishleg,
    fishleg_damping,
    fishleg_forms,
    fishleg_noise,
    fishleg_preconditioner,
    gradual,
    hessian_fisher,
    kfac_blocks,
    layers,
    methods,
    mlpnet_mnist,
    page,
    quadratic_model,
    recomputed,
    resnet20_cifar10,
    stages,
    woodtaylor,
    woodtaylor_ablation,
)
from benchmarks.paper.experiment import Curves
from benchmarks.paper.networks import CharTransformer, LeNet5, MLPNet, ResNet18, ResNet20
from benchmarks.paper.pictures import Axes
from fastfisher.fisher.fishleg import FishLegInverse


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
    _save(ResNet18(width=4), made / "resnet18.safetensors")
    root = made / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for label in ("n02", "n01"):
        (root / "train" / label / "images").mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(root / "train" / label / "images" / f"{label}_{i}.JPEG")
        image.convert("L").save(root / "val" / "images" / f"val_{label}.JPEG")
        lines.append(f"val_{label}.JPEG\t{label}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (made / "tinyshakespeare.txt").write_text("".join(random.choice(list("ab c\n"), 400)))
    return made


def test_networks_have_the_published_sizes() -> None:
    assert sum(p.numel() for p in MLPNet().parameters()) == 32_360
    network = ResNet20()
    parameters = dict(network.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 272_474
    assert sum(parameters[name].numel() for name in ResNet20.prunable()) == 267_264
    assert "layer2.0.downsample.0.weight" in parameters
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in LeNet5().parameters()) == 44_426
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_173_962
    assert ResNet18(200)(torch.zeros(2, 3, 8, 8)).shape == (2, 200)


def test_tiny_imagenet_is_read_from_its_folders(folder: Path) -> None:
    train, test = data.tiny_imagenet(folder, 10, 0)
    assert train.images.shape == (10, 3, 8, 8)
    assert len(train.labels) == 10
    assert test.labels.tolist() == [1, 0]
    assert float(test.images.abs().max()) <= 1
    assert test.images[0, 0].equal(test.images[0, 1])


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


def _run(main: Callable[[list[str]], None], folder: Path, out: Path, arguments: str) -> tuple[Curves, dict]:
    """One of the experiments with two seeds; its numbers and its record."""
    main([*arguments.split(), "--data", str(folder), "--out", str(out), "--seeds", "2"])
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    curves = experiment.read_csv(path.with_suffix(".csv"), Axes(**record["axes"]))
    assert all(len(values) == 2 for values in curves.values.values())
    assert all(np.isfinite(values).all() for values in curves.values.values())
    assert all(Image.open(out / picture).width > 500 for picture in record["pictures"])
    assert record["held"] == experiment.verdict(record["bars"])
    assert record["command"].startswith("python -m benchmarks.paper.")
    return curves, record


def test_gradual_methods_end_at_their_sparsity(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradual, "EVERY", 1)
    few = dataclasses.replace(gradual.NETWORKS["mlpnet"], num_grads=8)
    monkeypatch.setitem(gradual.NETWORKS, "mlpnet", few)
    arguments = "mlpnet --samples 20 --epochs 4 --sparsities 0.5 0.9"
    curves, record = _run(gradual.main, folder, tmp_path, arguments)
    assert set(curves.labels()) == {f"{m}, {s}" for m in gradual.METHODS for s in ("50%", "90%")}
    assert ("WoodFisher, 90%", 1.5) in curves.values
    assert ("DPF, 90%", 1.5) not in curves.values
    assert len(record["bars"]) == 2


def test_every_method_runs_at_every_sparsity_and_pattern(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {label: {**told, "num_recomputations": 1} for label, told in methods.STEPS.items()}
    monkeypatch.setattr(methods, "STEPS", few)
    monkeypatch.setattr(methods, "PATTERNS", {"2:4": methods.PATTERNS["2:4"]})
    arguments = "mlpnet --samples 16 --num-grads 8 --sparsities 0.5"
    curves, record = _run(methods.main, folder, tmp_path, arguments)
    assert set(curves.labels()) == {*methods.ONE_STEP, *methods.STEPS}
    assert {place for _, place in curves.values} == {0.0, "50%", "2:4"}
    assert len(record["bars"]) == 2 * 2 + 1


def test_hessian_is_near_the_fisher_of_an_untrained_network(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(hessian_fisher.main, folder, tmp_path, "--samples 12 --epochs 0 1")
    assert len(record["bars"]) == 3
    assert len(record["pictures"]) == 2
    for (label, _), values in curves.values.items():
        assert "norm" in label or all(-1 <= value <= 1 for value in values)


def test_hessian_and_fisher_blocks_against_all_pairs_of_derivatives(folder: Path) -> None:
    torch.manual_seed(0)
    model = MLPNet().double()
    samples = data.Split(torch.randn(5, 1, 28, 28, dtype=torch.float64), torch.arange(5))
    index = torch.tensor([0, 3, 50, 199])
    found, fisher = hessian_fisher.matrices(model, samples, "fc3.weight", index)
    weight = model.fc3.weight
    losses = nn.functional.cross_entropy(model(samples.images), samples.labels, reduction="none")
    (slope,) = torch.autograd.grad(losses.mean(), weight, create_graph=True)
    rows = [
        torch.autograd.grad(slope.flatten()[i], weight, retain_graph=True)[0].flatten()[index] for i in index
    ]
    assert torch.allclose(found, torch.stack(rows), rtol=1e-6, atol=1e-12)
    grads = torch.stack(
        [torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten()[index] for loss in losses]
    )
    assert torch.allclose(fisher, grads.T @ grads / 5, rtol=1e-5)


def test_quadratic_model_is_a_parabola(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(quadratic_model.main, folder, tmp_path, "--samples 12 --sparsities 0.5")
    assert len(record["bars"]) == 3
    label = "WoodFisher, 50%, model"
    assert curves.mean(label, 0.5) == pytest.approx(curves.mean(label, 1.0) / 4, rel=1e-3)
    assert curves.mean("magnitude, 50%, real", 0.0) == pytest.approx(0, abs=1e-9)


def test_kfac_is_exact_for_one_image(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(kfac_blocks.main, folder, tmp_path, "--samples 4 12 --reference 20")
    assert len(record["bars"]) == 8
    assert len(curves.values) == 2 * 4 * 2 * 2
    a, g = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    found = kfac_blocks.matrices(a, g)
    for kind in kfac_blocks.KINDS:
        assert torch.allclose(found["K-FAC"][kind], found["WoodFisher"][kind])


@pytest.mark.parametrize(("network", "figure"), [("mlpnet", "table 4.1"), ("resnet20", "fig. 4.7")])
def test_sparsities_of_the_layers_add_up(folder: Path, tmp_path: Path, network: str, figure: str) -> None:
    curves, record = _run(layers.main, folder, tmp_path, f"{network} --samples 8")
    assert record["figure"] == figure
    model, names, _, _ = data.load(network, folder, 8, 0)
    sizes = {name.removesuffix(".weight"): model.get_parameter(name).numel() for name in names}
    for label in curves.labels():
        zeros = sum(curves.values[label, name][0] * size / 100 for name, size in sizes.items())
        assert zeros / sum(sizes.values()) == pytest.approx(record["settings"]["sparsity"], abs=1e-4)


def test_chunk_size_experiment_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_size, "SIZES", (20, 5_000, 37_000))
    monkeypatch.setattr(chunk_size, "PLACES", (1, 2, 3))
    curves, record = _run(chunk_size.main, folder, tmp_path, "--samples 8 --sparsities 0.6")
    assert len(record["bars"]) == 4
    assert len(curves.values) == 1 + 2 * (1 + 3)


def test_woodtaylor_experiments_run(folder: Path, tmp_path: Path) -> None:
    _, record = _run(woodtaylor.main, folder, tmp_path / "mlpnet", "mlpnet --samples 12 --sparsities 0.5 0.9")
    assert record["figure"] == "fig. 5.1"
    assert len(record["bars"]) == 3
    _, record = _run(woodtaylor.main, folder, tmp_path / "resnet20", "resnet20 --full --sparsities 0.5")
    assert (
        record["command"]
        == "python -m benchmarks.paper.woodtaylor resnet20 --full --seeds 2 --sparsities 0.5"
    )
    assert record["settings"]["samples"] == woodtaylor.NETWORKS["resnet20"].full
    assert (tmp_path / "resnet20" / "woodtaylor_resnet20_full.csv").exists()


def test_woodtaylor_starts_from_the_newton_step(folder: Path) -> None:
    model, names, train, _ = data.load("mlpnet_ep2", folder, 6, 0)
    layout = experiment.layout_of(model, names[-1:])
    weight, grads = experiment.weights_of(model, layout), experiment.gradients(model, layout, train)
    found = experiment.pruned(
        weight, layout, {"taylor": experiment.woodtaylor(grads, layout, 0.1)}, woodtaylor.TAYLOR, 0.0
    )
    g = grads.double()
    fisher = g.T @ g / 6 + 0.1 * torch.eye(200, dtype=torch.float64)
    assert torch.allclose(found.double(), weight - torch.linalg.solve(fisher, g.mean(0)), atol=1e-6)


def test_woodtaylor_ablation_runs(folder: Path, tmp_path: Path) -> None:
    arguments = "--samples 6 12 --dampings 0.01 0.1 --sparsities 0.5"
    curves, record = _run(woodtaylor_ablation.main, folder, tmp_path, arguments)
    assert len(record["bars"]) == 2
    assert len(curves.values) == 1 + 2 * 2


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """FishLeg's networks with few reference images, few steps of the published loop, and the damping that the few
    gradients of an untrained network need.
    """
    monkeypatch.setattr(stages, "DAMPING", 30.0)
    for name, network in stages.NETWORKS.items():
        monkeypatch.setitem(stages.NETWORKS, name, dataclasses.replace(network, reference=4))
    told = fishleg.METHODS["FLS, as published"]
    short = {**told, "fishleg": {**told["fishleg"], "max_aux_steps": 2}}
    monkeypatch.setitem(fishleg.METHODS, "FLS, as published", short)


@pytest.mark.usefixtures("few_steps")
def test_fishleg_and_its_rivals_end_at_the_same_sparsity(folder: Path, tmp_path: Path) -> None:
    arguments = "mlpnet --samples 40 --num-grads 36 --stages 2 --train-steps 1"
    curves, record = _run(fishleg.main, folder, tmp_path, arguments)
    assert record["command"] == f"python -m benchmarks.paper.fishleg {arguments} --seeds 2"
    assert len(record["bars"]) == 3
    for label in fishleg.METHODS:
        assert (label, 0.95) in curves.values
        assert (label + ", trained", 0.95) in curves.values
        assert ((label + stages.ERROR, 0.95) in curves.values) == label.startswith("FLS")
    assert curves.mean("magnitude" + stages.STATE, 0.95) == 0
    assert curves.mean("diagonal Fisher" + stages.STATE, 0.95) == pytest.approx(4 * 32_360 / 2**20, rel=1e-3)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("network", ["lenet"])
def test_fishleg_runs_on_every_small_network(folder: Path, tmp_path: Path, network: str) -> None:
    arguments = f"{network} --samples 12 --num-grads 8 --stages 1 --epochs 1"
    curves, _ = _run(fishleg.main, folder, tmp_path, arguments)
    assert curves.mean("dense", 0.0) <= 100


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("network", ["resnet18", "tinyimagenet"])
def test_fishleg_runs_on_large_networks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.setattr(stages, "ResNet18", functools.partial(ResNet18, width=4))
    told = "--full --num-grads 4 --stages 2 --train-steps 1 --epochs 1 --samples 8 --seeds 1"
    if network == "resnet18":
        told += f" --checkpoint {folder / 'resnet18.safetensors'}"
    arguments = [network, *told.split(), "--data", str(folder), "--out", str(tmp_path)]
    fishleg.main(arguments)
    record = json.loads((tmp_path / f"fishleg_{network}_full.json").read_text())
    assert record["settings"]["final"] == stages.NETWORKS[network].final
    assert record["command"].startswith(f"python -m benchmarks.paper.fishleg {network} --full --samples 8")


@pytest.mark.usefixtures("few_steps")
def test_forms_of_fishleg_differ_in_state(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(fishleg_forms.main, folder, tmp_path, "--samples 40 --num-grads 36 --stages 2")
    assert len(record["bars"]) == 3
    states = [curves.mean(label + stages.STATE, 0.95) for label in fishleg_forms.FORMS]
    assert len(set(states)) == len(states)


def test_auxiliary_loss_of_tiles_is_that_of_the_matrix() -> None:
    torch.manual_seed(0)
    grads = torch.randn(7, 12, dtype=torch.float64)
    layout = ff.BlockLayout(["w"], [(3, 4)], 4)
    eye = torch.eye(12, dtype=torch.float64)
    for form in ("kron", "block"):
        made = FishLegInverse.start(layout, damping=0.1, parameterization=form, dtype=torch.float64)
        made.aux_step(grads)
        q = made.mul(eye)
        fisher = grads.T @ grads / 7 + 0.1 * eye
        dense = float((q @ fisher @ q).trace() / 2 - q.trace())
        assert fishleg_preconditioner.loss(made, grads) == pytest.approx(dense)
    least = fishleg_preconditioner.smallest(grads, [(0, 12)], 0.1)
    assert least == pytest.approx(-float(fisher.inverse().trace()) / 2)
    assert least < dense


def test_preconditioner_experiment_runs(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(
        fishleg_preconditioner.main, folder, tmp_path, "--samples 8 --steps 2 --rates 0.001"
    )
    assert len(record["bars"]) == 4
    assert curves.mean("block: exact in u", 2) < curves.mean("block: exact in u", 0)


def test_damping_experiment_runs(folder: Path, tmp_path: Path) -> None:
    arguments = "--samples 16 --dampings 0.001 0.1 --recomputations 1 --sparsities 0.5"
    curves, record = _run(fishleg_damping.main, folder, tmp_path, arguments)
    assert len(record["bars"]) == 2
    assert set(curves.labels()) == set(fishleg_damping.METHODS)


def test_noise_experiment_runs_and_the_end_of_learning_is_the_inverse(folder: Path, tmp_path: Path) -> None:
    curves, record = _run(fishleg_noise.main, folder, tmp_path, "--samples 8 24 --reference 12 --dampings 30")
    assert len(record["bars"]) == 2
    to_the_end = curves.mean("γ 30: FLS blocks, to the end", 24)
    assert to_the_end == pytest.approx(curves.mean("γ 30: inverted", 24), rel=0.1)


def test_text_is_cut_into_windows_and_what_follows(folder: Path) -> None:
    text = data.shakespeare(folder)
    assert text.characters == "\n abc"
    whole = torch.cat([text.train, text.held_out])
    assert "".join(text.characters[i] for i in whole) == (folder / "tinyshakespeare.txt").read_text()
    assert len(text.held_out) == 40
    x, y = data.sequences(text.train, 7, 200, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (200, 7)
    assert x[:, 1:].equal(y[:, :-1])
    assert bool((text.train.unfold(0, 8, 1) == torch.cat([x, y[:, -1:]], 1)[:, None]).all(2).any(1).all())


def test_no_prediction_of_the_transformer_sees_what_follows() -> None:
    torch.manual_seed(0)
    model = CharTransformer(5, context=8, width=8, layers=2).eval()
    x = torch.randint(5, (1, 8))
    y = x.clone()
    y[0, 5] = (y[0, 5] + 1) % 5
    one, other = model(x).detach(), model(y).detach()
    assert one.shape == (1, 5, 8)
    torch.testing.assert_close(one[..., :5], other[..., :5])
    assert float((one[..., 5:] - other[..., 5:]).abs().amin()) > 0
    text = torch.randint(5, (17,))
    expected = torch.nn.functional.cross_entropy(model(text[:16].view(2, 8)), text[1:].view(2, 8)) / np.log(2)
    accuracy, bits = char_transformer.scores(model, text, 8)
    assert bits == pytest.approx(expected.item())
    assert accuracy in [100 * n / 16 for n in range(17)]


def test_transformer_experiment_runs_and_reads_what_it_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"num_grads": 16, "num_recomputations": 1}
    methods = {
        m: told if told["method"] == "magnitude" else told | few
        for m, told in char_transformer.METHODS.items()
    }
    monkeypatch.setattr(char_transformer, "METHODS", methods)
    path = tmp_path / "trained.safetensors"
    small = (
        f"--samples 16 --steps 3 --context 8 --width 8 --layers 1 --sparsities 0.5 0.9 --checkpoint {path}"
    )
    curves, record = _run(char_transformer.main, folder, tmp_path / "one", small)
    assert set(curves.labels()) == {f"{m}{end}" for m in methods for end in ("", ", bits")} | {"dense, bits"}
    assert len(record["bars"]) == 2 * 2
    assert "checkpoint" not in record["command"]
    again, _ = _run(char_transformer.main, folder, tmp_path / "two", small)
    assert again.values == curves.values


def test_every_experiment_is_run_by_make_paper() -> None:
    scripts = {path.stem for path in Path(everything.__file__).parent.glob("*.py")}
    helpers = {"__init__", "__main__", "data", "experiment", "networks", "pictures", "stages"}
    assert {command.split()[0] for command in everything.COMMANDS} == scripts - helpers
    assert everything.COMMANDS[-1] == "page"


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


def test_committed_page_is_the_one_of_the_committed_results() -> None:
    assert page.PAGE.read_text() == page.page(experiment.RESULTS, "../benchmarks/results/paper")
    pictures = {path.name for path in experiment.RESULTS.glob("*.png")}
    assert pictures == {name for record in page.load(experiment.RESULTS) for name in record["pictures"]}


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
