"""Images, labels and checkpoints of the published experiments, from a folder that the user names.

The folder holds (uint8 pixels everywhere):
    mnist.npz                                  x_train [60000, 28, 28], y_train, x_test [10000, 28, 28], y_test
    mlpnet/full_ep25_seed<s>.safetensors       a trained MLPNet for each seed
    mlpnet/full_ep2_seed<s>.safetensors        the same after two epochs only
    cifar10_train_1..4.webp                    training images in order, 10,000 a file, tiled 100 to a row, lossless
    cifar10_test_first1000.webp                the first 1,000 test images, tiled 40 to a row
    cifar10_labels.npz                         y_train, y_test_first1000
    resnet20_cifar10_woodfisher.safetensors    a trained ResNet20
    tiny-imagenet-200/                         train/<class>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt
    tinyshakespeare.txt                        plays, one after the other
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.machine import ROOT
from benchmarks.paper.networks import MLPNet, ResNet20

VARIABLE = "FASTFISHER_DATA"


class Split(NamedTuple):
    """images [n, C, H, W] float32, normalised; labels [n] int64."""

    images: Tensor
    labels: Tensor


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option --data, with the environment variable and then a folder beside the repository as defaults."""
    default = Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "data")
    parser.add_argument(
        "--data", type=Path, default=default, help=f"folder of data and checkpoints (or {VARIABLE})"
    )


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise SystemExit(
            f"{name} is not in {folder}: name the folder that holds it by --data or {VARIABLE}; "
            f"benchmarks/paper/data.py lists its files"
        )
    return path


def mnist(folder: Path, num_samples: int, seed: int) -> tuple[Split, Split]:
    """Training images drawn without replacement, and the test set, normalised by mean and deviation of the training
    pixels.
    """
    with np.load(_file(folder, "mnist.npz")) as arrays:
        x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    picked = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))[:num_samples].numpy()

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split((torch.from_numpy(x).unsqueeze(1) / 255 - 0.1307) / 0.3081, torch.from_numpy(y).long())

    return split(x_train[picked], y_train[picked]), split(x_test, y_test)


def _tiles(path: Path) -> Tensor:
    """A picture of 32 x 32 tiles, row by row -> uint8 [n, 3, 32, 32]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))  # [rows * 32, columns * 32, 3]
    return pixels.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).permute(0, 2, 4, 1, 3).flatten(0, 1)


def cifar10(folder: Path, num_samples: int, seed: int) -> tuple[Split, Split]:
    """Training images drawn without replacement, and the first 1,000 test images; pixels scaled to [-1, 1]."""
    with np.load(_file(folder, "cifar10_labels.npz")) as arrays:
        y_train = torch.from_numpy(arrays["y_train"]).long()
        y_test = torch.from_numpy(arrays["y_test_first1000"]).long()
    x_train = torch.cat([_tiles(_file(folder, f"cifar10_train_{i}.webp")) for i in (1, 2, 3, 4)])
    x_test = _tiles(_file(folder, "cifar10_test_first1000.webp"))
    picked = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return Split(x_train[picked] / 127.5 - 1, y_train[picked]), Split(x_test / 127.5 - 1, y_test)


def _pictures(paths: Sequence[Path]) -> Tensor:
    """Pictures of one size -> [n, 3, H, W], pixels scaled to [-1, 1]."""
    pixels = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def tiny_imagenet(folder: Path, num_samples: int, seed: int) -> tuple[Split, Split]:
    """Training images drawn without replacement, and all images of val/; classes in the order of their names."""
    root = _file(folder, "tiny-imagenet-200")
    classes = {path.name: i for i, path in enumerate(sorted((root / "train").iterdir()))}
    known = sorted((root / "train").glob("*/images/*.JPEG"))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:num_samples]
    picked = [known[i] for i in order.tolist()]
    rows = [line.split() for line in _file(root, "val/val_annotations.txt").read_text().splitlines()]

    def split(paths: Sequence[Path], names: Sequence[str]) -> Split:
        return Split(_pictures(paths), torch.tensor([classes[name] for name in names]))

    train = split(picked, [path.parent.parent.name for path in picked])
    return train, split([root / "val" / "images" / row[0] for row in rows], [row[1] for row in rows])


class Text(NamedTuple):
    """train, held_out: places in `characters`, [n] int64."""

    train: Tensor
    held_out: Tensor
    characters: str


def shakespeare(folder: Path) -> Text:
    """The text as numbers of its characters in their order; its last tenth is held out."""
    text = _file(folder, "tinyshakespeare.txt").read_text(encoding="utf-8")
    characters = "".join(sorted(set(text)))
    places = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([places[character] for character in text])
    cut = len(numbers) * 9 // 10
    return Text(numbers[:cut], numbers[cut:], characters)


def sequences(text: Tensor, context: int, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of the text [n] anywhere in it, and the character that follows each of theirs, both [count, context]."""
    first = torch.randint(len(text) - context, (count, 1), generator=draws)
    at = first + torch.arange(context)
    return text[at], text[at + 1]


def load_weights(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """Read a checkpoint into the model, and return it in eval mode."""
    model.load_state_dict(load_file(_file(folder, name)))
    return model.eval()


def load(
    network: str, folder: Path, num_samples: int, seed: int
) -> tuple[nn.Module, list[str], Split, Split]:
    """A trained network by its name, the names of its weights to prune, and training and test images of one seed.

    network: resnet20 (one for all seeds), mlpnet or mlpnet_ep2.
    """
    if network == "resnet20":
        model = load_weights(ResNet20(), folder, "resnet20_cifar10_woodfisher.safetensors")
        return model, ResNet20.prunable(), *cifar10(folder, num_samples, seed)
    kind = {"mlpnet": "full_ep25", "mlpnet_ep2": "full_ep2"}[network]
    model = load_weights(MLPNet(), folder, f"mlpnet/{kind}_seed{seed}.safetensors")
    return model, [name for name, _ in model.named_parameters()], *mnist(folder, num_samples, seed)
