"""Plates as tables of wells, coloured by a number that was measured in each or by mechanism."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from screening.report.groups import Group, ink_on, mechanisms, natural
from screening.report.tables import cell, missing, number

# Rows and columns of the plates that are sold; the smallest that holds the wells is drawn.
PLATE_SHAPES = ((2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (16, 24), (32, 48))

# Made to read alike with any colour vision (Nuñez et al. 2018).
SCALE = tuple(to_hex(colour) for colour in colormaps["cividis"](np.linspace(0.08, 1, 64)))
INKS = tuple(map(ink_on, SCALE))


@dataclass(frozen=True)
class Measure:
    """A number of each well on one scale for all plates; `shades` are positions in :data:`SCALE`, None if missing."""

    name: str
    label: str
    low: str
    high: str
    texts: list[str]
    shades: list[int | None]


@dataclass(frozen=True)
class Well:
    """A well where the plate has it; `index` is its place in the values of every measure."""

    index: int
    hover: str
    group: Group
    positive_control: bool


@dataclass(frozen=True)
class Plate:
    """A plate: wells by row and column, None where the plate map has none."""

    name: str
    row_names: list[str]
    rows: list[list[Well | None]]
    summary: str


@dataclass(frozen=True)
class Plates:
    """All plates, and what they can be coloured by; the first measure is shown first."""

    plates: list[Plate]
    measures: list[Measure]

    @property
    def payload(self) -> dict[str, Any]:
        """What the script needs to colour the plates by another measure."""
        measures = [
            {"label": m.label, "low": m.low, "high": m.high, "texts": m.texts, "shades": m.shades}
            for m in self.measures
        ]
        return {"scale": SCALE, "inks": INKS, "measures": measures}


def plates(
    plate_maps: pd.DataFrame, labels: Mapping[str, str], styles: Mapping[str, Group], controls: set[str]
) -> Plates | None:
    """The plates of a plate map; `labels`: numeric columns of it to colour by, and what each is."""
    if plate_maps.empty:
        return None
    wells = plate_maps.reset_index(drop=True)
    names = sorted(wells["plate"].astype(str).unique(), key=natural)
    drawn = [_plate(name, wells[wells["plate"].astype(str) == name], styles, controls) for name in names]
    measures = [_measure(column, label, wells[column]) for column, label in labels.items() if column in wells]
    return Plates(drawn, measures)


def _measure(name: str, label: str, values: pd.Series[Any]) -> Measure:
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    known = numbers[np.isfinite(numbers)]
    # Counts start from nothing; other measures fill the scale.
    whole = known.size > 0 and bool((known == known.round()).all()) and known.min() >= 0
    low = 0.0 if whole or not known.size else float(known.min())
    high = float(known.max()) if known.size else 0.0
    width = (high - low) or 1.0
    shades = [round((value - low) / width * (len(SCALE) - 1)) if np.isfinite(value) else None for value in numbers]
    texts = [_short(value, whole) if np.isfinite(value) else "" for value in numbers]
    return Measure(name, label, cell(low).text, cell(high).text, texts, shades)


def _short(value: float, whole: bool) -> str:
    """A number in the few characters that a well has room for."""
    if whole and value < 10_000:
        return f"{value:.0f}"
    text = f"{value:.2g}"
    text = f"{value:.0f}" if abs(value) >= 100 and abs(value) < 10_000 else text
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _plate(name: str, wells: pd.DataFrame, styles: Mapping[str, Group], controls: set[str]) -> Plate:
    positions = well_positions(wells["well"].astype(str).tolist())
    n_rows, n_columns = plate_shape(positions)
    grid: list[list[Well | None]] = [[None] * n_columns for _ in range(n_rows)]
    records = zip(positions, wells.index, wells.to_dict("records"), mechanisms(wells, controls), strict=True)
    for (row, column), index, record, label in records:
        grid[row][column] = Well(
            index=int(index),
            hover=_hover(record, label),
            group=styles[label],
            positive_control=record.get("role") == "positive_control",
        )
    summary = f"{len(wells)} wells"
    if "n_cells" in wells:
        counts = wells["n_cells"].dropna()
        summary += (
            f"; {int(counts.sum()):,} cells, {int(counts.min()):,} to {int(counts.max()):,} a well"
            if len(counts)
            else "; no well was measured"
        )
    return Plate(name, [row_name(r) for r in range(n_rows)], grid, summary)


def _hover(well: Mapping[Any, Any], label: str) -> str:
    """A well in words; groups beyond the palette share a style, but this still names the mechanism."""
    said = [f"{well['well']}: {well.get('compound', '')}"]
    if not missing(well.get("concentration")):
        unit = well.get("unit")
        said.append(f"{cell(well['concentration']).text} {'' if missing(unit) else unit}".strip())
    said.append(label)
    if "n_cells" in well:
        cells = number(well["n_cells"])
        said.append("not measured" if cells is None else f"{cells:,.0f} cells")
    return ", ".join(said)


def well_positions(names: Sequence[str]) -> list[tuple[int, int]]:
    """(row, column) from 0 of wells named as B07; other names fill the rows beneath in order."""
    matches = [re.fullmatch(r"([A-Za-z]{1,2})0*([1-9]\d?)", name) for name in names]
    named = [(_row_index(m[1]), int(m[2]) - 1) for m in matches if m]
    n_rows, n_columns = plate_shape(named) if named else (0, 12)
    beneath = iter(range(len(names)))
    return [
        (_row_index(m[1]), int(m[2]) - 1) if m else (n_rows + (i := next(beneath)) // n_columns, i % n_columns)
        for m in matches
    ]


def plate_shape(positions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest usual plate that holds the wells, or just their extent where none does."""
    rows = max(row for row, _ in positions) + 1
    columns = max(column for _, column in positions) + 1
    return next((s for s in PLATE_SHAPES if s[0] >= rows and s[1] >= columns), (rows, columns))


def _row_index(letters: str) -> int:
    index = 0
    for letter in letters.upper():
        index = 26 * index + ord(letter) - ord("A") + 1
    return index - 1


def row_name(index: int) -> str:
    """A to Z, then AA to ZZ."""
    return chr(65 + index) if index < 26 else chr(64 + index // 26) + chr(65 + index % 26)
