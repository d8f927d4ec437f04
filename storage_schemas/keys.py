"""Keys of what a screen holds: plate, well, site and track, each with one canonical text form.

The text form joins the parts with ``/``: ``plate_1/B02``, ``plate_1/B02/0``, ``plate_1/B02/0/17``.
Names come from outside (files, tables, other people's plates) and become parts of paths, so each is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from storage_schemas.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+=@()-]*")
_WELL = re.compile(r"([A-Z]{1,2})([0-9]{1,3})")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can safely be one part of a path or URL.

    Raises:
        InputError: for empty names, path separators, ``..``, control characters and the like.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.endswith((".", " ")) or len(name) > 128:
        raise InputError(
            f"{what} name {name!r} is not usable: up to 128 letters, digits, blanks and . _ + = @ ( ) - are, "
            "beginning with a letter or digit, without '..' and not ending in '.' or a blank"
        )
    return name


def split_well(well: str) -> tuple[str, str]:
    """Split a well name into its row letters and column number as NGFF wants them: ``B02 -> ("B", "02")``.

    Raises:
        InputError: if the name is not row letters followed by a column number.
    """
    match = _WELL.fullmatch(well)
    if match is None:
        raise InputError(f"well {well!r} is not a well name: expected row letters and a column number, such as B02")
    return match[1], match[2]


def canonical_well(well: str) -> str:
    """The one spelling of a well that tables and folders use: two digits at least, ``b2 -> B02``."""
    row, column = split_well(str(well).strip().upper())
    if int(column) == 0:
        raise InputError(f"well {well!r}: columns are counted from 1")
    return f"{row}{int(column):02d}"


@dataclass(frozen=True, order=True)
class WellKey:
    """A well of a plate: the unit of work."""

    plate: str
    well: str

    def __post_init__(self) -> None:
        check_name(self.plate, "plate")
        if canonical_well(self.well) != self.well:
            raise InputError(f"well {self.well!r} must be spelt {canonical_well(self.well)!r}")

    def __str__(self) -> str:
        return f"{self.plate}/{self.well}"

    @classmethod
    def parse(cls, text: str) -> WellKey:
        """Read the text form back.

        Raises:
            InputError: if the text is not ``plate/well``.
        """
        return cls(*_parts(text, 2, "plate/well"))


@dataclass(frozen=True, order=True)
class SiteKey:
    """A site (field of view) of a well."""

    plate: str
    well: str
    site: str

    def __post_init__(self) -> None:
        WellKey(self.plate, self.well)
        check_name(self.site, "site")

    def __str__(self) -> str:
        return f"{self.plate}/{self.well}/{self.site}"

    @classmethod
    def parse(cls, text: str) -> SiteKey:
        """Read the text form back.

        Raises:
            InputError: if the text is not ``plate/well/site``.
        """
        return cls(*_parts(text, 3, "plate/well/site"))


@dataclass(frozen=True, order=True)
class TrackKey:
    """A tracked cell of a site."""

    plate: str
    well: str
    site: str
    track: int

    def __post_init__(self) -> None:
        SiteKey(self.plate, self.well, self.site)
        if self.track < 1:
            raise InputError(f"track {self.track} is not a track number: they are counted from 1")

    def __str__(self) -> str:
        return f"{self.plate}/{self.well}/{self.site}/{self.track}"

    @classmethod
    def parse(cls, text: str) -> TrackKey:
        """Read the text form back.

        Raises:
            InputError: if the text is not ``plate/well/site/track``.
        """
        plate, well, site, track = _parts(text, 4, "plate/well/site/track")
        if not re.fullmatch(r"[1-9][0-9]{0,17}", track):
            raise InputError(f"{text!r}: track {track!r} is not a whole number counted from 1")
        return cls(plate, well, site, int(track))


def _parts(text: str, count: int, form: str) -> list[str]:
    parts = text.split("/")
    if len(parts) != count:
        raise InputError(f"{text!r} is not of the form {form}")
    return parts
