"""The map of cells as data for the script that draws it, and in words."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from screening.report.groups import Group, groups, mechanisms, used

NEIGHBOURS = 15
"""Points near a point that are compared with it, to say in words what the map shows."""

# Positions are sent as 16-bit numbers, finer than any screen.
_STEPS = 65535


@dataclass(frozen=True)
class Colouring:
    """One way to colour the map: `of_well` are positions in `legend`; `words` says what the map shows by it."""

    name: str
    legend: list[Group]
    of_well: list[int]
    words: str


@dataclass(frozen=True)
class PointMap:
    """A map of points, each of a well; wells as [plate, well, compound, mechanism]."""

    n: int
    points: dict[str, str]
    wells: list[list[str]]
    colourings: list[Colouring]

    @property
    def payload(self) -> dict[str, Any]:
        """What the script draws."""
        colourings = [
            {
                "name": c.name,
                "groups": [{"label": g.label, "colour": g.colour, "marker": g.marker} for g in c.legend],
                "ofWell": c.of_well,
                "words": c.words,
            }
            for c in self.colourings
        ]
        return {**self.points, "wells": self.wells, "colourings": colourings}


def point_map(cells: pd.DataFrame, styles: Mapping[str, Group], controls: set[str]) -> PointMap | None:
    """The map by mechanism, by plate and, where plates do not tell it, by replicate."""
    if cells.empty:
        return None
    # In an order of chance, so that no group hides those drawn before it.
    cells = cells.sample(frac=1, random_state=0)
    labels = pd.Series(mechanisms(cells, controls), index=cells.index)
    keys = pd.DataFrame({"plate": cells["plate"].astype(str), "well": cells["well"].astype(str)})
    well = keys.groupby(["plate", "well"], sort=False).ngroup().to_numpy()
    first = pd.Series(well).drop_duplicates().index
    positions = cells[["x", "y"]].to_numpy(dtype=float)
    scaled = _to_steps(positions)
    nearest = _nearest(positions)
    compounds = cells["compound"].astype(str) if "compound" in cells else pd.Series("", index=cells.index)
    table = pd.concat([keys, compounds, labels], axis=1)
    colourings = [_colouring("mechanism", labels, styles, first, nearest)]
    previous = labels
    for column in ("plate", "replicate"):
        if column not in cells or cells[column].isna().all():
            continue
        own = cells[column].astype(str)
        told = len(set(zip(previous, own, strict=True))) == own.nunique()
        if column == "plate" or (own.nunique() > 1 and not told):
            colourings.append(_colouring(column, own, groups(own), first, nearest))
        previous = own
    return PointMap(
        n=len(cells),
        points={"x": _packed(scaled[:, 0], "<u2"), "y": _packed(scaled[:, 1], "<u2"), "well": _packed(well, "<u4")},
        wells=table.iloc[first].to_numpy().tolist(),
        colourings=colourings,
    )


def _colouring(
    name: str,
    labels: pd.Series[str],
    styles: Mapping[str, Group],
    first: pd.Index[int],
    nearest: NDArray[np.int64] | None,
) -> Colouring:
    legend = used(styles, labels)
    place = {group: i for i, group in enumerate(legend)}
    of_well = [place[styles[label]] for label in labels.iloc[first]]
    return Colouring(name, legend, of_well, _words(name, labels, nearest))


def _words(name: str, labels: pd.Series[str], nearest: NDArray[np.int64] | None) -> str:
    """How often neighbours on the map share a label, beside how often any two points do."""
    if nearest is None or labels.nunique() < 2:
        return f"All points are of one {name}." if labels.nunique() < 2 else ""
    codes = pd.factorize(labels)[0]
    near = float((codes[nearest] == codes[:, None]).mean())
    shares = np.bincount(codes) / len(codes)
    return (
        f"Of the {nearest.shape[1]} points nearest to a point, {near:.0%} share its {name}; "
        f"of points drawn by chance, {float((shares**2).sum()):.0%} would."
    )


def _nearest(positions: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """(n, k) positions of the points nearest to each, itself left out; None of too few points."""
    k = min(NEIGHBOURS, len(positions) - 1)
    if k < 1:
        return None
    search = NearestNeighbors(n_neighbors=k).fit(positions)
    found: NDArray[np.int64] = search.kneighbors(return_distance=False)
    return found


def _to_steps(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Both axes on one scale, the longer from 0 to `_STEPS`, the shorter in the middle; y points up."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    width = float((high - low).max()) or 1.0
    shift = (width - (high - low)) / 2
    shares = (positions - low + shift) / width
    shares[:, 1] = 1 - shares[:, 1]
    steps: NDArray[np.int64] = (shares * _STEPS).round().astype(np.int64)
    return steps


def _packed(values: NDArray[Any] | Sequence[int], dtype: str) -> str:
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode("ascii")
