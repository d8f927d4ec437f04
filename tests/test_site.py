from __future__ import annotations

import pickle

import numpy as np
import pytest
from numpy.typing import NDArray

from screening.clips import EXCLUSIONS, KEPT, CellScaling, ClipsConfig, FixedScaling, FixedWindow, PlateScaling
from screening.illumination import Calibration, NoIllumination, calibrate
from screening.network import NAMES
from screening.quality import EMPTY, FLAGS, NOT_FINITE
from screening.simulation import CHANNELS, SimulatedSite, SimulationConfig, simulate_site
from screening.site import (
    NO_CELLS,
    ChannelsConfig,
    SegmentConfig,
    Site,
    SiteError,
    SiteForm,
    check_form,
    process_site,
)
from storage_schemas.errors import InputError

CONFIG = SegmentConfig(
    channels=ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria"),
    illumination=NoIllumination(),
    clips=ClipsConfig(frames=4, size=32, window=FixedWindow(size=64)),
)


@pytest.fixture(scope="module")
def simulated() -> SimulatedSite:
    config = SimulationConfig(frames=5, height=256, width=256, cells_per_site=10, out_of_focus_rate=0)
    return simulate_site(config, "plate-1", "A01", 0)


def calibration(stack: NDArray[np.uint16]) -> Calibration:
    return calibrate([stack], NoIllumination(), (1.0, 99.8))


@pytest.fixture(scope="module")
def site(simulated: SimulatedSite) -> Site:
    return process_site(simulated.stack, CHANNELS, calibration(simulated.stack), CONFIG)


def test_shapes(site: Site, simulated: SimulatedSite) -> None:
    assert site.nuclei.shape == site.cells.shape == simulated.nuclei.shape
    assert site.nuclei.dtype == site.cells.dtype == np.int32
    assert site.clips.shape[1:] == (3, 4, 32, 32)
    assert site.clips.dtype == np.uint8
    # Four of five frames, first to last.
    assert site.frames.tolist() == [0, 1, 3, 4]


def test_every_nucleus_belongs_to_one_track(site: Site) -> None:
    tracks = site.selection["track"].to_numpy()
    assert tracks.tolist() == list(range(1, len(tracks) + 1))
    for t, plane in enumerate(site.nuclei):
        there = {int(label) for label in np.unique(plane) if label}
        assert there == {int(track) for track in tracks[site.tracks.present[:, t]]}


def test_each_nucleus_lies_in_the_cell_of_its_track(site: Site) -> None:
    inside = site.nuclei > 0
    np.testing.assert_array_equal(site.cells[inside], site.nuclei[inside])
    assert set(np.unique(site.cells)) == set(np.unique(site.nuclei))


def test_tracks_are_the_simulated_cells(site: Site, simulated: SimulatedSite) -> None:
    # A nucleus seen whole in every frame is found in every frame, by one track of its own.
    found = []
    for cell in np.unique(simulated.nuclei):
        masks = simulated.nuclei == cell
        whole = masks[:, 8:-8, 8:-8].sum(axis=(1, 2)) == masks.sum(axis=(1, 2))
        if cell == 0 or not masks.any(axis=(1, 2)).all() or not whole.all():
            continue
        found.append([int(np.bincount(plane[mask]).argmax()) for plane, mask in zip(site.nuclei, masks, strict=True)])
    assert len(found) >= 3
    assert all(len(set(tracks)) == 1 and tracks[0] > 0 for tracks in found)
    assert len({tracks[0] for tracks in found}) == len(found)


def test_selection_adds_up(site: Site) -> None:
    selection = site.selection
    kept = selection["excluded"] == KEPT
    assert set(selection["excluded"]) <= {KEPT, *EXCLUSIONS}
    assert 0 < kept.sum() < len(selection)
    assert kept.sum() == len(site.clips)
    assert selection.loc[kept, "clip"].tolist() == list(range(len(site.clips)))
    assert selection.loc[~kept, "clip"].isna().all()


def test_a_frame_is_measured_once_a_channel(site: Site, simulated: SimulatedSite) -> None:
    assert len(site.quality) == simulated.stack.shape[0] * simulated.stack.shape[1]
    assert not site.quality["bad"].any()
    assert (site.quality[["flags", "site_flag"]] == "").all(axis=None)


def test_drift_is_what_the_stage_did(simulated: SimulatedSite) -> None:
    stack = simulated.stack.copy()
    stack[3:] = np.roll(stack[3:], (6, -4), axis=(2, 3))
    moved = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG).quality
    still = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), CONFIG).quality
    for axis, shift in (("drift_y", 6), ("drift_x", -4)):
        drift = (moved[axis] - still[axis]).groupby(moved["frame"]).first().to_numpy()
        np.testing.assert_allclose(drift, [0, 0, 0, shift, 0], atol=1)


def test_objects_found_are_the_objects_in_tracks(site: Site) -> None:
    found = site.quality.groupby("frame")["n_nuclei"]
    assert (found.nunique() == 1).all()
    assert found.first().tolist() == [len(np.unique(plane)) - 1 for plane in site.nuclei]
    assert found.first().sum() == site.tracks.present.sum()


def test_same_input_same_output(site: Site, simulated: SimulatedSite) -> None:
    again = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), CONFIG)
    np.testing.assert_array_equal(site.clips, again.clips)
    np.testing.assert_array_equal(site.cells, again.cells)


def test_channels_of_clips_are_those_asked_for(site: Site, simulated: SimulatedSite) -> None:
    channels = ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria", clips=("potential", "nucleus"))
    config = CONFIG.model_copy(update={"channels": channels})
    chosen = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config)
    np.testing.assert_array_equal(chosen.clips, site.clips[:, [2, 0]])


def test_networks_are_measured_when_their_channel_is_named(site: Site, simulated: SimulatedSite) -> None:
    assert not any(name.startswith("network_") for name in site.tracks.features)
    channels = ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria", network="mitochondria")
    config = CONFIG.model_copy(update={"channels": channels})
    measured = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config).tracks
    assert {name for name in measured.features if name not in site.tracks.features} == set(NAMES)
    assert (measured.features["network_fragments"][measured.present] > 0).mean() > 0.9
    assert np.isnan(measured.features["network_area"][~measured.present]).all()


def test_intensities_of_clips_are_those_of_the_site(simulated: SimulatedSite) -> None:
    channels = ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria", clips=("potential", "nucleus"))
    window = FixedWindow(size=48)
    for scaling in (PlateScaling(), CellScaling()):
        cut = ClipsConfig(frames=5, size=48, window=window, mask="none", dtype="uint16", scaling=scaling)
        config = CONFIG.model_copy(update={"channels": channels, "clips": cut})
        site = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config)
        clip = site.selection.index[site.selection["clip"] == 0][0]
        y0, x0, y1, x1 = site.tracks.box[clip, 2]
        y, x = (y0 + y1) // 2 - 24, (x0 + x1) // 2 - 24
        want = simulated.stack[2, [2, 0], y : y + 48, x : x + 48]
        low, high = (end[0, :, None, None] for end in (site.ranges.low, site.ranges.high))
        np.testing.assert_allclose(site.ranges.intensities(site.clips)[0, :, 2], want.clip(low, high), atol=1)


def test_fixed_ranges_are_those_of_the_channels_of_clips(simulated: SimulatedSite) -> None:
    channels = ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria", clips=("potential", "nucleus"))
    cut = CONFIG.clips.model_copy(update={"scaling": FixedScaling(low=(1, 2), high=(3000, 4000))})
    config = CONFIG.model_copy(update={"channels": channels, "clips": cut})
    found = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config).ranges
    assert (found.low[0].tolist(), found.high[0].tolist()) == ([1, 2], [3000, 4000])


def test_nuclei_alone_do(simulated: SimulatedSite) -> None:
    config = CONFIG.model_copy(update={"channels": ChannelsConfig(nucleus="dna")})
    stack = simulated.stack[:, :1]
    alone = process_site(stack, ("dna",), calibration(stack), config)
    assert alone.clips.shape[1] == 1
    assert len(alone.clips) > 0


def test_a_blank_frame_is_repaired_not_fatal(simulated: SimulatedSite, site: Site) -> None:
    stack = simulated.stack.copy()
    stack[3] = 0
    damaged = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert damaged.quality.loc[damaged.quality["bad"], "frame"].unique().tolist() == [3]
    assert (damaged.selection.loc[damaged.selection["excluded"] == KEPT, "n_repaired"] == 1).all()
    assert len(damaged.clips) > 0


def test_noise_is_a_site_flagged_for_having_no_cells() -> None:
    stack = np.random.default_rng(0).normal(100, 3, (5, 3, 128, 128)).astype(np.uint16)
    empty = process_site(stack, CHANNELS, calibration(stack), CONFIG)
    assert empty.clips.shape == (0, 3, 4, 32, 32)
    assert (empty.quality["n_nuclei"] == 0).all()
    assert not empty.quality["bad"].any()
    assert set(empty.quality["site_flag"]) == {NO_CELLS}


def test_a_site_with_too_many_bad_frames_is_flagged_for_the_commonest_reason(simulated: SimulatedSite) -> None:
    stack = simulated.stack.copy()
    stack[[0, 1, 3], 1] = 0
    stack[4] = 4095
    damaged = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert set(damaged.quality["site_flag"]) == {EMPTY}
    assert (damaged.selection["excluded"] == "bad frames").all()
    assert len(damaged.clips) == 0


@pytest.mark.parametrize("value", [0, 700])
def test_blank_movie(simulated: SimulatedSite, value: int) -> None:
    stack = np.full_like(simulated.stack, value)
    with pytest.raises(SiteError, match="each frame is one value") as caught:
        process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert caught.value.fault == "blank"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hole_is_forgiven(simulated: SimulatedSite, site: Site, value: float) -> None:
    stack = simulated.stack.astype(np.float32)
    stack[2, :, :20, :20] = value
    holed = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert not holed.quality["bad"].any()
    assert (holed.nuclei[2, 20:, 20:] > 0).sum() == pytest.approx((site.nuclei[2, 20:, 20:] > 0).sum(), rel=0.02)
    # The clips show nothing there, and nothing else elsewhere.
    assert len(holed.clips) == pytest.approx(len(site.clips), abs=1)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_frame_that_is_no_image_is_repaired(simulated: SimulatedSite, value: float) -> None:
    stack = simulated.stack.astype(np.float32)
    stack[3, 0] = value
    damaged = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert damaged.quality.loc[damaged.quality["bad"], "frame"].unique().tolist() == [3]
    assert damaged.quality.query("frame == 3")["flags"].tolist() == [NOT_FINITE, "", ""]
    assert (damaged.selection.loc[damaged.selection["excluded"] == KEPT, "n_repaired"] == 1).all()
    assert len(damaged.clips) > 0


def test_a_movie_that_is_no_image_is_flagged(simulated: SimulatedSite) -> None:
    stack = np.full_like(simulated.stack, np.nan, np.float32)
    damaged = process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)
    assert set(damaged.quality["site_flag"]) == {NOT_FINITE}
    assert len(damaged.selection) == 0


@pytest.mark.parametrize("role", ["nucleus", "cytoplasm", "clips"])
def test_channel_that_is_not_there(simulated: SimulatedSite, role: str) -> None:
    channels = {"nucleus": "nucleus", role: ("dapi",) if role == "clips" else "dapi"}
    config = CONFIG.model_copy(update={"channels": ChannelsConfig.model_validate(channels)})
    with pytest.raises(InputError, match="has no channel 'dapi'; its channels are"):
        process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config)


def test_movie_that_is_too_short(simulated: SimulatedSite) -> None:
    with pytest.raises(InputError, match=r"a movie of 3 frames is too short for clips of 4 frames"):
        process_site(simulated.stack[:3], CHANNELS, calibration(simulated.stack), CONFIG)


PLATE = SiteForm(("a", "b"), (5, 2, 64, 48))


@pytest.mark.parametrize("channels", [("a", "b"), ("b", "a"), ("x", "b", "a")])
def test_channels_are_known_by_name(channels: tuple[str, ...]) -> None:
    check_form(SiteForm(channels, (5, len(channels), 64, 48)), PLATE, CONFIG)


@pytest.mark.parametrize(
    ("site", "fault", "message"),
    [
        (SiteForm(("b", "c"), (5, 2, 64, 48)), "channels", r"has no channel \['a'\]; its channels are \['b', 'c'\]"),
        (SiteForm(("a", "b"), (5, 2, 48, 64)), "shape", r"is 48 × 64 px, the sites of its plate 64 × 48 px"),
        (SiteForm(("a", "b"), (3, 2, 64, 48)), "frames", "a movie of 3 frames is too short for clips of 4 frames"),
        (SiteForm(("a", "b"), (9, 2, 64, 48)), "frames", "has 9 frames, the sites of its plate 5: its clips would be"),
    ],
)
def test_sites_unlike_their_plate(site: SiteForm, fault: str, message: str) -> None:
    with pytest.raises(SiteError, match=message) as caught:
        check_form(site, PLATE, CONFIG)
    assert caught.value.fault == fault
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.fault, str(again)) == (SiteError, fault, str(caught.value))


def test_more_frames_are_no_fault_where_clips_are_of_the_first_ones() -> None:
    config = CONFIG.model_copy(update={"clips": ClipsConfig(frames=4, step=1)})
    check_form(SiteForm(("a", "b"), (9, 2, 64, 48)), PLATE, config)
    with pytest.raises(SiteError, match="too short"):
        check_form(SiteForm(("a", "b"), (3, 2, 64, 48)), PLATE, config)


def test_no_flag_of_a_site_is_a_part_of_another() -> None:
    """The commonest is found by its name among joined ones."""
    assert not any(one in other for one in FLAGS for other in FLAGS if one != other)


def test_movies_brought_together_may_differ_but_for_channels_and_length() -> None:
    config = CONFIG.model_copy(update={"alike": False})
    check_form(SiteForm(("a", "b"), (9, 2, 48, 64)), PLATE, config)
    for channels, n_frames in ((("a",), 9), (("a", "b"), 3)):
        with pytest.raises(SiteError):
            check_form(SiteForm(channels, (n_frames, len(channels), 48, 64)), PLATE, config)


def test_movies_brought_together_are_judged_alone(simulated: SimulatedSite) -> None:
    """One of 8 bit among those of 16 bit is not empty, nor are they debris."""
    config = CONFIG.model_copy(update={"alike": False})
    plate = calibration(simulated.stack)
    dim = (simulated.stack // 100).astype(np.uint8)
    assert process_site(dim, CHANNELS, plate, CONFIG).quality["bad"].all()
    assert not process_site(dim, CHANNELS, plate, config).quality["bad"].any()
