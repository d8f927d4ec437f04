from __future__ import annotations

import tracemalloc

import cv2
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter, ValidationError

from screening import illumination, quality
from screening.illumination import Calibration, FlatField, IlluminationConfig, NoIllumination
from screening.quality import PlateQuality
from storage_schemas.errors import InputError

USUAL = PlateQuality(*np.ones((4, 1)))


def vignette(height: int, width: int) -> np.ndarray:
    """An off-centre fall of light, about 0.65 to 1.15, of mean 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    field = 1 - 0.2 * ((x - 0.2) ** 2 + (y + 0.1) ** 2)
    return field / field.mean()


def simulate(rng: np.random.Generator, shape: tuple[int, int], n_frames: int = 1, offset: float = 100) -> np.ndarray:
    """Discs on a lit background under a vignette, over a camera offset: (T, 2, H, W) uint16."""
    height, width = shape
    light = np.zeros(shape, np.float32)
    for _ in range(70):
        centre = (int(rng.uniform(-9, width + 9)), int(rng.uniform(-9, height + 9)))
        cv2.circle(light, centre, 5, float(rng.uniform(200, 600)), -1)
    field = vignette(height, width)
    channels = [rng.poisson((gain * light + 150) * field) + offset for gain in (1, 0.5)]
    return np.repeat(np.array(channels)[None], n_frames, axis=0).astype(np.uint16)


def plate(n_sites: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    # Sites of two shapes: the field spans the field of view.
    return [simulate(rng, (128, 128) if site % 2 else (96, 160)) for site in range(n_sites)]


def test_recovers_simulated_vignetting_within_a_few_per_cent() -> None:
    calibration = illumination.calibrate(plate(96), FlatField(min_sites=16))
    assert calibration.flat_field is not None
    truth = vignette(64, 64)
    for field in calibration.flat_field:
        error = field / truth - 1
        assert np.sqrt(np.mean(error**2)) < 0.03
        assert np.abs(error).max() < 0.12
    np.testing.assert_allclose(calibration.flat_field.mean(axis=(1, 2)), 1, atol=1e-5)


def test_correction_evens_out_an_empty_field() -> None:
    calibration = illumination.calibrate(plate(96), FlatField(min_sites=16))
    empty = 100 + 150 * np.broadcast_to(vignette(256, 256), (1, 2, 256, 256))
    before = (empty - 100).std() / (empty - 100).mean()
    corrected = illumination.correct(empty, calibration)
    assert corrected.std() / corrected.mean() < before / 2


def test_field_does_not_depend_on_the_camera_offset() -> None:
    def fields(offset: float) -> np.ndarray:
        rng = np.random.default_rng(1)
        sites = [simulate(rng, (64, 64), offset=offset) for _ in range(20)]
        field = illumination.calibrate(sites, FlatField(min_sites=20)).flat_field
        assert field is not None
        return field

    np.testing.assert_allclose(fields(200), fields(1000), atol=0.01)


def test_range_is_of_the_corrected_pixels() -> None:
    calibration = illumination.calibrate(plate(40), FlatField(min_sites=16), (5.0, 95.0))
    corrected = np.concatenate(
        [illumination.correct(s, calibration).swapaxes(0, 1).reshape(2, -1) for s in plate(40)], 1
    )
    low, high = np.percentile(corrected, (5, 95), axis=1)
    np.testing.assert_allclose(calibration.low, low, rtol=0.03)
    np.testing.assert_allclose(calibration.high, high, rtol=0.03)


def test_no_field_below_the_fewest_sites_or_when_switched_off() -> None:
    for config in (FlatField(min_sites=9), NoIllumination()):
        calibration = illumination.calibrate(plate(8), config, (0, 100))
        assert calibration.flat_field is None
        assert (calibration.offset == 0).all()
        stack = simulate(np.random.default_rng(2), (32, 40), n_frames=2)
        corrected = illumination.correct(stack, calibration)
        assert corrected.dtype == np.float32
        np.testing.assert_array_equal(corrected, stack)


def test_correct_is_offset_then_gain_and_leaves_its_input_alone() -> None:
    field = np.full((1, 8, 8), 0.5, np.float32)
    three, five = np.array([3], np.float32), np.array([5], np.float32)
    stack = np.full((2, 1, 10, 12), 7.0)
    stack[0, 0, 0, 0] = np.nan
    before = stack.copy()
    corrected = illumination.correct(stack, Calibration(field, three, three, five, USUAL))
    np.testing.assert_array_equal(stack, before)
    assert np.isnan(corrected[0, 0, 0, 0])
    np.testing.assert_allclose(corrected[1], 8)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", ">f4", "float16", "float64", "int64"])
def test_any_real_dtype_is_corrected_alike(dtype: str) -> None:
    field = np.random.default_rng(0).uniform(0.5, 2, (1, 8, 8)).astype(np.float32)
    one, two = np.ones(1, np.float32), np.full(1, 2, np.float32)
    stack = np.random.default_rng(1).integers(0, 200, (2, 1, 10, 12))
    calibration = Calibration(field, one, one, two, USUAL)
    corrected = illumination.correct(stack.astype(dtype), calibration)
    assert corrected.dtype == np.float32
    np.testing.assert_array_equal(corrected, illumination.correct(stack.astype(np.float32), calibration))


def test_holes_and_constant_channels_do_no_harm() -> None:
    sites = [np.repeat(stack, 2, axis=0).astype(np.float32) for stack in plate(20)]
    for movie in sites:
        movie[0, 0, 3, 3] = np.nan
        movie[:, 1] = 0
    calibration = illumination.calibrate(sites, FlatField(min_sites=16))
    assert calibration.flat_field is not None
    assert np.isfinite(calibration.flat_field).all()
    np.testing.assert_allclose(calibration.flat_field[1], 1, atol=1e-6)
    assert calibration.low[1] == calibration.high[1] == 0
    assert calibration.low[0] < calibration.high[0]


def test_lost_frames_are_as_if_never_taken() -> None:
    sites = [stack.astype(np.float32) for stack in plate(20)]
    lost = [np.concatenate([stack, np.full_like(stack, np.nan)]) for stack in sites]
    for config in (FlatField(min_sites=16), NoIllumination()):
        one, other = illumination.calibrate(sites, config), illumination.calibrate(lost, config)
        for name in ("flat_field", "offset"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.quality.focus, other.quality.focus)
        # Twice the frames are sampled by half the pixels.
        np.testing.assert_allclose(one.high, other.high, rtol=0.05)


def test_a_sample_is_read_frame_by_frame_and_once() -> None:
    shape, n_sites = (2, 256, 256), 40
    reads: list[tuple[int, int]] = []

    def read(site: int, frame: int) -> np.ndarray:
        reads.append((site, frame))
        return np.random.default_rng([site, frame]).normal(100, 5, (1, *shape)).astype(np.float32)

    def lazy(site: int) -> da.Array:
        frames = [dask.delayed(read)(site, frame) for frame in range(3)]
        return da.concatenate([da.from_delayed(frame, (1, *shape), np.float32) for frame in frames])

    stacks = [lazy(site) for site in range(n_sites)]
    tracemalloc.start()
    with dask.config.set(scheduler="synchronous"):
        illumination.calibrate(stacks, FlatField(min_sites=16, grid=16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(reads) == [(site, frame) for site in range(n_sites) for frame in range(3)]
    # What is kept of a site is small, and of 120 frames a few are held at a time.
    frame_bytes = 4 * np.prod(shape)
    assert peak < 20 * frame_bytes


def test_a_plate_knows_its_usual_quality() -> None:
    calibration = illumination.calibrate(plate(12), NoIllumination())
    measured = pd.concat([quality.measure(stack) for stack in plate(12)])
    expected = quality.typical(measured)
    for name in ("focus", "saturated", "glare", "sd"):
        np.testing.assert_allclose(getattr(calibration.quality, name), getattr(expected, name))


def test_what_cannot_be_calibrated_is_said() -> None:
    with pytest.raises(InputError, match="no sites"):
        illumination.calibrate([], NoIllumination())
    two, three = np.zeros((1, 2, 8, 8)), np.zeros((1, 3, 8, 8))
    with pytest.raises(InputError, match=r"site 1 .* 3 channels"):
        illumination.calibrate([two, three], NoIllumination())
    with pytest.raises(InputError, match="no finite pixel"):
        illumination.calibrate([np.full((1, 1, 8, 8), np.nan)], FlatField())
    with pytest.raises(InputError, match="2 channels"):
        illumination.correct(three, illumination.calibrate([two], NoIllumination()))


def test_config_is_a_union_by_method() -> None:
    adapter: TypeAdapter[NoIllumination | FlatField] = TypeAdapter(IlluminationConfig)
    assert adapter.validate_python({"method": "none"}) == NoIllumination()
    assert adapter.validate_python({"method": "flat_field", "min_sites": 4}).min_sites == 4
    with pytest.raises(ValidationError):
        adapter.validate_python({"method": "none", "min_sites": 4})
