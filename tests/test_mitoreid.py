from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import digests, times

from screening import mitoreid
from screening.mitoreid import Part, UnusableSequenceError, clip_of, parse, virtual_wells
from storage_schemas.clips import channel_names, open_clips, read_clips
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey, split_well
from storage_schemas.screen import STAGES, Manifest, Screen
from storage_schemas.tables import CELLS, COMPOUNDS, PLATE_MAP, SEQUENCES, SPLIT, open_table

FRAMES = 16

# --- names ---------------------------------------------------------------------------------------

drugs = st.integers(1, 1068).map(str) | st.just("dmso")
fields = st.builds(lambda name, repeat: name + repeat, drugs | st.just("ctrl"), st.sampled_from(["", "-2", "-13"]))
inside = st.sampled_from([part for part in get_args(Part) if part != "novel"])
places = st.tuples(st.sampled_from(["l1", "l2", "l3"]), inside) | st.just(("novel", "novel"))
cells = st.tuples(places, drugs, fields, st.integers(0, 10**6))


def folder_of(cell: tuple[tuple[str, str], str, str, int]) -> str:
    (plate, part), drug, field, number = cell
    above = plate if plate == part else f"{plate}/{part}"
    return f"{above}/{drug}/{field}_{number}"


@given(
    st.dictionaries(cells, st.sets(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=8),
    st.lists(st.sampled_from(["annotation.xlsx", "l1/train/5/5_0/1.png", "l1/train/5/5.avi", "l4x/train/1/1_0/1.jpg"])),
    st.randoms(use_true_random=False),
)
def test_names_say_what_they_were_made_of(
    made: dict[tuple[tuple[str, str], str, str, int], set[int]], others: list[str], random: object
) -> None:
    one_each = {(cell[0][0], *cell[1:]): cell for cell in made}.values()
    names = [f"{folder_of(cell)}/{frame}.jpg" for cell in one_each for frame in made[cell]] + others
    random.shuffle(names)  # type: ignore[attr-defined]
    found = parse(names)
    assert sorted(found.ignored) == sorted(others)
    rows = found.table.set_index("folder")
    assert sorted(rows.index) == sorted(map(folder_of, one_each))
    for cell in one_each:
        row = rows.loc[folder_of(cell)]
        assert ((row["plate"], row["part"]), row["drug"], row["field"], row["number"]) == cell
        assert row["frames"] == sorted(made[cell])


@given(st.lists(st.text("l1trainquerynovel0123456789-_./jpg\nä\u0663", max_size=30)))
def test_whatever_is_there_is_a_frame_or_ignored(names: list[str]) -> None:
    found = parse(["l1/train/dmso/dmso_0/1.jpg", *names])
    assert len(found.ignored) + found.table["frames"].map(len).sum() == len(names) + 1


def test_a_drug_s_folder_may_be_named_like_a_repeat() -> None:
    (row,) = parse(["l2/query/5-2/5-2_7/1.jpg"]).table.to_dict("records")
    assert (row["drug"], row["field"], row["number"]) == ("5", "5-2", 7)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Mito/l1/train/5/5_0/1.jpg"], "give its folder 'Mito/', which does"),
        (["train/5/5_0/1.jpg"], "give the folder that holds the experiments l1, l2 and l3"),
        (["5/5_0/1.jpg"], "give the folder that holds the experiments l1, l2 and l3"),
        (["5/5_1_w2.tif", "x"], "its 2 file(s) are named like '5/5_1_w2.tif'"),
        ([], "it is empty"),
    ],
)
def test_another_folder_is_told_from_the_right_one(names: list[str], said: str) -> None:
    with pytest.raises(
        InputError, match=re.escape(f"holds no single-cell images such as l1/train/5/5_0/1.jpg; {said}")
    ):
        parse(names)


def test_a_name_that_is_no_part_of_a_path_is_an_error() -> None:
    with pytest.raises(InputError, match=r"field name '\.\.5' is not usable"):
        parse(["l1/train/5/..5_0/1.jpg"])


# --- annotation ----------------------------------------------------------------------------------

FDA = pd.DataFrame(
    [
        ("dmso", "DMSO", "67-68-5", "dmso", "31", "1", "x"),
        ("1", "FCCP", "370-86-5", "uncoupler", "0", "1", None),
        ("2", "CCCP", None, "uncoupler", "0", "1.0", None),
        ("3", "rotenone", "83-79-4", "complex I  inhibitor", "7", "0", None),
        ("4", "sugar", None, "unknown", "unknown", "0", None),
        ("5", "salt", None, None, None, None, None),
    ],
    columns=[*mitoreid.FDA_COLUMNS, "moa_comment"],
    index=range(1, 7),
)
NOVEL = pd.DataFrame([("1", "epicatechin", "490-46-0")], columns=list(mitoreid.NOVEL_COLUMNS), index=[1])


def moas(table: pd.DataFrame) -> dict[str, str | None]:
    return {row["compound"]: row["moa"] if isinstance(row["moa"], str) else None for row in table.to_dict("records")}


def test_moas_are_those_of_chosen_drugs() -> None:
    table, notes = mitoreid.compounds(FDA, NOVEL)
    assert moas(table) == {
        **{"dmso": None, "1": "uncoupler", "2": "uncoupler", "3": None, "4": None, "5": None},
        "novel-1": None,
    }
    assert table.set_index("compound").loc[["1", "novel-1"], ["name", "cas"]].to_numpy().tolist() == [
        ["FCCP", "370-86-5"],
        ["epicatechin", "490-46-0"],
    ]
    assert notes == ["annotation: 1 MOAs of 2 drugs; 5 others have none here"]


def test_all_known_moas_can_be_had() -> None:
    table, _ = mitoreid.compounds(FDA, None, "all")
    assert moas(table)["3"] == "complex I inhibitor"
    assert [compound for compound, moa in moas(table).items() if moa is None] == ["dmso", "4", "5"]


def test_the_control_is_a_compound_even_if_it_is_not_listed() -> None:
    table, _ = mitoreid.compounds(FDA[FDA["index"] != "dmso"], None)
    assert table.set_index("compound").loc["dmso", "name"] == "DMSO"
    assert moas(table)["dmso"] is None


def test_an_moa_of_several_names_has_the_first_and_a_note() -> None:
    table, notes = mitoreid.compounds(FDA.assign(common_moa=["dmso", "protonophore", *FDA["common_moa"][2:]]), None)
    assert moas(table)["2"] == "protonophore"
    assert notes[1] == "annotation: moa_id 0 has the names ['protonophore', 'uncoupler']; it is called by the first"


def test_moas_that_names_do_not_tell_apart_are_told_apart_by_their_ids() -> None:
    table, notes = mitoreid.compounds(FDA.assign(moa_id=["31", "0", "1", "7", None, None]), None)
    assert (moas(table)["1"], moas(table)["2"]) == ("uncoupler (moa_id 0)", "uncoupler (moa_id 1)")
    assert notes[1] == "annotation: moa_id ['0', '1'] are all called 'uncoupler'; their ids are put after it"
    table, _ = mitoreid.compounds(FDA.assign(common_moa=None), None, "all")
    assert moas(table) == {"dmso": None, "1": "moa_id 0", "2": "moa_id 0", "3": "moa_id 7", "4": None, "5": None}


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("moa_choose", ["0"] * 6, "no drug has the moa_choose 1 and a moa_id"),
        ("index", ["dmso", "1", "1", "3", "4", "5"], "sheet FDA-list: the index ['1'] stands there more than once"),
        ("index", ["dmso", "1", None, "3", "4", "5"], "sheet FDA-list: the index is empty in line(s) [4]"),
    ],
)
def test_an_annotation_that_says_too_little(column: str, values: Sequence[str | None], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        mitoreid.compounds(FDA.assign(**{column: values}), None)


def test_missing_columns_are_named() -> None:
    with pytest.raises(InputError, match=r"sheet FDA-list has no column \['moa_choose'\]; it has \['index'"):
        mitoreid.compounds(FDA.drop(columns="moa_choose"), None)
    with pytest.raises(InputError, match=r"sheet Novel-list has no column \['cas'\]"):
        mitoreid.compounds(FDA, NOVEL.drop(columns="cas"))


def test_natural_compounds_are_told_from_drugs_of_the_same_number() -> None:
    sequences = pd.DataFrame(
        [("train", "1"), ("nc", "1"), ("novel", "1"), ("nc", "3"), ("train", "dmso")], columns=["part", "drug"]
    ).assign(folder="f")
    known = {"dmso", "1", "3", "novel-1"}
    assert mitoreid.identify(sequences, known).tolist() == ["1", "novel-1", "novel-1", "3", "dmso"]
    with pytest.raises(InputError, match=r"1 drug\(s\) are not in the annotation: 3 \(such as f\); add a row"):
        mitoreid.identify(sequences, known - {"3"})


def test_an_experiment_without_control_is_an_error() -> None:
    table = pd.DataFrame({"plate": ["l1", "l1", "l10", "l2", "novel"], "compound": ["dmso", "1", "1", "1", "novel-1"]})
    table = table.assign(field="1", number=0, folder="f")
    with pytest.raises(InputError, match=r"experiment\(s\) l2, l10 have no cell of the control 'dmso'.*l2/train/dmso"):
        mitoreid.check(table)
    mitoreid.check(table[table["plate"].isin(["l1", "novel"])])


def test_a_cell_that_is_there_twice_is_an_error() -> None:
    folders = [
        "l1/train/5/5_0",
        "l1/nc/5/5_0",
        "l1/query/5/5_0",
        "l2/query/5/5_0",
        "l1/train/5/5-2_0",
        "l1/train/5/5_1",
    ]
    table = parse([f"{folder}/1.jpg" for folder in folders]).table
    table["compound"] = table["drug"].mask(table["part"] == "nc", "novel-5")
    with pytest.raises(InputError, match="l1/query/5/5_0 and l1/train/5/5_0 are one cell by name, and 1 in all"):
        mitoreid.check(table)


@given(st.lists(st.tuples(st.integers(1, 3000).map(str) | st.just("dmso"), st.sampled_from(["", "-2", "-10"]))))
def test_wells_are_one_to_one_with_fields_and_the_control_s_are_first(pairs: list[tuple[str, str]]) -> None:
    compound = pd.Series([compound for compound, _ in pairs], dtype=object)
    field = pd.Series([compound + repeat for compound, repeat in pairs], dtype=object)
    wells = virtual_wells(compound, field)
    assert wells.nunique() == len(set(pairs))
    assert wells.groupby([compound, field]).nunique().eq(1).all()
    assert all(WellKey("l1", well) for well in wells)
    order = wells.map(lambda well: (len(split_well(well)[0]), split_well(well)[0], int(split_well(well)[1])))
    first = order[compound == "dmso"]
    assert first.empty or first.max() <= order[compound != "dmso"].min() if (compound != "dmso").any() else True
    # In any order of the sequences.
    assert virtual_wells(compound[::-1], field[::-1]).sort_index().equals(wells)


def test_wells_go_on_after_the_last_row_of_a_plate() -> None:
    numbers = pd.Series(range(1, 48 * 703)).map(str)
    wells = virtual_wells(numbers, numbers)
    assert wells.iloc[[0, 47, 48, 48 * 26 - 1, 48 * 26, 48 * 702 - 1]].tolist() == [
        "A01",
        "A48",
        "B01",
        "Z48",
        "AA01",
        "ZZ48",
    ]


# --- images --------------------------------------------------------------------------------------


def jpeg(pixels: np.ndarray, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, kind, quality=95)
    return sink.getvalue()


def photo(side: int = 24, colour: tuple[int, int, int] = (200, 100, 50), seed: int = 0) -> np.ndarray:
    """A spot of a colour on black, (side, side, 3) uint8."""
    y, x = np.mgrid[:side, :side] - side / 2 + np.random.default_rng(seed).uniform(-2, 2)
    spot = np.exp(-(y**2 + x**2) / (side / 4) ** 2)
    return (spot[..., None] * colour).astype(np.uint8)


def test_a_clip_has_the_files_pixels_and_channels() -> None:
    images = [jpeg(photo(seed=seed)) for seed in range(3)]
    clip = clip_of(images, 24)
    assert (clip.shape, clip.dtype) == ((3, 3, 24, 24), np.uint8)
    for frame, image in enumerate(images):
        pixels = np.asarray(Image.open(io.BytesIO(image)))
        for channel in range(3):
            np.testing.assert_array_equal(clip[channel, frame], pixels[..., channel])
    assert clip[:, 0].max(axis=(1, 2)).astype(float) == pytest.approx([200, 100, 50], abs=15)


@pytest.mark.parametrize("side", [12, 40, 130])
def test_images_are_resized_by_the_bilinear_filter(side: int) -> None:
    """Each pixel is a mean of those under a tent as wide as two pixels of the smaller of both images."""
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(photo(side)))), np.float64)
    scale = side / 24
    reach = max(scale, 1.0)
    weights = np.zeros((24, side))
    for to in range(24):
        for source in range(side):
            weights[to, source] = max(0.0, 1 - abs((source + 0.5) - (to + 0.5) * scale) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("yi,xj,ijc->cyx", weights, weights, pixels)
    found = clip_of([jpeg(photo(side))], 24)[:, 0]
    assert np.abs(found - expected).max() <= 1.0


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([jpeg(photo()), jpeg(photo())[:-100]], mitoreid.UNREADABLE),
        ([b""], mitoreid.UNREADABLE),
        ([b"no image"], mitoreid.UNREADABLE),
        ([jpeg(photo(), kind="PNG")], mitoreid.UNREADABLE),
        ([jpeg(photo(), mode="L")], mitoreid.MISSHAPEN),
        ([jpeg(photo()[:, :20])], mitoreid.MISSHAPEN),
        ([jpeg(photo()), jpeg(photo(30))], mitoreid.MISSHAPEN),
    ],
)
def test_images_that_make_no_clip(images: list[bytes], reason: str) -> None:
    with pytest.raises(UnusableSequenceError) as caught:
        clip_of(images, 24)
    assert caught.value.reason == reason


# --- import --------------------------------------------------------------------------------------

COLOURS = {"a": (220, 60, 60), "b": (60, 60, 220), "control": (120, 120, 120)}
MOA_OF = {**{str(drug): "a" for drug in (1, 2, 3)}, **{str(drug): "b" for drug in (4, 5, 10)}, "dmso": "control"}
SIZE = ("--size", 16)


def write_cell(folder: Path, colour: tuple[int, int, int], seed: int) -> None:
    folder.mkdir(parents=True)
    for frame in range(FRAMES):
        (folder / f"{frame + 1}.jpg").write_bytes(jpeg(photo(20 + 2 * (seed % 5), colour, seed + frame)))


def write_annotation(path: Path, sheets: Mapping[str, pd.DataFrame]) -> None:
    with pd.ExcelWriter(path) as book:
        for name, sheet in sheets.items():
            sheet.to_excel(book, sheet_name=name, index=False)


def annotation_sheets() -> dict[str, pd.DataFrame]:
    rows = [
        (drug if drug == "dmso" else int(drug), f"drug {drug}", f"{drug}-0", f"MOA {moa}", {"a": 0, "b": 7}.get(moa), 1)
        for drug, moa in MOA_OF.items()
    ]
    rows += [(11, "unchosen", "11-0", "rare", 8, 0), (12, "not on a plate", "12-0", "MOA a", 0, 1)]
    return {
        "FDA-list": pd.DataFrame(rows, columns=list(mitoreid.FDA_COLUMNS)),
        "Novel-list": pd.DataFrame([(1, "tea", "490-46-0")], columns=list(mitoreid.NOVEL_COLUMNS)),
    }


@pytest.fixture(scope="session")
def mito(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Released data in small: three experiments of seven drugs, controls and a natural compound. Only to be read."""
    folder = tmp_path_factory.mktemp("mito") / "Mito"
    seed = 0
    for plate in ("l1", "l2", "l3"):
        for drug, moa in {**MOA_OF, "11": "a"}.items():
            for number, part in enumerate(("train", "train", "query", "gallery")):
                # Of the control, and of one drug in one experiment, there is a second field.
                repeat = "-2" if number == 1 and (drug == "dmso" or (plate, drug) == ("l2", "5")) else ""
                seed += 1
                write_cell(folder / plate / part / drug / f"{drug}{repeat}_{number}", COLOURS[moa], seed)
        write_cell(folder / plate / "nc" / "1" / "1_0", COLOURS["b"], seed := seed + 1)
    write_cell(folder / "novel" / "11" / "11_0", COLOURS["b"], seed := seed + 1)
    (folder / "l1" / "train" / "1" / "1.avi").write_bytes(b"film")
    write_annotation(folder / "annotation.xlsx", annotation_sheets())
    return folder


N_SEQUENCES = 3 * (8 * 4 + 1)


@pytest.fixture(scope="session")
def imported(mito: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """The data as a screen. Only to be read."""
    from pipelines.import_cells import ImportConfig, import_cells

    folder = tmp_path_factory.mktemp("imported") / "screen"
    counts = import_cells(str(mito), None, str(folder), ImportConfig(size=16))
    assert counts["clips"] == counts["sequences"] == N_SEQUENCES
    return folder


@pytest.fixture
def mito_copy(mito: Path, tmp_path: Path) -> Path:
    """The data, to damage."""
    return Path(shutil.copytree(mito, tmp_path / "Mito"))


pytestmark = pytest.mark.usefixtures("local_ray")


def sequences_of(screen: Screen) -> pd.DataFrame:
    """The table of sequences with what became of each."""
    outcomes = [open_table(screen.cells(well), CELLS).to_pandas() for well in sorted(screen.done_units("segment"))]
    keys = ["plate", "well", "site", "track"]
    table = open_table(screen.sequences, SEQUENCES).to_pandas()
    return table.merge(pd.concat(outcomes), on=keys, how="outer", validate="one_to_one")


def test_every_sequence_is_a_clip_of_its_images(mito: Path, imported: Path) -> None:
    screen = Screen(str(imported))
    table = sequences_of(screen)
    assert len(table) == N_SEQUENCES
    folders = {str(path.parent.relative_to(mito)) for path in mito.glob("l*/*/*/*/1.jpg")}
    assert set(table["folder"]) == folders
    for row in table.to_dict("records"):
        url = screen.clips(WellKey(row["plate"], row["well"]))
        images = [(mito / row["folder"] / f"{frame}.jpg").read_bytes() for frame in range(1, FRAMES + 1)]
        np.testing.assert_array_equal(read_clips(url, [int(row["clip"])])[0], clip_of(images, 16))
    array = open_clips(url)
    assert array.shape[1:] == (3, FRAMES, 16, 16)
    assert channel_names(array) == ["TMRM", "MitoTracker", "Hoechst"]


def test_membership_and_names_are_kept(imported: Path) -> None:
    table = sequences_of(Screen(str(imported)))
    said = table["folder"].str.split("/", expand=True)
    assert table["plate"].tolist() == said[0].tolist()
    assert table["part"].tolist() == said[1].tolist()
    assert (table["site"] + "_" + (table["track"] - 1).astype(str)).tolist() == said[3].tolist()
    assert table["frames"].map(list).tolist() == [list(range(FRAMES))] * N_SEQUENCES


def test_what_is_not_known_of_cells_is_left_open(imported: Path) -> None:
    table = sequences_of(Screen(str(imported)))
    assert table["parent"].isna().all()
    for column in ("centroid_y", "centroid_x"):
        assert np.isnan(np.stack(table[column])).all()
        assert np.stack(table[column]).shape == (N_SEQUENCES, FRAMES)
    assert all((np.stack(boxes) == -1).all() for boxes in table["box"])
    known = {"first_frame": 0, "last_frame": FRAMES - 1, "n_frames": FRAMES, "n_missing": 0, "n_repaired": 0}
    assert (table[list(known)] == pd.Series(known)).all(axis=None)
    assert not [column for column in table if column.startswith("feature_")]


def test_wells_are_drugs_and_fields_of_experiments(imported: Path) -> None:
    screen = Screen(str(imported))
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    assert set(plate_map["plate"]) == set(plate_map["replicate"]) == {"l1", "l2", "l3"}
    assert plate_map["plate"].value_counts().to_dict() == {"l1": 10, "l2": 11, "l3": 10}
    by_compound = plate_map.groupby("compound")["well"].agg(lambda wells: sorted(set(wells)))
    assert by_compound.to_dict() == {
        **{"dmso": ["A01", "A02"], "1": ["A03"], "2": ["A04"], "3": ["A05"], "4": ["A06"], "5": ["A07", "A08"]},
        **{"10": ["A09"], "11": ["A10"], "novel-1": ["A11"]},
    }
    controls = plate_map["role"] == "negative_control"
    assert set(plate_map["compound"][controls]) == {"dmso"}
    assert set(plate_map["role"][~controls]) == {"treatment"}
    table = sequences_of(screen).merge(plate_map, on=["plate", "well"])
    assert (table.groupby("well")["site"].nunique() == 1).all()


def test_compounds_are_those_that_have_cells(imported: Path) -> None:
    table = open_table(Screen(str(imported)).compounds, COMPOUNDS).to_pandas().set_index("compound")
    assert sorted(table.index) == sorted([*MOA_OF, "11", "novel-1"])
    assert table["moa"].dropna().to_dict() == {drug: f"MOA {moa}" for drug, moa in MOA_OF.items() if moa != "control"}
    assert table.loc["novel-1", ["name", "cas"]].tolist() == ["tea", "490-46-0"]


def status_of(command: Command, folder: Path) -> dict[str, object]:
    done = command("status", folder, "--format", "json")
    assert done.code == 0
    row = json.loads(done.out)[0]
    assert isinstance(row, dict)
    return row


def test_importing_again_changes_nothing_and_other_settings_are_refused(
    mito: Path, imported: Path, tmp_path: Path, command: Command
) -> None:
    folder = Path(shutil.copytree(imported, tmp_path / "screen"))
    before, written = digests(folder, "."), times(folder, "cells", "clips", "sequences.parquet")
    done = command("import-cells", mito, folder, *SIZE)
    assert (done.code, done.out) == (0, f"{folder}: {N_SEQUENCES} clips of {N_SEQUENCES} sequences\n")
    assert "segment: done before" in done.err
    assert digests(folder, ".") == before
    assert times(folder, "cells", "clips", "sequences.parquet") == written

    done = command("import-cells", mito, folder, "--size", 32)
    assert (done.code, done.out) == (1, "")
    assert "holds an import of other settings, images or annotation" in done.err
    assert digests(folder, ".") == before

    # Other MOAs are other tables, but the same clips.
    done = command("import-cells", mito, folder, *SIZE, "--moas", "all", "--update")
    assert (done.code, "done before" in done.err) == (0, True)
    screen = Screen(str(folder))
    assert open_table(screen.compounds, COMPOUNDS).to_pandas().set_index("compound")["moa"]["11"] == "rare"
    assert "annotation: 3 MOAs of 8 drugs; 2 others have none here" in screen.read_manifest().stages["segment"].notes
    assert times(folder, "cells", "clips") == {name: written[name] for name in times(folder, "cells", "clips")}

    done = command("import-cells", mito, folder, "--size", 32, "--parts", "train,gallery", "--update")
    assert done.code == 0
    assert "part query: 24 sequence(s) left out" in " ".join(done.err.split())
    assert set(sequences_of(screen)["part"]) == {"train", "gallery"}
    assert open_clips(screen.clips(WellKey("l1", "A03"))).shape[1:] == (3, FRAMES, 32, 32)


def test_an_import_that_was_cut_off_goes_on(mito: Path, imported: Path, tmp_path: Path, command: Command) -> None:
    folder = Path(shutil.copytree(imported, tmp_path / "screen"))
    screen = Screen(str(folder))
    before, written = digests(folder, "cells", "clips"), times(folder, "cells", "clips")
    Path(screen.cells(WellKey("l2", "A03"))).unlink()
    done = command("import-cells", mito, folder, *SIZE)
    assert done.code == 0
    assert digests(folder, "cells", "clips") == before
    now = times(folder, "cells", "clips")
    again = {
        name for name in now if "l2/A03" in name and not name.endswith("zarr.json")
    }  # the same array is written over
    assert {name for name in now if now[name] != written[name]} == again


def test_broken_sequences_cost_themselves_and_are_counted(mito_copy: Path, tmp_path: Path, command: Command) -> None:
    missing, truncated, misshapen = (mito_copy / f"l1/train/{drug}/{drug}_0" for drug in (1, 2, 3))
    (missing / "7.jpg").unlink()
    (missing / "16.jpg").unlink()
    (truncated / "3.jpg").write_bytes((truncated / "3.jpg").read_bytes()[:-200])
    (misshapen / "16.jpg").write_bytes(jpeg(photo(50)))
    # All that a well has.
    shutil.rmtree(mito_copy / "l3/nc/1/1_0")
    (mito_copy / "l3/nc/1/1_0").mkdir()
    (mito_copy / "l3/nc/1/1_0/17.jpg").write_bytes(jpeg(photo()))

    folder = tmp_path / "screen"
    done = command("import-cells", mito_copy, folder, *SIZE)
    assert done.code == 3
    assert done.out == (
        f"{folder}: {N_SEQUENCES - 4} clips of {N_SEQUENCES} sequences; 4 left out, see screening status {folder}\n"
    )
    said = " ".join(done.err.split())
    assert "1 image(s) after frame 16 left out" in said
    assert "1 file(s) that are of no cell left out: l1/train/1/1.avi" in said
    status = command("status", folder).out
    for line in (
        f"l1/A03/1/1: missing frames: {missing}: has 14 of 16 frames; missing: 7.jpg, 16.jpg",
        f"l1/A04/2/1: unreadable frames: {truncated}: 3.jpg is not a readable JPEG (",
        f"l1/A05/3/1: {mitoreid.MISSHAPEN}: {misshapen}: 16.jpg is RGB of 50 × 50 px; expected RGB of ",
        f"l3/A11/1/1: missing frames: {mito_copy}/l3/nc/1/1_0: has 0 of 16 frames; missing: 1.jpg, 2.jpg",
    ):
        assert f"failed in segment: {line}" in status
    row = status_of(command, folder)
    assert (row["state"], row["done"], row["failed"], row["left"]) == ("done", 31, 4, 0)
    counts = Screen(str(folder)).read_manifest().stages["segment"].counts
    assert counts == {
        **{"wells": 31, "done": 31, "failed": 0, "sequences": N_SEQUENCES, "clips": N_SEQUENCES - 4},
        **{"sequences failed: missing frames": 2, "sequences failed: unreadable frames": 1},
        f"sequences failed: {mitoreid.MISSHAPEN}": 1,
    }
    screen = Screen(str(folder))
    table = sequences_of(screen).set_index("folder")
    gaps = table.loc["l1/train/1/1_0"]
    assert (gaps["excluded"], gaps["n_missing"], gaps["n_frames"], gaps["last_frame"]) == ("missing frames", 2, 14, 14)
    assert table.loc["l3/nc/1/1_0", ["n_missing", "n_frames"]].tolist() == [FRAMES, 0]
    kept = table[table["excluded"] == ""]
    assert kept.groupby(["plate", "well"])["clip"].agg(lambda clips: sorted(clips) == list(range(len(clips)))).all()
    assert table.loc[table["excluded"] != "", "clip"].isna().all()
    assert open_clips(screen.clips(WellKey("l3", "A11"))).shape[0] == 0

    # It is the same the second time, and what has been mended is taken then.
    before, written = digests(folder, "cells", "clips"), times(folder, "cells", "clips")
    assert command("import-cells", mito_copy, folder, *SIZE).code == 3
    assert (digests(folder, "cells", "clips"), times(folder, "cells", "clips")) == (before, written)
    shutil.copy(truncated / "2.jpg", truncated / "3.jpg")
    done = command("import-cells", mito_copy, folder, *SIZE)
    assert (done.code, f"{N_SEQUENCES - 3} clips of {N_SEQUENCES} sequences" in done.out) == (3, True)
    now = times(folder, "cells", "clips")
    assert {name for name in now if now[name] != written.get(name)} == {name for name in now if "l1/A04" in name}
    for frame in (7, 16):
        shutil.copy(missing / "2.jpg", missing / f"{frame}.jpg")
    done = command("import-cells", mito_copy, folder, *SIZE)
    assert (done.code, f"{N_SEQUENCES - 2} clips of {N_SEQUENCES} sequences" in done.out) == (3, True)
    mended = open_table(screen.sequences, SEQUENCES).to_pandas().set_index("folder").loc["l1/train/1/1_0", "frames"]
    assert mended.tolist() == list(range(FRAMES))


def rewritten(change: Callable[[dict[str, pd.DataFrame]], object]) -> Callable[[Path], object]:
    """Changes the sheets of a folder's annotation."""

    def rewrite(folder: Path) -> None:
        sheets = annotation_sheets()
        change(sheets)
        write_annotation(folder / "annotation.xlsx", sheets)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "annotation.xlsx").unlink(), "Mito/annotation.xlsx: no such file"),
        (rewritten(lambda sheets: sheets.pop("FDA-list")), r"has no sheet 'FDA-list'; its sheets are \['Novel-list'\]"),
        (
            rewritten(lambda sheets: sheets.pop("Novel-list")),
            r"has no sheet 'Novel-list'; its sheets are \['FDA-list'\]",
        ),
        (
            rewritten(lambda sheets: sheets["FDA-list"].pop("moa_id")),
            r"annotation.xlsx: sheet FDA-list has no column \['moa_id'\]",
        ),
        (
            rewritten(lambda sheets: sheets.update({"FDA-list": sheets["FDA-list"].iloc[1:]})),
            r"annotation.xlsx: 1 drug\(s\) are not in the annotation: 1 \(such as l1/train/1/1_0\)",
        ),
        (lambda folder: [shutil.rmtree(p) for p in folder.glob("l2/*/dmso")], r"Mito: experiment\(s\) l2 have no cell"),
        (lambda folder: [shutil.rmtree(p) for p in folder.glob("[ln]*")], "Mito: holds no single-cell images"),
        (shutil.rmtree, "Mito: no such folder"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    tmp_path: Path, command: Command, damage: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "Mito"
    for cell in ("l1/train/dmso/dmso_0", "l1/train/1/1_0", "l2/query/dmso/dmso_0", "l2/nc/1/1_0"):
        (folder / cell).mkdir(parents=True)
        (folder / cell / "1.jpg").write_bytes(b"never opened")
    write_annotation(folder / "annotation.xlsx", annotation_sheets())
    damage(folder)
    done = command("import-cells", folder, tmp_path / "screen")
    assert (done.code, done.out) == (1, "")
    assert re.search(said, done.err), done.err
    assert not (tmp_path / "screen").exists()


def test_folders_and_settings_that_do_not_fit(mito: Path, tmp_path: Path, command: Command) -> None:
    done = command("import-cells", mito / "l1", tmp_path / "screen")
    assert (done.code, "give the folder that holds the experiments l1, l2 and l3" in done.err) == (1, True)
    done = command("import-cells", mito.parent, tmp_path / "screen")
    assert (done.code, "give its folder 'Mito/', which does" in done.err) == (1, True)
    done = command("import-cells", mito, tmp_path / "screen", "--parts", "train,test")
    assert (done.code, "parts: Input should be 'train'" in done.err) == (2, True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "sea.jpg").write_bytes(b"sea")
    done = command("import-cells", mito, tmp_path / "photos")
    assert (done.code, "holds ['sea.jpg'] but no screen" in done.err) == (1, True)
    ran = Screen(str(tmp_path / "ran"))
    ran.write_manifest(Manifest(software={}, config={"seed": 1}, inputs=""))
    before = digests(tmp_path, "ran")
    done = command("import-cells", mito, ran.url, "--update")
    assert (done.code, "holds a screen that was not imported" in done.err) == (1, True)
    assert digests(tmp_path, "ran") == before


# --- a run on imported cells ---------------------------------------------------------------------

SMALL = (
    *("--set", "model.depth=10", "--set", "model.width=4", "--set", "train.epochs=2", "--set", "train.p=3"),
    *("--set", "train.k=2", "--set", "evaluation.n_bootstrap=50"),
)


@pytest.mark.slow
def test_a_run_on_imported_cells_goes_from_training_to_report(
    mito: Path, imported: Path, tmp_path: Path, command: Command
) -> None:
    before = digests(imported, ".")
    config = tmp_path / "run.yaml"
    config.write_text(f"title: Imported\ninputs: {{cells: {imported}}}\n")
    folder = tmp_path / "screen"
    done = command("run", config, "--out", folder, *SMALL)
    assert done.code == 0, done.err
    assert f"segment: the cells of {imported} are taken" in done.err
    assert digests(imported, ".") == before
    assert not [name for name in ("cells", "clips", "calibration") if (folder / name).exists()]

    status = command("status", folder, "--format", "json")
    rows = {row["stage"]: row for row in json.loads(status.out)}
    assert {row["state"] for row in rows.values()} == {"done"}
    for stage in ("segment", "embed"):
        assert (rows[stage]["done"], rows[stage]["failed"], rows[stage]["left"]) == (31, 0, 0)
    assert f"clips {N_SEQUENCES}" in rows["segment"]["counts"]
    assert f"cells {N_SEQUENCES}" in rows["embed"]["counts"]
    split = open_table(Screen(str(folder)).split, SPLIT).to_pandas()
    assert {"train", "test_compound", "test_replicate", "validation"} <= set(split["split"])
    page = (folder / "report.html").read_text()
    assert f"cells were imported from {mito}" in page
    assert "cells of" in page
    answer = command("query", folder, "--compound", "1", "--format", "json")
    assert answer.code == 0
    assert len(json.loads(answer.out)) == 8
    votes = json.loads(command("predict", folder, "--format", "json").out)
    assert {vote["compound"] for vote in votes} == {*MOA_OF, "11", "novel-1"} - {"dmso"}

    again = command("run", config, "--out", folder, *SMALL)
    assert (again.code, again.err.count("done before")) == (0, len(STAGES) - 1)
    refused = command("run", config, "--out", imported, *SMALL)
    assert (refused.code, "is the screen whose cells are taken" in refused.err) == (2, True)
