from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from screening.layouts import (
    MAX_COLUMNS,
    MAX_ROWS,
    PLANE,
    PatternLayout,
    checked_well,
    missing_planes,
    natural,
    parse,
    well_name,
)
from storage_schemas.errors import InputError

IMAGEXPRESS = PatternLayout(
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


@given(st.lists(planes, min_size=1, max_size=30, unique=True), st.integers(1, 4), st.randoms())
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
    with pytest.raises(InputError, match="none of 0 file names"):
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
def test_exactly_the_planes_taken_away_are_missing(data: st.DataObject) -> None:
    names = complete([0, 1, 2, 3])
    # The plate's corners stay, so that every number still occurs at its ends.
    corners = {name for name in names if "_t0_" in name or "_t3_" in name}
    gone = data.draw(st.sets(st.sampled_from(sorted(set(names) - corners)), max_size=15))
    table = parse(sorted(set(names) - gone), FLAT).table
    found = {
        f"{well}_s{site}_t{time}_c{channel}_z{z}.tif"
        for well, site, time, channel, z in missing_planes(table).itertuples(index=False)
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
    missing = missing_planes(parse(complete(times), FLAT).table)
    assert sorted(set(missing["time"])) == gaps
    assert len(missing) == 2 * 2 * 2 * len(gaps)


def test_the_mitocheck_movie_is_one_site_of_thirty_frames(real_data: Path) -> None:
    names = relative_files(real_data / "mitocheck_movie" / "mitocheck-movie")
    planes = parse(names, MITOCHECK)
    assert planes.ignored == []
    assert list(planes.table["time"]) == list(range(30))
    assert planes.table[["well", "site", "channel", "z"]].drop_duplicates().values.tolist() == [["B02", "1", "H2B", 0]]
    assert missing_planes(planes.table).empty
    without_frame_15 = missing_planes(planes.table.drop(index=15))
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
    planes = parse(names, IMAGEXPRESS)
    assert len(planes.table) == files
    assert planes.table[PLANE].nunique().to_dict() == counts
    assert all(name.endswith(".HTD") for name in planes.ignored)
    assert missing_planes(planes.table).empty
