"""What the report of a screen on disk is made of: typical cells of each compound, and whatever else is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from indexed_screens import MOAS, write_screen
from made_up_clips import CELLS_OF_WELL, write_clips_of

from pipelines import report
from pipelines.inputs import well_keys
from pipelines.report import collect, read_example, write_report
from pipelines.vectors import EmbeddedCells
from storage_schemas.clips import read_clips
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import TrackKey, WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table, write_table


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    screen = write_screen(tmp_path_factory.mktemp("shown") / "screen")
    write_clips_of(screen)
    return screen


def plate_map(screen: Screen) -> pd.DataFrame:
    return open_table(screen.plate_map, PLATE_MAP).to_pandas()


def test_clips_are_those_of_the_medoid_and_its_nearest_cells(screen: Screen) -> None:
    maps = plate_map(screen)
    keys, embeddings = EmbeddedCells(screen, well_keys(maps)).read()
    cells = keys.merge(maps, on=["plate", "well"])
    shown = collect(screen).examples
    for compound in ("uncoupler-1", "DMSO"):
        own = np.flatnonzero(cells["compound"] == compound)
        unit = embeddings[own] / np.linalg.norm(embeddings[own], axis=1, keepdims=True)
        distance = np.array([[1 - float(a @ b) for b in unit] for a in unit])
        medoid = distance.sum(axis=1).argmin()
        typical = cells.iloc[own[np.argsort(distance[medoid], kind="stable")[:4]]]
        expected = [f"{row.plate}/{row.well}, site {row.site}, track {row.track}" for row in typical.itertuples()]
        found = [example for example in shown if example.compound == compound]
        assert [example.caption for example in found] == expected
        for example, row in zip(found, typical.itertuples(), strict=True):
            clip = read_clips(screen.clips(WellKey(row.plate, row.well)), [row.track - 1])[0]
            np.testing.assert_array_equal(example.clip, clip)
    assert shown[0].compound == "DMSO"
    assert len(shown) == 7 * 4


def test_many_compounds_share_the_clips_that_are_read(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_CLIPS", 15)
    compounds = pd.Series([example.compound for example in collect(screen).examples])
    assert (compounds.value_counts() == 2).all()
    monkeypatch.setattr(report, "_CLIPS", 3)
    shown = [example.compound for example in collect(screen).examples]
    assert shown == ["DMSO", "potassium-ionophore-1", "potassium-ionophore-2"]


def test_a_screen_is_collected_whole(screen: Screen) -> None:
    data = collect(screen, ["a note"])
    assert data.title == "screen"
    assert data.plate_maps["n_cells"].tolist() == [CELLS_OF_WELL] * len(data.plate_maps)
    assert set(data.retrieval["compound"]) == set(plate_map(screen)["compound"])
    assert (data.retrieval.groupby("compound").size() == 5).all()
    assert list(data.similarity.index) == sorted(MOAS)
    assert (np.diag(data.similarity) > data.similarity.to_numpy()[0, 1]).all(), "compounds of a mechanism act alike"
    assert len(data.embedding_map) == CELLS_OF_WELL * len(data.plate_maps)
    assert set(data.predictions["compound"]) == set(plate_map(screen)["compound"]) - {"DMSO"}
    assert "a note" in data.notes
    again = collect(screen, ["a note"])
    for part in dataclasses.fields(data):
        one, other = getattr(data, part.name), getattr(again, part.name)
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(one, other)


def test_profiles_without_cells_are_shown_well_by_well(tmp_path: Path) -> None:
    screen = write_screen(tmp_path / "profiles")
    for key in well_keys(plate_map(screen)):
        Path(screen.embeddings(key)).unlink()
    data = collect(screen)
    assert data.mapped == "well"
    assert len(data.embedding_map) == len(plate_map(screen))
    assert not data.examples
    assert not data.similarity.empty
    assert data.plate_maps["n_cells"].tolist() == [CELLS_OF_WELL] * len(data.plate_maps)


def test_without_mechanisms_none_is_predicted_but_damage_is_said(tmp_path: Path) -> None:
    screen = write_screen(tmp_path / "screen")
    for key in well_keys(plate_map(screen)):
        Path(screen.embeddings(key)).unlink()
    known = open_table(screen.compounds, COMPOUNDS).to_pandas()
    write_table(screen.compounds, known.assign(moa=None), COMPOUNDS)
    assert collect(screen).predictions.empty
    write_table(screen.compounds, known, COMPOUNDS)
    assert not collect(screen).predictions.empty
    Path(screen.predictions("compound", "parquet")).write_bytes(b"PAR1 damaged")
    with pytest.raises(SchemaError, match="predictions"):
        collect(screen)


def test_a_cell_that_is_not_there_has_no_clip(screen: Screen) -> None:
    assert read_example(screen, TrackKey("plate-1", "A02", "0", 3)).caption == "plate-1/A02, site 0, track 3"
    with pytest.raises(InputError, match="no clip"):
        read_example(screen, TrackKey("plate-1", "A02", "0", 999))


def test_the_command_writes_the_page_where_it_is_told(screen: Screen, tmp_path: Path, command: Command) -> None:
    done = command("report", screen.url)
    assert (done.code, done.out.strip()) == (0, screen.report)
    assert "uncoupler-1" in Path(screen.report).read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    assert command("report", screen.url, "--out", page).code == 0
    assert page.read_bytes() == Path(screen.report).read_bytes()
    missing = command("report", tmp_path / "nothing")
    assert missing.code == 1
    assert "is not a screen" in missing.err


def test_where_nothing_was_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="is not a screen"):
        write_report(str(tmp_path))
