from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image

from screening import features

CHANNELS = ("dna", "tmrm")


def movie(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nuclei in cells, 5 tracks, track 3 absent from frame 1: labels (3, 40, 50) and a stack."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :50]
    nuclei, cells = np.zeros((2, 3, 40, 50), np.int32)
    for frame in range(3):
        for track in range(1, 6):
            if (track, frame) == (3, 1):
                continue
            distance = np.hypot((y - 20) / rng.uniform(1, 3), x - 9 * track + frame)
            cells[frame][distance < 4] = track
            nuclei[frame][distance < 2] = track
    return nuclei, cells, rng.integers(0, 4000, (3, 2, 40, 50)).astype(np.uint16)


def variogram(mask: np.ndarray, plane: np.ndarray, lag: int) -> float:
    """Mean squared difference of pixels of the mask that lie ``lag`` apart along a row or column, over 2 variances."""
    squares = []
    for y, x in np.argwhere(mask):
        for ny, nx in ((y + lag, x), (y, x + lag)):
            if ny < mask.shape[0] and nx < mask.shape[1] and mask[ny, nx]:
                squares.append((float(plane[y, x]) - float(plane[ny, nx])) ** 2)
    variance = np.var(plane[mask].astype(float))
    return float(np.mean(squares) / (2 * variance)) if squares and variance else np.nan


def hull_pixels(mask: np.ndarray) -> int:
    points = np.argwhere(mask)
    if np.linalg.matrix_rank(points - points[0]) < 2:
        return int(np.gcd(*(points[-1] - points[0]))) + 1
    return int(convex_hull_image(mask, offset_coordinates=False).sum())


def oracle_shape(mask: np.ndarray) -> dict[str, float]:
    (region,) = regionprops(mask.astype(np.uint8))
    perimeter = region.perimeter
    return {
        "area": region.area,
        "perimeter": perimeter,
        "form_factor": 4 * np.pi * region.area / perimeter**2 if perimeter else np.nan,
        "eccentricity": region.eccentricity,
        "major_axis": region.axis_major_length,
        "minor_axis": region.axis_minor_length,
        "extent": region.extent,
        "solidity": region.area / hull_pixels(mask),
    }


def oracle_light(mask: np.ndarray, plane: np.ndarray, dark: float) -> dict[str, float]:
    """Pixel by pixel."""
    y, x = np.nonzero(mask)
    light = plane[mask].astype(float) - dark
    edge = []
    for here_y, here_x, value in zip(y, x, light, strict=True):
        around = [(here_y + dy, here_x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        inside = [0 <= a < mask.shape[0] and 0 <= b < mask.shape[1] and mask[a, b] for a, b in around]
        if not all(inside):
            edge.append(value)
    squared = (y - y.mean()) ** 2 + (x - x.mean()) ** 2
    return {
        "mean": light.mean(),
        "sd": light.std(),
        "min": light.min(),
        "max": light.max(),
        "integrated": light.sum(),
        "edge": np.mean(edge),
        "texture": variogram(mask, plane, 1),
        "coarse_texture": variogram(mask, plane, 4),
        "radial": (light * squared).sum() / light.sum() / squared.mean(),
        "mass_displacement": np.hypot(
            (light * y).sum() / light.sum() - y.mean(), (light * x).sum() / light.sum() - x.mean()
        ),
    }


def test_every_feature_equals_its_definition_object_by_object() -> None:
    nuclei, cells, stack = movie()
    dark = np.array([-50.0, -300.0])
    tracks = features.measure(nuclei, cells, stack, CHANNELS, dark)
    assert list(tracks.features) == features.feature_names(CHANNELS)
    seen = np.zeros_like(tracks.present)
    compared = set()
    for frame in range(3):
        for region in regionprops(cells[frame]):
            at = (region.label - 1, frame)
            got = {name: values[at] for name, values in tracks.features.items()}
            inner, outer = (labels[frame] == region.label for labels in (nuclei, cells))
            want = {
                "cell_nucleus_share": inner.sum() / outer.sum(),
                "cell_nucleus_offset": np.hypot(*(np.argwhere(inner).mean(0) - np.argwhere(outer).mean(0))),
            }
            for kind, mask in (("nucleus", inner), ("cell", outer)):
                want |= {f"{kind}_{name}": value for name, value in oracle_shape(mask).items()}
                for channel, name in enumerate(CHANNELS):
                    light = oracle_light(mask, stack[frame, channel], dark[channel])
                    want |= {f"{kind}_{measure}_{name}": value for measure, value in light.items()}
            for channel, name in enumerate(CHANNELS):
                plane = stack[frame, channel] - dark[channel]
                want[f"cell_nucleus_ratio_{name}"] = plane[inner].mean() / plane[outer & ~inner].mean()
            for name, value in want.items():
                np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-4, err_msg=name)
            compared |= set(want)
            seen[at] = True
            np.testing.assert_allclose(tracks.centroid[at], region.centroid, rtol=1e-6)
            assert tracks.box[at].tolist() == list(region.bbox)
    assert compared == set(tracks.features) - {"nucleus_speed", "nucleus_displacement"}
    np.testing.assert_array_equal(tracks.present, seen)
    assert not tracks.present[2, 1]
    assert tracks.box[2, 1].tolist() == [-1] * 4
    assert np.isnan(tracks.centroid[2, 1]).all()
    assert all(np.isnan(values[2, 1]) for values in tracks.features.values())


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
def test_shapes_of_any_mask(mask: np.ndarray) -> None:
    """In pieces, with holes, a single line or pixel, at the image's edge."""
    if not mask.any():
        return
    labels = mask[None].astype(np.int32)
    tracks = features.measure(labels, labels, np.zeros((1, 1, *mask.shape)), ["dna"])
    for name, value in oracle_shape(mask).items():
        np.testing.assert_allclose(tracks.features[f"cell_{name}"][0, 0], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_motion_skips_frames_in_which_the_cell_is_missing() -> None:
    labels = np.zeros((5, 20, 40), np.int32)
    for frame, x in ((1, 5), (2, 8), (4, 20)):
        labels[frame, 4:7, x : x + 3] = 1
    tracks = features.measure(labels, labels, np.zeros((5, 1, 20, 40)), ["dna"])
    nan = np.nan
    np.testing.assert_array_equal(tracks.features["nucleus_speed"][0], [nan, nan, 3, nan, 6])
    np.testing.assert_array_equal(tracks.features["nucleus_displacement"][0], [nan, 0, 3, nan, 15])


def test_light_near_the_centre_is_radially_low() -> None:
    y, x = np.mgrid[:41, :41] - 20
    radius = np.hypot(y, x)
    labels = np.broadcast_to((radius < 18).astype(np.int32), (3, 41, 41))
    planes = np.stack([radius < 6, radius < 99, radius > 12])[:, None] * 100.0 + 30
    radial = features.measure(labels, labels, planes, ["dna"], np.array([20.0])).features["cell_radial_dna"][0]
    assert radial[0] < 0.7 < radial[1] < 1.2 < radial[2]
    assert radial[1] == pytest.approx(1)


def test_types_and_shapes() -> None:
    tracks = features.measure(*movie(), CHANNELS)
    assert tracks.present.shape == (5, 3)
    assert (tracks.centroid.dtype, tracks.centroid.shape) == (np.float32, (5, 3, 2))
    assert (tracks.box.dtype, tracks.box.shape) == (np.int32, (5, 3, 4))
    assert {values.dtype for values in tracks.features.values()} == {np.dtype(np.float32)}
    assert {values.shape for values in tracks.features.values()} == {(5, 3)}


def test_no_tracks_give_empty_arrays() -> None:
    blank = np.zeros((2, 8, 9), np.int32)
    tracks = features.measure(blank, blank, np.zeros((2, 1, 8, 9)), ["dna"])
    assert tracks.present.shape == (0, 2)
    assert tracks.centroid.shape == (0, 2, 2)
    assert tracks.box.shape == (0, 2, 4)
    assert all(values.shape == (0, 2) for values in tracks.features.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_finite_costs_that_objects_intensities_only(value: float) -> None:
    nuclei, cells, stack = movie()
    holes = stack.astype(np.float32)
    y, x = np.argwhere(cells[0] == 1)[5]
    holes[0, 0, y, x] = value
    whole = features.measure(nuclei, cells, stack, CHANNELS).features
    got = features.measure(nuclei, cells, holes, CHANNELS).features
    lost = {name for name in got if not np.array_equal(got[name], whole[name], equal_nan=True)}
    assert lost >= {f"cell_{measure}_dna" for measure in ("mean", "sd", "min", "max", "integrated", "edge", "texture")}
    assert all(name.endswith("_dna") for name in lost)
    for name in lost:
        assert np.isnan(got[name][0, 0]), name
        np.testing.assert_array_equal(got[name].ravel()[1:], whole[name].ravel()[1:])


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i4", "f2", "f8"])
def test_any_real_dtype(dtype: str) -> None:
    nuclei, cells, stack = movie()
    small = stack % 200
    want = features.measure(nuclei, cells, small, CHANNELS)
    got = features.measure(nuclei, cells, small.astype(dtype), CHANNELS)
    for name, values in want.features.items():
        np.testing.assert_array_equal(got.features[name], values)


def test_texture_tells_grain_from_gradient() -> None:
    labels = np.ones((2, 32, 32), np.int32)
    grain = np.random.default_rng(0).normal(1000, 50, (32, 32))
    gradient = np.broadcast_to(np.linspace(900, 1100, 32), (32, 32))
    tracks = features.measure(labels, labels, np.stack([grain, gradient])[:, None], ["dna"])
    rough, smooth = tracks.features["cell_texture_dna"][0]
    assert rough == pytest.approx(1, abs=0.1)
    assert smooth < 0.01


def test_degenerate_objects() -> None:
    labels = np.zeros((1, 6, 6), np.int32)
    labels[0, 1, 1] = 1
    labels[0, 3, 1:5] = 2
    tracks = features.measure(labels, labels, np.full((1, 1, 6, 6), 0.1), ["dna"])
    np.testing.assert_allclose(tracks.features["cell_eccentricity"][:, 0], [0, 1])
    np.testing.assert_array_equal(tracks.features["cell_sd_dna"][:, 0], 0)
    assert np.isnan(tracks.features["cell_texture_dna"]).all()


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int32, (2, 7, 6), elements=st.integers(0, 4)))
def test_areas_and_boxes_of_any_labels(labels: np.ndarray) -> None:
    tracks = features.measure(labels, labels, np.zeros((2, 1, 7, 6)), ["dna"])
    assert len(tracks.present) == labels.max()
    for track, frame in np.ndindex(tracks.present.shape):
        y, x = np.nonzero(labels[frame] == track + 1)
        assert tracks.present[track, frame] == (len(y) > 0)
        if len(y):
            assert tracks.features["cell_area"][track, frame] == len(y)
            box = [y.min(), x.min(), y.max() + 1, x.max() + 1]
            assert tracks.box[track, frame].tolist() == box
