"""Augmentation: the same for all frames and channels of a clip, its own for each clip."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from screening.augmentation import AugmentConfig, Draw, _apply_opencv, _apply_torch, apply, augment, draw
from storage_schemas.clips import white

OFF = AugmentConfig(rotation=0, min_scale=1, max_scale=1, flip=False, shift=0, brightness=0, blur_probability=0)


def noise(n: int = 6, t: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 2, t, size, size), dtype=torch.uint8, generator=generator)


def run(clips: torch.Tensor, config: AugmentConfig, seed: int = 0) -> torch.Tensor:
    return augment(clips, config, torch.Generator().manual_seed(seed))


def test_nothing_changes_when_all_is_off() -> None:
    assert torch.equal(run(noise(), OFF), noise())


def test_all_frames_and_channels_of_a_clip_get_one_draw() -> None:
    still = noise()[:, :1, :1].expand(-1, 2, 5, -1, -1)
    changed = run(still, AugmentConfig(blur_probability=0.5))
    assert changed.dtype == torch.uint8
    assert torch.equal(changed, changed[:, :1, :1].expand_as(changed))
    assert not torch.equal(changed, still)


@pytest.mark.parametrize("dtype", ["uint16", "float16"])
@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_clips_of_more_bits_change_like_those_of_eight(dtype: str, blur: float) -> None:
    config = AugmentConfig(blur_probability=blur, brightness=0.3)
    unit = white(dtype)
    finer = noise().float().mul(unit / 255).to(getattr(torch, dtype))
    changed = run(finer, config)
    assert changed.dtype == finer.dtype
    assert 0.9 * unit < changed.float().max() <= unit
    # Those of eight are rounded after each step.
    np.testing.assert_allclose(changed.float() / unit, run(noise(), config).float() / 255, atol=2 / 255)


def test_each_clip_gets_its_own_draw() -> None:
    same = noise(1).expand(6, -1, -1, -1, -1)
    changed = run(same, AugmentConfig(blur_probability=0))
    for i in range(1, 6):
        assert not torch.equal(changed[0], changed[i])


def test_the_draw_follows_the_generator_and_leaves_the_global_state() -> None:
    config = AugmentConfig(blur_probability=0)
    state = torch.get_rng_state()
    assert torch.equal(run(noise(), config, 5), run(noise(), config, 5))
    assert not torch.equal(run(noise(), config, 5), run(noise(), config, 6))
    assert torch.equal(state, torch.get_rng_state())


def test_flips_go_both_ways_and_are_exact() -> None:
    clips = noise(40)
    changed = run(clips, OFF.model_copy(update={"flip": True}))
    seen = set()
    for before, after in zip(clips, changed, strict=True):
        kinds = [dims for dims in ((), (2,), (3,), (2, 3)) if torch.equal(after, before.flip(dims) if dims else before)]
        assert len(kinds) == 1
        seen.add(kinds[0])
    assert seen == {(), (2,), (3,), (2, 3)}


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_rotation_keeps_lengths_whatever_the_shape(size: tuple[int, int]) -> None:
    # A disc stays a disc of the same area and place, however it is turned.
    h, w = size
    y, x = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    disc = (200 * torch.sigmoid(2 * (8 - torch.hypot(y, x)))).round().to(torch.uint8)
    clips = disc.expand(8, 1, 2, h, w)
    changed = run(clips, OFF.model_copy(update={"rotation": 180.0, "padding": "zeros"}))
    assert int((changed.int() - clips.int()).abs().max()) <= 12


def test_scale_changes_area_as_told() -> None:
    clips = torch.zeros(1, 1, 1, 64, 64, dtype=torch.uint8)
    clips[..., 24:40, 24:40] = 255
    doubled = run(clips, OFF.model_copy(update={"min_scale": 2.0, "max_scale": 2.0}))
    assert doubled.float().sum() / clips.float().sum() == pytest.approx(4, rel=0.05)


def test_shift_stays_within_its_share() -> None:
    clips = torch.zeros(50, 1, 1, 65, 65, dtype=torch.uint8)
    clips[..., 32, 32] = 255
    config = OFF.model_copy(update={"shift": 0.1, "padding": "zeros"})
    moved = run(clips, config)[:, 0, 0].flatten(1).argmax(dim=1)
    offset = torch.stack([moved // 65 - 32, moved % 65 - 32], dim=1)
    assert 5 <= int(offset.abs().max()) <= 7


def test_brightness_stays_within_its_share() -> None:
    clips = torch.full((50, 1, 1, 4, 4), 100, dtype=torch.uint8)
    changed = run(clips, OFF.model_copy(update={"brightness": 0.2}))
    assert 80 <= int(changed.min()) < 90
    assert 110 < int(changed.max()) <= 120


def test_blur_lowers_contrast_of_the_share_told_and_keeps_the_mean() -> None:
    clips = noise(60, t=1)
    changed = run(clips, OFF.model_copy(update={"blur_probability": 0.5, "max_blur": 1.5}))
    blurred = [not torch.equal(a, b) for a, b in zip(clips, changed, strict=True)]
    assert 15 <= sum(blurred) <= 45
    assert changed.float().std() < clips.float().std()
    assert changed.float().mean() == pytest.approx(clips.float().mean(), abs=1)


def turned(clip: np.ndarray, drawn: Draw) -> np.ndarray:
    """One clip (P, H, W) warped pixel by pixel, zeros beyond its edge."""
    h, w = clip.shape[1:]
    result = np.zeros(clip.shape)
    matrix, shift = drawn.matrix[0].numpy(), drawn.shift[0].numpy()
    for y in range(h):
        for x in range(w):
            u, v = matrix @ (x - (w - 1) / 2, y - (h - 1) / 2) + (
                (w - 1) / 2 + shift[0] * w,
                (h - 1) / 2 + shift[1] * h,
            )
            for row in (math.floor(v), math.floor(v) + 1):
                for column in (math.floor(u), math.floor(u) + 1):
                    if 0 <= row < h and 0 <= column < w:
                        result[:, y, x] += (1 - abs(v - row)) * (1 - abs(u - column)) * clip[:, row, column]
    return result * float(drawn.gain[0])


def waves(n: int, h: int, w: int) -> torch.Tensor:
    y, x = np.mgrid[:h, :w]
    planes = [127 + 100 * np.sin(x / 7 + plane) * np.cos(y / 9) for plane in range(18)]
    return torch.tensor(np.stack(planes)).expand(n, 18, h, w)


@pytest.mark.parametrize("way", [_apply_opencv, _apply_torch])
def test_the_warp_equals_the_loop(way: Callable[..., torch.Tensor]) -> None:
    drawn = draw(1, AugmentConfig(blur_probability=0), torch.Generator().manual_seed(4))
    clip = waves(1, 24, 40) / 255
    result = way(clip.half(), drawn, "zeros", 2)[0].float()
    np.testing.assert_allclose(result, turned(clip[0].numpy(), drawn).clip(0, 1), atol=0.02)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_both_ways_give_the_same_picture(dtype: str, padding: str) -> None:
    drawn = draw(8, AugmentConfig(blur_probability=0.5), torch.Generator().manual_seed(3))
    images = (waves(8, 64, 48) * (white(dtype) / 255)).to(getattr(torch, dtype))
    a, b = (way(images, drawn, padding, 2).float() * 255 / white(dtype) for way in (_apply_opencv, _apply_torch))
    # OpenCV rounds places to 1/32 px, which shows at the edge to black.
    assert float((a - b).abs().max()) <= (4 if padding == "zeros" else 1) + 1e-3
    assert float((a - b).square().mean().sqrt()) < 0.6


def test_both_ways_are_near_each_other_on_noise() -> None:
    """1/64 px along each axis is off by 1/64 of the contrast each."""
    drawn = draw(6, AugmentConfig(blur_probability=0), torch.Generator().manual_seed(3))
    a, b = (way(noise(size=64).flatten(1, 2), drawn, "reflection", 2).int() for way in (_apply_opencv, _apply_torch))
    assert 1 < int((a - b).abs().max()) <= 2 * 255 / 64 + 1


def test_a_share_of_a_batch_changes_as_in_the_whole() -> None:
    config = AugmentConfig(blur_probability=0.5)
    drawn = draw(6, config, torch.Generator().manual_seed(1))
    whole = apply(noise(), drawn, config)
    assert torch.equal(whole, run(noise(), config, 1))
    assert torch.equal(whole[2:4], apply(noise()[2:4], drawn[2:4], config))
