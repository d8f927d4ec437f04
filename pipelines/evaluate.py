"""Stage `evaluate`: embeddings in; the held-out tests, with intervals and beside chance, out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.units import Counts
from pipelines.vectors import EmbeddedCells, sample_rows
from screening.evaluation import Cells
from screening.evaluation import evaluate as score
from screening.splits import TESTS, ByCompound, check_leaks, is_of_cells, parts_of, unit
from storage_schemas import store
from storage_schemas.screen import Screen
from storage_schemas.tables import SPLIT, open_table

OUTPUT_VERSION = 3  # raised when the same configuration gives other numbers


def evaluate(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Look up held-out cells among those of the gallery, and write the scores to ``evaluation.json``.

    Returns:
        Counts, and notes for the reader.
    """
    table = open_table(screen.split, SPLIT).to_pandas()
    check_leaks(table, unit(config.split))
    held = _HeldOut(EmbeddedCells(screen, inputs.wells), table, config)
    offered = "gallery" if "gallery" in set(table["split"]) else "train"
    gallery, in_gallery = held.cells(offered)
    notes = [_drawn(len(gallery), in_gallery, "the gallery's cells")] if len(gallery) < in_gallery else []
    result: dict[str, Any] = {}
    for number, (part, test) in enumerate(TESTS.items()):
        if part in _asked(config, table):
            query, in_test = held.cells(part)
            rng = np.random.default_rng([config.seed, 4, number])
            result[test] = score(query, gallery, config.evaluation, rng)
            if len(query) < in_test:
                notes.append(f"{test}: {_drawn(len(query), in_test, 'the queries')}")
    store.write_json(screen.evaluation, result)
    counts = {f"queries: {test}": int(scores["n_queries"]) for test, scores in result.items()}
    notes += [f"{test}: {scores['note']}" for test, scores in result.items() if scores["note"]]
    if not result:
        notes.append("the split has no queries, so nothing is tested")
    return counts | {"gallery": len(gallery)}, notes


def _drawn(n: int, total: int, what: str) -> str:
    return f"{n:,} of {total:,} of {what} were drawn (evaluation.max_cells): compare scores of equal galleries only"


def _asked(config: RunConfig, table: pd.DataFrame) -> set[str]:
    """The parts that are tested; of a split by compound those asked for, though one be empty, so that it says why."""
    if isinstance(config.split, ByCompound):
        return {"test_compound", "test_replicate"} if config.split.hold_out_replicate else {"test_compound"}
    return set(table["split"])


class _HeldOut:
    """The cells of a part of the split that have a mechanism to find; controls have none."""

    def __init__(self, embedded: EmbeddedCells, table: pd.DataFrame, config: RunConfig) -> None:
        self._embedded, self._table = embedded, table
        self._most = config.evaluation.max_cells
        self._rng = np.random.default_rng([config.seed, 9])
        # A split by well says all of a well's cells at once: none of them need be known.
        of_cells = is_of_cells(table)
        groups = embedded.keys() if of_cells else embedded.per_well()
        self._counts = np.ones(len(groups), np.int64) if of_cells else embedded.counts
        said = parts_of(groups, table)
        known = said["moa"].notna() & (said["role"] != "negative_control")
        self._part = said["split"].where(known)

    def cells(self, part: str) -> tuple[Cells, int]:
        """The cells, no more than are taken at most, and how many there are."""
        which = (self._part == part).to_numpy()
        keys, embeddings = self._embedded.read(sample_rows(self._counts, which, self._most, self._rng))
        said = parts_of(keys, self._table)
        columns = [said[name].to_numpy(object) for name in ("moa", "compound", "plate", "well", "replicate")]
        return Cells(embeddings, *columns), int(self._counts[which].sum())
