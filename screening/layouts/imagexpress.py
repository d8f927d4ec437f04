"""Exports of a Molecular Devices ImageXpress (MetaXpress): ``TimePoint_1/ZStep_2/9987_B02_s1_w1.TIF``.

The folders and the parts ``_s`` and ``_w`` are there only where there is more than one time point, z plane, site or
wavelength; a GUID may follow; ``_thumb`` files are previews. The ``.HTD`` beside them says what was to be acquired.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Any, Literal

from pydantic import Field

from screening.layouts.color import wavelength_color
from screening.layouts.planes import (
    Channel,
    LeftOut,
    Metadata,
    Plane,
    PlaneFile,
    Planes,
    beside,
    check_planes,
    collect,
    one_plate,
    plate_folder,
    positive,
    well_name,
)
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_GUID = r"[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}"
# Lazy numbers, since a GUID that follows without a mark may begin with digits; and a lazy plate, since _w10 looks like
# a well.
_FILE = re.compile(
    r"(?P<plate>.+?)_(?P<row>[A-Z]{1,2})(?P<column>\d{2})(?:_s(?P<site>\d{1,4}?))?(?:_w(?P<channel>\d{1,2}?))?"
    rf"(?P<thumb>_thumb)?(?:{_GUID})?\.tiff?",
    re.IGNORECASE | re.ASCII,
)
_FOLDER = re.compile(r"(?P<axis>TimePoint|ZStep)_(?P<number>\d{1,9})", re.IGNORECASE | re.ASCII)

PROJECTION = "the microscope's own projection"
THUMBNAIL = "thumbnail"


class ImageXpressLayout(Config):
    """A plate exported by MetaXpress."""

    method: Literal["imagexpress"] = Field("imagexpress", description="Molecular Devices ImageXpress")

    def documents(self, names: Iterable[str]) -> list[str]:
        """The ``.HTD`` files nearest to the top; those in the folders below are copies."""
        found = [name for name in names if name.lower().endswith(".htd")]
        depth = min((name.count("/") for name in found), default=0)
        return [name for name in found if name.count("/") == depth]

    def read(self, names: Iterable[str], documents: Mapping[str, bytes]) -> Planes:
        """Read planes from names, and what the ``.HTD`` promises.

        Names without a part mean its number 1. ``ZStep_0``, or a file above the ``ZStep_`` folders, is the
        microscope's own projection: it is left out where its channel has z planes, and stands for z 1 where it has
        none.

        Args:
            names: image paths below the source folder, parts joined by ``/``.
            documents: ``.HTD`` files: path -> bytes.

        Raises:
            InputError: if a name's well is on no plate, two files hold the same plane, plates are mixed, or the
                ``.HTD`` cannot be read.
        """
        files: list[PlaneFile] = []
        ignored: list[str] = []
        left_out: list[LeftOut] = []
        plates: dict[str, str] = {}
        for name in names:
            plate, found = _parse(name)
            if found is None:
                ignored.append(name)
            elif plate is None:
                left_out.append((name, found[1], THUMBNAIL))
            else:
                plates.setdefault(plate, name)
                files.append(found)
        one_plate(plates)
        stacked = {channel for *_, channel, z in files if z > 0}
        left_out += [
            (name, well, PROJECTION) for name, well, _, _, channel, z in files if z == 0 and channel in stacked
        ]
        files = [(*row[:5], row[5] or 1) for row in files if row[5] > 0 or row[4] not in stacked]
        promised: list[Plane] = []
        channels: dict[str, Channel] = {}
        for name, data in _of_plate(documents, next(iter(plates), None)).items():
            htd = _Htd.read(name, data)
            channels = {str(w): Channel(text) for w, text in htd.waves.items()}
            promised += htd.planes({row[2] for row in files}, {row[4] for row in files} - stacked)
        return collect(
            files,
            ignored,
            "keep one of them",
            left_out=left_out,
            promised=promised,
            metadata=Metadata(channels),
        )


@dataclass(frozen=True)
class ImageHeader:
    """What a MetaMorph TIFF says of its plane.

    Attributes:
        pixel_size: micrometres, or None.
        wavelength: of the light measured, nm, or None.
        acquired: local time, or None.
        z: micrometres, or None.
    """

    pixel_size: float | None
    wavelength: float | None
    acquired: datetime | None
    z: float | None

    @classmethod
    def read(cls, plane_info: Mapping[str, Any]) -> ImageHeader:
        """From the entry PlaneInfo of a file's MetaSeries metadata."""
        calibrated = plane_info.get("spatial-calibration-state") and plane_info.get("spatial-calibration-units") == "um"
        acquired = plane_info.get("acquisition-time-local")
        return cls(
            positive(_real(plane_info.get("spatial-calibration-x"))) if calibrated else None,
            positive(_real(plane_info.get("wavelength"))),
            acquired if isinstance(acquired, datetime) else None,
            _real(plane_info.get("z-position")),
        )


def with_headers(metadata: Metadata, headers: Mapping[Plane, ImageHeader]) -> Metadata:
    """Add what images say of themselves to what the ``.HTD`` says.

    Args:
        metadata: as read from the ``.HTD``.
        headers: of some planes of one site; those that differ in time or z alone say its step.
    """
    channels = dict(metadata.channels)
    for (*_, channel, _), header in headers.items():
        known = channels.get(channel, Channel(channel))
        if known.color is None and header.wavelength is not None:
            channels[channel] = replace(known, color=wavelength_color(header.wavelength))
    time_step = z_step = None
    for (one, first), (two, second) in product(headers.items(), repeat=2):
        if one[:2] + one[3:] == two[:2] + two[3:] and one[2] < two[2] and first.acquired and second.acquired:
            time_step = (second.acquired - first.acquired).total_seconds() / (two[2] - one[2])
        if one[:4] == two[:4] and one[4] < two[4] and first.z is not None and second.z is not None:
            z_step = abs(second.z - first.z) / (two[4] - one[4])
    sizes = [header.pixel_size for header in headers.values() if header.pixel_size is not None]
    return Metadata(
        channels,
        sizes[0] if sizes else None,
        positive(time_step),
        positive(z_step and round(z_step, 3)),
    )


def _parse(name: str) -> tuple[str | None, PlaneFile | None]:
    """(plate, plane), (None, plane) of a thumbnail, or (None, None) of another file."""
    *folders, file = name.split("/")
    match = _FILE.fullmatch(file)
    if match is None:
        return None, None
    numbers = {"timepoint": 1, "zstep": 0}
    for axis in filter(None, map(_FOLDER.fullmatch, folders)):
        numbers[axis["axis"].lower()] = int(axis["number"])
    try:
        well = well_name(match["row"], match["column"])
    except InputError as error:
        raise InputError(f"file {name!r}: {error}") from error
    site, channel = str(int(match["site"] or 1)), str(int(match["channel"] or 1))
    plane = (name, well, site, numbers["timepoint"], channel, numbers["zstep"])
    return None if match["thumb"] else f"{plate_folder(name, _FOLDER)}/{match['plate']}".lstrip("/"), plane


def _of_plate(documents: Mapping[str, bytes], plate: str | None) -> Mapping[str, bytes]:
    """The .HTD of a plate: in its folder, and of its name if there are others."""
    if plate is None:
        return documents
    folder, _, prefix = plate.rpartition("/")
    found = beside(documents, folder, _FOLDER)
    named = {name: found[name] for name in found if name.rpartition("/")[2][:-4].lower() == prefix.lower()}
    return named or found


@dataclass(frozen=True)
class _Htd:
    """What an ``.HTD`` file says was to be acquired."""

    wells: tuple[str, ...]
    sites: tuple[bool, ...]  # of the grid, row by row: is it visited?
    times: int
    waves: dict[int, str]
    zs: int

    @classmethod
    def read(cls, name: str, data: bytes) -> _Htd:
        # Latin-1 whatever the computer's language: descriptions hold signs such as µ.
        rows = csv.reader(data.decode("latin-1").splitlines(), skipinitialspace=True)
        try:
            entries = {row[0]: [value.strip() for value in row[1:]] for row in rows if len(row) > 1}
            columns = int(entries["XWells"][0])
            wells = tuple(
                well_name(str(row), str(column))
                for row in range(1, int(entries["YWells"][0]) + 1)
                for column, chosen in enumerate(entries[f"WellsSelection{row}"][:columns], 1)
                if _true(chosen)
            )
            sites: tuple[bool, ...] = (True,)
            if _true(entries["Sites"][0]):
                sites = tuple(
                    _true(chosen)
                    for row in range(1, int(entries["YSites"][0]) + 1)
                    for chosen in entries[f"SiteSelection{row}"]
                )
            waves = {
                wave: entries[f"WaveName{wave}"][0]
                for wave in range(1, int(entries["NWavelengths"][0]) + 1)
                if entries.get(f"WaveCollect{wave}", ["1"])[0] != "0"
            }
            zs = int(entries["ZSteps"][0]) if _true(entries["ZSeries"][0]) else 1
            return cls(wells, sites, int(entries["TimePoints"][0]), waves, zs)
        except (KeyError, IndexError, ValueError, csv.Error) as error:
            missing = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{name}: is not a usable .HTD file: {missing}; without it names alone are read"
            ) from error

    def planes(self, found_sites: set[str], projected: set[str]) -> list[Plane]:
        """Every plane to be acquired; channels ``projected`` have but one z plane on disk."""
        check_planes(len(self.wells) * len(self.sites) * self.times * len(self.waves) * self.zs)
        return [
            (well, site, time, str(wave), z)
            for well, site, time, wave in product(
                self.wells, self._site_names(found_sites), range(1, self.times + 1), self.waves
            )
            for z in range(1, (1 if str(wave) in projected else self.zs) + 1)
        ]

    def _site_names(self, found: set[str]) -> Sequence[str]:
        """Sites are numbered by visit; or by place in the grid, if names on disk show that."""
        by_visit = [str(number) for number in range(1, sum(self.sites) + 1)]
        by_place = [str(number) for number, visited in enumerate(self.sites, 1) if visited]
        return by_visit if found <= set(by_visit) else by_place


def _true(text: str) -> bool:
    return text.upper() == "TRUE"


def _real(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
