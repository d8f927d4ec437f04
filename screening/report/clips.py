"""Clips of cells as film strips: all frames of a cell side by side in one WebP image.

A strip is played by moving it behind a window, so that the reader can stop it at any frame, and it is its own still
picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from screening.report.data import Example
from screening.report.groups import PALETTE

CLIP_BUDGET = 16_000_000
"""Characters of encoded clips in one page, so that a screen of any size stays an attachment."""
CLIP_SIDE = 96
"""Pixels: larger clips are reduced to this side."""
CLIP_FRAMES = 24
"""Of longer clips so many frames are shown, at even distances."""
QUALITY = 75


@dataclass(frozen=True)
class Clip:
    """A cell's film strip: `strip` is a WebP image in base64, `width` and `height` those of one frame."""

    compound: str
    caption: str
    strip: str
    frames: int
    width: int
    height: int


def film_strips(examples: Sequence[Example]) -> tuple[list[Clip], int]:
    """Encoded clips within `CLIP_BUDGET` characters, and the number of clips left out for it.

    The first cell of every compound comes before the second of any, so that the budget is shared evenly.
    """
    brightest = brightness(examples)
    clips: list[Clip] = []
    spent = 0
    for example in _in_turns(examples):
        clip = film_strip(example, brightest)
        spent += len(clip.strip)
        if spent > CLIP_BUDGET:
            break
        clips.append(clip)
    return clips, len(examples) - len(clips)


def brightness(examples: Sequence[Example]) -> dict[str, float]:
    """Per channel the 99.8th percentile over all examples.

    It is shown as full brightness in each of them, so that clips can be compared with each other.
    """
    histograms: dict[str, NDArray[np.int64]] = {}
    for example in examples:
        for name, channel in zip(example.channel_colours, example.clip, strict=True):
            counts = np.bincount(channel.ravel(), minlength=256)
            histograms[name] = histograms.get(name, np.zeros(256, dtype=np.int64)) + counts
    return {
        name: float(max(np.searchsorted(counts.cumsum(), 0.998 * counts.sum()), 1))
        for name, counts in histograms.items()
    }


def film_strip(example: Example, brightest: Mapping[str, float]) -> Clip:
    """One clip, encoded; `brightest` as of :func:`brightness`."""
    n_frames = example.clip.shape[1]
    shown = np.unique(np.linspace(0, n_frames - 1, min(n_frames, CLIP_FRAMES)).round().astype(int))
    images = [Image.fromarray(frame) for frame in composite(example._replace(clip=example.clip[:, shown]), brightest)]
    for image in images:
        image.thumbnail((CLIP_SIDE, CLIP_SIDE))
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="WEBP", quality=QUALITY)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Clip(example.compound, example.caption, encoded, len(images), width, height)


def composite(example: Example, brightest: Mapping[str, float]) -> NDArray[np.uint8]:
    """(T, H, W, 3) uint8: each channel in its colour, added up."""
    mixed = np.zeros((*example.clip.shape[1:], 3), dtype=np.float32)
    for channel, (name, colour) in zip(example.clip, example.channel_colours.items(), strict=True):
        intensity = np.minimum(channel / np.float32(brightest[name]), 1.0)
        mixed += intensity[..., None] * np.asarray(to_rgb(colour), dtype=np.float32)
    return (255 * np.minimum(mixed, 1.0)).round().astype(np.uint8)


def channel_colours(names: Sequence[str]) -> dict[str, str]:
    """Display colours of channels, told apart with any colour vision: white; green and magenta;
    blue, green and red-magenta; further ones in the order of the palette."""
    if len(names) == 1:
        return {names[0]: "#ffffff"}
    first = ("#37d67a", "#f04fd0") if len(names) == 2 else ("#4f7dff", "#37d67a", "#ff4f6d")
    return dict(zip(names, (*first, *PALETTE * len(names)), strict=False))


def legend(examples: Sequence[Example]) -> dict[str, str]:
    """The colours of all channels that are shown, by name."""
    return {name: colour for example in examples for name, colour in example.channel_colours.items()}


def _in_turns(examples: Sequence[Example]) -> Iterator[Example]:
    """The first example of each compound, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns: dict[int, list[Example]] = {}
    for example in examples:
        turn = seen.get(example.compound, 0)
        seen[example.compound] = turn + 1
        turns.setdefault(turn, []).append(example)
    for turn in sorted(turns):
        yield from turns[turn]
