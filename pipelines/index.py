"""Stage `index`: embeddings in; well and compound profiles and a similarity index of each level out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.profiles import write_profiles, write_raw
from pipelines.units import Counts
from pipelines.vectors import read_embeddings, read_profiles
from screening import similarity
from storage_schemas.index import IndexManifest, Level, write_level, write_manifest
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen

OUTPUT_VERSION = 3  # raised when the same configuration gives other files


def index(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Sum cells up to wells and compounds, normalise, and index all three levels.

    Returns:
        Counts, and notes for the reader.

    Raises:
        InputError: if a plate has no negative controls to normalise to.
    """
    keys, cells = read_embeddings(screen, inputs.wells)
    of_cells = keys.groupby(["plate", "well"], sort=True).indices
    by_well = ((WellKey(*key), keys.iloc[rows], cells[rows]) for key, rows in of_cells.items())
    write_raw(screen, by_well, config.profiles.aggregate, fingerprint)
    _, notes = write_profiles(screen, config.profiles, fingerprint)
    wells, normalised = read_profiles(screen, "well")
    compounds, merged = read_profiles(screen, "compound")

    moa = inputs.compounds.set_index("compound")["moa"]
    of_well = wells.set_index(["plate", "well"])["compound"]
    cell_compound = of_well.loc[pd.MultiIndex.from_frame(keys[["plate", "well"]])].to_numpy()
    text = keys["plate"] + "/" + keys["well"] + "/" + keys["site"] + "/" + keys["track"].astype(str)
    levels: dict[Level, tuple[pd.DataFrame, npt.NDArray[np.float32]]] = {
        "cell": (
            pd.DataFrame({"id": text, "compound": cell_compound, "plate": keys["plate"], "n_cells": 1}),
            cells,
        ),
        "well": (
            wells.assign(id=wells["plate"] + "/" + wells["well"])[["id", "compound", "plate", "n_cells"]],
            normalised,
        ),
        "compound": (
            compounds.assign(id=compounds["compound"], plate=None)[["id", "compound", "plate", "n_cells"]],
            merged,
        ),
    }
    for level, (ids, values) in levels.items():
        ids = ids.assign(moa=ids["compound"].map(moa))
        write_level(screen.index, level, similarity.serialise(similarity.build(values)), ids)
    counts = {f"{level}s": len(ids) for level, (ids, _) in levels.items()}
    write_manifest(
        screen.index,
        IndexManifest("cosine", fingerprint, normalised.shape[1], {k: len(v[0]) for k, v in levels.items()}),
    )
    return counts, notes
