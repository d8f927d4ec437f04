from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.segmentation import watershed as skimage_watershed

from screening.regions import (
    contacts,
    cut,
    enlarge,
    find_regions,
    hills,
    inner_distance,
    label_sums,
    minus,
    outside_in_halves,
    positions,
    shared_pixels,
    summits,
    watershed,
)

Array = npt.NDArray[Any]

small_labels = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.int32, shape, elements=st.integers(0, 3))
)


def separate_regions(image: Array) -> Array:
    """(H, W) number of the region of each pixel: one value at a time through scipy."""
    regions = np.zeros(image.shape, int)
    for value in np.unique(image):
        parts = ndimage.label(image == value)[0]
        regions[parts > 0] = parts[parts > 0] + regions.max()
    return regions


@settings(deadline=None)
@given(small_labels)
def test_regions_are_those_of_scipy(image: Array) -> None:
    regions = find_regions(image)
    n = len(regions.areas())
    numbers = np.zeros(image.shape, np.int32)
    regions.paint(numbers, np.arange(1, n + 1, dtype=np.int32))
    expected = separate_regions(image)
    # The same regions, numbered in reading order.
    assert len(set(zip(numbers.ravel(), expected.ravel(), strict=True))) == n == expected.max()
    _, first = np.unique(numbers, return_index=True)
    assert (np.diff(first) > 0).all()
    border = np.ones(image.shape, bool)
    border[1:-1, 1:-1] = False
    values, touches = regions.values(image), regions.on_border()
    for k in range(n):
        inside = numbers == k + 1
        assert regions.areas()[k] == inside.sum()
        assert (image[inside] == values[k]).all()
        assert touches[k] == border[inside].any()


def test_painting_leaves_regions_of_value_0_alone() -> None:
    image = np.array([[1, 1, 0], [0, 0, 2]], np.int32)
    target = np.full((2, 3), 9, np.uint8)
    find_regions(image).paint(target, np.array([5, 0, 0, 7], np.uint8))
    np.testing.assert_array_equal(target, [[5, 5, 9], [9, 9, 7]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 1.0])
def test_positions_are_those_of_numpy(share: float, dtype: type) -> None:
    image = (np.random.default_rng(0).random((70, 33)) < share).astype(dtype) * 3
    np.testing.assert_array_equal(positions(image), np.flatnonzero(image))


@pytest.mark.parametrize("n_levels", [3, 50, 4000])
@pytest.mark.parametrize("seed", range(5))
def test_watershed_is_that_of_scikit_image(n_levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = ndimage.gaussian_filter(rng.random((90, 70)), 2.0)
    levels = np.floor((levels - levels.min()) / np.ptp(levels) * n_levels).astype(np.float32)
    # Markers of one pixel and one level each: scikit-image leaves the order of equal ones to its heap.
    _, places = np.unique(levels, return_index=True)
    places = rng.permutation(places)[:20]
    markers = np.zeros(levels.shape, np.int32)
    markers.ravel()[places] = rng.permutation(len(places)) + 1
    mask = rng.random(levels.shape) < 0.9
    found = watershed(levels, markers, positions(mask.astype(np.uint8)))
    np.testing.assert_array_equal(found, skimage_watershed(levels, markers, mask=mask))
    assert len(np.unique(found)) > 2


def test_watershed_stays_in_the_mask_and_reaches_all_it_can() -> None:
    mask = np.ones((5, 9), np.uint8)
    mask[:, 4] = 0
    markers = np.zeros((5, 9), np.int32)
    markers[2, 0] = 7
    markers[2, 4] = 3
    labels = watershed(np.zeros((5, 9), np.float32), markers, positions(mask))
    np.testing.assert_array_equal(labels[:, :4], 7)
    assert not labels[:, 4:].any()


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_sums_and_contacts_by_loops(labels: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inner, contrast = rng.random((2, *labels.shape), dtype=np.float32)
    area, peak, light, square = label_sums(labels, inner, contrast, 3, positions(labels))
    assert len(area) == 4
    for k in range(1, len(area)):
        inside = labels == k
        assert area[k] == inside.sum()
        assert peak[k] == pytest.approx(inner[inside].max(initial=0))
        assert light[k] == pytest.approx(contrast[inside].sum(), rel=1e-5)
        assert square[k] == pytest.approx((contrast[inside] ** 2).sum(), rel=1e-5)
    expected = []
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < height and u < width and labels[y, x] != labels[v, u] and labels[y, x] * labels[v, u] > 0:
                    pair = sorted((int(labels[y, x]), int(labels[v, u])))
                    expected.append((*pair, min(inner[y, x], inner[v, u]), min(contrast[y, x], contrast[v, u])))
    assert list(zip(*contacts(labels, inner, contrast, positions(labels)), strict=True)) == expected


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_labels_are_cut_each_at_its_level(labels: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contrast = rng.random(labels.shape, np.float32)
    name, level = np.array([9, 5, 5, 0], np.int32), rng.random(4, np.float32)
    expected = [
        [name[k] if k and c > level[k] else 0 for k, c in zip(*rows, strict=True)]
        for rows in zip(labels, contrast, strict=True)
    ]
    np.testing.assert_array_equal(cut(labels, contrast, name, level, positions(labels)), expected)


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_hills_by_loops(labels: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = labels > 0
    inner, contrast, around = rng.random((3, *labels.shape), np.float32)
    contrast -= 0.2
    around[rng.random(labels.shape) < 0.1] = 0
    smooth = ndimage.convolve(inner.astype(float), np.outer([1, 2, 1], [1, 2, 1]) / 16, mode="nearest")
    expected = smooth * np.sqrt(np.maximum(contrast, 0) / np.maximum(around, 1e-6)) * mask
    np.testing.assert_allclose(hills(inner, contrast, around, positions(labels)), expected, rtol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_inner_distance_is_near_the_exact_one(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < rng.choice([0.5, 0.97])
    found = inner_distance(mask.shape, positions(mask.view(np.uint8)))
    if mask.all():
        assert np.isinf(found).all()
    else:
        # The weights of the chamfer are chosen for an error of at most 2 %.
        np.testing.assert_allclose(found, ndimage.distance_transform_edt(mask), rtol=0.021)


def test_inner_distance_of_a_large_disk() -> None:
    y, x = np.mgrid[:101, :101]
    mask = np.hypot(y - 50, x - 50) < 45
    found = inner_distance(mask.shape, positions(mask.view(np.uint8)))
    np.testing.assert_allclose(found, ndimage.distance_transform_edt(mask), rtol=0.021)


@settings(deadline=None)
@given(small_labels, st.integers(1, 4))
def test_summits_are_where_none_within_reach_is_higher(labels: Array, reach: int) -> None:
    height = labels.astype(np.float32)
    found, n = summits(height, reach, positions(labels))
    highest = ndimage.maximum_filter(height, 2 * reach + 1, mode="constant")
    np.testing.assert_array_equal(found > 0, (height > 0) & (height == highest))
    assert set(np.unique(found)) - {0} == set(range(1, n + 1))
    # What shares a number is in one piece.
    for k in range(1, n + 1):
        assert ndimage.label(found == k, np.ones((3, 3)))[1] == 1


def test_a_flat_summit_is_one() -> None:
    height = np.zeros((9, 9), np.float32)
    height[3:5, 2:6] = 2
    found, n = summits(height, 2, positions(height.astype(np.uint8)))
    assert n == 1
    np.testing.assert_array_equal(found > 0, height > 0)


@pytest.mark.parametrize(("shape", "rows"), [((40, 30), 5), ((41, 7), 13), ((8, 8), 1), ((6, 5), 6)])
def test_what_varies_slowly_is_subtracted_as_if_resized(shape: tuple[int, int], rows: int) -> None:
    rng = np.random.default_rng(0)
    plane, smooth = rng.random(shape, np.float32), rng.random((rows, shape[1]), np.float32)
    expected = plane - cv2.resize(smooth, shape[::-1], interpolation=cv2.INTER_LINEAR)
    out = np.empty_like(plane)
    minus(plane, smooth, out)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_the_outside_in_halves_by_loops(labels: Array, seed: int) -> None:
    plane = np.random.default_rng(seed).random(labels.shape, np.float32)
    mask = (labels > 1).astype(np.uint8)
    share, total = outside_in_halves(plane, mask)
    even = [(0, side % 2) for side in labels.shape]
    outside, dark = np.pad(1.0 - mask, even, "edge"), np.pad(plane * (1 - mask), even, "edge")
    for found, whole in ((share, outside), (total, dark)):
        blocks = whole.reshape(whole.shape[0] // 2, 2, whole.shape[1] // 2, 2)
        np.testing.assert_allclose(found, blocks.mean(axis=(1, 3)), rtol=1e-5)


@settings(deadline=None)
@given(small_labels, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_labels_are_enlarged_by_loops(coarse: Array, factor: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = rng.integers(0, 2, coarse.shape, np.uint8)
    shape = tuple(side * factor - rng.integers(0, factor) for side in coarse.shape)
    bright, centres = rng.random(shape) < 0.5, rng.integers(0, 3, shape, np.int32)
    found = enlarge(coarse, kept, bright, centres)
    for y in range(shape[0]):
        for x in range(shape[1]):
            v, u = y * coarse.shape[0] // shape[0], x * coarse.shape[1] // shape[1]
            around = coarse[v, u] if bright[y, x] or kept[v, u] else 0
            assert found[y, x] == (centres[y, x] or around)


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_shared_pixels_by_loops(one: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    other, move = rng.integers(0, 3, one.shape, np.int32), rng.integers(-2, 3, (3, 2))
    expected = np.zeros((4, 3), int)
    for (y, x), k in np.ndenumerate(one):
        if k:
            v, u = np.array([y, x]) + move[k - 1]
            if 0 <= v < one.shape[0] and 0 <= u < one.shape[1]:
                expected[k, other[v, u]] += 1
    np.testing.assert_array_equal(shared_pixels(one, positions(one), move, other, 3, 2), expected)
