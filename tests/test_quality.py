from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from screening import quality
from screening.quality import DEBRIS, EMPTY, NOT_FINITE, SATURATED, SOFT, PlateQuality, QualityConfig
from screening.simulation import SimulationConfig, design, simulate_site

CONFIG = QualityConfig()


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


def judge(stack: np.ndarray, plate: PlateQuality | None = None, config: QualityConfig = CONFIG) -> pd.DataFrame:
    """The flags of a movie on its plate; alone on it by default."""
    measures = quality.measure(stack)
    return quality.flag(measures, quality.typical(measures) if plate is None else plate, config)


def flags(stack: np.ndarray, plate: PlateQuality | None = None) -> list[int]:
    """The bad frames."""
    judged = judge(stack, plate)
    bad = judged.groupby("frame")["bad"]
    assert (bad.nunique() == 1).all()
    reasons = judged.groupby("frame")["flags"].agg(lambda reasons: "".join(reasons) != "")
    assert (bad.first() == reasons).all()
    return [int(frame) for frame in np.flatnonzero(bad.first())]


def reasons(judged: pd.DataFrame, frame: int) -> list[str]:
    """The flags of a frame's channels."""
    return judged.loc[judged["frame"] == frame, "flags"].tolist()


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
    judged = judge(stack)
    assert reasons(judged, 3) == [EMPTY, EMPTY]
    assert reasons(judged, 7) == ["", EMPTY]


def test_flags_lost_pixels_and_forgives_a_hole() -> None:
    stack = movie().astype(np.float32)
    stack[4] = np.nan
    stack[6, 1, :10] = np.inf
    stack[8, 0, :5, :5] = np.nan
    assert flags(stack) == [4, 6]
    judged = judge(stack)
    assert reasons(judged, 4) == [NOT_FINITE, NOT_FINITE]
    assert reasons(judged, 6) == ["", NOT_FINITE]


def test_flags_saturation_at_a_camera_ceiling() -> None:
    stack = movie()
    stack[6, 0, :60] = 4095
    measures = quality.measure(stack)
    row = measures.query("frame == 6 and channel == 0").iloc[0]
    assert row.saturated == 60 / 96
    assert flags(stack) == [6]
    assert SATURATED in reasons(judge(stack), 6)[0]


@pytest.mark.parametrize("lost", [0, 11])
def test_a_lost_frame_does_not_hide_saturation(lost: int) -> None:
    stack = movie().astype(np.float32)
    stack[6, 0, :60] = 4095
    stack[lost] = np.nan
    assert quality.measure(stack).query("frame == 6 and channel == 0")["saturated"].item() == 60 / 96


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
    assert list(measures.columns) == ["frame", "channel", "focus", "saturated", "glare", "mean", "sd", "not_finite"]
    assert measures[["frame", "channel"]].to_numpy().tolist() == [[t, c] for t in range(3) for c in range(2)]
    np.testing.assert_allclose(measures["mean"], stack.mean(axis=(2, 3)).ravel(), rtol=1e-5)
    np.testing.assert_allclose(measures["sd"], stack.std(axis=(2, 3)).ravel(), rtol=1e-5)


def test_rows_may_be_shuffled() -> None:
    measures = quality.measure(blurred(movie(), 5))
    judged = quality.flag(measures.sample(frac=1, random_state=0), quality.typical(measures), CONFIG)
    pd.testing.assert_frame_equal(judged, quality.flag(measures, quality.typical(measures), CONFIG))
    assert judged.loc[judged["bad"], "frame"].unique().tolist() == [5]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2)])
def test_tiny_images_are_measured(shape: tuple[int, int]) -> None:
    stack = np.arange(2 * np.prod(shape), dtype=np.uint8).reshape(2, 1, *shape)
    assert len(quality.measure(stack)) == 2


# --- against the plate -----------------------------------------------------------------------


def usual(n_sites: int = 8) -> PlateQuality:
    return quality.typical(pd.concat([quality.measure(movie(2, seed=seed)) for seed in range(n_sites)]))


def test_what_is_usual_is_the_median_and_for_glare_the_upper_range() -> None:
    measures = pd.DataFrame(
        {
            "frame": np.repeat(np.arange(11), 2),
            "channel": np.tile([0, 1], 11),
            **{name: np.repeat(np.arange(11.0), 2) for name in ("focus", "saturated", "glare", "sd")},
            "not_finite": 0.0,
        }
    )
    measures.loc[measures["channel"] == 1, "sd"] *= 3
    measures.loc[measures["frame"] == 10, ["focus", "not_finite"]] = [1e9, 0.5]
    plate = quality.typical(measures)
    np.testing.assert_allclose(plate.focus, [4.5, 4.5])
    np.testing.assert_allclose(plate.sd, [4.5, 13.5])
    np.testing.assert_allclose(plate.glare, [8.1, 8.1])


def test_a_plate_whose_frames_are_all_broken_tells_nothing_and_breaks_nothing() -> None:
    stack = movie(3).astype(np.float32)
    stack[:, :, 0, 0] = np.nan
    plate = quality.typical(quality.measure(stack))
    assert np.isnan(plate.focus).all()
    assert flags(movie(3), plate) == []


@pytest.mark.parametrize("n_frames", [1, 4])
def test_a_site_that_is_bad_throughout_is_flagged_by_its_plate(n_frames: int) -> None:
    good = movie(n_frames, seed=99)
    assert flags(good, usual()) == []
    every = list(range(n_frames))

    soft = good
    for frame in every:
        soft = blurred(soft, frame)
    assert flags(soft, usual()) == every
    assert reasons(judge(soft, usual()), 0) == [SOFT, SOFT]

    dim = np.random.default_rng(0).poisson(60 + (good - 60.0).clip(0) / 100).astype(np.uint16) // 8
    assert EMPTY in reasons(judge(dim, usual()), 0)[0]

    saturated = good.copy()
    saturated[:, 1, :30] = 4095
    assert SATURATED in reasons(judge(saturated, usual()), 0)[1]


def test_a_fibre_is_debris_and_bright_cells_are_not() -> None:
    plate = usual()
    for seed in range(100, 104):
        fibre = movie(1, seed=seed)
        cv2.line(fibre[0, 0], (5, 90), (90, 5), 9000, 5)
        fibre[0, 0] = cv2.GaussianBlur(fibre[0, 0], (0, 0), 3)
        assert reasons(judge(fibre, plate), 0)[0].startswith(DEBRIS)
        bright = movie(1, seed=seed).astype(np.float64)
        assert flags(60 + (bright - 60) * 3, plate) == []
        # Light everywhere, as of a compound that fluoresces in its medium, is no debris either.
        assert flags(bright + 20_000, plate) == []


def test_hot_pixels_are_no_debris() -> None:
    stack = movie(1, seed=99)
    stack[0, :, ::16, ::16] = 65_000
    assert DEBRIS not in reasons(judge(stack, usual()), 0)[0]


def test_saturation_is_counted_beyond_what_the_plate_has() -> None:
    stack = movie(4)
    stack[:, 0, :20] = 4095
    plate = quality.typical(quality.measure(stack))
    assert flags(stack, plate) == []
    assert flags(stack, usual()) == [0, 1, 2, 3]


def test_a_channel_that_a_plate_does_not_use_is_no_fault() -> None:
    stack = movie(4)
    stack[:, 1] = 0
    assert flags(stack) == []
    assert flags(stack, usual()) == [0, 1, 2, 3]


def test_flags_are_counted_by_frame() -> None:
    stack = movie()
    stack[3] = 0
    stack[6, 0, :60] = 4095
    judged = judge(stack).assign(plate="p", well="A01", site="0")
    rows = quality.flags_of_frames(judged)
    assert list(rows.columns) == ["plate", "well", "site", "frame", "flag"]
    assert rows.loc[rows["frame"] == 3, "flag"].tolist() == [EMPTY]
    assert set(rows["frame"]) == {3, 6}


def judged_sites() -> pd.DataFrame:
    """Two plates: on one a site with a lost frame, a site that gives no clips and one without a fault."""
    lost = movie(4)
    lost[2] = 0
    sites = {("p", "A01", "0"): lost, ("p", "A01", "1"): np.zeros_like(lost), ("q", "B02", "0"): movie(4)}
    tables = [
        judge(stack, usual()).assign(plate=plate, well=well, site=site, site_flag=EMPTY if site == "1" else "")
        for (plate, well, site), stack in sites.items()
    ]
    return pd.concat(tables, ignore_index=True)


def test_plates_are_summed_up_by_shares_of_frames() -> None:
    table = quality.summarise(judged_sites()).set_index("plate")
    assert table.loc["p", ["sites", "sites_flagged", "frames"]].tolist() == [2, 1, 8]
    assert table.loc["p", ["bad", EMPTY, SOFT]].tolist() == [5 / 8, 5 / 8, 0]
    assert table.loc["q"].tolist() == [1, 0, 4, *[0.0] * 6]
    assert list(table.columns[3:]) == ["bad", *quality.FLAGS]


def test_the_worst_sites_come_first() -> None:
    table = quality.worst_sites(judged_sites(), 10)
    assert list(table.columns) == ["plate", "well", "site", "site_flag", "bad", "flags"]
    assert table.to_numpy().tolist() == [["p", "A01", "1", EMPTY, 1.0, EMPTY], ["p", "A01", "0", "", 0.25, EMPTY]]
    assert len(quality.worst_sites(judged_sites(), 1)) == 1
    none = quality.worst_sites(judged_sites().query("plate == 'q'"), 10)
    assert list(none.columns) == list(table.columns)
    assert none.empty


def test_limits_are_those_that_frames_are_held_to() -> None:
    plate = usual()
    table = quality.limits(plate, ["a", "b"], CONFIG).set_index("channel")
    measures = quality.measure(movie(1))

    def flagged(name: str, column: str, share: float) -> bool:
        """Whether a frame is bad of which both channels measure this share of a limit."""
        frame = measures.assign(**{name: table[column].to_numpy() * share})
        return bool(quality.flag(frame, plate, CONFIG)["bad"].any())

    for name, column, below in (
        ("focus", "soft_below", True),
        ("sd", "empty_below", True),
        ("glare", "debris_above", False),
        ("saturated", "saturated_above", False),
    ):
        assert flagged(name, column, 0.99) == below
        assert flagged(name, column, 1.01) != below


# --- what a drug does, and what the microscope does ------------------------------------------


def test_no_drug_of_a_simulated_plate_is_called_bad_and_every_soft_frame_is() -> None:
    config = SimulationConfig(
        replicates=1, compounds_per_moa=1, controls_per_plate=3, frames=6, out_of_focus_rate=0.1, debris_per_site=0
    )
    plate_map, _ = design(config)
    sites = [simulate_site(config, plate, well, 0) for plate, well in zip(plate_map.plate, plate_map.well, strict=True)]
    measures = [quality.measure(site.stack) for site in sites]
    plate = quality.typical(pd.concat(measures))
    truth = [site.bad_frames for site in sites]
    assert sum(map(len, truth)) >= 3
    judged = [quality.flag(measured, plate, CONFIG) for measured in measures]
    assert [table.loc[table["bad"], "frame"].unique().tolist() for table in judged] == truth
    assert {flag for table in judged for flag in table["flags"]} == {"", SOFT}


# --- real images -----------------------------------------------------------------------------

SIGMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def real_planes(folder: Path) -> dict[str, list[np.ndarray]]:
    """Real images by set: in one set, as on one plate, focus is comparable."""
    paths = sorted((folder / "nuclei_dsb2018").rglob("*.png"))[:8]
    sets = {f"dsb2018 {path.stem[:8]}": [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)] for path in paths}
    for dye in ("DAPI", "GFP", "RFP"):
        found = [path for path in sorted((folder / "cellpainting_nf1").rglob("*.tif*")) if dye in path.name]
        planes = [tifffile.imread(path) for path in found if "images" in str(path.parent)]
        sets[f"cell painting {dye}"] = [plane for plane in planes if plane.dtype == np.uint16]
    movie_planes = [tifffile.imread(path) for path in sorted((folder / "mitocheck_movie").rglob("*.tif*"))]
    sets["mitocheck"] = [plane for plane in movie_planes if plane.shape == (190, 211)][::6]
    sets["nuclei_tracks"] = list(tifffile.imread(folder / "nuclei_tracks" / "example_images.tif"))[::2]
    assert all(sets.values())
    return sets


def focus(plane: np.ndarray) -> float:
    return float(quality.measure(plane[None, None])["focus"].item())


def test_focus_of_real_images_falls_with_every_blur(real_data: Path) -> None:
    for name, planes in real_planes(real_data).items():
        for plane in planes:
            blurs = [cv2.GaussianBlur(plane.astype(np.float32), (0, 0), s) if s else plane for s in SIGMAS]
            falling = np.array([focus(blur) for blur in blurs])
            assert (np.diff(falling) < 0).all(), name
            # A blur of 3 px costs more than half, which is more than neighbours may differ by.
            assert falling[SIGMAS.index(3.0)] < 0.5 * falling[0], name


def test_focus_of_real_images_keeps_to_intensity_noise_and_number_of_cells(real_data: Path) -> None:
    rng = np.random.default_rng(0)
    sets = real_planes(real_data)
    for dye in ("DAPI", "GFP", "RFP"):
        plane = sets[f"cell painting {dye}"][0].astype(np.float32)
        sharp = focus(plane)
        assert focus(plane * 0.1 + 500) == pytest.approx(sharp, rel=0.02)
        # From thousands of photons a pixel to a hundred; the sharp image stays apart from the soft one.
        light = (plane - np.percentile(plane, 5)).clip(0) / np.percentile(plane, 99.5)
        soft = cv2.GaussianBlur(light, (0, 0), 3)
        for photons in (1000, 100):
            dim, dim_soft = (rng.poisson(image * photons + 20).astype(np.uint16) for image in (light, soft))
            assert focus(dim) == pytest.approx(sharp, rel=0.15)
            assert focus(dim_soft) < 0.5 * focus(dim)
        # A quarter of the field's cells, on its background with its noise.
        few = plane.copy()
        quarter = plane.shape[1] // 4
        noise = np.sqrt(quality._noise_variance(plane))
        few[:, quarter:] = rng.normal(np.percentile(plane, 5), noise, few[:, quarter:].shape)
        assert focus(few) == pytest.approx(sharp, rel=0.45)


def test_what_is_all_noise_has_no_focus() -> None:
    rng = np.random.default_rng(0)
    for level in (20, 100, 5000):
        assert np.isnan(focus(rng.poisson(level, (256, 256)).astype(np.uint16)))


def test_a_soft_frame_of_a_real_movie_is_flagged_and_no_other(real_data: Path) -> None:
    paths = sorted((real_data / "mitocheck_movie").rglob("*.tif*"))
    planes = [plane for plane in map(tifffile.imread, paths) if plane.shape == (190, 211)]
    stack = np.stack(planes)[:, None]
    assert flags(stack) == []
    stack[12, 0] = cv2.GaussianBlur(stack[12, 0], (0, 0), 2.5)
    assert flags(stack) == [12]


def test_a_soft_site_of_a_real_plate_is_flagged_and_no_other(real_data: Path) -> None:
    channels = [real_planes(real_data)[f"cell painting {dye}"] for dye in ("DAPI", "GFP", "RFP")]
    sites = [np.stack(planes)[None] for planes in zip(*channels, strict=True)]
    plate = quality.typical(pd.concat([quality.measure(site) for site in sites]))
    for site in sites:
        assert flags(site, plate) == []
        soft = np.stack([cv2.GaussianBlur(plane, (0, 0), 3) for plane in site[0]])[None]
        assert reasons(judge(soft, plate), 0) == [SOFT] * 3


def test_a_fibre_on_a_real_plate_is_flagged_and_no_other(real_data: Path) -> None:
    """At a tenth of the exposure: as they are, the images reach up to the camera's ceiling, and nothing is brighter."""
    planes = [plane // 10 for plane in real_planes(real_data)["cell painting DAPI"]]
    sites = [plane[None, None] for plane in planes]
    plate = quality.typical(pd.concat([quality.measure(site) for site in sites]))
    for site in sites:
        assert flags(site, plate) == []
        fibre = np.zeros(site.shape[2:], np.float32)
        cv2.polylines(fibre, [np.array([[100, 100], [500, 400], [900, 350], [1100, 700]])], False, 60_000, 15)
        dirty = (site + cv2.GaussianBlur(fibre, (0, 0), 5)).clip(0, 65535).astype(np.uint16)
        assert DEBRIS in reasons(judge(dirty, plate), 0)[0]
