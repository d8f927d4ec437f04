"""Stage `index`: embeddings in; well and compound profiles and a similarity index of each level out."""

from __future__ import annotations

from pipelines.config import RunConfig
from pipelines.indexing import build_index, read_cells
from pipelines.inputs import Inputs
from pipelines.profiles import write_profiles, write_raw
from pipelines.units import Counts
from storage_schemas.screen import Screen

OUTPUT_VERSION = 4  # raised when the same configuration gives other files


def index(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Sum cells up to wells and compounds, normalise, and index all three levels.

    Returns:
        Counts, and notes for the reader.

    Raises:
        InputError: if a plate has no negative controls to normalise to.
    """
    write_raw(screen, read_cells(screen, inputs.wells), config.profiles.aggregate, fingerprint)
    _, notes = write_profiles(screen, config.profiles, fingerprint)
    counts, searched = build_index(screen, config.index, inputs.wells)
    return counts, [*notes, *searched]
