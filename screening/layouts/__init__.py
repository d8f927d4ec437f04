"""How images are laid out in folders and names by the instruments and people that write them.

Each layout turns names, and the text of the metadata beside them, into :class:`Planes`. Nothing is guessed: the user
says which layout it is, a name that does not match is reported, two files for one plane are an error, and planes that
are promised and not there are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

from pydantic import Field

from screening.layouts.cv8000 import Cv8000Layout
from screening.layouts.imagexpress import ImageXpressLayout
from screening.layouts.mitoreid import MitoReidLayout
from screening.layouts.pattern import PatternLayout
from screening.layouts.phenix import PhenixLayout
from screening.layouts.planes import (
    Channel,
    Grid,
    Metadata,
    Plane,
    Planes,
    grid,
    missing_planes,
    natural,
    row_letters,
)
from storage_schemas.errors import InputError

__all__ = [
    "Channel",
    "Cv8000Layout",
    "Grid",
    "ImageXpressLayout",
    "Layout",
    "Metadata",
    "MitoReidLayout",
    "PatternLayout",
    "PhenixLayout",
    "Plane",
    "Planes",
    "grid",
    "missing_planes",
    "natural",
    "read",
    "row_letters",
]

Layout = Annotated[
    PatternLayout | ImageXpressLayout | Cv8000Layout | PhenixLayout | MitoReidLayout, Field(discriminator="method")
]
VENDORS: tuple[ImageXpressLayout | Cv8000Layout | PhenixLayout | MitoReidLayout, ...] = (
    ImageXpressLayout(),
    Cv8000Layout(),
    PhenixLayout(),
    MitoReidLayout(),
)


def read(layout: Layout, images: Sequence[str], documents: dict[str, bytes]) -> Planes:
    """Read the planes of a folder.

    Args:
        layout: how they are laid out.
        images: image paths below the source folder, parts joined by ``/``.
        documents: what ``layout.documents`` names: path -> bytes.

    Raises:
        InputError: if no name is of this layout, saying of which it looks like; or as the layout's own ``read`` says.
    """
    try:
        planes = layout.read(images, documents)
    except InputError as error:
        if hint := _other(layout, images):
            raise InputError(f"{error}{hint}") from error
        raise
    if planes.table.empty:
        what = f"pattern {layout.pattern!r}" if isinstance(layout, PatternLayout) else f"layout {layout.method}"
        where = "; it is searched for in the path below the source folder" if layout.method == "pattern" else ""
        shown = ", ".join(map(repr, images[:3])) or "there are none"
        promised = (
            f", though {', '.join(documents)} promises {len(planes.promised)} planes" if len(planes.promised) else ""
        )
        raise InputError(
            f"{what} matches none of {len(images)} image file names ({shown}){promised}{where}{_other(layout, images)}"
        )
    return planes


def _other(layout: Layout, images: Sequence[str]) -> str:
    """Which layout most names are of, if one of the others."""
    found: dict[str, int] = {}
    for other in VENDORS:
        if other.method != layout.method:
            # A folder with a mistake of its own is of that layout all the same; that will be told in turn.
            with suppress(InputError):
                found[other.method] = len(other.read(images, {}).table)
    best = max(found, key=lambda method: found[method], default="")
    return f"; they look like --layout {best}" if found.get(best, 0) > len(images) / 2 else ""
