"""The split of a screen: made from its tables, and by cell from its cells; no Ray, no network."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import RunConfig
from pipelines.inputs import Inputs, open_inputs
from screening.clips import KEPT
from screening.splits import CELL, Split, check_leaks, unit
from screening.splits import split as divide
from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, open_table


def make_split(config: RunConfig, inputs: Inputs, cells: Screen | None) -> Split:
    """Divide a screen, and refuse what leaks.

    Args:
        config: of the run.
        inputs: its tables.
        cells: the screen whose cells are divided by cell, or None where there is none yet.

    Raises:
        InputError: for a split that leaks or that the tables do not allow.
    """
    found = None if cells is None or config.split.method != "cell" else _cells(cells, inputs)
    try:
        made = divide(
            inputs.plate_map, inputs.compounds, config.split, config.seed, config.broadest_label, found, inputs.split
        )
        check_leaks(made.table, unit(config.split))
    except InputError as error:
        if config.inputs.split is None:
            raise
        raise InputError(f"{config.inputs.split}: {error}") from error
    return made


def write_split(config: RunConfig, out: str) -> Split:
    """Make the split of a configuration without a run, and write it as CSV, to look at or to edit.

    Raises:
        InputError: as :func:`make_split`, or if there is something at ``out`` already.
    """
    url = store.absolute(out)
    if store.exists(url):
        raise InputError(f"{url}: is there already; choose another name for --out")
    inputs = open_inputs(config.inputs)
    made = make_split(config, inputs, inputs.cells)
    table = made.table.dropna(axis=1, how="all")
    store.write_bytes(url, table.to_csv(index=False).encode())
    return made


def _cells(screen: Screen, inputs: Inputs) -> pd.DataFrame:
    """Keys of all cells that are cut out."""
    done = screen.done_units("segment")
    urls = [screen.cells(key) for key in inputs.wells if key in done]
    read = ahead(partial(open_table, form=CELLS, columns=[*CELL, "excluded"]), urls)
    tables = [table.filter(pc.field("excluded") == KEPT) for table in read]
    return pa.concat_tables(tables).to_pandas()[CELL] if tables else pd.DataFrame(columns=CELL)
