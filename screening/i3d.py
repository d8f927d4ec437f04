"""I3D ResNet, the residual network over space and time that embeds clips (Hara et al., CVPR 2018).

As MitoReID uses it ("Deep learning large-scale drug discovery and repurposing", Nature
Computational Science 2024): every two-dimensional convolution of a ResNet gains a time axis, and a
batch-norm neck (Luo et al., CVPRW 2019) stands between the embedding that the metric losses see and
the classifier.

Axis letters: N clips, C channels, T frames, H height, W width (px), D embedding dimension.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from storage_schemas.base import Config
from storage_schemas.errors import InputError

Stride: TypeAlias = tuple[int, int, int]


class ModelConfig(Config):
    """The shape of the network."""

    depth: Literal[10, 18, 34, 50] = Field(18, description="layers: 10, 18 and 34 of basic blocks, 50 of bottlenecks")
    width: int = Field(64, ge=4, description="channels of the stem; the stages have 1, 2, 4 and 8 times as many")
    temporal: Literal["standard", "retain", "image"] = Field(
        "retain",
        description="time in the last stages: halved (standard) or kept (retain); image: one frame",
    )
    image_frame: int = Field(-1, description="frame of the clip that temporal=image sees; negative counts from the end")
    neck: bool = Field(True, description="batch-norm neck between embedding and classifier")
    stem_frames: int = Field(
        7,
        ge=1,
        description="frames the first convolution spans (odd); 3 makes a small network cheaper",
    )
    shortcut: Literal["A", "B"] | None = Field(
        None,
        description="where shapes change: A pads zeros, B projects; null: A, or B for depth 50",
    )


def frames_seen(config: ModelConfig, n_frames: int) -> list[int]:
    """The frames of a clip that the network is fed: all, or the one that ``temporal="image"`` sees.

    Raises:
        InputError: if ``image_frame`` lies outside the clip.
    """
    if config.temporal != "image":
        return list(range(n_frames))
    if not -n_frames <= config.image_frame < n_frames:
        raise InputError(
            f"model.image_frame is {config.image_frame} but clips have {n_frames} frames: "
            f"choose from {-n_frames} to {n_frames - 1}"
        )
    return [config.image_frame % n_frames]


class I3DResNet(nn.Module):
    """Clips to class scores and embeddings.

    Weights are drawn from torch's global generator (He et al., ICCV 2015, fan-out); fork and seed
    it for a reproducible start, as :meth:`screening.training.TrainingState.make` does.

    Args:
        config: the shape of the network.
        in_channels: C of the clips.
        n_classes: identities or mechanisms to tell apart.
    """

    def __init__(self, config: ModelConfig, in_channels: int, n_classes: int) -> None:
        super().__init__()
        self.config = config
        if config.stem_frames % 2 == 0:
            raise InputError(f"model.stem_frames is {config.stem_frames}: choose an odd number of frames")
        blocks = _BLOCKS_PER_STAGE[config.depth]
        block = Bottleneck if config.depth >= 50 else BasicBlock
        project = (config.shortcut or ("B" if block is Bottleneck else "A")) == "B"
        # Halving time in every stage leaves one frame of 16; retaining it leaves four.
        late: Stride = (1, 2, 2) if config.temporal == "retain" else (2, 2, 2)
        strides: tuple[Stride, ...] = ((1, 1, 1), (2, 2, 2), late, late)

        width = config.width
        self.conv1 = nn.Conv3d(
            in_channels,
            width,
            kernel_size=(config.stem_frames, 7, 7),
            stride=(1, 2, 2),
            padding=(config.stem_frames // 2, 3, 3),
            bias=False,
        )
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        stages = []
        channels = width
        for index, (depth, stride) in enumerate(zip(blocks, strides, strict=True)):
            planes = width * 2**index
            stage = [block(channels, planes, stride, project)]
            channels = planes * block.expansion
            stage += [block(channels, planes, (1, 1, 1), project) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.embedding_dim = channels
        self.neck = nn.BatchNorm1d(channels) if config.neck else None
        self.classifier = nn.Linear(channels, n_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The neck's features should stay centred on the origin, where cosine distance is measured.
        if self.neck is not None:
            self.neck.bias.requires_grad_(False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embed and classify.

        Args:
            x: normalised clips (N, C, T, H, W), any number of frames and any size.

        Returns:
            Logits (N, n_classes) and embedding (N, D): in training the embedding before the neck,
            which the metric losses pull together; in evaluation the one after it, which cosine
            distance compares.
        """
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, width, T, H/2, W/2)
        x = self.maxpool(x)  # (N, width, T/2, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        before = x.mean(dim=(2, 3, 4))  # (N, D): adaptive, so any clip fits
        after = before if self.neck is None else self.neck(before)
        logits = self.classifier(after)
        return logits, before if self.training else after


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: Stride, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = _shortcut(channels, planes, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, planes, T/stride, H/stride, W/stride)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3x3 convolution between two 1x1x1 ones, around a shortcut."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: Stride, project: bool) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv3d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out)
        self.downsample = _shortcut(channels, out, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, 4 * planes, T/stride, H/stride, W/stride)."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.downsample(x), inplace=True)


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th value (an average pool of kernel 1) and zeros as new channels."""

    def __init__(self, channels: int, out: int, stride: Stride) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out - channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, T, H, W) to (N, out, T/stride, H/stride, W/stride); no weights."""
        t, h, w = self.stride
        return functional.pad(x[:, :, ::t, ::h, ::w], (0, 0, 0, 0, 0, 0, 0, self.new_channels))


def _shortcut(channels: int, out: int, stride: Stride, project: bool) -> nn.Module:
    if stride == (1, 1, 1) and channels == out:
        return nn.Identity()
    if project:
        convolution = nn.Conv3d(channels, out, 1, stride, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm3d(out))
    return PadShortcut(channels, out, stride)


_BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
