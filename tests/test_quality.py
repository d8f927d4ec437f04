from __future__ import annotations

import cv2
import numpy as np
import pytest

from screening import quality
from screening.quality import QualityConfig


def movie(n_frames: int = 12, n_channels: int = 2, seed: int = 0) -> np.ndarray:
    """Textured discs that move, under camera noise: (T, C, 96, 96) uint16."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(10, 86, (12, 2))
    stack = np.zeros((n_frames, n_channels, 96, 96), np.float32)
    for frame in range(n_frames):
        centres += rng.normal(0, 1, centres.shape)
        for channel in range(n_channels):
            for y, x in centres:
                cv2.circle(stack[frame, channel], (int(x), int(y)), 6, 400.0 + 200 * channel, 2)
    return rng.poisson(stack + 60).astype(np.uint16)


def blurred(stack: np.ndarray, frame: int, sigma: float = 3) -> np.ndarray:
    stack = stack.astype(np.float32)
    for plane in stack[frame]:
        plane[:] = cv2.GaussianBlur(plane, (0, 0), sigma)
    # Defocus leaves the camera's noise as it is.
    stack[frame] += np.random.default_rng(1).normal(0, 8, stack[frame].shape)
    return stack.clip(0).astype(np.uint16)


def flags(stack: np.ndarray, config: QualityConfig | None = None) -> list[int]:
    bad = quality.flag_frames(quality.measure(stack), config or QualityConfig())
    assert bad.dtype == bool
    assert bad.shape == (len(stack),)
    return [int(frame) for frame in np.flatnonzero(bad)]


@pytest.mark.parametrize("frame", [0, 5, 11])
def test_flags_a_soft_frame_and_no_other(frame: int) -> None:
    assert flags(movie()) == []
    assert flags(blurred(movie(), frame)) == [frame]


def test_flags_a_run_of_soft_frames() -> None:
    assert flags(blurred(blurred(movie(), 4), 5)) == [4, 5]


def test_contrast_that_changes_smoothly_is_no_fault() -> None:
    stack = movie(24).astype(np.float32)
    fading = np.exp(-np.arange(24) / 8)[:, None, None, None]
    assert flags((60 + (stack - 60).clip(0) * fading).astype(np.uint16)) == []


def test_a_step_that_stays_is_no_fault() -> None:
    soft = movie()
    for frame in range(6, 12):
        soft = blurred(soft, frame, 1.5)
    assert flags(soft) == []


def test_flags_empty_frames_and_lost_channels() -> None:
    stack = movie()
    stack[3] = 0
    stack[7, 1] = 60
    assert flags(stack) == [3, 7]


def test_flags_frames_without_finite_pixels_and_forgives_a_hole() -> None:
    stack = movie().astype(np.float32)
    stack[4] = np.nan
    stack[8, 0, :5, :5] = np.nan
    assert flags(stack) == [4]


def test_flags_saturation_at_a_camera_ceiling() -> None:
    stack = movie()
    stack[6, 0, :60] = 4095
    measures = quality.measure(stack)
    row = measures.query("frame == 6 and channel == 0").iloc[0]
    assert row.saturated == 60 / 96
    assert flags(stack) == [6]


def test_the_highest_value_of_a_movie_is_not_saturation() -> None:
    stack = movie()
    stack[6, 0, :60] = 4000
    assert (quality.measure(stack).saturated == 0).all()


def test_a_movie_of_one_frame_is_never_soft() -> None:
    assert flags(blurred(movie(1), 0)) == []
    assert flags(np.zeros((1, 2, 8, 8), np.uint16)) == [0]


def test_focus_ignores_scale_and_offset() -> None:
    stack = movie(2)
    one, other = quality.measure(stack), quality.measure(stack * 3.0 + 1000)
    np.testing.assert_allclose(one.focus, other.focus, rtol=1e-3)


def test_measures_are_those_of_numpy_in_order() -> None:
    stack = movie(3, 2)
    measures = quality.measure(stack)
    assert list(measures.columns) == ["frame", "channel", "focus", "saturated", "mean", "sd"]
    assert measures[["frame", "channel"]].to_numpy().tolist() == [[t, c] for t in range(3) for c in range(2)]
    np.testing.assert_allclose(measures["mean"], stack.mean(axis=(2, 3)).ravel(), rtol=1e-5)
    np.testing.assert_allclose(measures["sd"], stack.std(axis=(2, 3)).ravel(), rtol=1e-5)


def test_channels_may_be_named_and_rows_shuffled() -> None:
    measures = quality.measure(blurred(movie(), 5))
    named = measures.assign(channel=measures.channel.map({0: "nucleus", 1: "actin"}))
    bad = quality.flag_frames(named.sample(frac=1, random_state=0), QualityConfig())
    assert np.flatnonzero(bad).tolist() == [5]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2)])
def test_tiny_images_are_measured(shape: tuple[int, int]) -> None:
    stack = np.arange(2 * np.prod(shape), dtype=np.uint8).reshape(2, 1, *shape)
    assert len(quality.measure(stack)) == 2
