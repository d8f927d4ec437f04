"""Augmentation of clips: one draw a clip for all its frames, so that nothing flickers in time.

Rotation, magnification, flips and shift are composed into one warp, so that pixels are interpolated once. Clips on a
CPU are warped by OpenCV, which takes them as they are stored; those on a GPU by torch, all at once. Both give the same
picture, but for OpenCV's rounding of places to 1/32 px.

Axis letters: N clips, C channels, T frames, H height, W width (px).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from storage_schemas.base import Config
from storage_schemas.clips import white

_PLANES_AT_A_TIME = 16  # that OpenCV warps as channels of one image: their places in it are worked out once
_CV_BORDERS = {"zeros": cv2.BORDER_CONSTANT, "border": cv2.BORDER_REPLICATE, "reflection": cv2.BORDER_REFLECT}


class AugmentConfig(Config):
    """How far augmentation may change a clip."""

    rotation: float = Field(180.0, ge=0, le=180, description="largest rotation either way, degrees")
    min_scale: float = Field(0.8, gt=0, description="smallest magnification")
    max_scale: float = Field(1.2, gt=0, description="largest magnification")
    flip: bool = Field(True, description="mirror left-right and top-bottom, each with probability one half")
    shift: float = Field(
        0.06,
        ge=0,
        lt=1,
        description="largest shift along either axis, share of the side (an off-centre crop)",
    )
    padding: Literal["zeros", "border", "reflection"] = Field(
        "reflection", description="what is seen beyond the clip's edge"
    )
    brightness: float = Field(0.1, ge=0, lt=1, description="largest relative change of intensity")
    blur_probability: float = Field(0.2, ge=0, le=1, description="share of clips that are blurred")
    max_blur: float = Field(1.0, ge=0, description="largest standard deviation of the blur, px")


@dataclass(frozen=True)
class Draw:
    """What is done to each of N clips, on the CPU.

    Attributes:
        matrix: (N, 2, 2) from places (x, y) in the result to places in the clip, px from the centre.
        shift: (N, 2) of the place (x, y) in the clip, share of the side.
        gain: (N,) what intensities are multiplied by.
        blur: (N,) standard deviation of the blur, px; 0 for none.
    """

    matrix: Tensor
    shift: Tensor
    gain: Tensor
    blur: Tensor

    def __getitem__(self, part: slice) -> Draw:
        """The draw of some of the clips, as of one worker's share of a batch."""
        return Draw(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def draw(n: int, config: AugmentConfig, generator: torch.Generator) -> Draw:
    """Draw what is done to each of n clips.

    Args:
        n: number of clips.
        config: how far.
        generator: a CPU generator, so that the draw is the same whatever the device.
    """
    angle = torch.deg2rad(config.rotation * _uniform(n, -1, 1, generator))
    scale = _uniform(n, config.min_scale, config.max_scale, generator)
    mirror = torch.ones(n, 2)
    if config.flip:
        mirror = 1 - 2 * torch.randint(0, 2, (n, 2), generator=generator).float()
    shift = config.shift * torch.stack([_uniform(n, -1, 1, generator) for _ in "xy"], dim=1)
    gain = 1 + config.brightness * _uniform(n, -1, 1, generator)
    blurred = _uniform(n, 0, 1, generator) < config.blur_probability
    sigma = _uniform(n, min(0.1, config.max_blur), config.max_blur, generator)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rotation = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    return Draw(rotation * mirror[:, None, :], shift, gain, sigma * blurred)


def augment(clips: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Change each clip by its own draw of rotation, scale, flips, shift, brightness and blur.

    Args:
        clips: (N, C, T, H, W) of any stored type, on any device.
        config: how far.
        generator: a CPU generator, so that the draw is the same whatever the device.

    Returns:
        (N, C, T, H, W) of the same type on the same device.
    """
    return apply(clips, draw(len(clips), config, generator), config)


def apply(clips: Tensor, drawn: Draw, config: AugmentConfig) -> Tensor:
    """Change clips as drawn.

    Args:
        clips: (N, C, T, H, W) of any stored type, on any device.
        drawn: of as many clips.
        config: that they were drawn with.

    Returns:
        (N, C, T, H, W) of the same type on the same device.
    """
    assert len(drawn.gain) == len(clips)
    radius = math.ceil(2 * config.max_blur)
    images = clips.flatten(1, 2)  # (N, C * T, H, W): channels and frames move together
    changed = (_apply_opencv if clips.device.type == "cpu" else _apply_torch)(images, drawn, config.padding, radius)
    return changed.reshape(clips.shape)


def _apply_opencv(images: Tensor, drawn: Draw, padding: str, radius: int) -> Tensor:
    if images.dtype == torch.float16:  # a type that OpenCV does not warp
        return _apply_opencv(images.float(), drawn, padding, radius).clamp_(0, white(images.dtype)).half()
    source: NDArray[Any] = images.contiguous().numpy()
    result = np.empty_like(source)
    h, w = source.shape[2:]
    center = np.array([w - 1, h - 1]) / 2
    matrix = drawn.matrix.numpy().astype(np.float64)
    offset = center + drawn.shift.numpy() * (w, h) - matrix @ center
    for i, affine in enumerate(np.concatenate([matrix, offset[:, :, None]], axis=2)):
        for start in range(0, source.shape[1], _PLANES_AT_A_TIME):
            planes = slice(start, start + _PLANES_AT_A_TIME)
            image = cv2.warpAffine(
                cv2.merge(list(source[i, planes])),
                affine,
                (w, h),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=_CV_BORDERS[padding],
            )
            if drawn.blur[i] > 0:
                cv2.GaussianBlur(image, (2 * radius + 1,) * 2, float(drawn.blur[i]), dst=image)
            flat = image.reshape(h, -1)
            cv2.addWeighted(flat, float(drawn.gain[i]), flat, 0, 0, dst=flat)  # a product that saturates
            cv2.split(image, list(result[i, planes]))
    return torch.from_numpy(result)


def _apply_torch(images: Tensor, drawn: Draw, padding: str, radius: int) -> Tensor:
    h, w = images.shape[2:]
    side = torch.tensor([w, h])
    # In half sides, as affine_grid wants it; the sides of a clip may differ.
    matrix = torch.cat([drawn.matrix * (side / side[:, None]), 2 * drawn.shift[:, :, None]], dim=2)
    grid = functional.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    warped = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    chosen = torch.nonzero(drawn.blur > 0).flatten()
    if len(chosen):
        warped[chosen] = _blurred(warped[chosen], drawn.blur[chosen].to(images.device), radius)
    warped.mul_(drawn.gain.to(images.device)[:, None, None, None]).clamp_(0, white(images.dtype))
    if not images.dtype.is_floating_point:
        warped.round_()
    return warped.to(images.dtype)


def _blurred(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Images (N, P, H, W), each blurred by its own standard deviation (N,)."""
    n, planes = images.shape[:2]
    place = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(planes, dim=0)  # (N * P, 2 * radius + 1)
    x = functional.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    x = functional.conv2d(x, kernel[:, None, None, :], groups=n * planes)
    x = functional.conv2d(x, kernel[:, None, :, None], groups=n * planes)
    return x.reshape(images.shape)


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)
