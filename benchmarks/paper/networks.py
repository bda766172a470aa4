"""The networks of the published experiments, with the parameter names of their checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLPNet(nn.Module):
    """784-40-20-10, ReLU, no biases: 32,360 weights.   x [n, 1, 28, 28] or [n, 784] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes.   Source: He et al., 2016, fig.
    2.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels:
            shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels: 272,474 parameters.   x [n, 3, 32, 32] -> logits [n,
    10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(2)]
        return nn.Sequential(BasicBlock(channels_in, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))

    @staticmethod
    def prunable() -> list[str]:
        """The eighteen 3x3 convolutions of the three stages: 267,264 weights."""
        return [
            f"layer{stage}.{block}.conv{conv}.weight"
            for stage in (1, 2, 3)
            for block in (0, 1, 2)
            for conv in (1, 2)
        ]


class LeNet5(nn.Module):
    """Two convolutions and three linear layers: 44,426 parameters.   x [n, 1, 28, 28] -> logits [n, 10].   Source:
    LeCun et al., 1998, with ReLU and maximum pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class ResNet18(nn.Module):
    """Four stages of two blocks with 64 to 512 channels, for small images: 11.2 million parameters.

    x [n, 3, H, W] -> logits [n, classes].   width: channels of the first stage.
    Source: He et al., 2016, with a first convolution of 3x3 and stride 1.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        w = width
        sizes = [(w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2)]
        self.stages = nn.Sequential(
            *(nn.Sequential(BasicBlock(a, b, s), BasicBlock(b, b, 1)) for a, b, s in sizes)
        )
        self.fc = nn.Linear(8 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Causal self-attention with several heads.   x [n, T, width] -> [n, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [n, heads, T, width / heads]
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Attention and two linear layers, each behind a LayerNorm and added to its input.   x [n, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """Predicts every next character from those before; input embedding and output layer are one matrix.

    characters [n, T] int64 with T <= context -> logits [n, characters, T], as cross entropy takes them.
    Source: Radford et al., 2019, without dropout.
    """

    def __init__(
        self, characters: int, context: int = 64, width: int = 128, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(TransformerLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.place.weight[: characters.shape[1]]
        return self.head(self.norm(self.layers(x))).transpose(1, 2)
