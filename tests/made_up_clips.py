"""Clips for the cells of a screen that has embeddings only (:mod:`indexed_screens`)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipelines.inputs import well_keys
from storage_schemas.clips import write_clips
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, PLATE_MAP, open_table, write_table

CELLS_OF_WELL = 12


def write_clips_of(screen: Screen) -> None:
    """Noise, of two channels and three frames; the track's number is one more than the clip's."""
    rng = np.random.default_rng(0)
    for key in well_keys(open_table(screen.plate_map, PLATE_MAP).to_pandas()):
        pixels = rng.integers(0, 255, (CELLS_OF_WELL, 2, 3, 16, 16)).astype(np.uint8)
        write_clips(screen.clips(key), pixels, ["one", "two"], range(3))
        cells = pd.DataFrame({name: None for name in CELLS.schema.names}, index=range(CELLS_OF_WELL))
        cells = cells.assign(
            plate=key.plate, well=key.well, site="0", track=range(1, CELLS_OF_WELL + 1), clip=range(CELLS_OF_WELL)
        )
        write_table(screen.cells(key), cells.assign(excluded=""), CELLS, "made up")
