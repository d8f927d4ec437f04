"""Stage `evaluate`: embeddings in; the held-out tests, with intervals and beside chance, out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.units import Counts
from pipelines.vectors import read_embeddings
from screening.evaluation import Cells
from screening.evaluation import evaluate as score
from screening.splits import TESTS, ByCompound, check_leaks, parts_of, unit
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
    keys, embeddings = read_embeddings(screen, inputs.wells)
    cells = parts_of(keys, table)
    # Controls have no mechanism to find, and are none.
    known = (cells["moa"].notna() & (cells["role"] != "negative_control")).to_numpy()
    offered = "gallery" if "gallery" in set(table["split"]) else "train"
    gallery = _cells(cells, embeddings, known & (cells["split"] == offered).to_numpy())
    result: dict[str, Any] = {}
    for number, (part, test) in enumerate(TESTS.items()):
        if part in _asked(config, table):
            query = _cells(cells, embeddings, known & (cells["split"] == part).to_numpy())
            rng = np.random.default_rng([config.seed, 4, number])
            result[test] = score(query, gallery, config.evaluation, rng)
    store.write_json(screen.evaluation, result)
    counts = {f"queries: {test}": int(scores["n_queries"]) for test, scores in result.items()}
    notes = [f"{test}: {scores['note']}" for test, scores in result.items() if scores["note"]]
    if not result:
        notes.append("the split has no queries, so nothing is tested")
    return counts | {"gallery": len(gallery)}, notes


def _asked(config: RunConfig, table: pd.DataFrame) -> set[str]:
    """The parts that are tested; of a split by compound those asked for, though one be empty, so that it says why."""
    if isinstance(config.split, ByCompound):
        return {"test_compound", "test_replicate"} if config.split.hold_out_replicate else {"test_compound"}
    return set(table["split"])


def _cells(cells: pd.DataFrame, embeddings: npt.NDArray[np.float32], which: npt.NDArray[np.bool_]) -> Cells:
    rows = cells[which]
    columns = [rows[name].to_numpy(object) for name in ("moa", "compound", "plate", "well", "replicate")]
    return Cells(embeddings[which], *columns)
