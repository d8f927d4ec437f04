"""Augmentation of clips: one draw a clip for all its frames, so that nothing flickers in time.

Axis letters: N clips, C channels, T frames, H height, W width (px).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from screening.torchvision_shim import import_torchvision
from storage_schemas.base import Config
from storage_schemas.clips import white


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


def augment(clips: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Change each clip by its own draw of rotation, scale, flips, shift, brightness and blur.

    Args:
        clips: (N, C, T, H, W) of any stored type, on any device.
        config: how far.
        generator: a CPU generator, so that the draw is the same whatever the device.

    Returns:
        (N, C, T, H, W) of the same type on the same device.
    """
    n, c, t, h, w = clips.shape
    images = clips.reshape(n, c * t, h, w)  # channels and frames move together
    matrix = _affine(n, h, w, config, generator).to(clips.device)
    gain = 1 + config.brightness * _uniform(n, -1, 1, generator).to(clips.device)
    grid = functional.affine_grid(matrix, [n, c * t, h, w], align_corners=False)
    warped = functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode=config.padding, align_corners=False
    )
    warped = warped.mul_(gain[:, None, None, None]).clamp_(0, white(clips.dtype))
    warped = _blur(warped, config, generator)
    if not clips.dtype.is_floating_point:
        warped.round_()
    return warped.to(clips.dtype).reshape(n, c, t, h, w)


def _affine(n: int, h: int, w: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """(N, 2, 3) matrices from output to input places in half sides, as ``affine_grid`` wants."""
    angle = torch.deg2rad(config.rotation * _uniform(n, -1, 1, generator))
    scale = _uniform(n, config.min_scale, config.max_scale, generator)
    mirror = torch.ones(n, 2)
    if config.flip:
        mirror = 1 - 2 * torch.randint(0, 2, (n, 2), generator=generator).float()
    shift = 2 * config.shift * torch.stack([_uniform(n, -1, 1, generator) for _ in "xy"], dim=1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # w / h and h / w: a rotation is one in pixels, and the sides of a clip may differ.
    rotation = torch.stack([torch.stack([cos, -sin * h / w], dim=1), torch.stack([sin * w / h, cos], dim=1)], dim=1)
    return torch.cat([rotation * mirror[:, None, :], shift[:, :, None]], dim=2)


def _blur(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Blur some of the images (N, C*T, H, W), in place, each by its own standard deviation."""
    drawn = _uniform(len(images), 0, 1, generator) < config.blur_probability
    sigmas = _uniform(len(images), 0.1, max(config.max_blur, 0.1), generator).tolist()
    chosen = torch.nonzero(drawn).flatten().tolist()
    if not chosen or config.max_blur == 0:
        return images
    # Imported here: it takes seconds, and only those who blur need it.
    gaussian_blur = import_torchvision("torchvision.transforms.v2.functional").gaussian_blur
    size = 2 * math.ceil(2 * config.max_blur) + 1
    # Clip by clip, though it is a loop: one grouped convolution for all is slower on a CPU.
    for i in chosen:
        images[i] = gaussian_blur(images[i], [size, size], [sigmas[i], sigmas[i]])
    return images


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)
