"""Names of any kind: the user says by a regular expression where well, site, time, channel and z stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Literal

from pydantic import Field

from screening.layouts.planes import PlaneFile, Planes, checked_well, collect, one_plate, well_name
from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.keys import check_name
from storage_schemas.missing import PLANE

GROUPS = ("plate", "row", "column", *PLANE)


class PatternLayout(Config):
    """How a folder of image files names its planes."""

    method: Literal["pattern"] = Field("pattern", description="names in a form that a regular expression says")
    pattern: str = Field(
        description="regular expression searched for in each file's path below the source folder "
        "(parts joined by /), with named groups: well, or row and column; and any of site, time, "
        "channel, z, plate"
    )
    well: str | None = Field(None, description="the well of every file (such as B02), where names do not hold it")
    site: str = Field("0", description="the site of files whose names do not hold it")
    channel: str = Field("0", description="the channel of files whose names do not hold it")

    def documents(self, names: Iterable[str]) -> list[str]:
        """None: names are all there is."""
        return []

    def read(self, names: Iterable[str], documents: Mapping[str, bytes]) -> Planes:
        """Read well, site, time, channel and z from file names.

        A group that takes no part in a match, or captures nothing, counts as absent: the site and
        channel are then the layout's, time and z are 0. Numbers may have leading zeros: site ``001`` is
        site ``1``.

        Args:
            names: image paths below the source folder, parts joined by ``/``.
            documents: of no use here.

        Raises:
            InputError: if the pattern is no regular expression, has unknown groups or does not tell the
                well; if a captured part is not usable; if two files hold the same plane; if files of several plates
                are mixed.
        """
        pattern = self._compiled()
        files: list[PlaneFile] = []
        ignored: list[str] = []
        plates: dict[str, str] = {}
        for name in names:
            match = pattern.search(name)
            if match is None:
                ignored.append(name)
                continue
            said = {group: text for group, text in match.groupdict().items() if text}
            plates.setdefault(said.get("plate", ""), name)
            files.append((name, *self._plane(name, said)))
        one_plate(plates)
        return collect(
            files, ignored, "give the pattern a group for what tells them apart, or make it match only one of them"
        )

    def _compiled(self) -> re.Pattern[str]:
        try:
            pattern = re.compile(self.pattern)
        except re.error as error:
            at = "" if error.pos is None else f" at character {error.pos + 1}"
            raise InputError(f"pattern {self.pattern!r} is not a regular expression: {error.msg}{at}") from error
        groups = set(pattern.groupindex)
        for unknown in sorted(groups - set(GROUPS)):
            near = get_close_matches(unknown, GROUPS, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(
                f"pattern {self.pattern!r}: unknown group {unknown!r}{hint}; known are {', '.join(GROUPS)}"
            )
        if ("row" in groups) != ("column" in groups):
            raise InputError(f"pattern {self.pattern!r}: the groups row and column go together")
        ways = ("well" in groups) + ("row" in groups) + (self.well is not None)
        if not ways:
            raise InputError(
                f"nothing says the well: give the pattern {self.pattern!r} a group (?P<well>...), or row and column, "
                "or name the well of all files (--well B02)"
            )
        if ways > 1:
            raise InputError(
                f"pattern {self.pattern!r} with the fixed well {self.well!r} tells the well in "
                f"{ways} ways: exactly one is needed, a group well, groups row and column, or a fixed well"
            )
        return pattern

    def _plane(self, name: str, said: dict[str, str]) -> tuple[str, str, int, str, int]:
        try:
            return (
                self._well(said),
                check_name(_plain_number(said.get("site", self.site)), "site"),
                _number(said, "time"),
                check_name(said.get("channel", self.channel), "channel"),
                _number(said, "z"),
            )
        except InputError as error:
            raise InputError(f"file {name!r}: {error}") from error

    def _well(self, said: dict[str, str]) -> str:
        if self.well is not None:
            return checked_well(self.well)
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
