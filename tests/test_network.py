from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import regionprops
from skimage.morphology import skeletonize

from screening import network
from screening.network import NAMES, NetworkConfig
from screening.simulation import SimulationConfig, compound_effects, design, simulate_site

EIGHT = np.ones((3, 3), int)


def analyse(mask: np.ndarray, labels: np.ndarray | None = None) -> dict[str, np.ndarray]:
    labels = np.ones(mask.shape, np.int32) if labels is None else labels
    return dict(zip(NAMES, network.analyse(labels, mask.astype(bool), int(labels.max())), strict=True))


def drawn(*lines: tuple[tuple[int, int], tuple[int, int]], shape: tuple[int, int] = (50, 50)) -> np.ndarray:
    """Lines one pixel wide between (y, x) ends."""
    plane = np.zeros(shape, np.uint8)
    for (y0, x0), (y1, x1) in lines:
        cv2.line(plane, (x0, y0), (x1, y1), 1)
    return plane


@pytest.mark.parametrize(
    ("lines", "fragments", "branches", "points", "ends", "length"),
    [
        ([((10, 10), (10, 30))], 1, 1, 0, 2, 20),
        ([((10, 10), (30, 30))], 1, 1, 0, 2, 20 * math.sqrt(2)),
        ([((10, 10), (10, 30)), ((40, 5), (40, 15))], 2, 2, 0, 4, 30),
        ([((20, 10), (20, 30)), ((10, 20), (30, 20))], 1, 4, 1, 4, 40),
        ([((10, 10), (10, 30)), ((10, 20), (30, 20))], 1, 3, 1, 3, 40),
        ([((10, 10), (30, 10)), ((10, 30), (30, 30)), ((20, 10), (20, 30))], 1, 5, 2, 4, 60),
        ([((7, 7), (7, 7))], 1, 1, 0, 0, 0),
        ([((5, 10), (20, 25)), ((5, 40), (20, 25)), ((20, 25), (40, 25))], 1, 3, 1, 3, 30 * math.sqrt(2) + 20),
    ],
    ids=["line", "diagonal", "two lines", "cross", "T", "H", "dot", "Y"],
)
def test_drawn_networks(lines: list, fragments: int, branches: int, points: int, ends: int, length: float) -> None:
    mask = drawn(*lines)
    got = analyse(mask)
    counted = [got[f"network_{name}"][0] for name in ("fragments", "branches", "branch_points", "end_points")]
    assert counted == [fragments, branches, points, ends]
    assert got["network_length"][0] == pytest.approx(length)
    assert got["network_branch_length"][0] == pytest.approx(length / branches)
    assert got["network_area"][0] == mask.sum()
    assert got["network_share"][0] == mask.sum() / mask.size


def test_a_ring_is_one_branch_without_ends() -> None:
    ring = np.zeros((50, 50), np.uint8)
    cv2.circle(ring, (25, 25), 15, 1)
    got = analyse(ring)
    assert [got[f"network_{name}"][0] for name in ("fragments", "branches", "branch_points", "end_points")] == [
        1,
        1,
        0,
        0,
    ]
    assert got["network_length"][0] == pytest.approx(2 * math.pi * 15, rel=0.1)


def test_form_factor_and_aspect_ratio_tell_dots_from_filaments() -> None:
    disc, filament = np.zeros((2, 60, 60), np.uint8)
    cv2.circle(disc, (30, 30), 12, 1, -1)
    filament[29:32, 5:56] = 1
    round_, long = analyse(disc), analyse(filament)
    assert round_["network_aspect_ratio"][0] == pytest.approx(1, abs=0.02)
    assert round_["network_form_factor"][0] == pytest.approx(1, abs=0.1)
    (region,) = regionprops(filament)
    assert long["network_aspect_ratio"][0] == pytest.approx(51 / 3, rel=0.05)
    assert long["network_form_factor"][0] == pytest.approx(region.perimeter**2 / (4 * np.pi * region.area))
    both = analyse(np.concatenate([disc, filament], axis=1))
    for name in ("network_aspect_ratio", "network_form_factor"):
        assert both[name][0] == pytest.approx((round_[name][0] + long[name][0]) / 2)


def oracle(skeleton: np.ndarray) -> tuple[int, int, int, float]:
    """Branches, branch points, ends and length of a skeleton, by sets of pixels and links."""
    pixels = {(int(y), int(x)) for y, x in np.argwhere(skeleton)}
    links = set()
    for y, x in pixels:
        for other in ((y, x + 1), (y + 1, x)):
            if other in pixels:
                links.add(((y, x), other))
        for other in ((y + 1, x + 1), (y + 1, x - 1)):
            if other in pixels and (y, other[1]) not in pixels and (other[0], x) not in pixels:
                links.add(((y, x), other))
    degree = {pixel: sum(pixel in link for link in links) for pixel in pixels}
    junctions = {pixel for pixel in pixels if degree[pixel] > 2}
    plane = np.zeros(skeleton.shape, bool)
    for pixel in junctions:
        plane[pixel] = True
    pieces = {pixel: pixel for pixel in pixels - junctions}  # each pixel to its branch, merged link by link
    for one, other in links:
        if one in pieces and other in pieces:
            old, new = pieces[one], pieces[other]
            pieces = {pixel: new if name == old else name for pixel, name in pieces.items()}
    length = sum(math.dist(*link) for link in links)
    return len(set(pieces.values())), ndimage.label(plane, EIGHT)[1], sum(d == 1 for d in degree.values()), length


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.bool_, (14, 12), elements=st.booleans()), st.integers(0, 3))
def test_any_mask_is_counted_like_sets_of_pixels_and_links(mask: np.ndarray, dilations: int) -> None:
    if dilations:
        mask = ndimage.binary_dilation(mask & (np.cumsum(mask) % 7 == 0).reshape(mask.shape), iterations=dilations)
    got = analyse(mask)
    branches, points, ends, length = oracle(skeletonize(mask))
    names = ("fragments", "branches", "branch_points", "end_points")
    assert [got[f"network_{name}"][0] for name in names] == [ndimage.label(mask, EIGHT)[1], branches, points, ends]
    assert got["network_length"][0] == pytest.approx(length)


def test_each_cell_gets_its_own_network_even_where_they_touch() -> None:
    labels = np.zeros((2, 60, 61), np.int32)
    labels[:, :, :30], labels[:, :, 30:60] = 1, 3
    plane = np.zeros((60, 61), np.float32)
    plane[19:22, 5:56] = 1000  # through both cells
    plane[39:42, 40:56] = 1000
    labels[1][labels[1] == 3] = 0
    got = network.measure(labels, np.stack([plane, plane]), 3, NetworkConfig())
    assert list(got) == list(NAMES)
    assert {values.shape for values in got.values()} == {(3, 2)}
    assert {values.dtype for values in got.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(got["network_fragments"], [[1, 1], [np.nan] * 2, [2, np.nan]])
    assert got["network_area"][0, 0] == pytest.approx(3 * 25, rel=0.2)
    assert got["network_length"][2, 0] == pytest.approx(25 + 15, rel=0.15)
    for values in got.values():
        assert np.isnan(values[1]).all()
        assert np.isnan(values[2, 1])


def test_a_frame_that_is_not_finite_has_no_measures() -> None:
    planes = np.zeros((2, 40, 40), np.float32)
    planes[:, 20, 5:35] = 100
    planes[0, 2, 2] = np.nan
    got = network.measure(np.ones((2, 40, 40), np.int32), planes, 1, NetworkConfig())
    assert all(np.isnan(values[0, 0]) for values in got.values())
    assert got["network_fragments"][0, 1] == 1


def test_a_cell_without_mitochondria_has_none() -> None:
    plane = np.random.default_rng(0).normal(500, 20, (1, 80, 80))
    labels = np.zeros((1, 80, 80), np.int32)
    labels[0, 20:60, 20:60] = 1
    got = network.measure(labels, plane, 1, NetworkConfig())
    for name in ("fragments", "area", "share", "length", "branches"):
        assert got[f"network_{name}"][0, 0] == 0
    for name in ("branch_length", "form_factor", "aspect_ratio"):
        assert np.isnan(got[f"network_{name}"][0, 0])


def test_brightness_and_background_do_not_count() -> None:
    rng = np.random.default_rng(0)
    light = np.zeros((90, 90), np.float32)
    for _ in range(6):
        y0, x0, y1, x1 = (int(v) for v in rng.integers(15, 75, 4))
        cv2.line(light, (x0, y0), (x1, y1), 1, 2)
    light = cv2.GaussianBlur(light, (0, 0), 1)
    labels = np.zeros((1, 90, 90), np.int32)
    labels[0, 5:85, 5:85] = 1
    bright, dim = (
        network.measure(labels, (gain * light + 100)[None] + rng.normal(0, 1, (1, 90, 90)), 1, NetworkConfig())
        for gain in (4000, 400)
    )
    for name in ("network_area", "network_length"):
        np.testing.assert_allclose(dim[name], bright[name], rtol=0.05)


def test_fragmented_networks_of_the_simulated_screen_come_out_fragmented() -> None:
    moa = "mitochondrial fission inducer"
    config = SimulationConfig(
        moas=(moa,), replicates=1, compounds_per_moa=1, controls_per_plate=1, frames=4, out_of_focus_rate=0
    )
    wells = design(config)[0].set_index("compound")["well"]
    (drug,) = compound_effects(config)["compound"]
    found = {}
    for compound in (drug, "DMSO"):
        site = simulate_site(config, "plate-1", wells[compound], 0)
        found[compound] = network.measure(site.cells, site.stack[:, 1], int(site.cells.max()), NetworkConfig())

    def ratio(name: str, frame: int) -> float:
        drugged, control = (np.nanmedian(found[compound][f"network_{name}"][:, frame]) for compound in (drug, "DMSO"))
        return float(drugged / control)

    assert ratio("fragments", -1) > 1.6
    assert ratio("branch_length", -1) < 0.7
    assert ratio("form_factor", -1) < 0.7
    assert ratio("fragments", 0) == pytest.approx(1, abs=0.35)
    assert ratio("branch_length", 0) == pytest.approx(1, abs=0.25)
