"""Cells that are embedded as they are cut out, and whose clips are not kept, are embedded as if they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import Command
from runs import times

from storage_schemas.clips import open_clips, read_clips
from storage_schemas.keys import WellKey
from storage_schemas.plate import list_wells
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, open_table

SAMPLE = 3
# Rounding depends on which clips are embedded together, and with how many threads.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def settings(small_settings: list[str], finished_screen: Path) -> list[str]:
    return [*small_settings, "--set", f"network={finished_screen}/checkpoint", "--set", "segment.clips.store=sample"]


@pytest.fixture(scope="module")
def one_pass(
    small_screen: Path, settings: list[str], subprocess_command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A screen with the network of another, of the same plates, that keeps a few clips. Only to be read."""
    folder = tmp_path_factory.mktemp("one_pass") / "screen"
    done = subprocess_command(
        "run", small_screen / "run.yaml", "--out", folder, *settings, "--set", f"segment.clips.sample={SAMPLE}"
    )
    assert done.code == 0, done.err
    assert "was not trained here" in done.err
    return folder


def wells_of(screen: Path) -> list[WellKey]:
    return sorted(Screen(str(screen)).done_units("segment"))


@pytest.mark.slow
def test_embeddings_and_cells_are_those_of_two_passes(one_pass: Path, finished_screen: Path) -> None:
    assert wells_of(one_pass) == wells_of(finished_screen)
    ours, theirs = Screen(str(one_pass)), Screen(str(finished_screen))
    for well in wells_of(finished_screen):
        found, expected = (pq.read_table(screen.embeddings(well)) for screen in (ours, theirs))
        assert found.drop_columns("embedding").equals(expected.drop_columns("embedding"))
        a, b = (np.stack(table["embedding"].to_numpy()) for table in (found, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())
        mine, other = (open_table(screen.cells(well), CELLS).drop_columns("clip") for screen in (ours, theirs))
        pd.testing.assert_frame_equal(mine.to_pandas(), other.to_pandas(), check_exact=True)


@pytest.mark.slow
def test_so_many_clips_are_kept_and_they_are_the_right_ones(one_pass: Path, finished_screen: Path) -> None:
    ours, theirs = Screen(str(one_pass)), Screen(str(finished_screen))
    for well in wells_of(one_pass):
        kept, every = (open_table(screen.cells(well), CELLS, ["site", "track", "clip"]) for screen in (ours, theirs))
        kept = kept.filter(pc.is_valid(kept["clip"])).to_pandas()
        assert len(kept) == min(SAMPLE, int(every["clip"].is_valid().to_numpy().sum()))
        assert open_clips(ours.clips(well)).shape[0] == len(kept)
        both = kept.merge(every.to_pandas(), on=["site", "track"], suffixes=("", "_of_all"), validate="one_to_one")
        np.testing.assert_array_equal(
            read_clips(ours.clips(well), both["clip"].astype(int).tolist()),
            read_clips(theirs.clips(well), both["clip_of_all"].astype(int).tolist()),
        )


@pytest.mark.slow
def test_what_follows_is_made_as_ever(one_pass: Path, finished_screen: Path, subprocess_command: Command) -> None:
    profiles = [pd.read_parquet(screen / "profiles" / "compound.parquet") for screen in (one_pass, finished_screen)]
    assert profiles[0].drop(columns="profile").equals(profiles[1].drop(columns="profile"))
    a, b = (np.stack(table["profile"].to_list()) for table in profiles)
    np.testing.assert_allclose(a, b, atol=1e-2)
    assert (one_pass / "report.html").exists()
    compound = profiles[0]["compound"][0]
    found = subprocess_command("query", one_pass, "--compound", compound, "--format", "csv")
    assert found.code == 0, found.err
    counts = Screen(str(one_pass)).read_manifest().stages["embed"].counts
    assert counts == Screen(str(finished_screen)).read_manifest().stages["embed"].counts
    again = subprocess_command("report", one_pass)
    assert again.code == 0, again.err


@pytest.mark.slow
def test_wells_that_lack_one_of_both_are_done_again_and_no_others(
    one_pass: Path, small_screen: Path, settings: list[str], tmp_path: Path, subprocess_command: Command
) -> None:
    shutil.copytree(one_pass, tmp_path / "screen")
    one_pass = tmp_path / "screen"
    screen = Screen(str(one_pass))
    first, second = wells_of(one_pass)[:2]
    before = times(one_pass, "embeddings", "cells")
    tables = {well: pq.read_table(screen.embeddings(well)) for well in (first, second)}
    Path(screen.cells(first)).unlink()
    Path(screen.embeddings(second)).unlink()
    done = subprocess_command(
        "run",
        *(small_screen / "run.yaml", "--out", one_pass, *settings),
        *("--set", f"segment.clips.sample={SAMPLE}", "--stages", "segment,train,embed"),
    )
    assert done.code == 0, done.err
    after = times(one_pass, "embeddings", "cells")
    assert before.keys() == after.keys()
    again = {str(Path(name).relative_to(Path(name).parts[0])) for name in before if before[name] != after[name]}
    assert again == {f"{well}.parquet" for well in (first, second)}
    for well, table in tables.items():
        assert pq.read_table(screen.embeddings(well)).equals(table)


@pytest.mark.slow
def test_new_plates_join_an_index_without_a_clip_on_disk(
    small_screen: Path, finished_screen: Path, settings: list[str], tmp_path: Path, subprocess_command: Command
) -> None:
    shutil.copytree(small_screen / "plates" / "plate-1.zarr", tmp_path / "plates" / "new.zarr")
    plate_map = pd.read_csv(small_screen / "plate_map.csv").query("plate == 'plate-1'").assign(plate="new")
    plate_map.to_csv(tmp_path / "plate_map.csv", index=False)
    list_wells(f"{tmp_path}/plates/new.zarr", "new", sorted(plate_map["well"]))
    shutil.copy(small_screen / "compounds.csv", tmp_path)
    shutil.copy(small_screen / "run.yaml", tmp_path)
    shutil.copytree(finished_screen, tmp_path / "known")
    done = subprocess_command(
        *("run", tmp_path / "run.yaml", "--out", tmp_path / "fresh", *settings, "--set", "segment.clips.store=none")
    )
    assert done.code == 0, done.err
    fresh = Screen(str(tmp_path / "fresh"))
    assert all(open_clips(fresh.clips(well)).shape[0] == 0 for well in wells_of(tmp_path / "fresh"))

    added = subprocess_command("index", tmp_path / "known", "--add", tmp_path / "fresh")
    assert added.code == 0, added.err
    well = wells_of(tmp_path / "fresh")[0]
    asked = (
        "query",
        tmp_path / "known",
        "--well",
        f"plate-1/{well.well}",
        "--level",
        "well",
        "-k",
        1,
        "--format",
        "json",
    )
    found = subprocess_command(*asked)
    assert found.code == 0, found.err
    (nearest,) = json.loads(found.out)
    assert nearest["id"] == f"new/{well.well}", nearest


def test_clips_cannot_be_given_up_without_a_network(
    small_screen: Path, small_settings: list[str], tmp_path: Path, command: Command
) -> None:
    done = command(
        "run", small_screen / "run.yaml", "--out", tmp_path / "s", *small_settings, "--set", "segment.clips.store=none"
    )
    assert done.code == 2
    assert "segment.clips.store=none keeps no clips to train on: name a trained network" in done.err


@pytest.mark.slow
def test_cells_without_clips_are_not_trained_on(one_pass: Path, tmp_path: Path, command: Command) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"inputs: {{cells: {one_pass}}}\n", encoding="utf-8")
    done = command("run", config, "--out", tmp_path / "s")
    assert done.code == 1
    assert "has been run with segment.clips.store=sample: there are no clips to train on" in done.err


def test_network_of_other_channels_is_refused_before_the_work(
    small_screen: Path, settings: list[str], tmp_path: Path, command: Command
) -> None:
    done = command(
        *("run", small_screen / "run.yaml", "--out", tmp_path / "s", *settings),
        *("--set", "segment.clips.store=none", "--set", "segment.channels.clips=[nucleus]"),
    )
    assert done.code == 1
    assert "its clips have the channels ['nucleus'], and the network of" in done.err
    assert not (tmp_path / "s" / "cells").exists()
