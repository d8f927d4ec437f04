"""The gallery: each compound beside the negative controls and its nearest neighbours, with clips of typical cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from screening.report.clips import Clip
from screening.report.groups import CONTROL
from screening.report.tables import missing


@dataclass(frozen=True)
class Gallery:
    """What the script needs to show one compound at a time.

    compounds: name, mechanism in words, whether it is a negative control, numbers of its clips, and its neighbours as
    (place in `compounds`, similarity).
    """

    compounds: list[dict[str, Any]]
    clips: Sequence[Clip]

    @property
    def names(self) -> list[str]:
        """The compounds to choose from."""
        return [compound["name"] for compound in self.compounds]

    @property
    def payload(self) -> dict[str, Any]:
        """All but the clips themselves, which stand in the page one by one and are read when they are shown."""
        clips = [
            {"caption": clip.caption, "frames": clip.frames, "width": clip.width, "height": clip.height}
            for clip in self.clips
        ]
        return {"compounds": self.compounds, "clips": clips}


def typical_cells(embeddings: NDArray[np.floating[Any]], k: int) -> NDArray[np.int64]:
    """The cells most typical of a group: its medoid, and those nearest to it.

    The medoid is the cell with the smallest sum of cosine distances to all others. As a sum of products with unit
    vectors is the product with their sum, it is found without comparing the cells pair by pair.

    Args:
        embeddings: (n, D) finite.
        k: how many.

    Returns:
        (min(k, n),) positions, the medoid first, then by cosine distance to it.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if not len(unit):
        return np.empty(0, dtype=np.int64)
    medoid = int((unit @ unit.sum(axis=0)).argmax())
    distance = 1 - unit @ unit[medoid]
    distance[medoid] = -1
    return np.argsort(distance, kind="stable")[:k].astype(np.int64)


def gallery(clips: Sequence[Clip], retrieval: pd.DataFrame, plate_maps: pd.DataFrame, controls: set[str]) -> Gallery:
    """The compounds that have clips or neighbours; controls last, others by name."""
    clips_of: dict[str, list[int]] = {}
    for i, clip in enumerate(clips):
        clips_of.setdefault(clip.compound, []).append(i)
    moas = _mechanisms(plate_maps, retrieval)
    asked = retrieval["compound"].astype(str) if "compound" in retrieval else pd.Series(dtype=str)
    near = retrieval["neighbour"].astype(str) if "neighbour" in retrieval else pd.Series(dtype=str)
    names = sorted({*clips_of, *asked, *near}, key=lambda name: (name in controls, name.casefold(), name))
    place = {name: i for i, name in enumerate(names)}
    neighbours: dict[str, list[tuple[int, float]]] = {}
    if len(asked):
        ranked = retrieval.assign(compound=asked, neighbour=near).sort_values("rank", kind="stable")
        for compound, neighbour, similarity in zip(
            ranked["compound"], ranked["neighbour"], ranked["similarity"], strict=True
        ):
            neighbours.setdefault(compound, []).append((place[neighbour], round(float(similarity), 3)))
    compounds = [
        {
            "name": name,
            "moa": CONTROL if name in controls else moas.get(name, ""),
            "control": name in controls,
            "clips": clips_of.get(name, []),
            "near": neighbours.get(name, []),
        }
        for name in names
    ]
    return Gallery(compounds, clips)


def _mechanisms(plate_maps: pd.DataFrame, retrieval: pd.DataFrame) -> dict[str, str]:
    """The mechanism of each compound, where one is known."""
    tables = [
        frame[list(columns)].set_axis(["compound", "moa"], axis=1)
        for frame, columns in (
            (plate_maps, ("compound", "moa")),
            (retrieval, ("compound", "moa")),
            (retrieval, ("neighbour", "neighbour_moa")),
        )
        if set(columns) <= set(frame.columns)
    ]
    return {
        str(compound): str(moa)
        for table in tables
        for compound, moa in table.drop_duplicates().itertuples(index=False, name=None)
        if not missing(moa)
    }
