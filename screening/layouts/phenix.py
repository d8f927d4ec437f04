"""Exports of a Revvity (PerkinElmer) Opera Phenix or Operetta: ``Images/r01c02f03p01-ch1sk1fk1fl1.tiff``.

Names hold row, column, field, plane, channel and the time point (``sk``; ``t`` in newer ones). ``Index.idx.xml``
(or ``Index.xml``) beside them lists every image; up to Harmony 5 each entry says its channel's name and pixel size,
from Harmony 6 on they stand once, under ``Maps``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from screening.layouts.color import wavelength_color
from screening.layouts.planes import (
    Channel,
    Metadata,
    Plane,
    PlaneFile,
    Planes,
    beside,
    collect,
    one_plate,
    plate_folder,
    positive,
    well_name,
)
from screening.layouts.xml import children, local_attributes, parse_xml, texts
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_FILE = re.compile(
    r"r(?P<row>\d{2})c(?P<column>\d{2})f(?P<site>\d{2,4})p(?P<z>\d{2,4})(?:rc\d+)?-ch(?P<channel>\d{1,2})"
    r"(?:sk(?P<time>\d+)fk\d+fl\d+|t(?P<t>\d+))\.tiff?",
    re.IGNORECASE | re.ASCII,
)
_INDEX = re.compile(r"Index(?:\.idx|\.ref)?\.xml", re.IGNORECASE)
# Folders inside a measurement, which tell no plates apart.
_INSIDE = re.compile(r"Images|r\d{2}c\d{2}", re.IGNORECASE | re.ASCII)


class PhenixLayout(Config):
    """A measurement exported by Harmony."""

    method: Literal["phenix"] = Field("phenix", description="Revvity (PerkinElmer) Opera Phenix and Operetta")

    def documents(self, names: Iterable[str]) -> list[str]:
        """The index of the measurement."""
        return [name for name in names if _INDEX.fullmatch(name.rpartition("/")[2])]

    def read(self, names: Iterable[str], documents: Mapping[str, bytes]) -> Planes:
        """Read planes from names; promises, pixel size, steps and channels from the index.

        Args:
            names: image paths below the source folder, parts joined by ``/``.
            documents: index files: path -> bytes.

        Raises:
            InputError: if a name's well is on no plate, two files hold the same plane, plates are mixed, or the index
                cannot be read.
        """
        files: list[PlaneFile] = []
        ignored: list[str] = []
        plates: dict[str, str] = {}
        for name in names:
            plane = _plane(name)
            if plane is None:
                ignored.append(name)
                continue
            plates.setdefault(plate_folder(name, _INSIDE), name)
            files.append((name, *plane))
        one_plate(plates)
        if plates:
            documents = beside(documents, next(iter(plates)), _INSIDE)
        promised: dict[Plane, dict[str, str]] = {}
        channels: dict[str, dict[str, str]] = {}
        for name, data in documents.items():
            root = parse_xml(name, data)
            for entries in children(root, "Maps"):
                for part in children(entries, "Map"):
                    for entry in children(part, "Entry"):
                        channel = local_attributes(entry).get("ChannelID", "")
                        channels.setdefault(channel, {}).update(texts(entry))
            for images in children(root, "Images"):
                for image in children(images, "Image"):
                    said = texts(image)
                    plane = _plane(said.get("URL", "").replace("\\", "/"))
                    if plane is None:
                        raise InputError(
                            f"{name}: an image's URL {said.get('URL')!r} is not named as Harmony names files"
                        )
                    promised[plane] = said
                    channels.setdefault(plane[3], {}).update(said)
        return collect(
            files,
            ignored,
            "if they are of fast kinetics or lifetime series, give a folder with the files of one",
            promised=promised,
            metadata=_metadata(channels, promised),
        )


def _plane(name: str) -> Plane | None:
    match = _FILE.fullmatch(name.rpartition("/")[2])
    if match is None:
        return None
    try:
        well = well_name(match["row"], match["column"])
    except InputError as error:
        raise InputError(f"file {name!r}: {error}") from error
    time = int(match["time"] or match["t"])
    return well, str(int(match["site"])), time, str(int(match["channel"])), int(match["z"])


def _metadata(channels: Mapping[str, Mapping[str, str]], images: Mapping[Plane, Mapping[str, str]]) -> Metadata:
    named: dict[str, Channel] = {}
    sizes = []
    for channel, said in channels.items():
        emission = positive(_real(said, "MainEmissionWavelength"))
        color = None if emission is None else wavelength_color(emission)
        named[channel] = Channel(said.get("ChannelName", channel), color)
        sizes.append(positive(_real(said, "ImageResolutionX")))
    # Lengths are in metres.
    metres = next((size for size in sizes if size), None)
    z_step = _step({plane: _real(said, "PositionZ") for plane, said in images.items()}, 4)
    time_step = _step({plane: _real(said, "MeasurementTimeOffset") for plane, said in images.items()}, 2)
    return Metadata(
        named,
        None if metres is None else round(metres * 1e6, 6),
        None if time_step is None else round(time_step, 3),
        None if z_step is None else round(z_step * 1e6, 3),
    )


def _step(values: Mapping[Plane, float | None], axis: int) -> float | None:
    """Median difference of a value from one number on an axis of the plane to the next, all else equal."""
    series: dict[tuple[str | int, ...], dict[int, float]] = {}
    for plane, value in values.items():
        if value is not None:
            others = (*plane[:axis], *plane[axis + 1 :])
            series.setdefault(others, {})[int(plane[axis])] = value
    steps = [(of[max(of)] - of[min(of)]) / (max(of) - min(of)) for of in series.values() if len(of) > 1]
    return positive(abs(float(np.median(steps)))) if steps else None


def _real(said: Mapping[str, str], name: str) -> float | None:
    try:
        return float(said[name])
    except (KeyError, ValueError):
        return None
