"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray


class Example(NamedTuple):
    """A cell to show.

    compound: what it was treated with; caption: where it comes from; clip: (C, T, H, W) uint8;
    channel_colours: name → CSS hex colour, a channel each, in order.
    """

    compound: str
    caption: str
    clip: NDArray[np.uint8]
    channel_colours: Mapping[str, str]


@dataclass(frozen=True)
class ReportData:
    """What a report shows; any part may be left empty and is then said to be missing.

    Attributes:
        title: Name of the screen.
        provenance: Versions, seeds, fingerprints, configuration; nested values are folded away.
        counts: A row a stage: `stage`, then counts such as `in`, `out`, `failed`, `filtered`, and
            the reasons as text or as a mapping from reason to count; shown as they come.
        plate_maps: A row a well: plate, well, role, compound, moa (missing when unknown) and
            n_cells (missing when the well was not measured); further columns are listed in the
            table of wells.
        plate_measures: Numeric columns of `plate_maps` that are drawn as heat maps, and what each is.
        quality: A row a plate: sites, frames and the shares of them that are bad, by reason.
        quality_limits: A row a plate and channel: what is usual, and beyond which value frames are bad.
        bad_sites: A row a site that failed or that something is wrong with, the worst first.
        training: A row an epoch: `phase`, `epoch` and any numbers; each becomes a small curve.
        embedding_map: A row a cell (or a well, see `mapped`): x, y (of `layout.embedding_map`),
            compound, moa, plate, well and, where known, replicate.
        mapped: What a point of the map is.
        imported: Whether profiles were made elsewhere, so that there is no network to test.
        evaluation: As `evaluation.evaluate` returns it, under the names of the tests
            (:data:`screening.splits.TESTS`).
        similarity: A row and a column a mechanism: mean cosine similarity of their compounds
            (`matrices.moa_similarity`).
        activity: A row a compound: how its wells differ from the controls, and how likely that is by chance.
        consistency: A row a group of compounds, of one mechanism or target: whether they act alike.
        doses: A row a compound: whether its effect grows with its dose.
        controls: A row a plate: how well its controls are told apart and how well replicates agree.
        predictions: A row a compound: the mechanism it is given, and how sure that is.
        prediction_notes: Sentences on how sure predictions are, and what is called unknown.
        retrieval: A row a neighbour: compound, moa, rank, neighbour, neighbour_moa, similarity
            (cosine). Further columns are shown as they come.
        examples: Cells to show as clips, those most typical of a compound first.
        notes: Sentences the reader must know, such as why a test is empty.
    """

    title: str
    provenance: Mapping[str, object] = field(default_factory=dict)
    counts: pd.DataFrame = field(default_factory=pd.DataFrame)
    plate_maps: pd.DataFrame = field(default_factory=pd.DataFrame)
    plate_measures: Mapping[str, str] = field(default_factory=lambda: {"n_cells": "cells in each well"})
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    quality_limits: pd.DataFrame = field(default_factory=pd.DataFrame)
    bad_sites: pd.DataFrame = field(default_factory=pd.DataFrame)
    training: pd.DataFrame = field(default_factory=pd.DataFrame)
    embedding_map: pd.DataFrame = field(default_factory=pd.DataFrame)
    mapped: str = "cell"
    imported: bool = False
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    similarity: pd.DataFrame = field(default_factory=pd.DataFrame)
    activity: pd.DataFrame = field(default_factory=pd.DataFrame)
    consistency: pd.DataFrame = field(default_factory=pd.DataFrame)
    doses: pd.DataFrame = field(default_factory=pd.DataFrame)
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    prediction_notes: Sequence[str] = ()
    retrieval: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: Sequence[Example] = ()
    notes: Sequence[str] = ()
