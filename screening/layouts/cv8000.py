"""Exports of a Yokogawa CellVoyager (CV7000, CV8000): ``PLATE_D08_T0001F001L01A01Z01C01.tif``.

``MeasurementData.mlf`` records every image taken, ``MeasurementDetail.mrf`` the pixel size and counts, the ``.mes``
file the channels. ``DC_`` (dark) and ``SC_`` (shading) files beside them are corrections, not planes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from xml.etree.ElementTree import Element

import numpy as np
from pydantic import Field

from screening.layouts.planes import (
    Channel,
    Metadata,
    Plane,
    PlaneFile,
    Planes,
    beside,
    check_planes,
    collect,
    one_plate,
    positive,
    well_name,
)
from screening.layouts.xml import children, local_attributes, parse_xml
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_FILE = re.compile(
    r"(?P<plate>.+)_(?P<row>[A-Z]{1,2})(?P<column>\d{2})_T(?P<time>\d{4})F(?P<site>\d{3,4})L(?P<line>\d{2})"
    r"A(?P<action>\d{2})Z(?P<z>\d{2,4})C(?P<channel>\d{2})\.tiff?",
    re.IGNORECASE | re.ASCII,
)
_CORRECTION = re.compile(r"(?:DC|SC)_.*\.tiff?", re.IGNORECASE)
# Metadata lie in the very folder of the images.
_NOTHING = re.compile(r"(?!)")

CORRECTION = "correction image"


class Cv8000Layout(Config):
    """A plate exported by a Yokogawa CellVoyager."""

    method: Literal["cv8000"] = Field("cv8000", description="Yokogawa CellVoyager CV7000 and CV8000")

    def documents(self, names: Iterable[str]) -> list[str]:
        """The measurement's records, details and settings."""
        return [name for name in names if name.lower().endswith((".mlf", ".mrf", ".mes"))]

    def read(self, names: Iterable[str], documents: Mapping[str, bytes]) -> Planes:
        """Read planes from names; promises, steps and channels from the metadata.

        The ``.mlf`` promises the images that it records, and the ``.mrf``, where there is one time line, as many time
        points of each as it counts.

        Args:
            names: image paths below the source folder, parts joined by ``/``.
            documents: ``.mlf``, ``.mrf`` and ``.mes`` files: path -> bytes.

        Raises:
            InputError: if a name's well is on no plate, two files hold the same plane, plates are mixed, or the
                metadata cannot be read.
        """
        files: list[PlaneFile] = []
        ignored: list[str] = []
        corrections: list[tuple[str, str, str]] = []
        plates: dict[str, str] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            match = _FILE.fullmatch(file)
            if match is not None:
                plates.setdefault(f"{folder}/{match['plate']}".lstrip("/"), name)
                files.append((name, *_plane(name, match)))
            elif _CORRECTION.fullmatch(file):
                corrections.append((name, "", CORRECTION))
            else:
                ignored.append(name)
        one_plate(plates)
        if plates:
            documents = beside(documents, next(iter(plates)).rpartition("/")[0], _NOTHING)
        roots = {name: parse_xml(name, data) for name, data in documents.items()}
        said = [
            (name, local_attributes(element))
            for name, root in roots.items()
            if name.lower().endswith(".mlf")
            for element in children(root, "MeasurementRecord")
        ]
        records = [_Record.read(name, record) for name, record in said if record.get("Type") != "ERR"]
        failures = [_Failure.read(name, record) for name, record in said if record.get("Type") == "ERR"]
        time_points = 0
        pixel_size = None
        for name, root in roots.items():
            if name.lower().endswith(".mrf"):
                time_points = int(_number(name, root, "TimePointCount"))
                for channel in children(root, "MeasurementChannel"):
                    pixel_size = _number(name, channel, "HorizontalPixelDimension")
        channels = {}
        for name, root in roots.items():
            if name.lower().endswith(".mes"):
                channels = _channels(name, root)
        return collect(
            files,
            ignored,
            "if they are of several actions or time lines, give a folder with the files of one",
            left_out=corrections,
            promised=_promised(records, failures, time_points),
            metadata=Metadata(
                channels, positive(pixel_size), positive(_time_step(records)), positive(_z_step(records))
            ),
        )


@dataclass(frozen=True)
class _Record:
    """A record of an image that was taken."""

    plane: Plane
    line: int
    action: int
    acquired: datetime
    z: float

    @classmethod
    def read(cls, name: str, said: dict[str, str]) -> _Record:
        try:
            return cls(
                (
                    well_name(said["Row"], said["Column"]),
                    str(int(said["FieldIndex"])),
                    int(said["TimePoint"]),
                    str(int(said["Ch"])),
                    int(said["ZIndex"]),
                ),
                int(said["TimelineIndex"]),
                int(said["ActionIndex"]),
                datetime.fromisoformat(said["Time"]),
                float(said["Z"]),
            )
        except (KeyError, ValueError) as error:
            raise _unusable(name, said, error) from error


@dataclass(frozen=True)
class _Failure:
    """A record of a failure, such as of the autofocus: of one field or time point, or of all where it names none."""

    well: str
    site: str | None
    time: int | None

    @classmethod
    def read(cls, name: str, said: dict[str, str]) -> _Failure:
        try:
            return cls(
                well_name(said["Row"], said["Column"]),
                str(int(said["FieldIndex"])) if "FieldIndex" in said else None,
                int(said["TimePoint"]) if "TimePoint" in said else None,
            )
        except (KeyError, ValueError) as error:
            raise _unusable(name, said, error) from error


def _unusable(name: str, said: dict[str, str], error: Exception) -> InputError:
    return InputError(f"{name}: a MeasurementRecord is not usable: {type(error).__name__}: {error}; it says {said}")


def _plane(name: str, match: re.Match[str]) -> Plane:
    try:
        well = well_name(match["row"], match["column"])
    except InputError as error:
        raise InputError(f"file {name!r}: {error}") from error
    return well, str(int(match["site"])), int(match["time"]), str(int(match["channel"])), int(match["z"])


def _promised(records: list[_Record], failures: list[_Failure], time_points: int) -> Iterable[Plane]:
    """What was recorded, what would have been but for a failure, and the time points still to come."""
    planes = {record.plane for record in records}
    images = {plane[1:] for plane in planes}  # of any well
    for failure in failures:
        planes |= {
            (failure.well, site, time, channel, z)
            for site, time, channel, z in images
            if failure.site in (None, site) and failure.time in (None, time)
        }
        check_planes(len(planes))
    if len({record.line for record in records}) == 1:
        check_planes(len({(well, site, channel, z) for well, site, _, channel, z in planes}) * time_points)
        planes |= {
            (well, site, later, channel, z)
            for well, site, _, channel, z in tuple(planes)
            for later in range(1, time_points + 1)
        }
    return planes


def _channels(name: str, settings: Element) -> dict[str, Channel]:
    """Channels of the .mes by number: called by dye, or filter where none is named."""
    said = [local_attributes(element) for part in children(settings, "ChannelList") for element in part]
    try:
        return {
            str(int(entry["Ch"])): Channel(
                entry.get("Fluorophore") or entry.get("Acquisition") or entry["Ch"],
                entry["Color"][-6:] if re.fullmatch("#[0-9A-Fa-f]{8}", entry.get("Color", "")) else None,
            )
            for entry in said
            if "Ch" in entry
        }
    except ValueError as error:
        raise InputError(f"{name}: a channel's number Ch is not usable: {error}") from error


def _time_step(records: list[_Record]) -> float | None:
    """Median seconds from one time point of a plane to the next."""
    by_plane: dict[tuple[object, ...], list[_Record]] = {}
    for record in records:
        well, site, _, channel, z = record.plane
        by_plane.setdefault((well, site, channel, z, record.line, record.action), []).append(record)
    steps = []
    for of_plane in by_plane.values():
        first = min(of_plane, key=lambda record: record.plane[2])
        last = max(of_plane, key=lambda record: record.plane[2])
        if first.plane[2] < last.plane[2]:
            seconds = (last.acquired - first.acquired).total_seconds()
            steps.append(seconds / (last.plane[2] - first.plane[2]))
    return round(float(np.median(steps)), 3) if steps else None


def _z_step(records: list[_Record]) -> float | None:
    """Micrometres from one z plane to the next."""
    heights = {record.plane[4]: record.z for record in records if record.plane[:4] == records[0].plane[:4]}
    low, high = min(heights, default=0), max(heights, default=0)
    return abs(heights[high] - heights[low]) / (high - low) if high > low else None


def _number(name: str, element: Element, attribute: str) -> float:
    text = local_attributes(element).get(attribute, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name}: {attribute} is {text!r}, expected a number")
    return number
