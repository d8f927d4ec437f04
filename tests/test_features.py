from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops

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


def geary(mask: np.ndarray, plane: np.ndarray) -> float:
    """Geary's ratio over 4-neighbours, pixel by pixel."""
    squares = []
    for y, x in np.argwhere(mask):
        for ny, nx in ((y + 1, x), (y, x + 1)):
            if ny < mask.shape[0] and nx < mask.shape[1] and mask[ny, nx]:
                squares.append((float(plane[y, x]) - float(plane[ny, nx])) ** 2)
    variance = np.var(plane[mask].astype(float))
    return float(np.mean(squares) / (2 * variance))


def test_equals_regionprops_object_by_object() -> None:
    nuclei, cells, stack = movie()
    tracks = features.measure(nuclei, cells, stack, CHANNELS)
    assert list(tracks.features) == features.feature_names(CHANNELS)
    seen = np.zeros_like(tracks.present)
    for frame in range(3):
        planes = np.moveaxis(stack[frame], 0, -1)
        for kind, labels in (("nucleus", nuclei), ("cell", cells)):
            for region in regionprops(labels[frame], intensity_image=planes):
                at = (region.label - 1, frame)
                got = {name: values[at] for name, values in tracks.features.items()}
                assert got[f"{kind}_area"] == region.area
                np.testing.assert_allclose(got[f"{kind}_eccentricity"], region.eccentricity, atol=1e-5)
                for channel, name in enumerate(CHANNELS):
                    plane = stack[frame, channel]
                    values = plane[labels[frame] == region.label]
                    np.testing.assert_allclose(
                        [got[f"{kind}_{measure}_{name}"] for measure in ("mean", "sd", "texture")],
                        [
                            values.mean(),
                            values.std(),
                            geary(labels[frame] == region.label, plane),
                        ],
                        rtol=1e-5,
                    )
                if kind == "cell":
                    seen[at] = True
                    np.testing.assert_allclose(tracks.centroid[at], region.centroid, rtol=1e-6)
                    assert tracks.box[at].tolist() == list(region.bbox)
    np.testing.assert_array_equal(tracks.present, seen)
    assert not tracks.present[2, 1]
    assert tracks.box[2, 1].tolist() == [-1] * 4
    assert np.isnan(tracks.centroid[2, 1]).all()
    assert all(np.isnan(values[2, 1]) for values in tracks.features.values())


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


def test_non_finite_pixels_count_for_shape_only() -> None:
    nuclei, cells, stack = movie()
    holes = stack.astype(np.float32)
    y, x = np.argwhere(cells[0] == 1)[5]
    holes[0, 0, y, x] = np.nan
    holes[0, 1, cells[0] == 2] = np.inf
    whole = features.measure(nuclei, cells, stack, CHANNELS)
    tracks = features.measure(nuclei, cells, holes, CHANNELS)
    left = stack[0, 0][(cells[0] == 1) & np.isfinite(holes[0, 0])]
    np.testing.assert_allclose(tracks.features["cell_mean_dna"][0, 0], left.mean(), rtol=1e-6)
    assert np.isnan(tracks.features["cell_mean_tmrm"][1, 0])
    np.testing.assert_array_equal(tracks.features["cell_area"], whole.features["cell_area"])
    np.testing.assert_array_equal(tracks.features["cell_mean_dna"][1:], whole.features["cell_mean_dna"][1:])


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
