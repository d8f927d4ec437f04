"""The network that MitoReID trains, written apart from ours: as the paper and Hara et al. (CVPR 2018) describe it.

Its average pool has the fixed size of one clip, and shortcut A is an average pool and a concatenation with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Block(nn.Module):
    """A list of convolutions, each with a batch norm, and a shortcut around them."""

    def __init__(
        self, convolutions: Sequence[nn.Conv3d], planes: int, stride: tuple[int, int, int], shortcut: str
    ) -> None:
        super().__init__()
        self.n = len(convolutions)
        for i, convolution in enumerate(convolutions, start=1):
            setattr(self, f"conv{i}", convolution)
            setattr(self, f"bn{i}", nn.BatchNorm3d(convolution.out_channels))
        channels = convolutions[0].in_channels
        self.planes, self.stride = planes, stride
        self.changes = stride != (1, 1, 1) or channels != planes
        if self.changes and shortcut == "B":
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, planes, 1, stride=stride, bias=False), nn.BatchNorm3d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.n + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.n:
                y = functional.relu(y)
        if not self.changes:
            return functional.relu(y + x)
        if hasattr(self, "downsample"):
            return functional.relu(y + self.downsample(x))
        pooled = functional.avg_pool3d(x, kernel_size=1, stride=self.stride)
        n, c, t, h, w = pooled.shape
        return functional.relu(y + torch.cat([pooled, torch.zeros(n, self.planes - c, t, h, w)], dim=1))


class Hara(nn.Module):
    """The network for clips (channels, frames, size, size); ``neck`` and ``head`` are the names of those two."""

    def __init__(
        self,
        depth: int = 18,
        shortcut: str = "A",
        temporal: str = "retain",
        *,
        cardinality: int = 1,
        width: int = 64,
        stem_frames: int = 7,
        channels: int = 3,
        frames: int = 16,
        size: int = 112,
        classes: int = 38,
        neck: str | None = "bottleneck",
        head: str = "classifier",
        head_bias: bool = True,
    ) -> None:
        super().__init__()
        s = (1, 2, 2) if temporal == "retain" else (2, 2, 2)
        pad = (stem_frames // 2, 3, 3)
        self.conv1 = nn.Conv3d(channels, width, (stem_frames, 7, 7), stride=(1, 2, 2), padding=pad, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        inplanes = width
        for i, (n, stride) in enumerate(zip(BLOCKS[depth], ((1, 1, 1), (2, 2, 2), s, s), strict=True)):
            blocks = []
            for j in range(n):
                step = stride if j == 0 else (1, 1, 1)
                if depth < 50:
                    planes = width * (1, 2, 4, 8)[i]
                    convolutions = [
                        nn.Conv3d(inplanes, planes, 3, stride=step, padding=1, bias=False),
                        nn.Conv3d(planes, planes, 3, padding=1, bias=False),
                    ]
                else:
                    if cardinality > 1:  # stages of 128, 256, 512 and 1024 where the stem has 64
                        wide = 2 * width * (1, 2, 4, 8)[i]
                        planes, mid = 2 * wide, cardinality * (wide // 32)
                    else:
                        mid = width * (1, 2, 4, 8)[i]
                        planes = 4 * mid
                    convolutions = [
                        nn.Conv3d(inplanes, mid, 1, bias=False),
                        nn.Conv3d(mid, mid, 3, stride=step, padding=1, groups=cardinality, bias=False),
                        nn.Conv3d(mid, planes, 1, bias=False),
                    ]
                blocks.append(Block(convolutions, planes, step, shortcut))
                inplanes = planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        left = frames if temporal == "image" else math.ceil(frames / (4 if temporal == "retain" else 16))
        self.avgpool = nn.AvgPool3d((left, math.ceil(size / 32), math.ceil(size / 32)), stride=1)
        self.neck_name, self.head_name = neck, head
        if neck is not None:
            self.add_module(neck, nn.BatchNorm1d(inplanes))
        self.add_module(head, nn.Linear(inplanes, classes, bias=head_bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool3d(x, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        x = self.avgpool(x)
        before = x.view(x.shape[0], -1)
        after = before if self.neck_name is None else getattr(self, self.neck_name)(before)
        return getattr(self, self.head_name)(after), before if self.training else after


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor set to numbers that are neither its default nor let the signal die out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(generator=generator).mul_((2 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(generator=generator).mul_(0.1)
            elif name.endswith(("running_var", "weight")):
                tensor.uniform_(0.6, 1.4, generator=generator)
    return network


def release(network: nn.Module, path: Path, prefix: str = "module.", **options: bool) -> Path:
    """Save a network as MitoReID does."""
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    checkpoint = {
        "state_dict": state,
        "epoch": 3,
        "best_metric": 0.5,
        "optimizer_state": optimizer.state_dict(),
        "scheduler_state": schedule.state_dict(),
    }
    torch.save(checkpoint, path, **options)
    return path
