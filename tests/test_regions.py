from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.segmentation import watershed as skimage_watershed

from screening.regions import contacts, cut, find_regions, hills, label_sums, steps, watershed

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


@pytest.mark.parametrize("n_levels", [3, 50, 4000])
@pytest.mark.parametrize("seed", range(5))
def test_watershed_is_that_of_scikit_image(n_levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = ndimage.gaussian_filter(rng.random((90, 70)), 2.0)
    levels = np.floor((levels - levels.min()) / np.ptp(levels) * n_levels).astype(np.uint16)
    # Markers of one pixel and one level each: scikit-image leaves the order of equal ones to its heap.
    _, places = np.unique(levels, return_index=True)
    places = rng.permutation(places)[:20]
    markers = np.zeros(levels.shape, np.int32)
    markers.ravel()[places] = rng.permutation(len(places)) + 1
    mask = rng.random(levels.shape) < 0.9
    found = watershed(levels, markers, mask.astype(np.uint8))
    np.testing.assert_array_equal(found, skimage_watershed(levels, markers, mask=mask))
    assert len(np.unique(found)) > 2


def test_watershed_stays_in_the_mask_and_reaches_all_it_can() -> None:
    mask = np.ones((5, 9), np.uint8)
    mask[:, 4] = 0
    markers = np.zeros((5, 9), np.int32)
    markers[2, 0] = 7
    markers[2, 4] = 3
    labels = watershed(np.zeros((5, 9), np.uint16), markers, mask)
    np.testing.assert_array_equal(labels[:, :4], 7)
    assert not labels[:, 4:].any()


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_sums_and_contacts_by_loops(labels: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inner, contrast = rng.random((2, *labels.shape), dtype=np.float32)
    area, peak, light, square = label_sums(labels, inner, contrast)
    assert len(area) == labels.max() + 1
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
    assert list(zip(*contacts(labels, inner, contrast), strict=True)) == expected


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
    np.testing.assert_array_equal(cut(labels, contrast, name, level), expected)


@settings(deadline=None)
@given(small_labels, st.integers(0, 2**32 - 1))
def test_hills_and_their_steps(labels: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (labels > 0).astype(np.uint8)
    inner, contrast, around = rng.random((3, *labels.shape), np.float32)
    around[rng.random(labels.shape) < 0.1] = 0
    height = hills(inner, contrast, around, mask)
    expected = inner * np.sqrt(contrast / np.maximum(around, 1e-6)) * mask
    np.testing.assert_allclose(height, expected, rtol=1e-5)
    levels = steps(height, mask)
    assert not levels[mask == 0].any()
    heights = height[mask > 0]
    if heights.size and np.ptp(heights) > 0:
        exact = (heights - heights.min()) / np.ptp(heights) * 4095
        assert levels[mask > 0].max() >= 4094
        np.testing.assert_allclose(levels[mask > 0], exact, atol=1)
    else:
        assert not levels.any()
