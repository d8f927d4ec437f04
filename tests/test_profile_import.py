"""What columns mean by their names, and screens made of tables of profiles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command

from pipelines.adding import add, rebuild
from pipelines.import_profiles import ImportProfilesConfig, import_profiles, parse_meanings, reprocess
from pipelines.query import Searcher
from pipelines.status import stage_table
from pipelines.vectors import read_profiles
from screening.profile_import import NO_COMPOUND, interpret, settle
from screening.profiles import Align, Custom, Filter, ProfilesConfig, Raw, Robust, Standardised
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen
from storage_schemas.tables import FEATURES, open_table


def meaning(columns: str, numbers: str = "", **given: str) -> dict[str, str]:
    """What space-separated columns are taken for."""
    names = [name.replace("~", " ") for name in columns.split()]
    found = interpret(names, frozenset([*numbers.split(), "Cells_x"]), given)
    return {key: "+".join(columns) for key, columns in found.keys.items()}


def test_the_names_of_known_data_sets_are_understood() -> None:
    assert meaning(
        "Metadata_broad_sample Metadata_solvent Metadata_Plate Metadata_Well Metadata_pert_iname Metadata_pert_type "
        "Metadata_control_type Metadata_target_list Metadata_mmoles_per_liter Metadata_cell_line Metadata_Time Cells_x"
    ) == {
        "plate": "Metadata_Plate",
        "well": "Metadata_Well",
        "compound": "Metadata_pert_iname",
        "concentration": "Metadata_mmoles_per_liter",
        "target": "Metadata_target_list",
        "time": "Metadata_Time",
        "cell_line": "Metadata_cell_line",
    }
    assert meaning("Metadata_Source Metadata_Plate Metadata_Well Metadata_JCP2022 Metadata_Batch Cells_x") == {
        "plate": "Metadata_Plate",
        "well": "Metadata_Well",
        "compound": "Metadata_JCP2022",
        "batch": "Metadata_Batch",
    }
    lincs = meaning(
        "Metadata_broad_sample Metadata_Plate_Map_Name Metadata_Assay_Plate_Barcode Metadata_well_position "
        "Metadata_dose_recode Metadata_mmoles_per_liter Metadata_moa Metadata_target Cells_x"
    )
    assert lincs["plate"] == "Metadata_Assay_Plate_Barcode"
    assert lincs["well"] == "Metadata_well_position"
    assert lincs["concentration"] == "Metadata_mmoles_per_liter"
    assert (lincs["moa"], lincs["target"]) == ("Metadata_moa", "Metadata_target")
    assert meaning("plate well treatment dose_um f1 f2", "f1 f2 dose_um plate")["concentration"] == "dose_um"


def test_measurements_are_told_from_metadata() -> None:
    numbers = frozenset(["Cells_x", "Nuclei_y", "Image_Count_Cells", "score", "Metadata_Site"])
    columns = ["Metadata_Plate", "Metadata_Well", "compound", "Cells_x", "Cells_text", "Nuclei_y", "Image_Count_Cells"]
    found = interpret([*columns, "score", "Metadata_Site"], numbers, {})
    assert found.features == ("Cells_x", "Nuclei_y", "Image_Count_Cells")
    assert found.not_numbers == ("Cells_text",)
    assert set(found.further) == {"score", "Metadata_Site", "Cells_text"}
    assert interpret([*columns, "score"], numbers, {}, ["Nuc*", "score"]).features == ("Nuclei_y", "score")
    deep = interpret(["Metadata_Plate", "Metadata_Well", "Metadata_JCP2022", "0", "1"], frozenset("01"), {})
    assert deep.features == ("0", "1")
    with pytest.raises(InputError, match="2 column\\(s\\) do not hold numbers: compound, Cells_text"):
        interpret(columns, numbers, {}, ["comp*", "Cells_t*"])
    with pytest.raises(InputError, match="no column has such a name"):
        interpret(columns, numbers, {}, ["Mito*"])
    with pytest.raises(InputError, match="no measurements found among 3 columns"):
        interpret(columns[:3], numbers, {})


def test_what_is_not_found_is_answered_with_near_names() -> None:
    with pytest.raises(InputError, match=r"no column for well found.*--map well=COLUMN .*perhaps Metadata_WellRow"):
        meaning("Metadata_Plate Metadata_WellRow compound Cells_x")
    with pytest.raises(InputError, match="no column 'Metadata_plate'; did you mean 'Metadata_Plate'"):
        meaning("Metadata_Plate Metadata_Well compound Cells_x", plate="Metadata_plate")
    with pytest.raises(InputError, match=r"--map mao=…: unknown; did you mean moa\? There are plate, well"):
        meaning("Metadata_Plate Cells_x", mao="Metadata_Plate")
    assert parse_meanings(["plate=a+b,well=c", "moa=x, y"]) == {"plate": "a+b", "well": "c", "moa": "x, y"}
    with pytest.raises(InputError, match="expected KEY=COLUMN"):
        parse_meanings(["plate"])


KEYS = {"plate": ("p",), "well": ("w",), "compound": ("c",)}


def metadata(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"p": "1", "w": ["a1", "r02c03", "B12"], "c": ["DMSO", "x", None], **columns})


def test_wells_roles_and_doses_are_brought_into_form() -> None:
    frame = metadata(
        control_type=["negcon", "poscon_cp", None],
        dose=["", "2.5 uM", "10"],
        note=["01", "02", None],
        time=["24", "48", None],
        smiles=["C", "CC", None],
    )
    keys = {
        **KEYS,
        "concentration": ("dose",),
        "time": ("time",),
        "smiles": ("smiles",),
        "plate": ("p", "control_type"),
    }
    found = settle(frame.assign(control_type=["negcon", "poscon_cp", "x"]), keys)
    assert found.plate_map["plate"].tolist() == ["1_negcon", "1_poscon_cp"]
    found = settle(frame, keys | {"plate": ("p",)})
    assert found.kept.tolist() == [True, True, False]
    assert found.plate_map["well"].tolist() == ["A01", "B03"]
    assert found.plate_map["role"].tolist() == ["negative_control", "positive_control"]
    assert found.plate_map["concentration"].iloc[1] == 2.5
    assert found.plate_map["unit"].tolist() == [None, "uM"]
    assert found.further["time"].tolist() == [24, 48]
    assert found.further["note"].tolist() == ["01", "02"], "a leading zero is kept"
    assert found.compounds.set_index("compound")["smiles"].to_dict() == {"DMSO": "C", "x": "CC"}
    assert "1 of 3 rows name no compound and are left out" in " ".join(found.notes)


def test_the_title_of_a_column_tells_the_unit_of_each_dose() -> None:
    title = "Compound Concentration (microMolar)"
    found = settle(metadata(c=["DMSO", "x", "y"], **{title: ["", "2.5", "10"]}), {**KEYS, "concentration": (title,)})
    assert found.plate_map["unit"].tolist() == [None, "uM", "uM"]


def test_controls_are_found_by_what_is_there_or_as_told() -> None:
    assert settle(metadata(), KEYS).plate_map["role"].tolist() == ["negative_control", "treatment"]
    by_type = settle(metadata(pert_type=["trt", "trt", "control"]), KEYS)
    assert by_type.plate_map["compound"].tolist() == ["DMSO", "x", NO_COMPOUND]
    assert by_type.plate_map["role"].tolist() == ["treatment", "treatment", "negative_control"]
    told = settle(metadata(group=["a", "b", "c"]), KEYS, ["x", "group=c"])
    assert told.plate_map["role"].tolist() == ["treatment", "negative_control", "negative_control"]
    with pytest.raises(InputError, match="--control 'dmso': no such well; did you mean 'DMSO'"):
        settle(metadata(), KEYS, ["dmso"])


def test_wells_that_cannot_be_are_said() -> None:
    with pytest.raises(InputError, match=r"row 1: well .SAMPLE 1. is not a well name.*--map well=COLUMN"):
        settle(metadata(w=["sample 1", "A2", "A3"]), KEYS)
    with pytest.raises(InputError, match="1 of 3 wells have no plate in p"):
        settle(metadata(p=["1", None, "1"], c=["DMSO", "x", "y"]), KEYS)
    with pytest.raises(InputError, match=r"1 well\(s\) stand there more than once: 1/A01.*plate=BATCH\+PLATE"):
        settle(metadata(w=["A1", "A01", "A2"]), KEYS)
    with pytest.raises(InputError, match=r"row 3: well .SAMPLE 1. is not a well name"):
        settle(metadata(c=["DMSO", None, "x"], w=["A1", "A2", "sample 1"]), KEYS)
    with pytest.raises(InputError, match="column d: 1 values are no concentrations, such as 'high' in row 2"):
        settle(metadata(d=["1", "high", "2"]), {**KEYS, "concentration": ("d",)})


# --- whole imports -------------------------------------------------------------------------------


def profiles_table(plates: int = 3, seed: int = 0) -> pd.DataFrame:
    """Three compounds of two mechanisms on every plate at two doses, eight controls, and columns to be left out."""
    rng = np.random.default_rng(seed)
    effects = {"DMSO": np.zeros(6), "drug a": np.r_[4, np.zeros(5)], "drug b": np.r_[4, 1, np.zeros(4)]}
    effects["drug c"] = np.r_[np.zeros(4), 4, 4]
    rows = []
    for plate in range(plates):
        contents = [("DMSO", np.nan)] * 8 + [(c, d) for c in effects if c != "DMSO" for d in (1.0, 10.0)]
        for position, (compound, dose) in enumerate(contents):
            values = effects[compound] * (1 if dose == 10 else 0.7) + rng.normal(size=6) + plate * 10
            known = {"Metadata_Plate": f"P{plate}", "Metadata_Well": f"A{position + 1:02d}"}
            known |= {"Metadata_pert_iname": compound, "Metadata_dose": dose, "Metadata_Site_Count": 9}
            rows.append({**known, **{f"Cells_Feature_{i}": value for i, value in enumerate(values)}})
    frame = pd.DataFrame(rows)
    frame["Cells_Flat"] = 1.0
    frame["Nuclei_Gaps"] = np.where(frame.index % 2, np.nan, 1.0)
    frame["Cells_AreaShape_Center_X"] = rng.normal(size=len(frame))
    return frame


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    """Three plates in two files, of which one has a feature more, and a table of compounds."""
    frame = profiles_table()
    first = frame["Metadata_Plate"] == "P0"
    frame[first].assign(Cells_Only_Here=1.5).to_csv(tmp_path / "one.csv.gz", index=False)
    frame[~first].to_parquet(tmp_path / "two.parquet")
    named = {"drug a": "poison", "drug b": "poison", "drug c": "cure", "DMSO": "control vehicle", "else": "x"}
    known = {"pert_iname": list(named), "moa": list(named.values())}
    pd.DataFrame(known).to_csv(tmp_path / "compounds.csv", index=False)
    return [tmp_path / "one.csv.gz", tmp_path / "two.parquet", tmp_path / "compounds.csv"]


def test_tables_become_a_screen_that_is_asked_like_any_other(
    tables: list[Path], tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "screen"
    done = command("profiles", "import", *tables[:2], "--screen", out, "--compounds", tables[2])
    assert done.code == 0, done.err
    for text in (
        "Metadata_pert_iname",
        "guessed",
        "rows 42, rows left out 0, compounds 4, wells 42, treatments 7, features 9, features kept 6, features left",
        "negative controls: 24 wells, by column 'Metadata_pert_iname'",
        "1 feature(s) that are not in every table are left out",
        "3 of 9 features are left out: 1 by its name, 1 no variance, 1 not finite",
        "names 4 of 4 compounds by 'pert_iname': moa from 'moa'; 1 of its rows are of others",
    ):
        assert text in done.out, text
    screen = Screen.open(str(out))
    wells, raw = read_profiles(screen, processed=False)
    frame = profiles_table()
    features = [name for name in frame if name.startswith(("Cells_", "Nuclei_"))]
    assert open_table(screen.profiles("features"), FEATURES)["feature"].to_pylist() == features
    np.testing.assert_array_equal(raw, frame[features].to_numpy(np.float32))
    assert wells["Metadata_Site_Count"].tolist() == [9] * 42
    metadata, processed = read_profiles(screen)
    controls = processed[(metadata["role"] == "negative_control").to_numpy()]
    np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-5)
    treatments, of_treatment = read_profiles(screen, "treatment")
    assert treatments["n_wells"].tolist() == [24, 3, 3, 3, 3, 3, 3]
    assert treatments["moa"].fillna("").tolist() == ["", *["poison"] * 4, *["cure"] * 2]
    own = (metadata["compound"] == "drug c") & (metadata["concentration"] == 10)
    np.testing.assert_allclose(of_treatment[-1], processed[own.to_numpy()].mean(axis=0), rtol=1e-5)
    assert Searcher(str(out)).query(compound="drug a", k=1)["compound"].tolist() == ["drug b"]
    state = stage_table(screen).set_index("stage")
    assert set(state.index) == {"index", "statistics", "report"}
    assert state.loc["index", "state"] == "done"
    assert "features left out 3" in state.loc["index", "counts"]


def test_a_column_may_be_one_of_the_table_of_compounds(tables: list[Path], tmp_path: Path) -> None:
    known = pd.read_csv(tables[2]).rename(columns={"moa": "what it does"})
    known.to_csv(tables[2], index=False)
    config = ImportProfilesConfig(
        tables=(str(tables[0]),), columns={"moa": "what it does"}, compounds=str(tables[2]), profiles=ProfilesConfig()
    )
    import_profiles(str(tmp_path / "screen"), config)
    wells = read_profiles(Screen(str(tmp_path / "screen")))[0]
    assert set(wells["moa"].dropna()) == {"poison", "cure"}
    with pytest.raises(InputError, match="there is no column 'what it does'"):
        import_profiles(str(tmp_path / "other"), config.model_copy(update={"compounds": None}))


def test_another_recipe_starts_from_what_was_imported(tables: list[Path], tmp_path: Path, command: Command) -> None:
    out = str(tmp_path / "screen")
    config = ImportProfilesConfig(tables=tuple(map(str, tables[:2])))
    import_profiles(out, config)
    before = read_profiles(Screen(out))[1]
    with pytest.raises(InputError, match=r"holds imported profiles; .*--update"):
        import_profiles(out, config)
    done = command("profiles", "process", out, "--recipe", "raw", "--consensus", "modz")
    assert done.code == 0, done.err
    now = read_profiles(Screen(out))[1]
    assert (before.shape, now.shape) == ((42, 6), (42, 7)), "raw keeps where cells lie"
    kept = Screen.open(out).read_manifest()
    assert kept.config["profiles_import"]["profiles"]["recipe"] == {"method": "raw"}
    assert kept.stages["index"].counts["rows"] == 42
    too_few = Custom(steps=(Filter(), Align(prior=0, regularisation=0, batch="well")))
    with pytest.raises(InputError, match="no negative control"):
        reprocess(out, ProfilesConfig(recipe=too_few))
    np.testing.assert_array_equal(read_profiles(Screen(out))[1], now)
    import_profiles(out, config, update=True)
    np.testing.assert_allclose(read_profiles(Screen(out))[1], before, rtol=1e-6)


def test_a_screen_that_cannot_be_replaced_stays(tables: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "screen"
    config = ImportProfilesConfig(tables=tuple(map(str, tables[:2])), compounds=str(tables[2]))
    import_profiles(str(out), config)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    alone = ProfilesConfig(recipe=Custom(steps=(Filter(), Align(prior=0, regularisation=0, batch="well"))))
    damaged = pd.concat([profiles_table(plates=1)] * 80, ignore_index=True).astype({"Cells_Feature_1": object})
    damaged["Metadata_Plate"] = [f"P{i // 14}" for i in range(len(damaged))]
    damaged.loc[1100, "Cells_Feature_1"] = "oops"
    damaged.to_csv(tmp_path / "damaged.csv", index=False)
    for change, said in (
        ({"profiles": alone}, "no negative control"),
        ({"tables": (str(tmp_path / "damaged.csv"),)}, "row 1,101 .*'oops' is no number"),
    ):
        with pytest.raises(InputError, match=said):
            import_profiles(str(out), config.model_copy(update=change), update=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # What a recipe may ask for is known beforehand, too.
    import_profiles(
        str(out),
        config.model_copy(
            update={"profiles": ProfilesConfig(recipe=Custom(steps=(Filter(), Align(reference="plate"))))}
        ),
        update=True,
    )
    assert Searcher(str(out)).query(compound="drug a", k=1)["rank"].tolist() == [1]


def test_plates_that_were_added_follow_another_recipe_too(tmp_path: Path) -> None:
    frame = profiles_table()
    last = frame["Metadata_Plate"] == "P2"
    for name, own in (("screen", ~last), ("other", last)):
        frame[own].to_csv(tmp_path / f"{name}.csv", index=False)
        import_profiles(str(tmp_path / name), ImportProfilesConfig(tables=(str(tmp_path / f"{name}.csv"),)))
    screen, raw = str(tmp_path / "screen"), ProfilesConfig(recipe=Raw())
    add(screen, str(tmp_path / "other"))
    reprocess(screen, raw)
    tables = tuple(str(tmp_path / f"{name}.csv") for name in ("screen", "other"))
    import_profiles(str(tmp_path / "both"), ImportProfilesConfig(tables=tables, profiles=raw))
    expected = Searcher(str(tmp_path / "both"))
    for again in (False, True):
        if again:
            rebuild(screen)
        found = Searcher(screen)
        assert found.ids("well")["id"].tolist() == expected.ids("well")["id"].tolist()
        for level in found.levels:
            np.testing.assert_array_equal(found.index(level).vectors, expected.index(level).vectors)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("Metadata_Well", "sample", "row 3 of {}: well 'SAMPLE' is not a well name"),
        ("Metadata_Plate", None, r"1 of 42 wells have no plate in Metadata_Plate (the first is row 3 of {})"),
        ("Metadata_dose", "high", "no concentrations, such as 'high' in row 3 of {}"),
    ],
)
def test_a_row_is_named_by_its_place_in_its_own_table(
    tmp_path: Path, column: str, value: str | None, message: str
) -> None:
    frame = profiles_table().astype({column: object})
    paths = [tmp_path / f"{plate}.csv" for plate in ("P0", "P1", "P2")]
    for path in paths:
        own = frame[frame["Metadata_Plate"] == path.stem].reset_index(drop=True)
        if path.stem == "P1":
            own.loc[2, column] = value
        own.to_csv(path, index=False)
    config = ImportProfilesConfig(tables=tuple(map(str, paths)), columns={"concentration": "Metadata_dose"})
    with pytest.raises(InputError, match=re.escape(message.format(paths[1]))):
        import_profiles(str(tmp_path / "screen"), config)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"Metadata_pert_iname": "drug"},
            [],
            r"3 of 3 plates have no negative control.*--control COMPOUND.*\['drug'\]",
        ),
        ({"Metadata_Well": "A01"}, [], "3 well.s. stand there more than once"),
        ({}, ["--control", "DMS"], "--control 'DMS': no such well; did you mean 'DMSO'"),
        ({}, ["--map", "moa=Metadata_mode"], "there is no column 'Metadata_mode'; did you mean"),
        ({}, ["--recipe", "sphere"], "--recipe 'sphere': unknown; did you mean sphered"),
        ({}, ["--recipe", "{method: sphered, regularization: 1}"], "Extra inputs are not permitted"),
        ({}, ["--features", "Metadata_pert*"], "do not hold numbers: Metadata_pert_iname"),
        ({"Cells_Feature_1": "text"}, ["--features", "Cells*"], "do not hold numbers: Cells_Feature_1"),
    ],
)
def test_bad_tables_are_refused_and_leave_no_screen(
    change: dict[str, str], options: list[str], message: str, tmp_path: Path, command: Command
) -> None:
    profiles_table().assign(**change).to_csv(tmp_path / "t.csv", index=False)
    done = command("profiles", "import", tmp_path / "t.csv", "--screen", tmp_path / "screen", *options)
    assert done.code == 1
    assert pd.Series([done.err.replace("\n", " ")]).str.contains(message).all(), done.err
    assert not (tmp_path / "screen" / "manifest.json").exists()


def test_a_column_that_holds_text_further_down_leaves_no_screen(tmp_path: Path) -> None:
    frame = pd.concat([profiles_table(plates=1)] * 80, ignore_index=True).astype({"Cells_Feature_1": object})
    frame["Metadata_Plate"] = [f"P{i // 14}" for i in range(len(frame))]
    frame.loc[1100, "Cells_Feature_1"] = "oops"
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=r"column 'Cells_Feature_1', row 1,101 .*: 'oops' is no number"):
        import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),)))
    assert not (tmp_path / "screen").exists()


@pytest.mark.parametrize("row", [4, 1100])
def test_marks_of_missing_values_cost_no_feature_wherever_they_stand(row: int, tmp_path: Path) -> None:
    frame = pd.concat([profiles_table(plates=1)] * 80, ignore_index=True).astype({"Cells_Feature_1": object})
    frame["Metadata_Plate"] = [f"P{i // 14}" for i in range(len(frame))]
    frame.loc[row, "Cells_Feature_1"] = "#DIV/0!"
    frame["Cells_Words"], frame["Cells_Nothing"], frame["remark"] = "text", "#N/A", "fine"
    frame.to_csv(tmp_path / "t.csv", index=False)
    done = import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),)))
    assert (done.counts["features"], done.counts["features kept"]) == (9, 6)
    notes = " ".join(done.notes)
    assert "1 missing value(s) are the median of their plate" in notes
    assert "2 column(s) of " in notes
    assert "rather than numbers: Cells_Words, Cells_Nothing; they are no features" in notes
    wells, values = read_profiles(Screen(str(tmp_path / "screen")), processed=False)
    assert np.argwhere(np.isnan(values[:, :6])).tolist() == [[row, 1]]
    assert wells["remark"].tolist() == ["fine"] * len(frame)


def test_a_plain_column_with_one_word_is_an_error_and_not_metadata(tmp_path: Path) -> None:
    frame = profiles_table().drop(columns=["Cells_Flat", "Nuclei_Gaps", "Cells_AreaShape_Center_X"])
    frame.columns = [name.removeprefix("Metadata_").replace("Cells_Feature_", "f") for name in frame]
    frame = frame.astype({"f3": object})
    frame.loc[30, "f3"] = "abc"
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=r"t\.csv: column 'f3', row 31 .*'abc' is no number"):
        import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),)))


def test_a_feature_that_is_empty_in_one_table_is_missing_there(tmp_path: Path) -> None:
    frame = profiles_table()
    tables = []
    for plate, own in frame.groupby("Metadata_Plate"):
        tables.append(str(tmp_path / f"{plate}.csv"))
        own.assign(Cells_Flat=np.nan if plate == "P1" else 1.0).to_csv(tables[-1], index=False)
    done = import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=tuple(tables)))
    assert done.counts["features"] == 9
    assert "2 not finite" in " ".join(done.notes)


def test_a_failure_of_the_recipe_leaves_no_folder_but_one_that_was_there(tmp_path: Path) -> None:
    frame = profiles_table(plates=1)
    frame[frame["Metadata_pert_iname"].ne("DMSO") | (frame.index == 0)].to_csv(tmp_path / "t.csv", index=False)
    config = ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),))
    (tmp_path / "mine").mkdir()
    for name in ("screen", "mine"):
        with pytest.raises(InputError, match=r"two negative controls .* found 1.*reference: plate.*--recipe raw"):
            import_profiles(str(tmp_path / name), config)
    assert not (tmp_path / "screen").exists()
    assert not list((tmp_path / "mine").iterdir())


def test_a_class_by_the_name_that_the_import_has_replaced_is_told_its_key(tmp_path: Path, command: Command) -> None:
    profiles_table().assign(Metadata_kind="x").to_csv(tmp_path / "t.csv", index=False)
    columns = {"moa": "Metadata_kind"}
    import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),), columns=columns))
    done = command("profiles", "evaluate", tmp_path / "screen", "--recipe", "raw", "--class", "Metadata_kind")
    assert done.code == 1
    assert "the import took it for moa: --class moa" in done.err.replace("\n", " ")


def test_one_plate_and_single_wells_are_said(tmp_path: Path) -> None:
    frame = profiles_table(plates=1).drop_duplicates("Metadata_pert_iname", keep="last")
    more = profiles_table(plates=1).head(4)
    pd.concat([more, frame[frame["Metadata_pert_iname"] != "DMSO"]]).to_csv(tmp_path / "t.csv", index=False)
    config = ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),), profiles=ProfilesConfig(recipe=Standardised()))
    notes = " ".join(import_profiles(str(tmp_path / "screen"), config).notes)
    assert "3 of 3 compounds have one well: nothing says how well they reproduce" in notes
    assert "there is one plate: nothing can be looked up on another" in notes


def test_no_controls_are_needed_where_wells_are_compared_with_their_plate(tmp_path: Path) -> None:
    profiles_table().assign(Metadata_pert_iname="drug").to_csv(tmp_path / "t.csv", index=False)
    for number, recipe in enumerate((Raw(), Robust(reference="plate"))):
        config = ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),), profiles=ProfilesConfig(recipe=recipe))
        assert import_profiles(str(tmp_path / f"screen{number}"), config).counts["wells"] == 42


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "screen").mkdir()
    (tmp_path / "screen" / "thesis.txt").write_text("mine")
    profiles_table().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match="but no screen"):
        import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tmp_path / "t.csv"),)))
    assert json.dumps((tmp_path / "screen" / "thesis.txt").read_text()) == '"mine"'


def test_what_needs_a_network_says_that_there_is_none(tables: list[Path], tmp_path: Path, command: Command) -> None:
    import_profiles(str(tmp_path / "screen"), ImportProfilesConfig(tables=(str(tables[0]),)))
    for name in ("compare", "normalisation"):
        done = command(name, tmp_path / "screen")
        assert done.code == 1
        assert "was imported and not run" in done.err


_PEAK = """
import resource, sys
from pipelines.import_profiles import ImportProfilesConfig, import_profiles
import_profiles(sys.argv[1] + ".screen", ImportProfilesConfig(tables=(sys.argv[1],)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_grows_with_the_measurements_and_not_with_their_text(tmp_path: Path) -> None:
    """A CSV file takes some ten bytes a number, and a table of text in memory several times that."""
    rng = np.random.default_rng(0)
    peaks, n_features = [], 500
    for plates in (10, 50):
        for plate in range(plates):
            frame = pd.DataFrame(rng.normal(size=(384, n_features))).add_prefix("Cells_")
            frame.insert(0, "Metadata_Plate", f"P{plate}")
            frame.insert(1, "Metadata_Well", [f"{chr(65 + i // 24)}{i % 24 + 1:02d}" for i in range(384)])
            frame.insert(2, "compound", ["DMSO" if i % 8 == 0 else f"drug {i}" for i in range(384)])
            path = tmp_path / f"{plates}.csv"
            frame.to_csv(path, index=False, header=plate == 0, mode="a", float_format="%.6g")
        done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 5 * 4 * 40 * 384 * n_features
