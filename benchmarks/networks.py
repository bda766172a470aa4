"""The weight tensors of networks that people prune: convolutions and linear layers, no biases and no normalisation.

Shapes are in the order of the networks' parameters, [out, in, ...] as PyTorch holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

Shape = tuple[int, ...]


def _resnet50() -> Iterator[Shape]:
    """He et al. 2015, table 1: four stages of bottlenecks, the first of each with a projection around it."""
    yield 64, 3, 7, 7
    channels = 64
    for width, bottlenecks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(bottlenecks):
            yield width, channels, 1, 1
            yield width, width, 3, 3
            yield 4 * width, width, 1, 1
            if i == 0:
                yield 4 * width, channels, 1, 1
            channels = 4 * width
    yield 1000, channels


def _bert_base_encoder() -> Iterator[Shape]:
    """Devlin et al. 2018: query, key, value and output of the attention, then the two layers behind it."""
    for _ in range(12):
        yield from [(768, 768)] * 4
        yield from [(3072, 768), (768, 3072)]


def _vit_b() -> Iterator[Shape]:
    """Dosovitskiy et al. 2020, patches of 16 x 16: query, key and value are one tensor."""
    yield 768, 3, 16, 16
    for _ in range(12):
        yield from [(3 * 768, 768), (768, 768), (3072, 768), (768, 3072)]
    yield 1000, 768


SHAPES: dict[str, tuple[Shape, ...]] = {
    "ResNet-50": tuple(_resnet50()),
    "BERT-base encoder": tuple(_bert_base_encoder()),
    "ViT-B": tuple(_vit_b()),
}
SIZES = {name: tuple(map(math.prod, shapes)) for name, shapes in SHAPES.items()}
