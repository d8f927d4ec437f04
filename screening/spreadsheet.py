"""Tables for spreadsheets, which run what looks like a formula."""

from __future__ import annotations

import re

import pandas as pd

_FORMULA = re.compile(r"[=+\-@\t\r]")


def as_csv(table: pd.DataFrame) -> str:
    """A table as CSV in which no text is a formula: one that would be begins with an apostrophe (OWASP, CSV injection).

    Numbers stay as they are, negative ones too.
    """
    texts = table.select_dtypes(exclude=["number", "bool"]).columns
    return table.assign(**{name: table[name].map(tamed) for name in texts}).rename(columns=tamed).to_csv(index=False)


def tamed(value: object) -> object:
    """A value; with an apostrophe before it if it is a text that a spreadsheet would run."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
