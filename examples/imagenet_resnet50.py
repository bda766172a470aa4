r"""Prune ResNet-50 on ImageNet to 80 or 90 %, gradually in 100 epochs or in one shot, with WoodFisher's settings.

    python examples/imagenet_resnet50.py --data /data/imagenet --weights resnet50-0676ba61.pth --mode plan
    torchrun --nproc-per-node 8 examples/imagenet_resnet50.py --data /data/imagenet \
        --weights resnet50-0676ba61.pth --mode gradual --sparsity 0.9 --out runs/gradual_90

--data: a folder in the layout of torchvision's ImageFolder, train/<class>/*.JPEG and val/<class>/*.JPEG, or hf: and the
    name of a Hugging Face dataset with the columns image and label, such as hf:ILSVRC/imagenet-1k.
--weights: a .pth or .safetensors file under torchvision's parameter names, such as
    https://download.pytorch.org/models/resnet50-0676ba61.pth.   torchvision itself is not needed, Pillow is.
--mode plan: bytes and seconds of one pruning on this machine, before anything runs.
--out: last.pt, from which a run that was killed goes on by itself, after any batch and with any number of processes;
    log.jsonl, for `fastfisher report`; at the end model.safetensors.
imagenet_resnet50.sbatch starts it under SLURM.

The settings are those of WoodFisher (Singh & Alistarh, 2020), the details as in the authors' repository
IST-DASLab/WoodFisher (configs/resnet50.yaml, scripts/resnet50_woodfisher_sparsity-0.9.sh): the weights of all
convolutions and of the last layer, ranked together; damping 1e-5, as it is; a single step with the summed correction;
gradients that are means over mini-batches of training images, cropped and flipped at random; schedule and rates as in
`schedule` and `rate`.  Blocks are of 1000 or 2000 weights, with 80 to 400 gradients of 100 to 400 images.  The defaults
are the smallest of these, for which --mode plan counts 34 GB; the script named above has --block-size 2000
--num-grads 400 --grad-batch-size 400 --batch-size 180, which comes to 144 GB, 102 of them for the activations of 400
images at once.  It starts from STR's dense ResNet-50, not from torchvision's.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

import fastfisher as ff
from fastfisher.errors import FastFisherError

SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp"}
# Of the colours of ImageNet, as torchvision's weights expect them.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, and a shortcut.   x [n, c, H, W] -> [n, 4 width, H', W']."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 bottlenecks, under torchvision's names.   x [n, 3, H, W] -> logits [n, classes].

    width: channels of the first stage; 64 makes the 25,557,032 parameters of the real one.   Source: He et al., 2016.
    """

    def __init__(self, classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for number, (depth, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), 1):
            stage = []
            for i in range(depth):
                stage.append(Bottleneck(channels, width, stride if i == 0 else 1))
                channels = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            width *= 2
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for number in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


class Folder:
    """The images of root/<class>/**, in the order of their paths; labels count the classes in alphabetical order."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FastFisherError(
                f"there is no folder {str(root)!r}; --data must hold train/<class>/ and val/<class>/"
            )
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.files: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            before = len(self.files)
            for folder, folders, files in os.walk(root / name):
                folders.sort()
                self.files += [
                    (os.path.join(folder, file), label)
                    for file in sorted(files)
                    if Path(file).suffix.lower() in SUFFIXES
                ]
            if len(self.files) == before:
                raise FastFisherError(f"there are no images in {str(root / name)!r}")
        if not self.files:
            raise FastFisherError(f"there are no images in {str(root)!r}; they must lie in a folder a class")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label


class HuggingFace:
    """The same of a Hugging Face dataset, by its name or of a local folder; `datasets` downloads it where need be."""

    def __init__(self, name: str, split: str) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise FastFisherError(
                f"--data hf:{name} needs the package datasets: pip install datasets"
            ) from error
        self.rows = load_dataset(name, split=split)
        if not {"image", "label"} <= set(self.rows.column_names):
            raise FastFisherError(
                f"--data hf:{name} must have the columns image and label; it has {self.rows.column_names}"
            )
        self.classes: list[str] = self.rows.features["label"].names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return row["image"].convert("RGB"), row["label"]


Source = Folder | HuggingFace


def read(data: str) -> tuple[Source, Source]:
    """Images to train on and to evaluate on.   Raises FastFisherError in a sentence."""
    train: Source
    val: Source
    if data.startswith("hf:"):
        train, val = (HuggingFace(data.removeprefix("hf:"), split) for split in ("train", "validation"))
    else:
        train, val = (Folder(Path(data, split)) for split in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise FastFisherError(f"train and val differ in their classes (first: {odd[0] if odd else 'order'})")
    return train, val


def random_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """8 to 100 % of an image in an aspect of 3/4 to 4/3, or its central square.   Source: Szegedy et al., 2015."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return x, y, x + w, y + h
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


class Crops(Dataset[tuple[Tensor, int]]):
    """Images [3, size, size] with normalised colours, and labels.

    key: None for the middle of the image.  Else crops and flips follow from key and index alone: they are the same
    whichever process decodes the image, also in a run that was killed and goes on.
    """

    def __init__(self, source: Source, size: int, key: str | None = None) -> None:
        self.source, self.size, self.key = source, size, key

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        size = self.size
        if self.key is None:
            short = round(size * 256 / 224)
            scale = short / min(image.size)
            w, h = (max(short, int(side * scale)) for side in image.size)
            image = image.resize((w, h), Image.Resampling.BILINEAR)
            x, y = round((w - size) / 2), round((h - size) / 2)
            image = image.crop((x, y, x + size, y + size))
        else:
            rng = random.Random(f"{self.key} {index}")
            image = image.crop(random_box(*image.size, rng)).resize((size, size), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # [3, size, size]
        return (pixels - MEAN) / STD, label


def load_weights(model: nn.Module, path: str) -> None:
    """Copy a file's tensors into the model.   Raises FastFisherError where it is no such file."""
    if path.endswith(".safetensors"):
        ff.load(path, model, verify=False)
        return
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise FastFisherError(
            f"--weights {path!r} cannot be read: {' '.join(str(error).split()):.120}"
        ) from error
    state = {name.removeprefix("module."): value for name, value in found.get("state_dict", found).items()}
    for name, own in model.state_dict().items():
        # files of before torch 0.4.1 do not count batches
        if not name.endswith("num_batches_tracked") and getattr(state.get(name), "shape", None) != own.shape:
            raise FastFisherError(f"--weights {path!r} has no {name!r} of the shape {list(own.shape)}")
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> World:
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device("cuda" if cuda else "cpu"))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `ff.prune` is told, and `ff.plan`."""
    return {
        "method": options.method,
        "block_size": options.block_size,
        "num_grads": options.num_grads,
        "grad_batch_size": options.grad_batch_size,
        "damping": 1e-5,
        "damping_mode": "absolute",
        "update": "sum",
        "num_recomputations": 0,
        "seed": options.seed,
    }


def schedule(options: argparse.Namespace) -> Any:
    """Gradual: 5 % after the 1st of 100 epochs, then every 5 epochs up to the 40th, cubic; fewer epochs in proportion.

    The authors' loop prunes at 1, 6, ... 36, a tenth of a percent short of the end; this one prunes at 40 too.
    """
    if options.mode == "one-shot":
        return [(0, options.sparsity)]
    n = options.epochs
    return ff.CubicSchedule(
        min(0.05, options.sparsity), options.sparsity, begin=n / 100, end=0.4 * n, every=n / 20
    )


def rate(options: argparse.Namespace, epoch: int) -> float:
    """0.005 of the optimizer up to epoch 40 of 100, then 0.6 times as much after every 6 epochs up to 90."""
    last = math.ceil(100 * epoch / options.epochs) - 1  # the epoch of 100 that is over
    drops = 0 if last < 40 else (min(last, 90) - 40) // 6 + 1
    return options.lr * 0.6**drops


def shuffled(count: int, key: str) -> list[int]:
    """0 ... count - 1 in an order that follows from the key alone."""
    generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
    return torch.randperm(count, generator=generator).tolist()


def gradient_batches(train: Source, options: argparse.Namespace, world: World, epoch: int) -> DataLoader[Any]:
    """Mini-batches for the Fisher: training images in another order each time, of which every process has its share."""
    key = f"fisher {options.seed} {epoch}"
    share = shuffled(len(train), key)[world.rank :: world.size]
    images = Subset(Crops(train, options.size, key), share)
    return DataLoader(images, options.grad_batch_size, num_workers=options.workers)


def training_batches(
    train: Source, options: argparse.Namespace, world: World, epoch: int, seen: int
) -> DataLoader[Any]:
    """This process's share of every batch of an epoch, from the first image on that was not seen yet."""
    key, size = f"train {options.seed} {epoch}", options.batch_size
    order = shuffled(len(train), key)
    batches = [
        order[i : i + size][world.rank :: world.size] for i in range(seen, len(order) - size + 1, size)
    ]
    return DataLoader(
        Crops(train, options.size, key),
        batch_sampler=batches,
        num_workers=options.workers,
        pin_memory=world.device.type == "cuda",
    )


@torch.no_grad()
def accuracy(model: nn.Module, val: Source, options: argparse.Namespace, world: World) -> float:
    """The share of the images whose largest logit is that of the label, over all processes."""
    images = Subset(Crops(val, options.size), range(world.rank, len(val), world.size))
    share = max(1, options.batch_size // world.size)
    right = torch.zeros((), device=world.device)
    model.eval()
    for inputs, labels in DataLoader(images, share, num_workers=options.workers):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=options.amp):
            logits = model(inputs.to(world.device))
        right += (logits.argmax(1) == labels.to(world.device)).sum()
    if world.size > 1:
        dist.all_reduce(right)
    return float(right) / len(val)


def run(options: argparse.Namespace, world: World) -> float | None:
    """Plan, or prune and train to the end; returns the accuracy."""
    train, val = read(options.data)
    plain = ResNet50(len(train.classes), options.width)
    load_weights(plain, options.weights)
    plain.to(world.device)
    if options.mode == "plan":
        if world.rank == 0:
            print(
                ff.plan(
                    plain,
                    gradient_batches(train, options, world, 0),
                    sparsity=options.sparsity,
                    **settings(options),
                )
            )
        return None

    if options.batch_size % world.size or options.batch_size > len(train):
        raise FastFisherError(
            f"--batch-size must be a multiple of {world.size} processes and at most the {len(train)} images; "
            f"got {options.batch_size}"
        )
    model: nn.Module = plain
    if world.size > 1:
        model = DistributedDataParallel(plain, [world.device.index] if world.device.type == "cuda" else None)
    optimizer = torch.optim.SGD(plain.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    pruner = ff.Pruner(
        model,  # in DistributedDataParallel: all processes end each pruning with the same weights
        schedule=schedule(options),
        log=options.out / "log.jsonl" if world.rank == 0 else None,
        **settings(options),
    )
    pruner.attach(optimizer)  # from here on zeros stay zero, in weights and momentum

    parts: dict[str, Any] = {"model": plain, "optimizer": optimizer, "pruner": pruner}
    start, seen, score = 0, 0, 0.0
    last = options.out / "last.pt"
    if last.exists():
        state = ff.load_checkpoint(last)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start, seen, score = state["epoch"], state["seen"], state["accuracy"]
        world.say(f"going on at image {seen:,} of epoch {start}")
    else:
        world.say(f"dense: accuracy {accuracy(plain, val, options, world):.4f}")

    def save(epoch: int, seen: int) -> None:
        if world.rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            ff.save_checkpoint(last, **states, epoch=epoch, seen=seen, accuracy=score)

    def judge(epoch: int, seconds: float) -> float:
        if world.size > 1:
            for buffer in plain.buffers():  # the running statistics of the first, as in its checkpoint
                dist.broadcast(buffer, 0)
        found = accuracy(plain, val, options, world)
        if world.rank == 0:
            pruner.record({"accuracy": found}, epoch=epoch)
        world.say(
            f"epoch {epoch}: {pruner.sparsity:.1%} of the weights are zero, accuracy {found:.4f}, {seconds:.0f} s"
        )
        return found

    if options.mode == "one-shot":
        began = time.perf_counter()
        if pruner.step(gradient_batches(train, options, world, 0), epoch=0) is not None:
            score = judge(0, time.perf_counter() - began)
            save(0, 0)
    for epoch in range(start, options.epochs):
        began = time.perf_counter()
        pruner.step(gradient_batches(train, options, world, epoch), epoch=epoch)  # when the schedule says so
        for group in optimizer.param_groups:
            group["lr"] = rate(options, epoch)
        model.train()
        batches = training_batches(train, options, world, epoch, seen)
        for count, (images, labels) in enumerate(batches, 1):
            images, labels = images.to(world.device), labels.to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=options.amp):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if count % options.save_every == 0:
                save(epoch, seen + count * options.batch_size)
        seen = 0
        score = judge(epoch, time.perf_counter() - began)
        save(epoch + 1, 0)
    pruner.finalize()
    if world.rank == 0:
        ff.save(plain, options.out / "model.safetensors", report=pruner.reports[-1])
    return score


def main(arguments: Sequence[str] | None = None) -> float | None:
    """Read the command line, run, and leave the other processes in order; an error is one sentence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, or hf:NAME")
    parser.add_argument("--weights", required=True, help="of the dense network, under torchvision's names")
    parser.add_argument("--mode", choices=("gradual", "one-shot", "plan"), default="gradual")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("imagenet_output"))
    parser.add_argument("--epochs", type=int, help="100, and 0 after one-shot pruning")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together (256)")
    parser.add_argument("--lr", type=float, default=0.005, help="at the beginning (0.005)")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16; the authors' is float32")
    parser.add_argument("--method", default="woodfisher", help='or "magnitude", ... of ff.prune')
    parser.add_argument("--block-size", type=int, default=1000)
    parser.add_argument("--num-grads", type=int, default=80)
    parser.add_argument("--grad-batch-size", type=int, default=100)
    parser.add_argument(
        "--workers", type=int, default=8, help="processes that decode, for each that trains (8)"
    )
    parser.add_argument("--save-every", type=int, default=500, help="batches; and after every epoch (500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=224, help="of the cropped images (224)")
    parser.add_argument(
        "--width", type=int, default=64, help="64 channels make a ResNet-50; fewer are for trials"
    )
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = 0 if options.mode == "one-shot" else 100
    if options.mode == "gradual" and options.epochs < 3:
        parser.error(f"--mode gradual needs --epochs 3 or more to reach its sparsity; got {options.epochs}")
    world = World.join()
    try:
        return run(options, world)
    except FastFisherError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
