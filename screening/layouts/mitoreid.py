"""Raw fields as MitoReID has them: ``{drug}/{drug}_{t}_w{c}.tif``, repeats in ``{drug}-2``.

There are no wells in it: every folder is given one of a virtual plate, and a plate map says which drug stands where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import pandas as pd
from pydantic import Field

from screening.layouts.planes import PlaneFile, Planes, collect, natural, one_plate, well_name
from storage_schemas.base import Config
from storage_schemas.errors import InputError

_FILE = re.compile(r"(?P<drug>.+)_(?P<time>\d{1,9})_w(?P<channel>\d{1,2})\.tiff?", re.IGNORECASE | re.ASCII)
_REPEAT = re.compile(r"(?P<drug>.+)-\d{1,3}", re.ASCII)

# (rows, columns) of the plates made.
_PLATES = ((8, 12), (16, 24), (32, 48))
_SITE = "1"
CONTROL = "dmso"


class MitoReidLayout(Config):
    """Folders of fields, one a drug and repeat."""

    method: Literal["mitoreid"] = Field("mitoreid", description="a folder a drug, as MitoReID has them")

    def documents(self, names: Iterable[str]) -> list[str]:
        """None: there is no metadata."""
        return []

    def read(self, names: Iterable[str], documents: Mapping[str, bytes]) -> Planes:
        """Read drugs, times and channels from names, and lay the drugs out on a plate.

        Folders get the wells of the smallest plate that holds them, row by row in natural order. ``X-2`` is a repeat
        of ``X`` if there is a folder ``X`` or X is a number, as drugs are called there: another well of the same
        compound, in the same replicate, which is the plate. ``dmso``, whatever number follows it, is the negative
        control.

        Args:
            names: image paths below the source folder, parts joined by ``/``.
            documents: of no use here.

        Raises:
            InputError: if two files hold the same plane, several libraries are mixed, or there are more folders than
                wells on any plate.
        """
        found: list[tuple[str, str, int, str]] = []
        ignored: list[str] = []
        libraries: dict[str, str] = {}
        for name in names:
            above, _, file = name.rpartition("/")
            library, _, folder = above.rpartition("/")
            match = _FILE.fullmatch(file)
            if match is None or match["drug"] != folder:
                ignored.append(name)
                continue
            libraries.setdefault(library, name)
            found.append((name, folder, int(match["time"]), str(int(match["channel"]))))
        one_plate(libraries)
        folders = sorted({folder for _, folder, _, _ in found}, key=lambda folder: (natural(folder), folder))
        wells = dict(zip(folders, _wells(len(folders)), strict=True))
        files: list[PlaneFile] = [
            (name, wells[folder], _SITE, time, channel, 0) for name, folder, time, channel in found
        ]
        plate_map = pd.DataFrame(
            [(wells[folder], *_compound(folder, set(folders))) for folder in folders],
            columns=["well", "compound", "role"],
        )
        return collect(files, ignored, "keep one of them", plate_map=plate_map)


def _compound(folder: str, folders: set[str]) -> tuple[str, str]:
    """(compound, role) of a folder."""
    if re.fullmatch(rf"{CONTROL}[-_ ]?\d*", folder, re.IGNORECASE | re.ASCII):
        return CONTROL, "negative_control"
    match = _REPEAT.fullmatch(folder)
    if match is not None and (match["drug"] in folders or match["drug"].isdecimal()):
        return match["drug"], "treatment"
    return folder, "treatment"


def _wells(count: int) -> list[str]:
    for rows, columns in _PLATES:
        if count <= rows * columns:
            return [well_name(str(1 + i // columns), str(1 + i % columns)) for i in range(count)]
    raise InputError(f"{count} drug folders are more than a plate has wells (1536); ingest them in parts")
