"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table in GitHub's Markdown.

    Args:
        header: a title a column.
        rows: as many cells each.
        names: how many columns, from the left, hold names; the others hold numbers, set to the right.
    """
    rule = ["---" if column < names else "---:" for column in range(len(header))]
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
