"""A screen of made-up cells for tests of training: segmented at once, and learnt from in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.config import RunConfig, parse
from pipelines.inputs import well_keys
from storage_schemas.clips import write_clips
from storage_schemas.screen import Manifest, Screen, StageRecord
from storage_schemas.tables import CELLS, COMPOUNDS, PLATE_MAP, write_table

CLIPS = 6  # a well
SHAPE = (2, 2, 16, 16)  # channels, frames, height, width
MOAS = ("inhibitor", "uncoupler")
UNKNOWN = "mystery"  # a compound whose MOA nobody knows

# What makes training on these cells a matter of seconds.
SETTINGS: dict[str, Any] = {
    "model": {"depth": 10, "width": 4, "stem_frames": 1},
    "train": {"epochs": 3, "p": 4, "k": 2, "validation_clips": 8},
    "resources": {"cpus": 2, "object_store_mb": 100},
}


def write_cells(folder: Path, clips: int = CLIPS, prefix: str = "p", seed: int = 0) -> Path:
    """Two replicate plates: controls, two mechanisms of three compounds each, and a compound without one.

    Cells of a mechanism are brighter than others in a channel of its own; the screen's segmentation is said to be done.
    """
    treatments = [*(f"{moa}-{i}" for moa in MOAS for i in range(3)), UNKNOWN]
    wells = [("DMSO", "negative_control"), *((compound, "treatment") for compound in treatments)]
    plate_map = pd.DataFrame(
        [
            {
                "plate": f"{prefix}{replicate}",
                "well": f"A{i + 1:02}",
                "compound": compound,
                "role": role,
                "replicate": replicate,
            }
            for replicate in "12"
            for i, (compound, role) in enumerate(wells)
        ]
    ).assign(concentration=None, unit=None)
    moa = [next((moa for moa in MOAS if compound.startswith(moa)), None) for compound, _ in wells]
    compounds = pd.DataFrame({name: None for name in COMPOUNDS.schema.names}, index=range(len(wells)))
    compounds = compounds.assign(compound=[name for name, _ in wells], name=[name for name, _ in wells], moa=moa)

    screen = Screen(str(folder))
    record = StageRecord(fingerprint="made up", done=True, output="made up", counts={"wells": len(plate_map)})
    screen.write_manifest(Manifest(software={}, config={}, inputs="made up", stages={"segment": record}))
    write_table(screen.plate_map, plate_map, PLATE_MAP)
    write_table(screen.compounds, compounds.sort_values("compound"), COMPOUNDS)
    rng = np.random.default_rng(seed)
    for key, compound in zip(well_keys(plate_map), plate_map["compound"], strict=True):
        light = np.array([60 if compound.startswith(moa) else 20 for moa in MOAS])
        pixels = rng.poisson(light[:, None, None, None], (clips, *SHAPE)).astype(np.uint8)
        write_clips(screen.clips(key), pixels, ["one", "two"], range(SHAPE[1]))
        cells = pd.DataFrame({name: None for name in CELLS.schema.names}, index=range(clips))
        cells = cells.assign(plate=key.plate, well=key.well, site="0", track=range(1, clips + 1), clip=range(clips))
        write_table(screen.cells(key), cells.assign(excluded=""), CELLS, "made up")
    return folder


def configuration(cells: Path, **groups: Any) -> RunConfig:
    """A configuration of training on such cells; the settings of a group are added to its own of :data:`SETTINGS`."""
    document = {"inputs": {"cells": str(cells)}, **SETTINGS}
    for name, settings in groups.items():
        document[name] = {**document.get(name, {}), **settings} if isinstance(settings, dict) else settings
    return parse(document, "test")
