"""File names to planes of a plate: which well, site, time, channel and z each image file holds.

Microscopes and people write these into names in their own ways, so the user says where they stand
by a regular expression with named groups. Nothing is guessed: a name that does not match is
reported, two files for one plane are an error, and planes that are not there are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise, product

import pandas as pd
from pydantic import Field

from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.keys import canonical_well, check_name, split_well

PLANE = ["well", "site", "time", "channel", "z"]
GROUPS = ("plate", "row", "column", *PLANE)

# The largest plates made: 1536 wells are 32 rows (A..AF) of 48 columns.
MAX_ROWS = 32
MAX_COLUMNS = 48


_Row = tuple[str, str, str, int, str, int]
_Natural = tuple[tuple[int, str], ...]


class PatternLayout(Config):
    """How a folder of image files names its planes."""

    pattern: str = Field(
        description="regular expression searched for in each file's path below the source folder "
        "(parts joined by /), with named groups: well, or row and column; and any of site, time, "
        "channel, z, plate"
    )
    well: str | None = Field(None, description="the well of every file (such as B02), where names do not hold it")
    site: str = Field("0", description="the site of files whose names do not hold it")
    channel: str = Field("0", description="the channel of files whose names do not hold it")


@dataclass(frozen=True)
class Planes:
    """What a folder's names say.

    Attributes:
        table: a row a file, sorted by well, site, time, channel, z (numbers as numbers): ``path``
            (as given), ``well`` (canonical, ``B02``), ``site`` (text), ``time`` (int), ``channel``
            (text), ``z`` (int). Times and z planes keep the numbers they have in the names.
        ignored: the names that the pattern does not match, in the order given.
    """

    table: pd.DataFrame
    ignored: list[str]


def parse(names: Iterable[str], layout: PatternLayout) -> Planes:
    """Read well, site, time, channel and z from file names.

    A group that takes no part in a match, or captures nothing, counts as absent: the site and
    channel are then the layout's, time and z are 0. Numbers may have leading zeros: site ``001`` is
    site ``1``.

    Args:
        names: file paths below the source folder, parts joined by ``/``.
        layout: the pattern and what it does not say.

    Raises:
        InputError: if the pattern is no regular expression, has unknown groups or does not tell the
            well; if it matches no name; if a captured part is not usable; if two files hold the
            same plane; if files of several plates are mixed.
    """
    pattern = _compile(layout)
    rows: list[_Row] = []
    ignored: list[str] = []
    plates: dict[str, str] = {}
    for name in names:
        match = pattern.search(name)
        if match is None:
            ignored.append(name)
            continue
        said = {group: text for group, text in match.groupdict().items() if text}
        plates.setdefault(said.get("plate", ""), name)
        rows.append((name, *_plane(name, said, layout)))
    if not rows:
        shown = ", ".join(map(repr, ignored[:3])) or "there are none"
        raise InputError(
            f"pattern {layout.pattern!r} matches none of {len(ignored)} file names ({shown}); "
            "it is searched for in the path below the source folder"
        )
    if len(plates) > 1:
        (one, of_one), (two, of_two) = list(plates.items())[:2]
        raise InputError(
            f"files of {len(plates)} plates are mixed: {of_one!r} is of plate {one!r}, {of_two!r} "
            f"of {two!r}; put the plate's name into the pattern and ingest one plate at a time"
        )
    rows.sort(key=_order)
    table = pd.DataFrame(rows, columns=["path", *PLANE])
    _check_unique(table)
    return Planes(table, ignored)


def missing_planes(table: pd.DataFrame) -> pd.DataFrame:
    """The planes that a complete plate would have and this one has not.

    Every site is expected to have every time, channel and z plane that occurs anywhere on the
    plate. Where the plate's times stand on an even grid with gaps (0, 1, 3), the times in the gaps
    are expected too: a movie that lost a frame is not a movie with fewer frames. The same holds for
    z planes.

    Args:
        table: columns well, site, time, channel, z, a row a plane, as `parse` gives it.

    Returns:
        the same five columns, a row a missing plane; empty where nothing is missing.
    """
    there = set(table[PLANE].itertuples(index=False, name=None))
    sites = list(dict.fromkeys(zip(table["well"], table["site"], strict=True)))
    planes = list(
        product(
            _evenly(sorted(set(table["time"]))),
            sorted(set(table["channel"]), key=natural),
            _evenly(sorted(set(table["z"]))),
        )
    )
    expected = ((*site, *plane) for site in sites for plane in planes)
    return pd.DataFrame([plane for plane in expected if plane not in there], columns=PLANE)


def well_name(row: str, column: str) -> str:
    """The canonical name of a well from its row (letters or a number from 1) and column: ``B02``.

    Raises:
        InputError: if there is no such well on any plate (rows A..AF or 1..32, columns 1..48).
    """
    if re.fullmatch(r"[0-9]{1,9}", row):
        row = _row_letters(int(row))
    return checked_well(f"{row}{column}")


def checked_well(well: str) -> str:
    """The canonical spelling of a well's name, if such a well is on any plate: ``b2 -> B02``.

    Raises:
        InputError: if the name is not row letters A..AF and a column 1..48.
    """
    name = canonical_well(well)
    row, column = split_well(name)
    if _row_number(row) > MAX_ROWS or int(column) > MAX_COLUMNS:
        raise InputError(
            f"well {well!r} is on no plate: rows go from A to {_row_letters(MAX_ROWS)}, columns from 1 to {MAX_COLUMNS}"
        )
    return name


def natural(text: str) -> _Natural:
    """A sort key under which numbers inside a text count as numbers: ``w2`` before ``w10``."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text) if part)


def _compile(layout: PatternLayout) -> re.Pattern[str]:
    try:
        pattern = re.compile(layout.pattern)
    except re.error as error:
        at = "" if error.pos is None else f" at character {error.pos + 1}"
        raise InputError(f"pattern {layout.pattern!r} is not a regular expression: {error.msg}{at}") from error
    groups = set(pattern.groupindex)
    for unknown in sorted(groups - set(GROUPS)):
        near = get_close_matches(unknown, GROUPS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"pattern {layout.pattern!r}: unknown group {unknown!r}{hint}; known are {', '.join(GROUPS)}")
    if ("row" in groups) != ("column" in groups):
        raise InputError(f"pattern {layout.pattern!r}: the groups row and column go together")
    ways = ("well" in groups) + ("row" in groups) + (layout.well is not None)
    if not ways:
        raise InputError(
            f"nothing says the well: give the pattern {layout.pattern!r} a group (?P<well>...), or row and column, or "
            "name the well of all files (--well B02)"
        )
    if ways > 1:
        raise InputError(
            f"pattern {layout.pattern!r} with the fixed well {layout.well!r} tells the well in "
            f"{ways} ways: exactly one is needed, a group well, groups row and column, or a fixed well"
        )
    return pattern


def _plane(name: str, said: dict[str, str], layout: PatternLayout) -> tuple[str, str, int, str, int]:
    try:
        return (
            _well(said, layout),
            check_name(_plain_number(said.get("site", layout.site)), "site"),
            _number(said, "time"),
            check_name(said.get("channel", layout.channel), "channel"),
            _number(said, "z"),
        )
    except InputError as error:
        raise InputError(f"file {name!r}: {error}") from error


def _well(said: dict[str, str], layout: PatternLayout) -> str:
    if layout.well is not None:
        return checked_well(layout.well)
    if "well" in said:
        return checked_well(said["well"])
    if "row" in said and "column" in said:
        return well_name(said["row"], said["column"])
    raise InputError("the pattern matches but captures no well")


def _number(said: dict[str, str], group: str) -> int:
    text = said.get(group, "0")
    # 18 digits fit the int64 that the table holds.
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(f"group {group!r} captures {text!r}, which is not a whole number")
    return int(text)


def _plain_number(text: str) -> str:
    return str(int(text)) if re.fullmatch(r"[0-9]{1,18}", text) else text


def _check_unique(table: pd.DataFrame) -> None:
    again = table.duplicated(PLANE)
    if not again.any():
        return
    second = table[again].iloc[0]
    same = table[(table[PLANE] == second[PLANE]).all(axis=1)]
    where = ", ".join(f"{name} {second[name]}" for name in PLANE)
    raise InputError(
        f"{same['path'].iloc[0]!r} and {same['path'].iloc[1]!r} are both the plane {where}, and "
        f"{int(again.sum())} files in all repeat a plane; give the pattern a group for what tells "
        "them apart, or make it match only one of them"
    )


def _order(row: _Row) -> tuple[int, int, _Natural, str, int, _Natural, str, int]:
    _, well, site, time, channel, z = row
    letters, column = split_well(well)
    place = (_row_number(letters), int(column))
    return *place, natural(site), site, time, natural(channel), channel, z


def _evenly(numbers: Sequence[int]) -> list[int]:
    """The even grid that ascending numbers fill at least half of, or else the numbers."""
    if len(numbers) < 2:
        return list(numbers)
    first, last = numbers[0], numbers[-1]
    step = min(later - earlier for earlier, later in pairwise(numbers))
    even = all((number - first) % step == 0 for number in numbers)
    # Numbers far apart are time stamps or the like, and what lies between them was never taken.
    if not even or (last - first) // step + 1 > 2 * len(numbers):
        return list(numbers)
    return list(range(first, last + 1, step))


def _row_number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _row_letters(number: int) -> str:
    if not 1 <= number <= MAX_ROWS:
        raise InputError(f"row {number} is on no plate: rows are counted from 1 to {MAX_ROWS}")
    ahead, last = divmod(number - 1, 26)
    return ("A" if ahead else "") + chr(ord("A") + last)
