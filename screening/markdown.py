"""Tables and names in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table in GitHub's Markdown; what stands in it is text, whatever it looks like.

    Args:
        header: a title a column.
        rows: as many cells each.
        names: how many columns, from the left, hold names; the others hold numbers, set to the right.
    """
    rule = ["---" if column < names else "---:" for column in range(len(header))]
    lines = [[text(cell) for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def text(name: str) -> str:
    """A name as Markdown shows it: no HTML, no link, no end of a cell or line comes of it."""
    name = re.sub(r"&(?=#?\w+;)", "&amp;", name).replace("<", "&lt;")
    return re.sub(r"([\\|\[\]`])", r"\\\1", " ".join(name.split()))
