from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.cli import LayoutName
from screening.layouts import (
    VENDORS,
    Cv8000Layout,
    ImageXpressLayout,
    Layout,
    MitoReidLayout,
    PatternLayout,
    PhenixLayout,
    Planes,
    grid,
    missing_planes,
    natural,
    read,
)
from screening.layouts.imagexpress import ImageHeader, with_headers
from screening.layouts.planes import MAX_COLUMNS, MAX_ROWS, Channel, Metadata, checked_well, well_name
from storage_schemas.errors import InputError
from storage_schemas.missing import PLANE

EXPORT = PatternLayout(
    pattern=r"TimePoint_(?P<time>\d+)/(?:ZStep_(?P<z>\d+)/)?[^/]*_(?P<well>[A-P]\d\d)"
    r"(?:_s(?P<site>\d+))?(?:_w(?P<channel>\d))?\.TIF$"
)
MITOCHECK = PatternLayout(
    pattern=r"W\d+--P(?P<site>\d+)--T(?P<time>\d+)--Z(?P<z>\d+)--C(?P<channel>\d*)\.tif$",
    well="B02",
    channel="H2B",
)
FLAT = PatternLayout(pattern=r"^(?P<well>\w+?)_s(?P<site>\w+)_t(?P<time>\d+)_c(?P<channel>\w+)_z(?P<z>\d+)\.tif$")

# Written out, not computed, so that it can judge what is computed.
ROWS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB", "AC", "AD", "AE", "AF"]

wells = st.tuples(st.integers(1, MAX_ROWS), st.integers(1, MAX_COLUMNS))
planes = st.tuples(wells, st.integers(0, 99), st.integers(0, 999), st.integers(0, 9), st.integers(0, 30))


def relative_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def parse(names: Iterable[str], layout: Layout, documents: dict[str, bytes] | None = None) -> Planes:
    return read(layout, list(names), documents or {})


def read_folder(folder: Path, layout: Layout) -> Planes:
    names = relative_files(folder)
    images = [name for name in names if name.lower().endswith(".tif")]
    return parse(images, layout, {name: (folder / name).read_bytes() for name in layout.documents(names)})


@given(st.lists(planes, min_size=1, max_size=30, unique=True), st.integers(1, 4), st.randoms())
@settings(deadline=None)
def test_generated_names_are_read_back(
    wanted: list[tuple[tuple[int, int], int, int, int, int]], digits: int, chance: random.Random
) -> None:
    names = {
        f"{ROWS[row - 1]}{column:02d}_s{site:0{digits}d}_t{time:0{digits}d}_cw{channel}_z{z}.tif": (
            f"{ROWS[row - 1]}{column:02d}",
            str(site),
            time,
            f"w{channel}",
            z,
        )
        for (row, column), site, time, channel, z in wanted
    }
    shuffled = list(names)
    chance.shuffle(shuffled)
    table = parse(shuffled, FLAT).table
    assert dict(zip(table["path"], table[PLANE].itertuples(index=False, name=None), strict=True)) == (names)
    in_order = sorted(wanted)
    assert [names[path] for path in table["path"]] == [
        (f"{ROWS[row - 1]}{column:02d}", str(site), time, f"w{channel}", z)
        for (row, column), site, time, channel, z in in_order
    ]


@given(wells)
def test_wells_have_one_spelling(well: tuple[int, int]) -> None:
    row, column = well
    name = well_name(str(row), str(column))
    assert name == f"{ROWS[row - 1]}{column:02d}"
    assert well_name(f"{row:03d}", f"{column:03d}") == name
    assert well_name(ROWS[row - 1].lower(), str(column)) == name
    assert checked_well(f" {name.lower()}") == name


@pytest.mark.parametrize("well", ["AG01", "A49", "A00", "A0", "0002", "B", "", "B2B", "../B02", "AAA1", "B-2"])
def test_wells_of_no_plate_are_refused(well: str) -> None:
    with pytest.raises(InputError, match="well"):
        checked_well(well)


@pytest.mark.parametrize("row", ["0", "33", "000000000", ""])
def test_rows_of_no_plate_are_refused(row: str) -> None:
    with pytest.raises(InputError):
        well_name(row, "1")


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["w10", "w2", "w1", "DAPI", "2", "10", "w2b", "w02"]
    assert sorted(names, key=natural) == ["DAPI", "w1", "w2", "w02", "w2b", "w10", "2", "10"]


def test_absent_groups_take_the_layout_s_values() -> None:
    layout = PatternLayout(pattern=r"(?P<well>[A-H]\d+)", site="3", channel="DNA")
    assert parse(["B2.tif"], layout).table.to_dict("records") == [
        {"path": "B2.tif", "well": "B02", "site": "3", "time": 0, "channel": "DNA", "z": 0}
    ]


def test_rows_and_columns_may_be_numbers() -> None:
    layout = PatternLayout(pattern=r"r(?P<row>\d+)c(?P<column>\d+)f(?P<site>\d+)")
    table = parse(["r02c11f01.tiff", "r02c02f01.tiff"], layout).table
    assert list(table["well"]) == ["B02", "B11"]
    assert list(table["site"]) == ["1", "1"]


def test_names_that_do_not_match_are_told() -> None:
    names = ["B02_s1_t0_c1_z0.tif", "notes.txt", "B02_s1_t1_c1_z0.tif", "thumbs/B02.png"]
    planes = parse(names, FLAT)
    assert planes.ignored == ["notes.txt", "thumbs/B02.png"]
    assert len(planes.table) == 2


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (PatternLayout(pattern="(?P<well>"), "not a regular expression: .* at character"),
        (PatternLayout(pattern="(?P<well>B02)(?P<tiem>1)"), "'tiem' .did you mean 'time'"),
        (PatternLayout(pattern="(?P<row>B)"), "row and column go together"),
        (PatternLayout(pattern="(?P<site>1)"), "nothing says the well"),
        (PatternLayout(pattern="(?P<well>B02)", well="B02"), "in 2 ways"),
        (PatternLayout(pattern="(?P<well>B02)(?P<row>B)(?P<column>2)"), "in 2 ways"),
        (PatternLayout(pattern="(?P<well>C03)"), r"matches none of 1 .*'B02_1.tif'"),
        (PatternLayout(pattern="(?P<well>B02)(?P<time>_)"), "'B02_1.tif'.*'_'.*whole number"),
        (PatternLayout(pattern="(?P<well>B)"), "'B02_1.tif'.*well 'B'"),
        (PatternLayout(pattern=r"(?P<well>B02)(?P<site>_)"), "'B02_1.tif'.*site name '_'"),
        (PatternLayout(pattern=r"(?P<well>Q\d)?B"), "captures no well"),
        (PatternLayout(pattern="B", well="AZ1"), "on no plate"),
    ],
)
def test_unusable_patterns_say_why(layout: PatternLayout, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse(["B02_1.tif"], layout)


def test_no_files_at_all_is_said() -> None:
    with pytest.raises(InputError, match="none of 0 image file names"):
        parse([], FLAT)


def test_two_files_for_one_plane_are_both_named() -> None:
    layout = PatternLayout(pattern=r"(?P<well>B\d\d)_w(?P<channel>\d)")
    with pytest.raises(InputError, match=r"'B02_w1.tif' and 'B02_w1_thumb.tif'.*well B02, site 0"):
        parse(["B02_w2.tif", "B02_w1.tif", "B02_w1_thumb.tif"], layout)


def test_plates_are_not_mixed() -> None:
    layout = PatternLayout(pattern=r"(?P<plate>P\d)_(?P<well>B\d\d)")
    assert len(parse(["P1_B02.tif", "P1_B03.tif"], layout).table) == 2
    with pytest.raises(InputError, match=r"'P1_B02.tif' is of plate 'P1', 'P2_B03.tif' of 'P2'"):
        parse(["P1_B02.tif", "P2_B03.tif"], layout)


def complete(times: list[int], wells: tuple[str, ...] = ("B02", "B03")) -> list[str]:
    return [
        f"{well}_s1_t{time}_c{channel}_z{z}.tif" for well, time, channel, z in product(wells, times, (1, 2), (0, 1))
    ]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_exactly_the_planes_taken_away_are_missing(data: st.DataObject) -> None:
    names = complete([0, 1, 2, 3])
    # The plate's corners stay, so that every number still occurs at its ends.
    corners = {name for name in names if "_t0_" in name or "_t3_" in name}
    gone = data.draw(st.sets(st.sampled_from(sorted(set(names) - corners)), max_size=15))
    planes = parse(sorted(set(names) - gone), FLAT)
    found = {
        f"{well}_s{site}_t{time}_c{channel}_z{z}.tif"
        for well, site, time, channel, z in missing_planes(planes)[PLANE].itertuples(index=False)
    }
    assert found == gone


@pytest.mark.parametrize(
    ("times", "gaps"),
    [
        ([0, 1, 3], [2]),
        ([0, 5, 10, 20], [15]),
        ([7], []),
        ([10, 20, 30], []),
        ([0, 2, 5], []),
        ([0, 1, 20231118135839], []),
    ],
)
def test_a_time_missing_everywhere_is_seen_on_an_even_grid(times: list[int], gaps: list[int]) -> None:
    missing = missing_planes(parse(complete(times), FLAT))
    assert sorted(set(missing["time"])) == gaps
    assert len(missing) == 2 * 2 * 2 * len(gaps)


def test_a_channel_is_expected_to_have_the_z_planes_it_has_anywhere() -> None:
    names = [f"B0{column}_s1_t0_c1_z{z}.tif" for column in (2, 3) for z in (0, 1, 2)]
    names += ["B02_s1_t0_c2_z1.tif", "B03_s1_t0_c2_z1.tif"]
    assert missing_planes(parse(names, FLAT)).empty
    missing = missing_planes(parse([name for name in names if name != "B03_s1_t0_c1_z2.tif"], FLAT))
    assert missing.values.tolist() == [["B03", "1", 0, "1", 2, False, "without"]]
    missing = missing_planes(parse([name for name in names if name != "B03_s1_t0_c1_z2.tif"], FLAT), keep_z=True)
    # Kept z has a place for planes that this channel has nowhere: zeros, which a mean over z will meet.
    assert missing.values.tolist() == [
        ["B02", "1", 0, "2", 0, False, "zeros"],
        ["B02", "1", 0, "2", 2, False, "zeros"],
        ["B03", "1", 0, "1", 2, False, "zeros"],
        ["B03", "1", 0, "2", 0, False, "zeros"],
        ["B03", "1", 0, "2", 2, False, "zeros"],
    ]


# --- instruments' names ----------------------------------------------------------------------

guids = st.uuids().map(lambda guid: str(guid).upper())
# A site, time, channel and z plane as instruments number them.
numbered = st.tuples(wells, st.integers(1, 99), st.integers(1, 99), st.integers(1, 9), st.integers(1, 30))
several = st.lists(numbered, min_size=1, max_size=20, unique=True)
plate_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 -]{0,8}(_[0-9]{1,4})?", fullmatch=True)


def as_read(planes: Planes) -> dict[str, tuple[object, ...]]:
    return dict(zip(planes.table["path"], planes.table[PLANE].itertuples(index=False, name=None), strict=True))


@given(several, plate_names, st.none() | guids, st.sampled_from(["TIF", "tif", "tiff"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_imagexpress_names_are_read_back(
    wanted: list[tuple[tuple[int, int], int, int, int, int]], plate: str, guid: str | None, suffix: str, thumbs: bool
) -> None:
    names = {}
    for (row, column), site, time, channel, z in wanted:
        folder = f"TimePoint_{time}/ZStep_{z}"
        stem = f"{folder}/{plate}_{ROWS[row - 1]}{column:02d}_s{site}_w{channel}"
        names[f"{stem}{guid or ''}.{suffix}"] = (f"{ROWS[row - 1]}{column:02d}", str(site), time, str(channel), z)
    previews = [name.replace(f"{guid or ''}.{suffix}", f"_thumb{guid or ''}.{suffix}") for name in names]
    planes = parse([*names, *(previews if thumbs else ())], ImageXpressLayout())
    assert as_read(planes) == names
    assert (planes.left_out["path"].tolist(), planes.ignored) == (previews if thumbs else [], [])
    assert set(planes.left_out["reason"]) <= {"thumbnail"}


@pytest.mark.parametrize(
    ("name", "plane"),
    [
        ("9987_B02.TIF", ("B02", "1", 1, "1", 1)),
        ("9987_b02.tif", ("B02", "1", 1, "1", 1)),
        ("9987_B02_s12.TIF", ("B02", "12", 1, "1", 1)),
        ("9987_B02_w10.TIF", ("B02", "1", 1, "10", 1)),
        # The GUID begins with digits, and nothing parts it from the wavelength.
        ("Week1_150607_B02_s1_w107447158-AC92-4844-8462-8A5C3A0D9B9C.tif", ("B02", "1", 1, "1", 1)),
        ("IXMtest_A01_s1_w2CE70AD49-290D-4312-82E6-EDB717B2BA6F.tif", ("A01", "1", 1, "2", 1)),
        ("two words/TimePoint_3/my plate 7_AF48_s2_w1.TIF", ("AF48", "2", 3, "1", 1)),
        ("timepoint_2/zstep_4/P_1_C03_w1.tiff", ("C03", "1", 2, "1", 4)),
    ],
)
def test_parts_of_imagexpress_names_may_be_absent(name: str, plane: tuple[object, ...]) -> None:
    assert as_read(parse([name], ImageXpressLayout())) == {name: plane}


def test_the_microscopes_own_projection_is_no_plane_where_there_are_planes() -> None:
    stacked = [f"TimePoint_1/ZStep_{z}/P_B02_w1.TIF" for z in (0, 1, 2)]
    alone = "TimePoint_1/ZStep_0/P_B02_w2.TIF"
    beside = "TimePoint_1/P_B03_w1.TIF"
    planes = parse([*stacked, alone, beside, "TimePoint_1/ZStep_1/P_B03_w1.TIF"], ImageXpressLayout())
    assert sorted(planes.left_out["path"]) == sorted([stacked[0], beside])
    assert as_read(planes)[alone] == ("B02", "1", 1, "2", 1)
    assert grid(planes).zs == (1, 2)


@given(several, plate_names)
@settings(max_examples=50, deadline=None)
def test_cv8000_names_are_read_back(wanted: list[tuple[tuple[int, int], int, int, int, int]], plate: str) -> None:
    names = {
        f"{plate}_{ROWS[row - 1]}{column:02d}_T{time:04d}F{site:03d}L01A01Z{z:02d}C{channel:02d}.tif": (
            f"{ROWS[row - 1]}{column:02d}", str(site), time, str(channel), z,
        )
        for (row, column), site, time, channel, z in wanted
    }  # fmt: skip
    corrections = ["DC_DCAM#1_CAM3.tif", "SC_BP445-45_20x v2_M01_CH01.tif"]
    planes = parse([*names, *corrections], Cv8000Layout())
    assert as_read(planes) == names
    assert planes.left_out["path"].tolist() == corrections


@given(several, st.sampled_from(["sk{0}fk1fl1", "t{0:02d}"]), st.sampled_from(["", "Images/"]))
@settings(max_examples=50, deadline=None)
def test_phenix_names_are_read_back(
    wanted: list[tuple[tuple[int, int], int, int, int, int]], ending: str, folder: str
) -> None:
    names = {
        f"{folder}r{row:02d}c{column:02d}f{site:02d}p{z:02d}-ch{channel}{ending.format(time)}.tiff": (
            f"{ROWS[row - 1]}{column:02d}", str(site), time, str(channel), z,
        )
        for (row, column), site, time, channel, z in wanted
    }  # fmt: skip
    assert as_read(parse(names, PhenixLayout())) == names


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9 -]{0,6}[a-z0-9]", fullmatch=True), st.integers(1, 3), min_size=1, max_size=20
    )
)
@settings(max_examples=50, deadline=None)
def test_mitoreid_folders_are_laid_out_in_natural_order(frames: dict[str, int]) -> None:
    names = {
        f"l1/{drug}/{drug}_{t}_w{c}.tif": (drug, t, str(c))
        for drug, n in frames.items()
        for t in range(1, n + 1)
        for c in (1, 2)
    }
    planes = parse(names, MitoReidLayout())
    assert planes.plate_map is not None
    in_order = sorted(frames, key=lambda drug: (natural(drug), drug))
    expected = {drug: f"{ROWS[i // 12]}{i % 12 + 1:02d}" for i, drug in enumerate(in_order)}
    assert {path: (well, time, channel) for path, (well, _, time, channel, _) in as_read(planes).items()} == {
        name: (expected[drug], t, c) for name, (drug, t, c) in names.items()
    }
    assert planes.plate_map["well"].tolist() == list(expected.values())


def test_mitoreid_repeats_and_controls_are_told() -> None:
    folders = ["dmso", "dmso-2", "DMSO 3", "5", "5-2", "17-3", "co-q10", "co", "co-2", "x-9"]
    planes = parse([f"{folder}/{folder}_1_w1.tif" for folder in folders], MitoReidLayout())
    assert planes.plate_map is not None
    told = {row.well: (row.compound, row.role) for row in planes.plate_map.itertuples()}
    wells = {path.partition("/")[0]: well for path, (well, *_) in as_read(planes).items()}
    assert {folder: told[wells[folder]] for folder in folders} == {
        "dmso": ("dmso", "negative_control"),
        "dmso-2": ("dmso", "negative_control"),
        "DMSO 3": ("dmso", "negative_control"),
        "5": ("5", "treatment"),
        "5-2": ("5", "treatment"),
        # Drugs are numbers there, so this is a repeat though its first is not in the folder.
        "17-3": ("17", "treatment"),
        "co-q10": ("co-q10", "treatment"),
        "co": ("co", "treatment"),
        "co-2": ("co", "treatment"),
        # No folder x: the whole is its name.
        "x-9": ("x-9", "treatment"),
    }


def test_more_drugs_than_wells_are_refused() -> None:
    names = [f"{drug}/{drug}_1_w1.tif" for drug in range(1537)]
    assert parse(names[:97], MitoReidLayout()).table["well"].iloc[-1] == "E01"  # of 384 wells, since 96 do not hold it
    with pytest.raises(InputError, match="1537 drug folders are more"):
        parse(names, MitoReidLayout())


FRAGMENTS = ("TimePoint_1", "ZStep_2", "/", "_", "B02", "s1", "w1", "r01c01f01p01", "-ch1", "sk1fk1fl1", "T0001F001")
junk = st.text(max_size=30) | st.lists(st.sampled_from((*FRAGMENTS, ".tif", "L01A01Z01C01", "ZZ99")), max_size=8).map(
    "".join
)


@given(st.lists(junk, max_size=10), st.sampled_from(VENDORS))
@settings(max_examples=200, deadline=None)
def test_junk_is_ignored_or_refused(names: list[str], layout: Layout) -> None:
    try:
        planes = parse(names, layout)
    except InputError:
        return
    assert sorted([*planes.table["path"], *planes.ignored, *planes.left_out["path"]]) == sorted(names)


@given(
    st.sampled_from(("9987.HTD", "a.mlf", "a.mrf", "a.mes", "Index.idx.xml")),
    st.binary(max_size=60) | st.text().map(str.encode),
)
@settings(max_examples=200, deadline=None)
def test_junk_metadata_is_refused_or_says_nothing(name: str, data: bytes) -> None:
    names = ["P_B02_s1_w1.TIF", "P_B02_T0001F001L01A01Z01C01.tif", "r01c01f01p01-ch1sk1fk1fl1.tiff"]
    (layout,) = [layout for layout in VENDORS if layout.documents([name])]
    said = ""
    try:
        assert parse(names, layout, {name: data}).promised.empty
    except InputError as error:
        said = str(error)
    assert not said or said.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.mrf", '<a TimePointCount="nan"/>', "TimePointCount is 'nan', expected a number"),
        ("a.mrf", '<a TimePointCount="inf"/>', "TimePointCount is 'inf', expected a number"),
        ("a.mes", '<a><ChannelList><C Ch="x"/></ChannelList></a>', "a channel's number Ch is not usable"),
        ("a.mlf", '<?xml version="1.0" encoding="foo"?><a/>', "unknown encoding: foo"),
        ("9987.HTD", '"' + 200_000 * "x", "field larger than field limit"),
    ],
)
def test_metadata_of_the_right_form_and_of_no_sense_are_refused(name: str, text: str, said: str) -> None:
    names = ["P_B02_s1_w1.TIF", "P_B02_T0001F001L01A01Z01C01.tif"]
    (layout,) = [layout for layout in VENDORS if layout.documents([name])]
    with pytest.raises(InputError, match=f"^{name}: .*{said}"):
        parse(names, layout, {name: text.encode()})


@pytest.mark.parametrize("size", ["0", "-1e-6", "inf", "nan", "wide"])
def test_sizes_that_are_none_are_not_known(size: str) -> None:
    images = "".join(
        f"<Image><URL>r01c01f01p0{z}-ch1sk1fk1fl1.tiff</URL><ImageResolutionX>{size}</ImageResolutionX>"
        f"<PositionZ>{size if z > 1 else 0}</PositionZ><MainEmissionWavelength>{size}</MainEmissionWavelength></Image>"
        for z in (1, 2)
    )
    index = f"<a><Images>{images}</Images></a>".encode()
    metadata = parse(["r01c01f01p01-ch1sk1fk1fl1.tiff"], PhenixLayout(), {"Index.xml": index}).metadata
    # A stage may well go down.
    assert metadata == Metadata({"1": Channel("1")}, z_step=1.0 if size == "-1e-6" else None)


def test_the_command_line_knows_every_layout() -> None:
    assert {layout.method for layout in VENDORS} | {"pattern"} == set(LayoutName)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (ImageXpressLayout(), ["a/P_B02_w1.TIF", "b/P_B02_w1.TIF"]),
        (ImageXpressLayout(), ["P_B02_w1.TIF", "Q_B03_w1.TIF"]),
        (Cv8000Layout(), ["P_B02_T0001F001L01A01Z01C01.tif", "Q_B03_T0001F001L01A01Z01C01.tif"]),
        (PhenixLayout(), ["a/Images/r01c01f01p01-ch1sk1fk1fl1.tiff", "b/Images/r01c02f01p01-ch1sk1fk1fl1.tiff"]),
        (MitoReidLayout(), ["l1/5/5_1_w1.tif", "l2/5/5_1_w1.tif"]),
    ],
)
def test_two_plates_in_one_folder_are_told(layout: Layout, names: list[str]) -> None:
    with pytest.raises(InputError, match="files of 2 plates are mixed"):
        parse(names, layout)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (Cv8000Layout(), ["P_B02_T0001F001L01A01Z01C01.tif", "P_B02_T0001F001L01A02Z01C01.tif"]),
        (PhenixLayout(), ["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p01-ch1sk1fk2fl1.tiff"]),
        (ImageXpressLayout(), ["P_B02_w1.TIF", "P_B02_w1.tif"]),
    ],
)
def test_two_files_for_one_plane_are_told_in_every_layout(layout: Layout, names: list[str]) -> None:
    with pytest.raises(InputError, match="are both the plane"):
        parse(names, layout)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("TimePoint_1/P_B02_s1_w1.TIF", "imagexpress"),
        ("P_B02_T0001F001L01A01Z01C01.tif", "cv8000"),
        ("r01c01f01p01-ch1sk1fk1fl1.tiff", "phenix"),
        ("dmso/dmso_1_w1.tif", "mitoreid"),
    ],
)
def test_names_of_another_layout_are_told(name: str, method: str) -> None:
    for layout in (*VENDORS, PatternLayout(pattern="(?P<well>H12)")):
        if layout.method != method:
            with pytest.raises(InputError, match=f"they look like --layout {method}"):
                parse([name], layout)


def test_the_layout_of_most_names_is_told() -> None:
    """A CellVoyager's correction images look like an ImageXpress's files, by a well that is on no plate."""
    names = ["P_B02_T0001F001L01A01Z01C01.tif", "P_B03_T0001F001L01A01Z01C01.tif", "SC_BP445-45_20x v2_M01_CH01.tif"]
    for method in ("imagexpress", "phenix"):
        (layout,) = (layout for layout in VENDORS if layout.method == method)
        with pytest.raises(InputError, match="they look like --layout cv8000"):
            parse(names, layout)


# --- instruments' metadata -------------------------------------------------------------------


def htd(wells: tuple[str, ...] = ("B02",), sites: str = "TRUE, TRUE", times: int = 1, **changes: str) -> bytes:
    """An .HTD file of eight rows and twelve columns, one row of sites and two wavelengths."""
    entries = {
        '"Description"': '"5 µm steps"',
        '"TimePoints"': str(times),
        '"ZSeries"': "FALSE",
        '"ZSteps"': "0",
        '"XWells"': "12",
        '"YWells"': "8",
        **{
            f'"WellsSelection{row}"': ", ".join(
                str(f"{ROWS[row - 1]}{column:02d}" in wells).upper() for column in range(1, 13)
            )
            for row in range(1, 9)
        },
        '"Sites"': "TRUE",
        '"XSites"': "2",
        '"YSites"': "1",
        '"SiteSelection1"': sites,
        '"NWavelengths"': "2",
        '"WaveName1"': '"DAPI, dim"',
        '"WaveName2"': '"Cy5"',
        '"WaveCollect1"': "1",
        '"WaveCollect2"': "1",
    }
    entries |= {f'"{key}"': value for key, value in changes.items()}
    return "".join(f"{key}, {value}\r\n" for key, value in entries.items()).encode("latin-1")


def promised(planes: Planes) -> list[list[object]]:
    return planes.promised.values.tolist()


def test_an_htd_promises_wells_sites_times_and_wavelengths() -> None:
    planes = parse(["P_B02_s1_w1.TIF"], ImageXpressLayout(), {"P.HTD": htd(("B02", "H12"), times=2)})
    assert promised(planes) == [
        [well, site, time, wave, 1]
        for well in ("B02", "H12")
        for site in ("1", "2")
        for time in (1, 2)
        for wave in ("1", "2")
    ]
    assert planes.metadata == Metadata({"1": Channel("DAPI, dim"), "2": Channel("Cy5")})
    missing = missing_planes(planes)
    assert len(missing) == 15
    assert set(missing["written"]) == {"no"}


def test_wavelengths_not_collected_are_not_promised_and_z_is() -> None:
    document = htd(WaveCollect2="0", ZSeries="TRUE", ZSteps="3", Sites="FALSE")
    names = ["ZStep_1/P_B02_w1.TIF", "ZStep_3/P_B02_w1.TIF"]
    planes = parse(names, ImageXpressLayout(), {"P.HTD": document})
    assert promised(planes) == [["B02", "1", 1, "1", z] for z in (1, 2, 3)]
    # Z plane 2 stands between two that are there.
    assert grid(planes).zs == (1, 2, 3)


def test_a_time_point_promised_between_two_others_stands_as_zeros() -> None:
    names = [f"TimePoint_{t}/P_B02_s{s}_w{w}.TIF" for t in (1, 4) for s in (1, 2) for w in (1, 2)]
    planes = parse(names, ImageXpressLayout(), {"P.HTD": htd(times=6)})
    assert grid(planes).times == (1, 2, 3, 4)
    missing = missing_planes(planes)
    assert set(missing.loc[missing["written"] == "zeros", "time"]) == {2, 3}
    assert set(missing.loc[missing["written"] == "no", "time"]) == {5, 6}


def test_sites_are_numbered_by_visit_or_by_place_as_names_show() -> None:
    document = htd(sites="FALSE, TRUE")
    by_visit = parse(["P_B02_s1_w1.TIF"], ImageXpressLayout(), {"P.HTD": document})
    by_place = parse(["P_B02_s2_w1.TIF"], ImageXpressLayout(), {"P.HTD": document})
    assert set(by_visit.promised["site"]) == {"1"}
    assert set(by_place.promised["site"]) == {"2"}


@pytest.mark.parametrize("document", [b"", htd(XWells="many"), htd(YWells="9"), b'"HTSInfoFile", Version 1.0'])
def test_an_unusable_htd_is_named(document: bytes) -> None:
    with pytest.raises(InputError, match=r"P.HTD: is not a usable .HTD file"):
        parse(["P_B02_s1_w1.TIF"], ImageXpressLayout(), {"P.HTD": document})


def test_an_htd_without_images_says_what_it_promises() -> None:
    with pytest.raises(InputError, match=r"none of 0 .*though P.HTD promises 4 planes"):
        parse([], ImageXpressLayout(), {"P.HTD": htd()})


def test_metadata_of_another_plate_promise_nothing() -> None:
    other = htd(("H12",))
    planes = parse(["a/P_B02_s1_w1.TIF"], ImageXpressLayout(), {"a/P.HTD": htd(), "b/P.HTD": other, "a/Q.HTD": other})
    assert set(planes.promised["well"]) == {"B02"}
    name = "a/Images/r02c02f01p01-ch1sk1fk1fl1.tiff"
    assert (
        len(parse([name], PhenixLayout(), {"a/Images/Index.idx.xml": index("V5"), "b/Index.xml": b"<a/>"}).promised)
        == 8
    )
    assert parse([name], PhenixLayout(), {"b/Images/Index.idx.xml": index("V5")}).promised.empty
    name = "a/P_B02_T0001F001L01A01Z01C01.tif"
    records = mlf([(2, 1, 1, 1, 1)])
    assert len(parse([name], Cv8000Layout(), {"a/a.mlf": records, "b/a.mlf": mlf([(3, 1, 1, 1, 1)])}).promised) == 1


def test_only_the_htd_at_the_top_is_asked_for() -> None:
    names = ["a/9987.HTD", "a/TimePoint_1/9987.HTD", "a/TimePoint_1/9987_B02.TIF"]
    assert ImageXpressLayout().documents(names) == ["a/9987.HTD"]


def test_images_say_pixel_size_colours_and_steps() -> None:
    start = datetime(2024, 7, 9, 13, 15)

    def header(seconds: float, wavelength: float, z: float) -> ImageHeader:
        return ImageHeader.read(
            {
                "spatial-calibration-state": True,
                "spatial-calibration-units": "um",
                "spatial-calibration-x": 1.5,
                "wavelength": wavelength,
                "acquisition-time-local": start + timedelta(seconds=seconds),
                "z-position": z,
            }
        )

    found = with_headers(
        Metadata({"1": Channel("DAPI")}),
        {
            ("B02", "1", 1, "1", 1): header(0, 452, 10.0),
            ("B02", "1", 1, "2", 1): header(2, 624, 10.0),
            ("B02", "1", 3, "1", 1): header(60, 452, 10.0),
            ("B02", "1", 1, "1", 2): header(1, 452, 7.5),
        },
    )
    assert found == Metadata({"1": Channel("DAPI", "0000FF"), "2": Channel("2", "FF0000")}, 1.5, 30.0, 2.5)
    assert ImageHeader.read({}) == ImageHeader(None, None, None, None)
    assert with_headers(Metadata(), {("B02", "1", 1, "1", 1): ImageHeader.read({})}) == Metadata()


def mlf(planes: Iterable[tuple[int, int, int, int, int]], line: int = 1) -> bytes:
    """Records of (column, field, time, channel, z), ten minutes and 3 µm apart."""
    start = datetime.fromisoformat("2023-09-18T13:58:44.438+02:00")
    records = "".join(
        f'<bts:MeasurementRecord bts:Type="IMG" bts:Time="{(start + timedelta(minutes=10 * t)).isoformat()}" '
        f'bts:Column="{column}" bts:Row="2" bts:TimePoint="{t}" bts:FieldIndex="{f}" bts:ZIndex="{z}" '
        f'bts:TimelineIndex="{line}" bts:ActionIndex="1" bts:Action="3D" bts:X="0" bts:Y="0" bts:Z="{3.0 * z}" '
        f'bts:Ch="{c}">name.tif</bts:MeasurementRecord>'
        for column, f, t, c, z in planes
    )
    return (
        f'<?xml version="1.0"?><bts:MeasurementData xmlns:bts="http://x/1.0">{records}</bts:MeasurementData>'.encode()
    )


def mrf(times: int) -> bytes:
    return (
        f'\ufeff<?xml version="1.0" encoding="utf-8"?><bts:MeasurementDetail bts:TimePointCount="{times}" '
        'xmlns:bts="http://x/1.0"><bts:MeasurementChannel bts:Ch="1" bts:HorizontalPixelDimension="0.325"/>'
        "</bts:MeasurementDetail>"
    ).encode()


def test_cv8000_records_promise_images_and_say_steps() -> None:
    documents = {"a.mlf": mlf([(2, 1, t, 1, z) for t in (1, 2) for z in (1, 2)]), "a.mrf": mrf(3)}
    planes = parse(["P_B02_T0001F001L01A01Z01C01.tif"], Cv8000Layout(), documents)
    assert promised(planes) == [["B02", "1", t, "1", z] for t in (1, 2, 3) for z in (1, 2)]
    assert planes.metadata == Metadata({}, 0.325, 600.0, 3.0)
    # Of several time lines each has time points of its own, which the total says nothing of.
    documents["b.mlf"] = mlf([(2, 1, 1, 2, 1)], line=2)
    assert len(parse(["P_B02_T0001F001L01A01Z01C01.tif"], Cv8000Layout(), documents).promised) == 5


@pytest.mark.parametrize(
    ("said", "sites"),
    [
        ('bts:TimePoint="1"', ["1", "2"]),
        ("", ["1", "2"]),
        ('bts:TimePoint="1" bts:FieldIndex="2"', ["2"]),
        ('bts:TimePoint="2"', []),
    ],
)
def test_a_failure_on_record_is_a_promise_that_was_not_kept(said: str, sites: list[str]) -> None:
    records = mlf([(2, site, 1, 1, 1) for site in (1, 2)]).decode()
    failure = f'<bts:MeasurementRecord bts:Type="ERR" bts:Row="2" bts:Column="3" {said}>AF</bts:MeasurementRecord>'
    document = records.replace("</bts:MeasurementData>", f"{failure}</bts:MeasurementData>").encode()
    names = [f"P_B02_T0001F00{site}L01A01Z01C01.tif" for site in (1, 2)]
    missing = missing_planes(parse(names, Cv8000Layout(), {"a.mlf": document}))
    assert missing[PLANE].values.tolist() == [["B03", site, 1, "1", 1] for site in sites]


INDEX = """<?xml version="1.0" encoding="utf-8"?>
<EvaluationInputData xmlns="http://www.perkinelmer.com/PEHH/Harmony{version}" Version="1">
<Maps>{maps}</Maps><Images>{images}</Images></EvaluationInputData>"""

CHANNEL = (
    "<ChannelName>{name}</ChannelName><ImageResolutionX Unit='m'>2.99E-07</ImageResolutionX>"
    "<MainEmissionWavelength Unit='nm'>{emission}</MainEmissionWavelength>"
)


def index(version: str) -> bytes:
    """An index of one well, two channels, two z planes and two times, as Harmony 5 or 6 writes it."""
    channels = {1: CHANNEL.format(name="HOECHST 33342", emission=456), 2: CHANNEL.format(name="TMRM", emission=576)}
    images = "".join(
        f"<Image><id>0202K{t}F1P{z}R{c}</id><State>Ok</State><URL>r02c02f01p{z:02d}-ch{c}sk{t}fk1fl1.tiff</URL>"
        f"<Row>2</Row><Col>2</Col><FieldID>1</FieldID><PlaneID>{z}</PlaneID><TimepointID>{t - 1}</TimepointID>"
        f"<ChannelID>{c}</ChannelID><PositionZ Unit='m'>{2e-6 * z}</PositionZ>"
        f"<MeasurementTimeOffset Unit='s'>{120.0 * (t - 1) + c}</MeasurementTimeOffset>"
        f"{channels[c] if version == 'V5' else ''}</Image>"
        for t in (1, 2)
        for c in (1, 2)
        for z in (1, 2)
    )
    maps = "".join(f"<Map><Entry ChannelID='{c}'>{text}</Entry></Map>" for c, text in channels.items())
    return INDEX.format(version=version, maps=maps if version == "V6" else "", images=images).encode()


@pytest.mark.parametrize("version", ["V5", "V6"])
def test_a_phenix_index_promises_images_and_says_channels_and_steps(version: str) -> None:
    assert PhenixLayout().documents(["Images/Index.idx.xml", "Images/a.tiff"]) == ["Images/Index.idx.xml"]
    planes = parse(["Images/r02c02f01p01-ch1sk1fk1fl1.tiff"], PhenixLayout(), {"Images/Index.idx.xml": index(version)})
    assert promised(planes) == [["B02", "1", t, c, z] for t in (1, 2) for c in ("1", "2") for z in (1, 2)]
    channels = {"1": Channel("HOECHST 33342", "0000FF"), "2": Channel("TMRM", "FFFF00")}
    assert planes.metadata == Metadata(channels, 0.299, 120.0, 2.0)


# --- real files ------------------------------------------------------------------------------


def test_the_mitocheck_movie_is_one_site_of_thirty_frames(real_data: Path) -> None:
    names = relative_files(real_data / "mitocheck_movie" / "mitocheck-movie")
    planes = parse(names, MITOCHECK)
    assert planes.ignored == []
    assert list(planes.table["time"]) == list(range(30))
    assert planes.table[["well", "site", "channel", "z"]].drop_duplicates().values.tolist() == [["B02", "1", "H2B", 0]]
    assert missing_planes(planes).empty
    without_frame_15 = missing_planes(replace(planes, table=planes.table.drop(index=15)))
    assert without_frame_15["time"].tolist() == [15]


@pytest.mark.parametrize(
    ("plate", "files", "counts"),
    [
        # wells, sites, times, channels and z planes, as the data's description has them
        ("9987_Plate_3420", 1, {"well": 1, "site": 1, "time": 1, "channel": 1, "z": 1}),
        ("9987_Plate_3434", 36, {"well": 2, "site": 2, "time": 1, "channel": 3, "z": 3}),
        ("9987_Plate_3435", 16, {"well": 2, "site": 2, "time": 2, "channel": 2, "z": 1}),
    ],
)
def test_imagexpress_exports(real_data: Path, plate: str, files: int, counts: dict[str, int]) -> None:
    names = relative_files(real_data / "vendor_layouts" / "ImageXpress" / plate)
    planes = parse(names, EXPORT)
    assert len(planes.table) == files
    assert planes.table[PLANE].nunique().to_dict() == counts
    assert all(name.endswith(".HTD") for name in planes.ignored)
    assert missing_planes(planes).empty


@pytest.mark.parametrize(
    ("plate", "n_promised", "n_missing", "projections"),
    [("9987_Plate_3420", 1, 0, 0), ("9987_Plate_3434", 48, 24, 12), ("9987_Plate_3435", 96, 80, 0)],
)
def test_what_real_htd_files_promise(
    real_data: Path, plate: str, n_promised: int, n_missing: int, projections: int
) -> None:
    planes = read_folder(real_data / "vendor_layouts" / "ImageXpress" / plate, ImageXpressLayout())
    assert planes.ignored == []
    assert (len(planes.promised), len(missing_planes(planes)), len(planes.left_out)) == (
        n_promised,
        n_missing,
        projections,
    )
    names = [planes.metadata.channels[channel].name for channel in grid(planes).channels]
    assert names == ["DAPI", "FITC", "Texas Red"][: len(names)]


def test_the_real_cv8000_export(real_data: Path) -> None:
    planes = read_folder(real_data / "vendor_layouts" / "CV8000", Cv8000Layout())
    assert planes.table[PLANE].nunique().to_dict() == {"well": 3, "site": 4, "time": 1, "channel": 2, "z": 4}
    assert (len(planes.table), len(planes.left_out), planes.ignored) == (96, 6, [])
    assert missing_planes(planes).empty
    assert (planes.metadata.pixel_size, planes.metadata.z_step, planes.metadata.time_step) == (0.325, 3.0, None)
    assert planes.metadata.channels["1"] == Channel("BP445/45", "002FFF")
