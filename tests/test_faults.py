"""Faults of a plate on disk: each costs its site alone, is recorded with its reason, and leaves no trace once mended.

Truncated and missing images of instruments are met by `ingest`, before there is a plate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
import zarr
from conftest import Command
from runs import digests, times

from pipelines.config import load
from pipelines.inputs import open_inputs
from pipelines.report import bad_sites, read_quality
from pipelines.run import run
from screening.simulation import CHANNELS, SimulationConfig, simulate_site
from storage_schemas.clips import open_clips
from storage_schemas.keys import WellKey
from storage_schemas.plate import create_well, list_wells, open_plate
from storage_schemas.screen import Screen, StageRecord
from storage_schemas.tables import CELLS, QUALITY, open_table

PER_WELL = ("cells", "quality", "clips")
SEGMENTED = (*PER_WELL, "calibration")
SITES = ("0", "1")

pytestmark = pytest.mark.usefixtures("local_ray")


# --- faults ----------------------------------------------------------------------------------


def shards(site: Path) -> list[Path]:
    """The shards of a site at full resolution, one a frame."""
    return sorted(path for path in (site / "0" / "c").rglob("*") if path.is_file())


def pixels(site: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(site / "0", mode="r")[...])


def rewrite(site: Path, stack: np.ndarray, channels: tuple[str, ...] = CHANNELS) -> None:
    """Put other images in a site's place."""
    plate = site.parent / "rewritten.zarr"
    create_well(str(plate), "A01", {"0": stack}, channels)
    shutil.rmtree(site)
    shutil.move(plate / "A" / "01" / "0", site)
    shutil.rmtree(plate)


def truncate_a_shard(site: Path) -> None:
    shards(site)[1].write_bytes(shards(site)[1].read_bytes()[:1000])


def alter_a_chunk(site: Path) -> None:
    content = bytearray(shards(site)[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards(site)[1].write_bytes(content)


def break_the_metadata(site: Path) -> None:
    (site / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"ome": {}}}')


def delete_the_metadata(site: Path) -> None:
    (site / "zarr.json").unlink()


def remove_a_channel(site: Path) -> None:
    rewrite(site, pixels(site)[:, :2], CHANNELS[:2])


def drop_the_last_frame(site: Path) -> None:
    rewrite(site, pixels(site)[:-1])


def crop(site: Path) -> None:
    rewrite(site, pixels(site)[:, :, :150])


def zero(site: Path) -> None:
    rewrite(site, np.zeros_like(pixels(site)))


def delete_a_shard(site: Path) -> None:
    """Zarr reads what is not there as zeros, as it leaves out chunks of nothing but zeros when it writes."""
    shards(site)[1].unlink()


def empty(site: Path) -> None:
    """Light and noise, but no cells."""
    stack = pixels(site)
    level = np.median(stack, axis=(2, 3), keepdims=True)
    noise = np.random.default_rng(0).normal(0, 5, stack.shape)
    rewrite(site, (level + noise).astype(stack.dtype))


def lose_a_frame_to_nan(site: Path) -> None:
    zarr.open_array(site / "0", mode="r+")[1, 0] = np.nan


def lose_all_to_nan(site: Path) -> None:
    zarr.open_array(site / "0", mode="r+")[...] = np.nan


@dataclass(frozen=True)
class Fault:
    """What is done to a site, what is recorded of it and a part of what is said."""

    damage: Callable[[Path], None]
    recorded: str
    says: str = ""


# The plate, its well and its site that is damaged; one fault a well, so that each well has a site that is whole.
FAILED = {
    ("p", "A01", "0"): Fault(truncate_a_shard, "unreadable", "/A/01/0/0: cannot be read: a chunk is truncated"),
    ("p", "A02", "1"): Fault(alter_a_chunk, "unreadable", "/A/02/1/0: cannot be read: a chunk is truncated or corrupt"),
    ("p", "A03", "0"): Fault(break_the_metadata, "unreadable", "/A/03/0: is not an OME-Zarr image"),
    ("p", "A04", "1"): Fault(delete_the_metadata, "unreadable", "/A/04/1: is not a readable Zarr group"),
    ("p", "B01", "0"): Fault(remove_a_channel, "channels", "/B/01/0: has no channel ['potential']"),
    ("p", "B02", "1"): Fault(drop_the_last_frame, "frames", "/B/02/1: a movie of 3 frames is too short"),
    ("p", "B03", "0"): Fault(crop, "shape", "/B/03/0: is 150 × 192 px, the sites of its plate 192 × 192 px"),
    ("p", "B04", "1"): Fault(zero, "blank", "/B/04/1: each frame is one value (0)"),
}
# Both sites of a well: it has failed as a whole.
WHOLLY = {
    ("p", "C01", "0"): Fault(zero, "blank", "/C/01/0: each frame is one value (0)"),
    ("p", "C01", "1"): Fault(truncate_a_shard, "unreadable", "/C/01/1/0: cannot be read"),
}
# Of frames or whole sites that can be read, but show nothing.
FLAGGED = {
    ("p", "C02", "0"): Fault(delete_a_shard, "empty"),
    ("f", "A01", "0"): Fault(lose_a_frame_to_nan, "not finite"),
    ("p", "C03", "0"): Fault(empty, "no cells"),
    ("f", "A02", "1"): Fault(lose_all_to_nan, "not finite"),
}
UNTOUCHED = WellKey("p", "C04")


def folder_of(plates: Path, plate: str, well: str, site: str) -> Path:
    return plates / f"{plate}.zarr" / well[0] / well[1:] / site


def damage(plates: Path, faults: dict[tuple[str, str, str], Fault]) -> None:
    for key, fault in faults.items():
        fault.damage(folder_of(plates, *key))


def mend(plates: Path, whole: Path, faults: dict[tuple[str, str, str], Fault]) -> None:
    for key in faults:
        site = folder_of(plates, *key)
        shutil.rmtree(site)
        shutil.copytree(folder_of(whole, *key), site)


# --- plates and runs ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plate of 12 wells of two sites in 16 bit, one of two such wells in floating point, and how to run them."""
    folder = tmp_path_factory.mktemp("faults") / "plates"
    config = SimulationConfig(
        frames=4, height=192, width=192, cells_per_site=6, sites_per_well=2, out_of_focus_rate=0, debris_per_site=0
    )
    rows = []
    for plate, dtype, wells in (
        ("p", np.uint16, [f"{row}{column:02d}" for row in "ABC" for column in (1, 2, 3, 4)]),
        ("f", np.float32, ["A01", "A02"]),
    ):
        url = str(folder / f"{plate}.zarr")
        for well in wells:
            sites = {site: simulate_site(config, "plate-1", well, int(site)).stack.astype(dtype) for site in SITES}
            create_well(url, well, sites, CHANNELS)
            role = "negative_control" if well == "A01" else "treatment"
            rows.append({"plate": plate, "well": well, "compound": f"c-{well}", "role": role})
        list_wells(url, plate, wells)
    pd.DataFrame(rows).to_csv(folder / "plate_map.csv", index=False)
    document = {
        "inputs": {"plates": ["*.zarr"], "plate_map": "plate_map.csv"},
        "segment": {
            "channels": {"nucleus": "nucleus", "cytoplasm": "mitochondria"},
            "clips": {"frames": 4, "size": 32, "window": {"method": "fixed", "size": 64}},
            "labels": False,
        },
        "resources": {"cpus": 2, "object_store_mb": 100},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture
def plates(whole_plates: Path, tmp_path: Path) -> Path:
    """The same to damage."""
    return Path(shutil.copytree(whole_plates, tmp_path / "plates"))


@pytest.fixture(scope="session")
def calm(whole_plates: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plates come to if they are never damaged. Only to be read."""
    folder = tmp_path_factory.mktemp("calm") / "screen"
    assert run(load(str(whole_plates / "run.yaml")), str(folder), ("segment",)) == 0
    return folder


def record_of(folder: Path) -> StageRecord:
    return Screen(str(folder)).read_manifest().stages["segment"]


def check_conservation(folder: Path, plates: Path) -> None:
    """Count everything again, from the plates and the tables, and compare with the manifest."""
    screen, counts = Screen(str(folder)), record_of(folder).counts
    done = screen.done_units("segment")
    listed = {
        f"{name}/{well}/{site}"
        for name in ("p", "f")
        for plate in [open_plate(str(plates / f"{name}.zarr"))]
        for well in plate.well_paths
        for site in plate.sites(well)
    }
    quality = pd.concat([open_table(screen.quality(well), QUALITY).to_pandas() for well in done])
    cells = pd.concat([open_table(screen.cells(well), CELLS).to_pandas() for well in done])
    failed = [failure.unit for failure in screen.failures("segment")]
    known = (quality["plate"] + "/" + quality["well"] + "/" + quality["site"]).unique().tolist()
    assert sorted(known + failed) == sorted(listed)
    assert counts["sites"] == len(listed)
    flagged = quality.drop_duplicates(["plate", "well", "site"])["site_flag"].value_counts().to_dict()
    assert counts["sites done"] == flagged.pop("", 0)
    assert {n: c for n, c in counts.items() if n.startswith("sites flagged")} == {
        f"sites flagged: {flag}": count for flag, count in flagged.items()
    }
    assert sum(c for n, c in counts.items() if n.startswith("sites failed")) == len(failed)

    frames = quality.drop_duplicates(["plate", "well", "site", "frame"])
    assert counts["frames"] == len(frames)
    assert counts["frames flagged"] == frames["bad"].sum()
    assert counts["objects"] == frames["n_nuclei"].sum() == cells["n_frames"].sum()
    kept = cells["excluded"] == ""
    assert counts["objects in clips"] == cells.loc[kept, "n_frames"].sum()
    assert counts["clips"] == kept.sum()
    for reason, group in cells[~kept].groupby("excluded"):
        assert counts[f"tracks excluded: {reason}"] == len(group)
        assert counts[f"objects excluded: {reason}"] == group["n_frames"].sum()
    objects = sum(c for n, c in counts.items() if n.startswith("objects ") and n != "objects")
    assert counts["objects"] == objects > 0
    assert counts["tracks"] == counts["clips"] + sum(c for n, c in counts.items() if n.startswith("tracks excluded"))


# --- tests -----------------------------------------------------------------------------------


def test_a_plate_without_faults_is_all_done(calm: Path, whole_plates: Path) -> None:
    check_conservation(calm, whole_plates)
    counts = record_of(calm).counts
    assert (counts["wells"], counts["done"], counts["failed"]) == (14, 14, 0)
    assert counts["sites"] == counts["sites done"] == 28
    assert counts["frames flagged"] == 0


def test_every_fault_costs_its_site_and_a_mended_plate_is_as_if_never_broken(
    plates: Path, whole_plates: Path, calm: Path, tmp_path: Path, command: Command
) -> None:
    damage(plates, FAILED | WHOLLY | FLAGGED)
    folder = tmp_path / "screen"
    arguments = ("run", plates / "run.yaml", "--out", folder, "--stages", "segment")
    done = command(*arguments)
    assert done.code == 3, done.err
    screen = Screen(str(folder))

    # Each failed site is recorded, with its reason and where it lies, and no other.
    failures = {failure.unit: failure for failure in screen.failures("segment")}
    assert set(failures) == {"/".join(key) for key in FAILED | WHOLLY}
    for key, fault in (FAILED | WHOLLY).items():
        failure = failures["/".join(key)]
        assert (failure.kind, fault.says in failure.message) == (fault.recorded, True), failure
    status = command("status", folder).out
    for unit, failure in failures.items():
        assert f"failed in segment: {unit}: {failure.kind}: " in status

    # Wells are done without their failed sites; one without any site has failed and left nothing behind.
    wholly = WellKey("p", "C01")
    counts = record_of(folder).counts
    assert (counts["wells"], counts["done"], counts["failed"]) == (14, 13, 1)
    assert wholly not in screen.done_units("segment")
    assert not any(Path(url).exists() for url in (screen.quality(wholly), screen.clips(wholly)))
    for plate, well, site in FAILED:
        assert set(open_table(screen.quality(WellKey(plate, well)), QUALITY)["site"].to_pylist()) == {*SITES} - {site}
    check_conservation(folder, plates)
    by_reason = pd.Series([failure.kind for failure in failures.values()]).value_counts()
    assert {n: c for n, c in counts.items() if n.startswith("sites failed")} == {
        f"sites failed: {kind}": count for kind, count in by_reason.items()
    }

    # What can be read but shows nothing is flagged: frames, or the whole site.
    for (plate, well, site), fault in FLAGGED.items():
        quality = open_table(screen.quality(WellKey(plate, well)), QUALITY).to_pandas()
        quality = quality[quality["site"] == site]
        if fault.damage in (delete_a_shard, lose_a_frame_to_nan):
            assert quality.loc[quality["bad"], "frame"].unique().tolist() == [1]
            assert fault.recorded in quality.loc[quality["bad"], "flags"].tolist()
            assert set(quality["site_flag"]) == {""}
        else:
            assert set(quality["site_flag"]) == {fault.recorded}
    assert counts["sites flagged: no cells"] == counts["sites flagged: not finite"] == 1

    # The report lists both, the failed ones first.
    listed = bad_sites(screen, read_quality(open_inputs(load(str(plates / "run.yaml")).inputs).wells, screen))
    assert listed["site"].tolist()[: len(failures)] == list(failures)
    assert (listed["outcome"] == "failed").sum() == len(failures)
    shown = listed.set_index("site")[["outcome", "reason"]].apply(tuple, axis=1).to_dict()
    assert {"/".join(key): shown["/".join(key)] for key in FLAGGED} == {
        "p/C02/0": ("used", "empty"),
        "f/A01/0": ("used", "not finite"),
        "p/C03/0": ("no clips", "no cells"),
        "f/A02/1": ("no clips", "not finite"),
    }

    # The same again tries the failed ones, and changes nothing.
    before, written = digests(folder, *SEGMENTED, "failures"), times(folder, *SEGMENTED)
    output = record_of(folder).output
    assert command(*arguments).code == 3
    assert digests(folder, *SEGMENTED, "failures") == before
    assert times(folder, *SEGMENTED) == written
    assert (record_of(folder).counts, record_of(folder).output) == (counts, output)

    # Mended sites are noticed if they had failed; of the flagged ones the user says so, by removing their cells.
    mend(plates, whole_plates, FAILED | WHOLLY | FLAGGED)
    for plate, well, _ in FLAGGED:
        Path(screen.cells(WellKey(plate, well))).unlink()
    assert command(*arguments).code == 0
    assert screen.failures("segment") == []
    assert digests(folder, *SEGMENTED) == digests(calm, *SEGMENTED)
    assert record_of(folder).counts == record_of(calm).counts
    assert record_of(folder).output == record_of(calm).output != output


def test_a_mended_site_costs_its_well_alone(
    plates: Path, whole_plates: Path, calm: Path, tmp_path: Path, command: Command
) -> None:
    """Frame 1 is not of the sample that the plate is calibrated from: the calibration stays, and so do other wells."""
    faults = {key: fault for key, fault in FAILED.items() if fault.damage in (truncate_a_shard, alter_a_chunk)}
    damage(plates, faults)
    folder = tmp_path / "screen"
    arguments = ("run", plates / "run.yaml", "--out", folder, "--stages", "segment")
    assert command(*arguments).code == 3
    broken = record_of(folder).output
    written = times(folder, *SEGMENTED)

    # One of two is mended: the other well still lacks its site.
    mended, left = faults
    mend(plates, whole_plates, {mended: faults[mended]})
    assert command(*arguments).code == 3
    assert [failure.unit for failure in Screen(str(folder)).failures("segment")] == ["/".join(left)]
    now = times(folder, *SEGMENTED)
    assert now.keys() >= written.keys()
    assert {name.split("/")[2].split(".")[0] for name in written if now[name] != written[name]} == {mended[1]}
    # What comes after `segment` is made from this, and is done again.
    assert record_of(folder).output != broken

    mend(plates, whole_plates, {left: faults[left]})
    assert command(*arguments).code == 0
    assert digests(folder, *SEGMENTED) == digests(calm, *SEGMENTED)


def test_movies_of_different_length_share_a_well_where_they_need_not_be_alike(
    plates: Path, tmp_path: Path, command: Command
) -> None:
    drop_the_last_frame(folder_of(plates, "f", "A02", "1"))
    settings = (
        f"inputs.plates=[{plates / 'f.zarr'}]",
        "inputs.missing_wells=skip",
        "segment.alike=false",
        "segment.clips.frames=3",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    folder = tmp_path / "screen"
    done = command("run", plates / "run.yaml", "--out", folder, "--stages", "segment", *options)
    assert done.code == 0, done.err
    screen = Screen(str(folder))
    for well, lengths, frames in (("A01", {"0": 4, "1": 4}, [0, 2, 3]), ("A02", {"0": 4, "1": 3}, None)):
        cells = open_table(screen.cells(WellKey("f", well)), CELLS).to_pandas()
        found = cells.groupby("site")["centroid_y"].agg(lambda tracks: set(tracks.map(len)))
        assert found.to_dict() == {site: {length} for site, length in lengths.items()}
        clips = open_clips(screen.clips(WellKey("f", well)))
        assert clips.shape[0] == cells["clip"].notna().sum() > 0
        assert clips.attrs["screening"]["frames"] == frames


def test_flags_alone_are_no_failure(plates: Path, tmp_path: Path, command: Command) -> None:
    damage(plates, FLAGGED)
    folder = tmp_path / "screen"
    done = command("run", plates / "run.yaml", "--out", folder, "--stages", "segment")
    assert (done.code, done.out) == (0, f"{folder}: done\n")
    check_conservation(folder, plates)


@pytest.mark.slow
def test_too_many_failed_sites_stop_the_run(plates: Path, tmp_path: Path, command: Command) -> None:
    """Eight of 28 sites are a seventh of all, a well counting by the share of its sites that failed."""
    damage(plates, FAILED)
    arguments = ("run", plates / "run.yaml", "--out", tmp_path / "screen", "--stages", "segment", "--set")
    done = command(*arguments, "max_failed_share=0.25")
    assert done.code == 1
    assert "of 14 wells failed, wholly or in part, more than max_failed_share=0.25 allows" in done.err
    assert command(*arguments, "max_failed_share=0.3").code == 3
