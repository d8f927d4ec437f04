"""The simulated screen: its design, its truth, its kinetics and its optics."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from screening.simulation import (
    CHANNELS,
    KINETIC_PAIR,
    MECHANISMS,
    Dial,
    SimulatedSite,
    SimulationConfig,
    compound_effects,
    design,
    simulate_site,
)
from storage_schemas.errors import InputError

SMALL = SimulationConfig(
    replicates=2,
    moas=KINETIC_PAIR,
    compounds_per_moa=2,
    controls_per_plate=2,
    frames=6,
    height=200,
    width=232,
    cells_per_site=8,
)
# Everything that hides the course of the mean brightness is off.
CLEAN = SMALL.model_copy(
    update={
        "out_of_focus_rate": 0.0,
        "debris_per_site": 0.0,
        "batch_effect": 0.0,
        "division_rate": 0.0,
        "death_rate": 0.0,
    }
)
BUSY = SMALL.model_copy(update={"division_rate": 0.08, "death_rate": 0.05, "out_of_focus_rate": 0.3, "frames": 9})


def _well_of(config: SimulationConfig, compound: str, plate: str = "plate-1") -> str:
    plate_map, _ = design(config)
    chosen = plate_map[(plate_map["plate"] == plate) & (plate_map["compound"] == compound)]
    return str(chosen["well"].iloc[0])


@cache
def _busy_sites() -> list[SimulatedSite]:
    plate_map, _ = design(BUSY)
    return [simulate_site(BUSY, "plate-1", well, 0) for well in plate_map["well"].unique()]


def _centroids(labels: np.ndarray) -> dict[int, np.ndarray]:
    return {int(k): np.argwhere(labels == k).mean(axis=0) for k in np.unique(labels) if k > 0}


def _potential_course(config: SimulationConfig, moa: str) -> np.ndarray:
    """(T,) light of the potential channel under the cells, relative to untreated wells."""
    plate_map, compounds = design(config)
    names = compounds.loc[compounds["moa"] == moa, "compound"]

    def course(members: pd.Series) -> np.ndarray:
        wells = plate_map.loc[plate_map["compound"].isin(members), ["plate", "well"]]
        movies = []
        for plate, well in wells.itertuples(index=False):
            site = simulate_site(config, plate, well, 0)
            light = site.stack[:, CHANNELS.index("potential")].astype(float)
            movies.append(
                [
                    frame[cells > 0].mean() - frame[cells == 0].mean()
                    for frame, cells in zip(light, site.cells, strict=True)
                ]
            )
        return np.mean(movies, axis=0)

    return course(names) / course(pd.Series(["DMSO"]))


def test_the_design_holds_every_compound_and_dose_once_a_plate() -> None:
    config = SMALL.model_copy(update={"doses_um": (1.0, 10.0)})
    plate_map, compounds = design(config)
    assert list(plate_map.columns) == [
        "plate", "well", "compound", "concentration", "unit", "role", "replicate",
    ]  # fmt: skip
    assert list(compounds.columns) == [
        "compound", "name", "moa", "cas", "inchikey", "smiles", "target",
    ]  # fmt: skip
    assert not plate_map.duplicated(["plate", "well"]).any()
    assert set(plate_map["compound"]) == set(compounds["compound"])
    for replicate, (_, plate) in enumerate(plate_map.groupby("plate"), start=1):
        assert set(plate["replicate"]) == {str(replicate)}
        treated = plate[plate["role"] == "treatment"]
        assert len(treated) == 2 * 2 * 2
        assert not treated.duplicated(["compound", "concentration"]).any()
        controls = plate[plate["role"] == "negative_control"]
        assert list(controls["compound"]) == ["DMSO"] * 2
    assert compounds.set_index("compound").loc["DMSO", "moa"] is None
    assert not compounds["compound"].duplicated().any()


def test_the_table_of_compounds_may_leave_mechanisms_unknown() -> None:
    config = SimulationConfig(compounds_per_moa=3, unknown_per_moa=2)
    compounds = design(config)[1].set_index("compound")
    truth = compound_effects(config).set_index("compound")["moa"]
    known = compounds["moa"].dropna()
    assert known.index.str.endswith("-1").all()
    assert known.to_dict() == truth[known.index].to_dict()
    assert len(known) == truth.nunique() == len(compounds.index.drop("DMSO")) / 3
    assert compounds.loc["uncoupler-3", ["name", "moa", "target"]].isna().all()


def test_replicate_plates_have_different_layouts() -> None:
    plate_map, _ = design(SimulationConfig())
    layouts = [list(p.sort_values("well")["compound"]) for _, p in plate_map.groupby("plate")]
    assert layouts[0] != layouts[1] != layouts[2]


@pytest.mark.parametrize("compounds_per_moa", [1, 4, 12, 48, 190])
def test_wells_have_names_of_real_plates(compounds_per_moa: int) -> None:
    config = SimulationConfig(replicates=1, compounds_per_moa=compounds_per_moa)
    wells = design(config)[0]["well"]
    assert wells.is_unique
    assert wells.str.fullmatch(r"A?[A-Z]\d\d").all()


def test_a_site_does_not_depend_on_what_was_simulated_before() -> None:
    first = simulate_site(SMALL, "plate-2", "A02", 0)
    simulate_site(SMALL, "plate-1", "A01", 0)
    again = simulate_site(SMALL, "plate-2", "A02", 0)
    np.testing.assert_array_equal(first.stack, again.stack)
    np.testing.assert_array_equal(first.nuclei, again.nuclei)
    np.testing.assert_array_equal(first.cells, again.cells)
    pd.testing.assert_frame_equal(first.parents, again.parents)
    assert first.bad_frames == again.bad_frames


def test_seed_plate_well_and_site_each_make_another_movie() -> None:
    config = SMALL.model_copy(update={"sites_per_well": 2, "frames": 2})
    movies = [
        simulate_site(config, "plate-1", "A01", 0),
        simulate_site(config, "plate-1", "A01", 1),
        simulate_site(config, "plate-1", "A02", 0),
        simulate_site(config, "plate-2", "A01", 0),
        simulate_site(config.model_copy(update={"seed": 1}), "plate-1", "A01", 0),
    ]
    assert len({movie.cells.tobytes() for movie in movies}) == len(movies)


def test_shapes_and_types() -> None:
    site = simulate_site(SMALL, "plate-1", "A01", 0)
    assert site.stack.shape == (6, 3, 200, 232)
    assert site.stack.dtype == np.uint16
    for labels in (site.nuclei, site.cells):
        assert labels.shape == (6, 200, 232)
        assert labels.dtype == np.int32
    assert list(site.parents.columns) == ["track", "parent", "frame"]
    assert (site.parents.dtypes == np.int64).all()


def test_every_nucleus_lies_in_its_own_cell() -> None:
    for site in _busy_sites():
        nuclear = site.nuclei > 0
        np.testing.assert_array_equal(site.cells[nuclear], site.nuclei[nuclear])
        for nuclei, cells in zip(site.nuclei, site.cells, strict=True):
            assert set(np.unique(nuclei)) == set(np.unique(cells))
            sizes = np.bincount(nuclei.ravel())[1:], np.bincount(cells.ravel())[1:]
            assert (sizes[1] >= sizes[0]).all()


def test_a_track_is_one_slowly_moving_cell_without_gaps() -> None:
    for site in _busy_sites():
        ids = np.unique(site.nuclei)
        np.testing.assert_array_equal(ids, np.arange(len(ids)))
        where = [_centroids(nuclei) for nuclei in site.nuclei]
        for track in ids[1:]:
            frames = [t for t, here in enumerate(where) if track in here]
            assert frames == list(range(frames[0], frames[-1] + 1))
            steps = np.diff([where[t][track] for t in frames], axis=0)
            assert (np.linalg.norm(steps, axis=1) < 20).all()


def test_daughters_begin_beside_their_mother_right_after_her_last_frame() -> None:
    n_divisions = 0
    for site in _busy_sites():
        present = {int(k): np.flatnonzero((site.nuclei == k).any(axis=(1, 2))) for k in np.unique(site.nuclei) if k > 0}
        begun_late = {track for track, frames in present.items() if frames[0] > 0}
        assert set(site.parents["track"]) == begun_late
        assert (site.parents.groupby("parent").size() == 2).all()
        for track, parent, frame in site.parents.itertuples(index=False):
            assert present[track][0] == frame == present[parent][-1] + 1
            mother = _centroids(site.nuclei[frame - 1])[parent]
            daughter = _centroids(site.nuclei[frame])[track]
            assert np.linalg.norm(daughter - mother) < 30
            n_divisions += 1
    assert n_divisions >= 4


def test_some_cells_die_and_their_nuclei_are_bright_before() -> None:
    config = SMALL.model_copy(update={"death_rate": 0.4, "out_of_focus_rate": 0.0, "frames": 8})
    site = simulate_site(config, "plate-1", _well_of(config, "DMSO"), 0)
    counts = [len(np.unique(nuclei)) - 1 for nuclei in site.nuclei]
    assert counts[-1] < counts[0] / 2
    light = site.stack[:, 0].astype(float)
    for track in range(1, counts[0] + 1):
        frames = np.flatnonzero((site.nuclei == track).any(axis=(1, 2)))
        if 2 < len(frames) < config.frames:
            last, first = (light[t][site.nuclei[t] == track].mean() for t in frames[[-1, 0]])
            assert last > 1.3 * first


def test_nuclei_are_separate_and_12_to_18_px_wide_in_untreated_wells() -> None:
    config = SimulationConfig()
    site = simulate_site(config, "plate-1", _well_of(config, "DMSO"), 0)
    for nuclei in site.nuclei:
        sizes = np.bincount(nuclei.ravel())[1:]
        diameters = np.sqrt(sizes[sizes > 0] * 4 / np.pi)
        assert np.mean((diameters > 11.5) & (diameters < 18.5)) > 0.85
        places = np.array(list(_centroids(nuclei).values()))
        gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
        np.fill_diagonal(gaps, np.inf)
        assert gaps.min() > 18


def test_cells_are_brighter_than_what_is_between_them() -> None:
    site = simulate_site(CLEAN, "plate-1", _well_of(CLEAN, "DMSO"), 0)
    for t in range(CLEAN.frames):
        for channel, labels in ((0, site.nuclei), (1, site.cells), (2, site.cells)):
            frame = site.stack[t, channel]
            assert np.median(frame[labels[t] > 0]) > 1.5 * np.median(frame[site.cells[t] == 0])


def test_the_kinetic_pair_has_one_end_state_and_two_courses() -> None:
    config = CLEAN.model_copy(update={"compounds_per_moa": 4, "frames": 8})
    fast, slow = (_potential_course(config, moa) for moa in KINETIC_PAIR)
    assert abs(fast[0] - slow[0]) < 0.2
    assert abs(fast[-1] - slow[-1]) < 0.1
    assert max(fast[-1], slow[-1]) < 0.6
    # In the middle one has long arrived while the other has hardly begun.
    assert np.all(slow[2:5] - fast[2:5] > 0.2)


def test_the_kinetic_pair_differs_in_nothing_but_midpoint_and_width() -> None:
    fast, slow = (MECHANISMS[moa] for moa in KINETIC_PAIR)
    assert fast.end_state is slow.end_state
    assert (fast.death, fast.arrests) == (slow.death, slow.arrests) == (0.0, False)
    many = SMALL.model_copy(update={"compounds_per_moa": 250})
    effects = compound_effects(many).groupby("moa")
    for column in ["ec50_um", *(dial.name.lower() for dial in Dial)]:
        mean, error = effects[column].mean(), effects[column].sem()
        assert abs(mean.iloc[0] - mean.iloc[1]) < 4 * np.hypot(*error), column


def test_mechanisms_do_to_cells_what_they_say() -> None:
    config = CLEAN.model_copy(
        update={
            "moas": ("topoisomerase inhibitor", "apoptosis inducer", "kinesin inhibitor"),
            "compounds_per_moa": 1,
        }
    )

    def grown(compound: str, labels: str) -> float:
        """Ratio of mean areas, last frame to first."""
        movie = getattr(simulate_site(config, "plate-1", _well_of(config, compound), 0), labels)
        sizes = [np.bincount(movie[t].ravel())[1:] for t in (0, -1)]
        return float(sizes[1][sizes[1] > 0].mean() / sizes[0].mean())

    assert grown("topoisomerase-inhibitor-1", "nuclei") > 1.5
    assert grown("apoptosis-inducer-1", "nuclei") < 0.85
    assert grown("apoptosis-inducer-1", "cells") < 0.8
    assert 0.9 < grown("DMSO", "nuclei") < 1.1
    assert 0.9 < grown("kinesin-inhibitor-1", "cells") < 1.1

    site = simulate_site(config, "plate-1", _well_of(config, "kinesin-inhibitor-1"), 0)
    nuclei_and_rims = []
    for t in (0, -1):
        rim = (site.cells[t] > 0) & ~_near(site.nuclei[t] > 0, 14)
        nuclei_and_rims.append(site.stack[t, 1][rim].mean())
    assert nuclei_and_rims[1] < 0.7 * nuclei_and_rims[0]


def _near(mask: np.ndarray, distance: int) -> np.ndarray:
    y, x = np.nonzero(mask)
    near = np.zeros_like(mask)
    for dy in range(-distance, distance + 1):
        reach = int(np.sqrt(distance**2 - dy**2))
        rows = np.clip(y + dy, 0, mask.shape[0] - 1)
        for dx in range(-reach, reach + 1):
            near[rows, np.clip(x + dx, 0, mask.shape[1] - 1)] = True
    return near


def test_without_effect_size_a_treated_well_is_untreated() -> None:
    config = CLEAN.model_copy(update={"effect_size": 0.0})
    courses = [_potential_course(config, moa) for moa in KINETIC_PAIR]
    np.testing.assert_allclose(np.std(courses, axis=1), 0, atol=0.03)


def test_plates_differ_by_their_batch_effects_alone() -> None:
    """Same wells on each plate, so the plates' mean backgrounds and gradients show the batch."""
    even = SMALL.model_copy(update={"batch_effect": 0.0, "cells_per_site": 0, "frames": 2})
    uneven = even.model_copy(update={"batch_effect": 1.0})

    def backgrounds(config: SimulationConfig) -> np.ndarray:
        """(plates, C, quadrants) medians of empty fields."""
        halves = slice(0, 100), slice(100, 200)
        return np.array(
            [
                [
                    [np.median(image[rows, columns]) for rows in halves for columns in halves]
                    for image in simulate_site(config, plate, "A01", 0).stack[0]
                ]
                for plate in ("plate-1", "plate-2")
            ]
        )

    np.testing.assert_allclose(*backgrounds(even), rtol=0.02)
    first, second = backgrounds(uneven)
    assert (np.abs(first.mean(axis=1) / second.mean(axis=1) - 1) > 0.02).any()
    # The gradient across the field is the plate's, and the same in all of its channels.
    profiles = [plate / plate.mean(axis=1, keepdims=True) for plate in (first, second)]
    assert np.abs(profiles[0] - profiles[1]).max() > 0.01
    for profile in profiles:
        np.testing.assert_allclose(profile, np.broadcast_to(profile[0], profile.shape), rtol=0.02)


def test_noise_grows_with_less_light() -> None:
    empty = CLEAN.model_copy(update={"cells_per_site": 0, "frames": 2})
    dim = empty.model_copy(update={"exposure": 0.25, "read_noise": 0.0})
    bright = empty.model_copy(update={"exposure": 1.0, "read_noise": 0.0})
    patches = [simulate_site(c, "plate-1", "A01", 0).stack[0, 0, 90:110, 100:132] for c in (dim, bright)]
    assert patches[0].mean() == pytest.approx(patches[1].mean(), rel=0.05)
    assert patches[0].std() == pytest.approx(2 * patches[1].std(), rel=0.15)


def test_bad_frames_are_blurred_and_only_they() -> None:
    site = next(s for s in _busy_sites() if 0 < len(s.bad_frames) < BUSY.frames)
    mitochondria = site.stack[:, 1].astype(float)
    # Saturated specks are the same in all frames and would drown the cells.
    bright = np.minimum(mitochondria, 20_000)
    sharpness = np.abs(np.diff(bright, axis=2)).mean(axis=(1, 2))
    bad = np.isin(np.arange(BUSY.frames), site.bad_frames)
    assert sharpness[bad].max() < sharpness[~bad].min()


def test_debris_saturates() -> None:
    dirty = CLEAN.model_copy(update={"debris_per_site": 5.0})
    assert (simulate_site(dirty, "plate-1", "A01", 0).stack == 65535).any(axis=(2, 3)).all()
    assert not (simulate_site(CLEAN, "plate-1", "A01", 0).stack == 65535).any()


def test_a_field_without_cells() -> None:
    empty = SMALL.model_copy(update={"cells_per_site": 0})
    site = simulate_site(empty, "plate-1", "A01", 0)
    assert not site.nuclei.any()
    assert not site.cells.any()
    assert site.parents.empty
    assert (site.stack > 0).all()


def test_a_field_whose_cells_all_die() -> None:
    deadly = CLEAN.model_copy(update={"death_rate": 1.0, "minutes_per_frame": 600.0})
    site = simulate_site(deadly, "plate-1", "A01", 0)
    assert site.nuclei[0].any()
    assert not site.nuclei[-1].any()


@settings(max_examples=10, deadline=None)
@given(
    height=st.integers(96, 200),
    width=st.integers(96, 200),
    frames=st.integers(2, 4),
    pixel=st.floats(0.5, 1.5),
    seed=st.integers(0, 2**63),
)
def test_any_geometry_goes_through(height: int, width: int, frames: int, pixel: float, seed: int) -> None:
    config = SimulationConfig(
        seed=seed,
        height=height,
        width=width,
        frames=frames,
        pixel_size_um=pixel,
        cells_per_site=1,
        minutes_per_frame=300,
        division_rate=0.1,
    )
    site = simulate_site(config, "plate-3", "B01", 0)
    assert site.stack.shape == (frames, 3, height, width)
    assert site.nuclei.any()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"frames": 1}, "frames"),
        ({"moas": ()}, "moas"),
        ({"moas": ("homeopathy",)}, "moas"),
        ({"moas": ("uncoupler", "uncoupler")}, "repeat"),
        ({"doses_um": (0.0,)}, "controls_per_plate"),
        ({"doses_um": (1.0, 1.0)}, "repeat"),
        ({"compounds_per_moa": 500}, "1536"),
        ({"unknown_per_moa": 5}, "unknown_per_moa is 5"),
        ({"cells_per_site": 500}, "lower cells_per_site"),
        ({"frame": 8}, "frame"),
    ],
)
def test_an_impossible_screen_is_refused(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SimulationConfig.model_validate(settings_)


@pytest.mark.parametrize(
    ("plate", "well", "site", "message"),
    [
        ("plate-9", "A01", 0, r"'plate-9': try plate-"),
        ("plate-1", "Z99", 0, r"well on plate-1 named 'Z99'"),
        ("plate-1", "A01", 1, r"sites are 0 to 0"),
    ],
)
def test_an_unknown_site_is_refused(plate: str, well: str, site: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_site(SMALL, plate, well, site)
