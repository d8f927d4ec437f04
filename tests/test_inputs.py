from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from pipelines.cluster import check_room
from pipelines.config import ConfigError, InputsConfig, RunConfig, parse
from pipelines.inputs import Inputs, open_inputs
from pipelines.run import _units, run
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.plate import create_well, list_wells
from storage_schemas.screen import Manifest, Screen, Stage, StageRecord
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, open_table, write_table

BLANK = {"0": np.zeros((1, 1, 4, 4), np.uint16)}


def write_plate(folder: Path, name: str, wells: Sequence[str]) -> None:
    for well in wells:
        create_well(str(folder), well, BLANK, ["dna"])
    list_wells(str(folder), name, wells)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two plates of two wells, with their tables."""
    for name in ("p1", "p2"):
        write_plate(tmp_path / "plates" / f"{name}.zarr", name, ["A01", "B02"])
    rows = [
        {"plate": plate, "well": well, "compound": compound, "role": role}
        for plate in ("p1", "p2")
        for well, compound, role in (("A01", "DMSO", "negative_control"), ("B02", "FCCP", "treatment"))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "plate_map.csv", index=False)
    pd.DataFrame({"compound": ["DMSO", "FCCP"], "moa": [None, "uncoupler"]}).to_csv(
        tmp_path / "compounds.csv", index=False
    )
    return tmp_path


def opened(folder: Path, **settings: str | None) -> Inputs:
    return open_inputs(
        InputsConfig.model_validate(
            {
                "plates": [f"{folder}/plates/*.zarr"],
                "plate_map": f"{folder}/plate_map.csv",
                "compounds": f"{folder}/compounds.csv",
                **settings,
            }
        )
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def message(folder: Path, **settings: str | None) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, **settings)
    return str(caught.value)


def test_inputs_that_fit(folder: Path) -> None:
    inputs = opened(folder)
    assert list(inputs.plates) == ["p1", "p2"]
    assert inputs.wells == [WellKey(plate, well) for plate in ("p1", "p2") for well in ("A01", "B02")]
    assert inputs.compounds["compound"].tolist() == ["DMSO", "FCCP"]
    assert inputs.notes == ()


def test_without_a_table_of_compounds_each_is_known_by_its_id(folder: Path) -> None:
    inputs = opened(folder, compounds=None)
    assert inputs.compounds["compound"].tolist() == inputs.compounds["name"].tolist() == ["DMSO", "FCCP"]
    assert inputs.compounds["moa"].isna().all()


def test_plates_can_be_named_one_by_one(folder: Path) -> None:
    config = InputsConfig(
        plates=(f"{folder}/plates/p2.zarr", f"{folder}/plates/p1.zarr/"), plate_map=f"{folder}/plate_map.csv"
    )
    assert set(open_inputs(config).plates) == {"p1", "p2"}


def test_missing_plate_map(folder: Path) -> None:
    (folder / "plate_map.csv").unlink()
    assert message(folder) == f"{folder}/plate_map.csv: no such file"


def test_missing_table_of_compounds(folder: Path) -> None:
    (folder / "compounds.csv").unlink()
    assert message(folder) == f"{folder}/compounds.csv: no such file"


def test_pattern_that_matches_no_plate(folder: Path) -> None:
    config = InputsConfig(plates=(f"{folder}/plates/x*.zarr",), plate_map=f"{folder}/plate_map.csv")
    with pytest.raises(InputError, match=re.escape(f"{folder}/plates/x*.zarr: no plate matches")):
        open_inputs(config)


def test_plate_that_is_not_there(folder: Path) -> None:
    config = InputsConfig(plates=(f"{folder}/plates/p3.zarr",), plate_map=f"{folder}/plate_map.csv")
    with pytest.raises(InputError, match=re.escape(f"{folder}/plates/p3.zarr: ")):
        open_inputs(config)


def test_two_plates_of_one_name(folder: Path) -> None:
    write_plate(folder / "plates" / "copy.zarr", "p1", ["A01"])
    said = message(folder)
    assert "two plates are called 'p1'" in said
    assert f"{folder}/plates/copy.zarr" in said
    assert f"{folder}/plates/p1.zarr" in said
    assert "rename one" in said


def test_well_with_images_that_the_plate_map_lacks(folder: Path) -> None:
    edit(folder / "plate_map.csv", "p2,B02,FCCP,treatment\n", "")
    said = message(folder)
    assert said.startswith(f"1 well(s) with images are not in the plate map {folder}/plate_map.csv: p2/B02")
    assert "--set inputs.unmapped_wells=skip" in said
    inputs = opened(folder, unmapped_wells="skip")
    assert WellKey("p2", "B02") not in inputs.wells
    assert len(inputs.wells) == 3
    (note,) = inputs.notes
    assert "p2/B02; skipped" in note


def test_well_of_the_plate_map_without_images(folder: Path) -> None:
    with (folder / "plate_map.csv").open("a") as file:
        file.write("p2,C03,FCCP,treatment\n")
    said = message(folder)
    assert f"1 well(s) of the plate map {folder}/plate_map.csv are on none of the plates ['p1', 'p2']: p2/C03" in said
    assert "--set inputs.missing_wells=skip" in said
    inputs = opened(folder, missing_wells="skip")
    assert len(inputs.wells) == 4
    (note,) = inputs.notes
    assert "p2/C03; skipped" in note


def test_compound_on_no_plate(folder: Path) -> None:
    with (folder / "compounds.csv").open("a") as file:
        file.write("rotenone,respiratory chain inhibitor\n")
    said = message(folder)
    assert f"1 compound(s) of {folder}/compounds.csv are on no plate: rotenone" in said
    assert "--set inputs.unused_compounds=skip" in said
    inputs = opened(folder, unused_compounds="skip")
    assert inputs.compounds["compound"].tolist() == ["DMSO", "FCCP"]
    (note,) = inputs.notes
    assert "rotenone; skipped" in note


def test_compound_that_the_table_of_compounds_lacks(folder: Path) -> None:
    edit(folder / "compounds.csv", "FCCP", "CCCP")
    said = message(folder, unused_compounds="skip")
    assert said.startswith(f"{folder}/compounds.csv: compound(s) ['FCCP'] of the plate map are not in it")
    assert "add a row" in said


def test_compound_on_skipped_wells_only_counts_as_unused(folder: Path) -> None:
    with (folder / "plate_map.csv").open("a") as file:
        file.write("p2,C03,rotenone,treatment\n")
    with (folder / "compounds.csv").open("a") as file:
        file.write("rotenone,respiratory chain inhibitor\n")
    assert "rotenone" in message(folder, missing_wells="skip")
    inputs = opened(folder, missing_wells="skip", unused_compounds="skip")
    assert "rotenone" not in set(inputs.compounds["compound"])
    assert len(inputs.notes) == 2


def test_plate_map_of_other_plates(folder: Path) -> None:
    for plate in ("p1", "p2"):
        edit(folder / "plate_map.csv", f"{plate},", f"{plate}x,")
    assert "4 well(s) with images are not in the plate map" in message(folder)
    said = message(folder, unmapped_wells="skip", missing_wells="skip")
    assert "its plates are called ['p1x', 'p2x'], the images' ['p1', 'p2']" in said


def test_long_lists_are_cut_short(folder: Path) -> None:
    with (folder / "plate_map.csv").open("a") as file:
        file.writelines(f"p1,C{column:02d},FCCP,treatment\n" for column in range(1, 9))
    said = message(folder)
    assert said.startswith("8 well(s)")
    assert "p1/C05 and 3 more;" in said


def test_wells_spelt_otherwise_are_the_same_wells(folder: Path) -> None:
    edit(folder / "plate_map.csv", "p1,B02", "p1,b2")
    assert WellKey("p1", "B02") in opened(folder).wells


def configured(folder: Path, **settings: object) -> RunConfig:
    inputs = {
        "plates": [f"{folder}/plates/*.zarr"],
        "plate_map": f"{folder}/plate_map.csv",
        "compounds": f"{folder}/compounds.csv",
    }
    document = {"inputs": inputs, "segment": {"channels": {"nucleus": "dna"}}, **settings}
    return parse(document, "test")


# --- cells of another screen ---------------------------------------------------------------------


@pytest.fixture
def lender(folder: Path) -> Screen:
    """A screen of two wells whose cells are there, as far as its manifest and tables say."""
    screen = Screen(str(folder / "lender"))
    done = StageRecord(fingerprint="abc", done=True, output="def", counts={"wells": 2})
    screen.write_manifest(Manifest(software={}, config={}, inputs="", stages={"segment": done}))
    inputs = opened(folder)
    write_table(screen.plate_map, inputs.plate_map[inputs.plate_map["plate"] == "p1"], PLATE_MAP)
    write_table(screen.compounds, inputs.compounds, COMPOUNDS)
    return screen


@pytest.fixture
def taker(folder: Path, lender: Screen) -> Screen:
    """A screen that has taken the lender's cells."""
    taker = Screen(str(folder / "taker"))
    taker.write_manifest(lender.read_manifest().model_copy(update={"cells": lender.url}))
    for url, form in (("plate_map", PLATE_MAP), ("compounds", COMPOUNDS)):
        write_table(getattr(taker, url), open_table(getattr(lender, url), form), form)
    return taker


def test_cells_come_with_their_tables(lender: Screen) -> None:
    inputs = open_inputs(InputsConfig(cells=lender.url))
    assert (inputs.cells, inputs.plates, inputs.notes) == (lender, {}, ())
    assert inputs.wells == [WellKey("p1", "A01"), WellKey("p1", "B02")]
    assert inputs.plate_map_url == lender.plate_map
    assert inputs.compounds["compound"].tolist() == ["DMSO", "FCCP"]
    assert inputs.compounds["moa"].dropna().tolist() == ["uncoupler"]


def test_cells_can_be_told_apart_by_other_tables(folder: Path, lender: Screen) -> None:
    tables = {"plate_map": f"{folder}/plate_map.csv", "compounds": f"{folder}/compounds.csv"}
    said = message(folder, plates=None, cells=lender.url)
    assert said.startswith(f"2 well(s) of the plate map {tables['plate_map']} are on none of the plates ['p1']: p2/A01")
    edit(folder / "compounds.csv", "uncoupler", "protonophore")
    edit(folder / "plate_map.csv", "p1,A01,DMSO,negative_control\n", "")
    skip: dict[str, Literal["error", "skip"]] = {"missing_wells": "skip", "unused_compounds": "skip"}
    said = message(folder, plates=None, cells=lender.url, missing_wells="skip")
    assert said.startswith(f"1 well(s) with cells are not in the plate map {tables['plate_map']}: p1/A01")
    inputs = open_inputs(InputsConfig(cells=lender.url, **tables, **skip, unmapped_wells="skip"))
    assert inputs.wells == [WellKey("p1", "B02")]
    assert inputs.compounds["moa"].tolist() == ["protonophore"]
    assert len(inputs.notes) == 3


def test_cells_that_were_taken_are_taken_from_where_they_lie(lender: Screen, taker: Screen) -> None:
    inputs = open_inputs(InputsConfig(cells=taker.url))
    assert inputs.cells == lender
    assert inputs.plate_map_url == taker.plate_map
    # Whether they are done is theirs to say, not the taker's.
    undone = StageRecord(fingerprint="new", counts={"wells": 2})
    lender.write_manifest(lender.read_manifest().model_copy(update={"stages": {"segment": undone}}))
    with pytest.raises(InputError, match=re.escape(f"{lender.url}: its stage 'segment'") + ".* is not done"):
        open_inputs(InputsConfig(cells=taker.url))


def test_cells_are_not_taken_back_through_another_screen(lender: Screen, taker: Screen) -> None:
    before = lender.read_manifest()
    config = parse({"inputs": {"cells": taker.url}, "segment": None}, "test")
    for out in (lender.url, taker.url):
        with pytest.raises(ConfigError, match=f"^{out}: is the screen whose cells are taken"):
            run(config, out, (), update=True)
    assert lender.read_manifest() == before


def test_cells_that_are_not_there(folder: Path, lender: Screen) -> None:
    with pytest.raises(InputError, match=re.escape(f"{folder}/plates: is not a screen: it has no manifest.json")):
        open_inputs(InputsConfig(cells=f"{folder}/plates"))
    for record in (None, StageRecord(fingerprint="abc")):
        stages: dict[Stage, StageRecord] = {} if record is None else {"segment": record}
        lender.write_manifest(lender.read_manifest().model_copy(update={"stages": stages}))
        with pytest.raises(InputError, match=re.escape(f"{lender.url}: its stage 'segment'") + ".* is not done"):
            open_inputs(InputsConfig(cells=lender.url))


# --- settings that do not fit --------------------------------------------------------------------


def test_a_plate_without_mapped_wells_is_left_out(folder: Path) -> None:
    edit(folder / "plate_map.csv", "p2,A01,DMSO,negative_control\np2,B02,FCCP,treatment\n", "")
    inputs = opened(folder, unmapped_wells="skip")
    assert set(inputs.plates) == {"p1"}
    assert inputs.wells == [WellKey("p1", "A01"), WellKey("p1", "B02")]


def test_a_misspelt_mechanism_is_found_before_anything_is_written(folder: Path) -> None:
    config = configured(folder, evaluation={"contrasts": [["uncoupler", "uncopler"]]})
    with pytest.raises(InputError, match=r"has the MOA 'uncopler'; did you mean 'uncoupler'\?") as caught:
        run(config, str(folder / "screen"))
    assert caught.type is InputError  # and no wrong usage
    assert not (folder / "screen").exists()


def test_a_plate_without_controls_is_found_before_anything_is_written(folder: Path) -> None:
    edit(folder / "plate_map.csv", "p2,A01,DMSO,negative_control", "p2,A01,DMSO,treatment")
    with pytest.raises(InputError, match=r"plate\(s\) \['p2'\] have no well of the role negative_control") as caught:
        run(configured(folder), str(folder / "screen"))
    assert caught.type is InputError  # and no wrong usage
    assert not (folder / "screen").exists()


def test_more_than_the_machine_has_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    for setting, said in (
        ({"segment_cpus": 3}, "segment_cpus asks for 3 CPUs and there are 2"),
        ({"train_readers": 9}, "train_readers asks for 2.75 CPUs"),
        ({"train_gpus": 1}, "train_gpus asks for 1 GPUs and there are 0"),
        ({"embed_gpus": 0.5}, "embed_gpus asks for 0.5 GPUs"),
    ):
        with pytest.raises(InputError, match=said):
            check_room(configured(folder, resources=setting).resources)


def test_wells_that_were_not_segmented_are_none_of_embeds(folder: Path) -> None:
    config, screen = configured(folder), Screen(str(folder / "screen"))
    inputs = open_inputs(config.inputs)
    first, second = inputs.wells[:2]
    assert _units("segment", config, inputs, screen) == ({"wells": 4}, False)
    for well in (first, second):
        store.write_bytes(screen.cells(well), b"cells")
    store.write_bytes(screen.embeddings(first), b"embeddings")
    assert _units("embed", config, inputs, screen) == ({"wells": 2}, False)
    store.write_bytes(screen.embeddings(second), b"embeddings")
    assert _units("embed", config, inputs, screen) == ({"wells": 2}, True)
    assert _units("segment", config, inputs, screen) == ({"wells": 4}, False)
    assert _units("train", config, inputs, screen) == ({}, True)
