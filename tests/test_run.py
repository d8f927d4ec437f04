from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import Command, FinishedRun
from runs import digests, times

from storage_schemas.clips import open_clips, read_clips
from storage_schemas.keys import WellKey
from storage_schemas.plate import create_well, list_wells, open_labels, open_plate
from storage_schemas.screen import STAGES, Screen
from storage_schemas.tables import CELLS, QUALITY, open_table

PER_WELL = ("cells", "quality", "clips")
# Written by every run, with the same bytes unless the configuration or the tables have changed.
WRITTEN_ANEW = {"manifest.json", "plate_map.parquet", "compounds.parquet"}

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def screen_copy(finished_screen: Path, tmp_path: Path) -> Path:
    """A finished screen to change."""
    return Path(shutil.copytree(finished_screen, tmp_path / "screen"))


@pytest.fixture
def plates_copy(small_screen: Path, tmp_path: Path) -> Path:
    """Simulated plates to damage."""
    return Path(shutil.copytree(small_screen, tmp_path / "plates", ignore=shutil.ignore_patterns("truth", "labels")))


def wells_of(screen: Screen) -> list[WellKey]:
    return sorted(screen.done_units("segment"))


def status_rows(command: Command, folder: Path) -> dict[str, dict[str, Any]]:
    done = command("status", folder, "--format", "json")
    assert done.code == 0
    return {row["stage"]: row for row in json.loads(done.out)}


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def site_chunks(plates: Path, well: WellKey) -> list[Path]:
    """The shards of a site at full resolution, one a frame."""
    folder = plates / "plates" / f"{well.plate}.zarr" / well.well[0] / well.well[1:] / "0" / "0" / "c"
    chunks = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(chunks) == 4
    return chunks


# --- a finished run --------------------------------------------------------------------------


def test_every_stage_is_reported_and_done(finished_run: FinishedRun, command: Command) -> None:
    assert finished_run.outcome.code == 0
    assert finished_run.outcome.out == f"{finished_run.folder}: done\n"
    for stage in STAGES:
        assert re.search(rf"^{stage}: .*\(\d+ s\)$", finished_run.outcome.err, re.M), stage
    rows = status_rows(command, finished_run.folder)
    assert list(rows) == list(STAGES)
    assert {row["state"] for row in rows.values()} == {"done"}
    for stage in ("segment", "embed"):
        assert (rows[stage]["done"], rows[stage]["failed"], rows[stage]["left"]) == (16, 0, 0)
    assert not half_written(finished_run.folder)


def test_evaluation_has_its_documented_form(finished_screen: Path) -> None:
    scores = json.loads((finished_screen / "evaluation.json").read_text())
    assert set(scores) == {"compound", "replicate"}
    for test in scores.values():
        assert test["n_queries"] > 0
        for metric in ("rank1", "rank5", "rank10", "map", "accuracy"):
            score = test[metric]
            assert set(score) == {"value", "low", "high", "chance"}
            assert all(0 <= score[name] <= 1 for name in score)
            assert score["low"] <= score["value"] <= score["high"]
        assert 0 < test["rank1"]["chance"] < 1


def test_report_is_one_page_of_this_screen(finished_screen: Path) -> None:
    page = (finished_screen / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "Simulated screen" in page
    for compound in ("uncoupler-1", "potassium-ionophore-3", "DMSO"):
        assert compound in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)


def test_no_cell_is_lost_on_the_way(finished_screen: Path, command: Command) -> None:
    screen = Screen(str(finished_screen))
    said = {
        name: int(count.replace(",", ""))
        for name, count in re.findall(
            r"(?:^|, )([^,\d]+?) ([\d,]*\d)(?=,|$)", status_rows(command, finished_screen)["segment"]["counts"]
        )
    }
    found: Counter[str] = Counter()
    for well in wells_of(screen):
        cells = open_table(screen.cells(well), CELLS).to_pandas()
        quality = open_table(screen.quality(well), QUALITY).to_pandas()
        clips = open_clips(screen.clips(well))
        kept = cells["excluded"] == ""
        # Every track either has a clip or a reason why not.
        assert cells.loc[kept, "clip"].tolist() == list(range(clips.shape[0]))
        assert cells.loc[~kept, "clip"].isna().all()
        found.update(
            {f"tracks excluded: {reason}": int(n) for reason, n in cells.loc[~kept, "excluded"].value_counts().items()}
        )
        found.update(tracks=len(cells), clips=clips.shape[0], objects=int(cells["n_frames"].sum()))
        found.update(frames=quality["frame"].nunique(), sites=quality["site"].nunique())
        # And every clip an embedding of its own.
        embedded = pd.read_parquet(screen.embeddings(well))
        assert embedded["track"].tolist() == cells.loc[kept, "track"].tolist()
        assert all(np.isfinite(vector).all() for vector in embedded["embedding"])
        # What is counted as an object is in the labels, and nothing else.
        plate = open_plate(str(finished_labels(screen, well)))
        nuclei = open_labels(plate.sites(well.well)["0"], "nuclei")
        assert sum(len(np.unique(frame)) - 1 for frame in nuclei) == cells["n_frames"].sum()
    assert {name: said[name] for name in found} == dict(found)
    assert found["tracks"] == found["clips"] + sum(n for name, n in found.items() if name.startswith("tracks excluded"))
    counted = screen.read_manifest().stages
    assert counted["embed"].counts["cells"] == counted["index"].counts["cells"] == found["clips"]


def finished_labels(screen: Screen, well: WellKey) -> Path:
    (pattern,) = screen.read_manifest().config["inputs"]["plates"]
    return Path(pattern).parent / f"{well.plate}.zarr"


def test_clips_show_cells(finished_screen: Path) -> None:
    screen = Screen(str(finished_screen))
    for well in wells_of(screen):
        clips = read_clips(screen.clips(well), slice(None))
        assert clips.shape[1:] == (3, 4, 32, 32)
        assert all(clip.max() > 0 for clip in clips)


# --- running again ---------------------------------------------------------------------------


def test_running_again_changes_nothing(
    small_screen: Path, screen_copy: Path, small_settings: list[str], command: Command
) -> None:
    before, written = digests(screen_copy, "."), times(screen_copy, ".")
    # As a writer leaves it that is killed before its rename.
    next(screen_copy.glob("cells/*")).joinpath(".A01.parquet.0123.partial").write_bytes(b"cut off")
    done = command("run", small_screen / "run.yaml", "--out", screen_copy, *small_settings)
    assert (done.code, done.out) == (0, f"{screen_copy}: done\n")
    assert done.err.splitlines() == [f"{stage}: done before" for stage in STAGES]
    assert digests(screen_copy, ".") == before
    now = times(screen_copy, ".")
    assert {name for name in now if now[name] != written[name]} <= WRITTEN_ANEW


def test_other_resources_are_the_same_run(
    small_screen: Path, screen_copy: Path, small_settings: list[str], command: Command
) -> None:
    others = ("--set", "resources.cpus=1", "--set", "resources.train_readers=2", "--set", "max_failed_share=0.1")
    done = command("run", small_screen / "run.yaml", "--out", screen_copy, *small_settings, *others)
    assert done.code == 0
    assert done.err.count("done before") == len(STAGES)


def test_another_configuration_is_refused_with_what_differs(
    small_screen: Path, screen_copy: Path, small_settings: list[str], command: Command
) -> None:
    before, written = digests(screen_copy, "."), times(screen_copy, ".")
    changed = ("--set", "train.epochs=3", "--set", "segment.nuclei.min_area=0.2")
    done = command("run", small_screen / "run.yaml", "--out", screen_copy, *small_settings, *changed)
    assert (done.code, done.out) == (2, "")
    assert f"error: {screen_copy}: holds a run of another configuration or other inputs:" in done.err
    assert "  train.epochs: 2 → 3\n" in done.err
    assert "  segment.nuclei.min_area: 0.14 → 0.2\n" in done.err
    assert "--update" in done.err
    assert (digests(screen_copy, "."), times(screen_copy, ".")) == (before, written)


def test_update_does_again_only_what_depends_on_the_change(
    small_screen: Path, screen_copy: Path, small_settings: list[str], command: Command
) -> None:
    untouched = (*PER_WELL, "calibration", "embeddings", "checkpoint", "train", "split.parquet", "evaluation.json")
    before, written = digests(screen_copy, *untouched), times(screen_copy, *untouched)
    profiles = digests(screen_copy, "profiles")
    changed = ("--set", "profiles.recipe.method=raw", "--update")
    done = command("run", small_screen / "run.yaml", "--out", screen_copy, *small_settings, *changed)
    assert done.code == 0
    redone = [stage for stage in STAGES if f"{stage}: done before" not in done.err]
    assert redone == ["index", "statistics", "report"]
    assert (digests(screen_copy, *untouched), times(screen_copy, *untouched)) == (before, written)
    now = digests(screen_copy, "profiles")
    assert now.keys() == profiles.keys()
    assert now["profiles/well.parquet"] != profiles["profiles/well.parquet"]
    manifest = Screen(str(screen_copy)).read_manifest()
    assert manifest.config["profiles"]["recipe"]["method"] == "raw"


def test_a_changed_title_is_a_new_report_of_the_same_results(
    small_screen: Path, screen_copy: Path, small_settings: list[str], command: Command
) -> None:
    results = (*PER_WELL, "embeddings", "profiles", "index", "evaluation.json")
    before = digests(screen_copy, *results)
    changed = ("--set", "title=Another <title>", "--update")
    done = command("run", small_screen / "run.yaml", "--out", screen_copy, *small_settings, *changed)
    assert done.code == 0
    assert [stage for stage in STAGES if f"{stage}: done before" not in done.err] == ["report"]
    assert digests(screen_copy, *results) == before
    assert "Another &lt;title&gt;" in (screen_copy / "report.html").read_text()


# --- the cells of another run ----------------------------------------------------------------


@pytest.fixture
def on_cells(small_screen: Path, finished_screen: Path, tmp_path: Path) -> Path:
    """The configuration of a run on the cells of the finished screen."""
    document = yaml.safe_load((small_screen / "run.yaml").read_text())
    del document["segment"]
    path = tmp_path / "cells.yaml"
    path.write_text(yaml.safe_dump({**document, "inputs": {"cells": str(finished_screen)}}))
    return path


@pytest.fixture
def training_settings(small_settings: list[str]) -> list[str]:
    """Those of the small run that are not of its segmentation."""
    pairs = zip(small_settings[::2], small_settings[1::2], strict=True)
    return [part for pair in pairs if not pair[1].startswith("segment.") for part in pair]


@pytest.mark.slow
def test_training_again_on_the_cells_of_a_run_finds_the_same(
    on_cells: Path, finished_screen: Path, tmp_path: Path, training_settings: list[str], command: Command
) -> None:
    before, written = digests(finished_screen, "."), times(finished_screen, ".")
    folder = tmp_path / "again"
    done = command("run", on_cells, "--out", folder, *training_settings)
    assert done.code == 0, done.err
    assert f"segment: the cells of {finished_screen} are taken" in done.err
    assert not any((folder / name).exists() for name in (*PER_WELL, "calibration"))
    assert (digests(finished_screen, "."), times(finished_screen, ".")) == (before, written)
    for name in ("evaluation.json", "split.parquet"):
        ours, theirs = (open_bytes(screen / name) for screen in (folder, finished_screen))
        assert ours == theirs, name
    theirs, ours = status_rows(command, finished_screen), status_rows(command, folder)
    assert ours["segment"] == theirs["segment"]
    assert (ours["embed"]["done"], ours["embed"]["left"]) == (16, 0)
    assert "cells of" in (folder / "report.html").read_text()

    done = command("run", on_cells, "--out", folder, *training_settings)
    assert (done.code, done.err.count("done before")) == (0, len(STAGES) - 1)


def open_bytes(path: Path) -> object:
    """What a file says, without the fingerprint that it carries."""
    return pd.read_parquet(path).to_csv() if path.suffix == ".parquet" else path.read_bytes()


def test_cells_are_not_taken_into_the_screen_that_they_are_of(
    on_cells: Path, screen_copy: Path, finished_screen: Path, training_settings: list[str], command: Command
) -> None:
    done = command("run", on_cells, "--out", finished_screen, *training_settings, "--update")
    assert (done.code, done.out) == (2, "")
    assert "is the screen whose cells are taken (inputs.cells); choose another folder for --out" in done.err
    # Nor are a run's own cells given up without being told to.
    before = digests(screen_copy, ".")
    done = command("run", on_cells, "--out", screen_copy, *training_settings)
    assert (done.code, done.out) == (2, "")
    assert "holds a run of another configuration" in done.err
    assert digests(screen_copy, ".") == before
    done = command("run", on_cells, "--out", screen_copy, *training_settings, "--update", "--stages", "segment")
    assert done.code == 0
    assert not any((screen_copy / name).exists() for name in (*PER_WELL, "calibration"))
    assert status_rows(command, screen_copy)["segment"] == status_rows(command, finished_screen)["segment"]


# --- where a run will not begin --------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(
    small_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    folder = tmp_path / "holidays"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"sea")
    done = command("run", small_screen / "run.yaml", "--out", folder, *small_settings)
    assert (done.code, done.out) == (2, "")
    assert f"{folder}: holds ['photo.jpg'] but no screen; choose a new or empty folder for --out" in done.err
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]


def test_a_stage_without_the_one_before_it(
    small_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    folder = tmp_path / "screen"
    done = command("run", small_screen / "run.yaml", "--out", folder, *small_settings, "--stages", "train")
    assert (done.code, done.out) == (1, "")
    assert "stage 'train' needs 'segment', which has not been done here" in done.err
    assert {path.name for path in folder.iterdir()} == WRITTEN_ANEW


def test_a_channel_that_does_not_exist(
    small_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    folder = tmp_path / "screen"
    for setting in ("channels.nucleus=dapi", "channels.cytoplasm=dapi", "channels.clips=[nucleus, dapi]"):
        changed = ("--set", f"segment.{setting}", "--update")
        done = command("run", small_screen / "run.yaml", "--out", folder, *small_settings, *changed)
        assert (done.code, done.out) == (1, "")
        assert "has no channel 'dapi'; its channels are ['nucleus', 'mitochondria', 'potential']" in done.err
        assert "segment.channels" in done.err
        assert {path.name for path in folder.iterdir()} == WRITTEN_ANEW


def test_ranges_for_another_number_of_channels(
    small_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    folder = tmp_path / "screen"
    scaling = ("--set", "segment.clips.scaling.method=fixed", "--set", "segment.clips.scaling.high=[900, 900]")
    done = command("run", small_screen / "run.yaml", "--out", folder, *small_settings, *scaling)
    assert (done.code, done.out) == (1, "")
    assert "segment.clips.scaling.high has 2 values for the 3 channels of the clips: give 1 or 3" in done.err
    assert {path.name for path in folder.iterdir()} == WRITTEN_ANEW


def test_a_plate_map_that_does_not_fit_leaves_nothing_behind(
    plates_copy: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    table = plates_copy / "plate_map.csv"
    table.write_text(table.read_text().replace("plate-2,", "plate-3,"))
    done = command("run", plates_copy / "run.yaml", "--out", tmp_path / "screen", *small_settings)
    assert (done.code, done.out) == (1, "")
    assert "8 well(s) with images are not in the plate map" in done.err
    assert not (tmp_path / "screen").exists()


# --- damaged plates --------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_wells_cost_themselves_and_a_repaired_screen_is_as_if_never_damaged(
    plates_copy: Path, finished_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    truncated, deleted, dropped = WellKey("plate-1", "A02"), WellKey("plate-1", "B01"), WellKey("plate-2", "A03")
    repair: dict[Path, bytes] = {}

    def damage(chunk: Path, kept: int | None) -> None:
        repair[chunk] = chunk.read_bytes()
        chunk.unlink() if kept is None else chunk.write_bytes(repair[chunk][:kept])

    damage(site_chunks(plates_copy, truncated)[2], 1000)
    for chunk in site_chunks(plates_copy, deleted):
        damage(chunk, None)
    damage(site_chunks(plates_copy, dropped)[1], None)
    # The first well of its plate, which the others are not to suffer for.
    unlisted = WellKey("plate-1", "A01")
    damage(plates_copy / "plates/plate-1.zarr/A/01/zarr.json", None)

    folder = tmp_path / "screen"
    arguments = ("run", plates_copy / "run.yaml", "--out", folder, *small_settings, "--stages", "segment")
    done = command(*arguments)
    assert done.code == 3
    assert done.out == f"{folder}: done; 3 site(s) or well(s) failed, see screening status {folder}\n"
    row = status_rows(command, folder)["segment"]
    assert (row["state"], row["done"], row["failed"], row["left"]) == ("done", 13, 3, 0)
    status = command("status", folder).out
    assert re.search(
        rf"failed in segment: {truncated}/0: unreadable: .*/A/02/0/0: cannot be read: a chunk is truncated", status
    )
    assert re.search(rf"failed in segment: {unlisted}: SchemaError: .*/A/01: is not a readable Zarr group", status)
    assert re.search(rf"failed in segment: {deleted}/0: blank: .*/B/01/0: each frame is one value \(0\)", status)

    # Nothing is there of what failed, and nothing half of anything.
    screen = Screen(str(folder))
    assert len(wells_of(screen)) == 13
    for well in (truncated, deleted, unlisted):
        assert not any(Path(url).exists() for url in (screen.cells(well), screen.quality(well), screen.clips(well)))
    assert not half_written(folder)
    # A lost frame is a bad frame, not a bad well.
    quality = open_table(screen.quality(dropped), QUALITY).to_pandas()
    assert quality.loc[quality["bad"], "frame"].unique().tolist() == [1]

    # The same again tries the failed ones and leaves the others alone.
    before = times(folder, *PER_WELL, "calibration")
    assert command(*arguments).code == 3
    assert times(folder, *PER_WELL, "calibration") == before

    # Fewer failures allowed: the run gives up, and says on what.
    done = command(*arguments, "--set", "max_failed_share=0.05")
    assert (done.code, done.out) == (1, "")
    assert re.search(
        r"segment: \d of 16 wells failed, wholly or in part, more than max_failed_share=0.05 allows", done.err
    )

    for chunk, content in repair.items():
        chunk.write_bytes(content)
    done = command(*arguments)
    assert done.code == 0
    row = status_rows(command, folder)["segment"]
    assert (row["done"], row["failed"], row["left"]) == (16, 0, 0)
    assert screen.failures("segment") == []

    # Wells that did not fail are not looked at again, so the lost frame stays lost; all else is as it should be.
    def others(files: dict[str, str]) -> dict[str, str]:
        return {name: digest for name, digest in files.items() if str(dropped) not in name}

    assert others(digests(folder, *PER_WELL)) == others(digests(finished_screen, *PER_WELL))
    assert digests(folder, "calibration") == digests(finished_screen, "calibration")


@pytest.fixture
def cell_free(tmp_path: Path) -> Path:
    """A configuration of a plate on which there is nothing but noise."""
    rng = np.random.default_rng(0)
    plate = tmp_path / "plates" / "empty.zarr"
    wells = ["A01", "A02", "A03"]
    for well in wells:
        create_well(str(plate), well, {"0": rng.poisson(100, (4, 1, 128, 128)).astype(np.uint16)}, ["dna"])
    list_wells(str(plate), "empty", wells)
    table = pd.DataFrame(
        {
            "plate": "empty",
            "well": wells,
            "compound": ["DMSO", "a", "b"],
            "role": ["negative_control", "treatment", "treatment"],
        }
    )
    table.to_csv(tmp_path / "plate_map.csv", index=False)
    document = {
        "inputs": {"plates": ["plates/*.zarr"], "plate_map": "plate_map.csv"},
        "segment": {"channels": {"nucleus": "dna"}, "clips": {"frames": 4, "size": 32}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_plate_without_cells(cell_free: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "screen"
    done = command("run", cell_free, "--out", folder)
    assert (done.code, done.out) == (1, "")
    assert re.search(
        r"error: segment: no clip in any of 3 wells: .*sites flagged: no cells 3; check segment.channels.nucleus",
        done.err,
    )
    rows = status_rows(command, folder)
    assert rows["segment"]["state"] == "begun"
    assert rows["train"]["state"] == "not begun"
    assert not half_written(folder)


def test_movies_too_short_for_the_clips(
    small_screen: Path, tmp_path: Path, small_settings: list[str], command: Command
) -> None:
    folder = tmp_path / "screen"
    done = command(
        "run", small_screen / "run.yaml", "--out", folder, *small_settings, "--set", "segment.clips.frames=5"
    )
    assert (done.code, done.out) == (1, "")
    assert "a movie of 4 frames is too short for clips of 5 frames" in done.err
    assert not (folder / "cells").exists()


def test_several_screens_run_one_after_the_other_and_none_stops_another(
    small_screen: Path,
    small_settings: list[str],
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", "plates")

    text = (small_screen / "run.yaml").read_text().replace("plates/", f"{small_screen}/plates/")
    for table in ("plate_map.csv", "compounds.csv"):
        text = text.replace(table, f"{small_screen}/{table}")
    for name, plate in (("first", "plate-1"), ("lost", "nowhere"), ("second", "plate-2")):
        config = yaml.safe_load(text)
        config["inputs"] |= {"plates": [f"{small_screen}/plates/{plate}.zarr"], "missing_wells": "skip"}
        config["inputs"]["unused_compounds"] = "skip"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    asked = [tmp_path / f"{name}.yaml" for name in ("first", "lost", "second")]
    done = command("run", *asked, "--out", tmp_path / "screens", "--stages", "segment", *small_settings)
    assert done.code == 1
    assert done.out.splitlines() == [f"{tmp_path}/screens/{name}: done" for name in ("first", "second")]
    assert f"{tmp_path}/screens/lost: {small_screen}/plates/nowhere.zarr" in done.err.replace("\n", "")
    for name, plate in (("first", "plate-1"), ("second", "plate-2")):
        done_units = Screen(f"{tmp_path}/screens/{name}").done_units("segment")
        assert {well.plate for well in done_units} == {plate}
        assert len(done_units) == 8
    monkeypatch.setattr("pipelines.run.run", refused)
    done = command("run", *asked[:2], "--out", tmp_path / "screens")
    assert done.code == 1
    assert done.err.count("Permission denied") == 2
    monkeypatch.undo()
    same = command("run", asked[0], asked[0], "--out", tmp_path / "screens")
    assert same.code == 2
    assert "two have the same name" in same.err
