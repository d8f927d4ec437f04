"""Screens that have embeddings and an index and were never run: what a query needs, in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.indexing import build_index, read_cells
from pipelines.profiles import write_profiles, write_raw
from pipelines.vectors import vector_column
from screening.profiles import Mean, ProfilesConfig
from screening.similarity import AutoIndex, IndexConfig
from storage_schemas.checkpoint import CheckpointManifest, write_checkpoint
from storage_schemas.keys import WellKey
from storage_schemas.screen import Manifest, Screen, StageRecord
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, SPLIT, embeddings_form, write_table

MOAS = ("uncoupler", "potassium ionophore")
DIMENSION = 20


def write_screen(
    folder: Path,
    plates: tuple[str, ...] = ("plate-1", "plate-2"),
    cells: int = 12,
    config: IndexConfig | None = None,
    seed: int = 0,
) -> Screen:
    """Two mechanisms of three compounds each and two controls on every plate; cells lie about their compound's centre.

    Args:
        folder: new.
        plates: their names.
        cells: of a well.
        config: of the index.
        seed: of cells; compounds lie where they lie.
    """
    screen = Screen(str(folder))
    record = StageRecord(fingerprint="embedded", done=True, counts={"wells": 8 * len(plates)})
    screen.write_manifest(Manifest(software={}, config={}, inputs="simulated", stages={"embed": record}))
    names = [*(f"{moa.replace(' ', '-')}-{i}" for moa in MOAS for i in (1, 2, 3)), "DMSO", "DMSO"]
    wells = [f"{row}{column:02d}" for row in "AB" for column in range(1, 5)]
    plate_map = pd.DataFrame(
        [
            (plate, well, name, 1.0, "uM", "negative_control" if name == "DMSO" else "treatment", plate)
            for plate in plates
            for well, name in zip(wells, names, strict=True)
        ],
        columns=PLATE_MAP.schema.names,
    )
    compounds = pd.DataFrame({column: None for column in COMPOUNDS.schema.names}, index=range(7))
    compounds["compound"] = compounds["name"] = sorted(set(names))
    compounds["moa"] = [None if name == "DMSO" else name[:-2].replace("-", " ") for name in compounds["compound"]]
    write_table(screen.plate_map, plate_map, PLATE_MAP)
    write_table(screen.compounds, compounds, COMPOUNDS)
    split = plate_map.merge(compounds[["compound", "moa"]], on="compound").assign(site=None, track=None, split="train")
    write_table(screen.split, split[SPLIT.schema.names], SPLIT)
    weights = {"weight": np.arange(4, dtype=np.float32)}
    manifest = CheckpointManifest({}, MOAS, ("nucleus",), 1, (0.0,), (1.0,), DIMENSION, 1, (), "trained")
    write_checkpoint(screen.checkpoint, manifest, weights)

    centres = np.random.default_rng(99)
    of_moa = {moa: centres.normal(size=DIMENSION) for moa in MOAS}
    of_compound = {
        name: of_moa.get(moa, np.zeros(DIMENSION)) + 0.7 * centres.normal(size=DIMENSION)
        for name, moa in zip(compounds["compound"], compounds["moa"], strict=True)
    }
    rng = np.random.default_rng(seed)
    keys = [WellKey(plate, well) for plate in plates for well in wells]
    for key, name in zip(keys, plate_map["compound"], strict=True):
        table = pa.table(
            {
                "plate": [key.plate] * cells,
                "well": [key.well] * cells,
                "site": ["0"] * cells,
                "track": pa.array(range(1, cells + 1), pa.int32()),
                "embedding": vector_column(
                    (of_compound[name] + 0.5 * rng.normal(size=(cells, DIMENSION))).astype(np.float32)
                ),
            }
        )
        write_table(screen.embeddings(key), table, embeddings_form(DIMENSION), "embedded")
    write_raw(screen, read_cells(screen, keys), Mean(), "")
    write_profiles(screen, ProfilesConfig(), "")
    build_index(screen, config or AutoIndex(), keys)
    return screen
