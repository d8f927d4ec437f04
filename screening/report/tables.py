"""Numbers and tables as a reader sees them, and as they are downloaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """`value` is what is sorted and downloaded, `text` what is read."""

    text: str
    value: str


@dataclass(frozen=True)
class Column:
    """A column: its name as downloaded, its heading as read, and whether it is sorted as numbers."""

    name: str
    heading: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """A table for the template."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


def table(frame: pd.DataFrame, name: str, caption: str) -> Table | None:
    """A table, or None of no rows; `name` is that of the file it is downloaded as."""
    if frame.empty:
        return None
    columns = [
        Column(
            str(column),
            str(column).replace("_", " "),
            pd.api.types.is_numeric_dtype(frame[column]) and not pd.api.types.is_bool_dtype(frame[column]),
        )
        for column in frame.columns
    ]
    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Table(name, caption, columns, rows)


def cell(value: object) -> Cell:
    """A value of any type as text."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{cell(count).text} {reason}" for reason, count in value.items())
        return Cell(text or NOTHING, text)
    if missing(value):
        return Cell(NOTHING, "")
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no", "yes" if value else "no")
    if isinstance(value, int | np.integer):
        return Cell(f"{value:,}", str(value))
    if isinstance(value, float | np.floating):
        number = float(value)
        whole = number.is_integer() and abs(number) < 1e9
        return Cell(f"{number:,.0f}" if whole else f"{number:.3g}", f"{number:.6g}")
    return Cell(str(value), str(value))


def missing(value: object) -> bool:
    """None, NA or NaN."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def number(value: object) -> float | None:
    """A finite number, or None: evaluations write what could not be measured as null or NaN."""
    if isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value):
        return float(value)
    return None


def percent(share: float) -> str:
    """A share as a percentage, with a decimal where whole numbers would hide it."""
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def mark_matches(retrieval: pd.DataFrame) -> pd.DataFrame:
    """The retrieval table with a column that says whether the neighbour shares the mechanism."""
    if retrieval.empty or not {"moa", "neighbour_moa"} <= set(retrieval.columns):
        return retrieval
    known = retrieval["moa"].notna() & retrieval["neighbour_moa"].notna()
    same = retrieval["moa"].astype(object) == retrieval["neighbour_moa"].astype(object)
    return retrieval.assign(same_moa=pd.Series(same, dtype="boolean").where(known))
