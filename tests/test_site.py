from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from screening.clips import EXCLUSIONS, KEPT, ClipsConfig, FixedWindow
from screening.illumination import Calibration, NoIllumination, calibrate
from screening.simulation import CHANNELS, SimulatedSite, SimulationConfig, simulate_site
from screening.site import ChannelsConfig, SegmentConfig, Site, process_site
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


def test_same_input_same_output(site: Site, simulated: SimulatedSite) -> None:
    again = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), CONFIG)
    np.testing.assert_array_equal(site.clips, again.clips)
    np.testing.assert_array_equal(site.cells, again.cells)


def test_channels_of_clips_are_those_asked_for(site: Site, simulated: SimulatedSite) -> None:
    channels = ChannelsConfig(nucleus="nucleus", cytoplasm="mitochondria", clips=("potential", "nucleus"))
    config = CONFIG.model_copy(update={"channels": channels})
    chosen = process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config)
    np.testing.assert_array_equal(chosen.clips, site.clips[:, [2, 0]])


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


def test_a_site_without_cells_has_no_clips() -> None:
    stack = np.random.default_rng(0).normal(100, 3, (5, 3, 64, 64)).astype(np.uint16)
    empty = process_site(stack, CHANNELS, calibration(stack), CONFIG)
    assert empty.clips.shape == (0, 3, 4, 32, 32)
    assert (empty.selection["excluded"] != KEPT).all()


@pytest.mark.parametrize("value", [0, 700])
def test_blank_movie(simulated: SimulatedSite, value: int) -> None:
    stack = np.full_like(simulated.stack, value)
    with pytest.raises(InputError, match=f"every pixel is {value}: chunks are missing or the camera was off"):
        process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_values_that_are_no_intensities(simulated: SimulatedSite, value: float, everywhere: bool) -> None:
    stack = simulated.stack.astype(np.float32)
    stack[... if everywhere else (2, 1, 100, 100)] = value
    with pytest.raises(InputError, match=r"NaN|nan|inf"):
        process_site(stack, CHANNELS, calibration(simulated.stack), CONFIG)


@pytest.mark.parametrize("role", ["nucleus", "cytoplasm", "clips"])
def test_channel_that_is_not_there(simulated: SimulatedSite, role: str) -> None:
    channels = {"nucleus": "nucleus", role: ("dapi",) if role == "clips" else "dapi"}
    config = CONFIG.model_copy(update={"channels": ChannelsConfig.model_validate(channels)})
    with pytest.raises(InputError, match="has no channel 'dapi'; its channels are"):
        process_site(simulated.stack, CHANNELS, calibration(simulated.stack), config)


def test_movie_that_is_too_short(simulated: SimulatedSite) -> None:
    with pytest.raises(InputError, match=r"a movie of 3 frames is too short for clips of 4 frames"):
        process_site(simulated.stack[:3], CHANNELS, calibration(simulated.stack), CONFIG)
