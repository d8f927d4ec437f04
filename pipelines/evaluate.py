"""Stage `evaluate`: embeddings in; the two held-out tests, with intervals and beside chance, out."""

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
from screening.splits import check_leaks
from storage_schemas import store
from storage_schemas.screen import Screen
from storage_schemas.tables import SPLIT, open_table

OUTPUT_VERSION = 1  # raised when the same configuration gives other numbers

TESTS = ("compound", "replicate")


def evaluate(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Look up held-out cells among those trained on, and write the scores to ``evaluation.json``.

    Returns:
        Counts, and notes for the reader.
    """
    table = open_table(screen.split, SPLIT).to_pandas()
    check_leaks(table)
    keys, embeddings = read_embeddings(screen, inputs.wells)
    cells = keys.merge(table, on=["plate", "well"], how="left", validate="many_to_one")
    # Controls have no mechanism to find, and are none.
    known = (cells["moa"].notna() & (cells["role"] != "negative_control")).to_numpy()
    gallery = _cells(cells, embeddings, known & (cells["split"] == "train").to_numpy())
    result: dict[str, Any] = {}
    for number, test in enumerate(TESTS):
        query = _cells(cells, embeddings, known & (cells["split"] == f"test_{test}").to_numpy())
        rng = np.random.default_rng([config.seed, 4, number])
        result[test] = score(query, gallery, config.evaluation, rng)
    store.write_json(screen.evaluation, result)
    counts = {f"queries: {test}": int(result[test]["n_queries"]) for test in TESTS}
    notes = [f"{test}: {result[test]['note']}" for test in TESTS if result[test]["note"]]
    return counts | {"gallery": len(gallery)}, notes


def _cells(cells: pd.DataFrame, embeddings: npt.NDArray[np.float32], which: npt.NDArray[np.bool_]) -> Cells:
    rows = cells[which]
    columns = [rows[name].to_numpy(object) for name in ("moa", "compound", "plate", "well")]
    return Cells(embeddings[which], *columns)
