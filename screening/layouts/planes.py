"""Planes of a plate: which well, site, time, channel and z each image file holds, and which planes are not there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pandas as pd

from storage_schemas.errors import InputError
from storage_schemas.keys import canonical_well, split_well
from storage_schemas.missing import ABSENT, PLANE, WITHOUT, ZEROS

# The largest plates made: 1536 wells are 32 rows (A..AF) of 48 columns.
MAX_ROWS = 32
MAX_COLUMNS = 48
# More than any plate has: 1536 wells of 9 sites, 5 channels and 200 time points are 14 million.
MAX_PLANES = 2 * 10**7

Plane = tuple[str, str, int, str, int]
PlaneFile = tuple[str, str, str, int, str, int]
LeftOut = tuple[str, str, str]
_Natural = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Channel:
    """What an instrument's metadata says of a channel.

    Attributes:
        name: as people call it.
        color: RRGGBB, or None where unknown.
    """

    name: str
    color: str | None = None


@dataclass(frozen=True)
class Metadata:
    """What an instrument's metadata says of a plate's images.

    Attributes:
        channels: by what file names call them.
        pixel_size: micrometres.
        time_step: seconds from one time point's number to the next.
        z_step: micrometres from one z plane's number to the next.
    """

    channels: Mapping[str, Channel] = field(default_factory=dict)
    pixel_size: float | None = None
    time_step: float | None = None
    z_step: float | None = None


@dataclass(frozen=True)
class Planes:
    """What a folder's names and its instrument's metadata say.

    Attributes:
        table: a row a file, sorted by well, site, time, channel, z (numbers as numbers): ``path``
            (as given), ``well`` (canonical, ``B02``), ``site`` (text), ``time`` (int), ``channel``
            (text), ``z`` (int). Times and z planes keep the numbers they have in the names.
        ignored: the names that say no plane, in the order given.
        left_out: a row a file that is known and not a plane: ``path``, ``well`` (or empty), ``reason``.
        promised: a row a plane that the metadata promises: well, site, time, channel, z; empty where it says nothing.
        metadata: what else it says.
        plate_map: a row a well whose compound the names say: well, compound, role; or None.
    """

    table: pd.DataFrame
    ignored: list[str]
    left_out: pd.DataFrame
    promised: pd.DataFrame
    metadata: Metadata = Metadata()
    plate_map: pd.DataFrame | None = None


def collect(
    files: Sequence[PlaneFile],
    ignored: list[str],
    advice: str,
    *,
    left_out: Sequence[LeftOut] = (),
    promised: Iterable[Plane] = (),
    metadata: Metadata | None = None,
    plate_map: pd.DataFrame | None = None,
) -> Planes:
    """Sort what was read into :class:`Planes`.

    Args:
        files: (path, well, site, time, channel, z) of each.
        ignored: see :class:`Planes`, as are the others.
        advice: what to do if two files hold the same plane.

    Raises:
        InputError: if two files hold the same plane.
    """
    in_order = sorted(files, key=lambda row: plane_order((row[1], row[2], row[3], row[4], row[5])))
    table = pd.DataFrame(in_order, columns=["path", *PLANE])
    _check_unique(table, advice)
    promises: list[Plane] = sorted(set(promised), key=plane_order)
    return Planes(
        table,
        ignored,
        pd.DataFrame(list(left_out), columns=["path", "well", "reason"]),
        pd.DataFrame(promises, columns=PLANE),
        metadata or Metadata(),
        plate_map,
    )


@dataclass(frozen=True)
class Grid:
    """The planes that each site of a plate has when it is written.

    Attributes:
        times: numbers of the frames, ascending. A time that is nowhere but stands between others is one of them: a
            movie that lost a frame is not a movie with fewer frames.
        channels: in natural order.
        zs: numbers of the z planes, ascending, with gaps filled likewise.
    """

    times: tuple[int, ...]
    channels: tuple[str, ...]
    zs: tuple[int, ...]


def grid(planes: Planes) -> Grid:
    """The times, channels and z planes that occur anywhere on a plate, with gaps filled.

    A gap is a number that the metadata promises between two that are there, or, where times stand on an even grid with
    holes (0, 1, 3), the holes.
    """
    table, promised = planes.table, planes.promised
    return Grid(
        _filled(table["time"], promised["time"]),
        tuple(sorted(set(table["channel"]), key=natural)),
        _filled(table["z"], promised["z"]),
    )


def missing_planes(planes: Planes, *, keep_z: bool = False) -> pd.DataFrame:
    """The planes that should be there and are not, and what stands in the plate instead.

    Should be there is what the metadata promises. Where it promises nothing, every site is expected to have every
    time and channel of the plate's :func:`grid`, and every z plane that its channel has anywhere. What nobody promised
    but the grid has a place for is listed too, since zeros stand there: a frame of a channel, once where z is
    projected; where it is kept, every z plane.

    Args:
        planes: as a layout reads them.
        keep_z: z is stored and not projected.

    Returns:
        columns well, site, time, channel, z, ``promised`` (bool) and ``written``: ``zeros`` stand in its place;
        ``without``: z was projected without it; ``no``: its site, time or channel is nowhere and not written.
    """
    there = set(planes.table[PLANE].itertuples(index=False, name=None))
    frames = {(well, site, time, channel) for well, site, time, channel, _ in there}
    sites = dict.fromkeys((well, site) for well, site, *_ in planes.table[PLANE].itertuples(index=False, name=None))
    of_plate = grid(planes)
    zs_of = {str(channel): _filled(of["z"], []) for channel, of in planes.table.groupby("channel")}
    promised = set(planes.promised.itertuples(index=False, name=None))
    should = promised or {
        (*site, time, channel, z)
        for site in sites
        for time in of_plate.times
        for channel in of_plate.channels
        for z in zs_of[channel]
    }
    missing = should - there
    listed = {(well, site, time, channel) for well, site, time, channel, _ in missing}
    for site in sites:
        for time in of_plate.times:
            for channel in of_plate.channels:
                frame = (*site, time, channel)
                if keep_z:
                    missing |= {(*frame, z) for z in of_plate.zs} - there
                elif frame not in frames and frame not in listed:
                    missing.add((*frame, zs_of[channel][0]))

    def written(plane: Plane) -> str:
        well, site, time, channel, z = plane
        if (well, site) not in sites or time not in of_plate.times or channel not in of_plate.channels:
            return ABSENT
        if keep_z:
            return ZEROS if z in of_plate.zs else ABSENT
        return WITHOUT if plane[:4] in frames else ZEROS

    rows = [(*plane, plane in promised, written(plane)) for plane in sorted(missing, key=plane_order)]
    return pd.DataFrame(rows, columns=[*PLANE, "promised", "written"])


def one_plate(names: Mapping[str, str]) -> None:
    """Refuse files of several plates.

    Args:
        names: plate -> one of its files.

    Raises:
        InputError: naming two plates and a file of each.
    """
    if len(names) > 1:
        (one, of_one), (two, of_two) = list(names.items())[:2]
        raise InputError(
            f"files of {len(names)} plates are mixed: {of_one!r} is of plate {one!r}, {of_two!r} of {two!r}; ingest "
            "one plate at a time: give the folder of one, or put its name into the pattern"
        )


def beside(documents: Mapping[str, bytes], folder: str, inside: re.Pattern[str]) -> dict[str, bytes]:
    """The metadata files of one plate: those in its folder, or in folders that are ``inside`` a plate's."""
    return {name: data for name, data in documents.items() if plate_folder(name, inside) == folder}


def plate_folder(name: str, inside: re.Pattern[str]) -> str:
    """The folder of a file's plate: its own without the parts that lie ``inside`` every plate's."""
    return "/".join(part for part in name.split("/")[:-1] if not inside.fullmatch(part))


def check_planes(n: int) -> None:
    """Refuse metadata that promise more planes than any plate has, before they are listed.

    Raises:
        InputError: if they do.
    """
    if n > MAX_PLANES:
        raise InputError(
            f"the metadata promise {n:,} planes, and no plate has more than {MAX_PLANES:,}: they are damaged, or of "
            "several plates; without them names alone are read"
        )


def positive(value: float | None) -> float | None:
    """A size or step as metadata say it, or None where they say nothing that is one: 0, say, or NaN."""
    return value if value is not None and 0 < value < math.inf else None


def well_name(row: str, column: str) -> str:
    """The canonical name of a well from its row (letters or a number from 1) and column: ``B02``.

    Raises:
        InputError: if there is no such well on any plate (rows A..AF or 1..32, columns 1..48).
    """
    if re.fullmatch(r"[0-9]{1,9}", row):
        if not 1 <= int(row) <= MAX_ROWS:
            raise InputError(f"row {int(row)} is on no plate: rows are counted from 1 to {MAX_ROWS}")
        row = row_letters(int(row))
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
            f"well {well!r} is on no plate: rows go from A to {row_letters(MAX_ROWS)}, columns from 1 to {MAX_COLUMNS}"
        )
    return name


def row_letters(number: int) -> str:
    """The letters of a row, counted from 1: ``B``, ``AF``, and so on up to row 702, ``ZZ``."""
    ahead, last = divmod(number - 1, 26)
    return (chr(ord("A") + ahead - 1) if ahead else "") + chr(ord("A") + last)


def natural(text: str) -> _Natural:
    """A sort key under which numbers inside a text count as numbers: ``w2`` before ``w10``."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text) if part)


def plane_order(plane: Plane) -> tuple[int, int, _Natural, str, int, _Natural, str, int]:
    """A sort key of planes: by row, column, site, time, channel, z, with numbers as numbers."""
    well, site, time, channel, z = plane
    letters, column = split_well(well)
    return _row_number(letters), int(column), natural(site), site, time, natural(channel), channel, z


def _check_unique(table: pd.DataFrame, advice: str) -> None:
    again = table.duplicated(PLANE)
    if not again.any():
        return
    second = table[again].iloc[0]
    same = table[(table[PLANE] == second[PLANE]).all(axis=1)]
    where = ", ".join(f"{name} {second[name]}" for name in PLANE)
    raise InputError(
        f"{same['path'].iloc[0]!r} and {same['path'].iloc[1]!r} are both the plane {where}, and "
        f"{int(again.sum())} files in all repeat a plane; {advice}"
    )


def _filled(there: Iterable[int], promised: Iterable[int]) -> tuple[int, ...]:
    numbers = sorted(set(there))
    if not numbers:
        return ()
    between = {number for number in promised if numbers[0] < number < numbers[-1]}
    return tuple(sorted({*_evenly(numbers), *between}))


def _evenly(numbers: Sequence[int]) -> Sequence[int]:
    """The even grid that ascending numbers fill at least half of, or else the numbers."""
    if len(numbers) < 2:
        return numbers
    first, last = numbers[0], numbers[-1]
    step = min(later - earlier for earlier, later in pairwise(numbers))
    even = all((number - first) % step == 0 for number in numbers)
    # Numbers far apart are time stamps or the like, and what lies between them was never taken.
    if not even or (last - first) // step + 1 > 2 * len(numbers):
        return numbers
    return range(first, last + 1, step)


def _row_number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number
