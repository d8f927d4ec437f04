"""What a simulation knows: true labels, divisions and spoilt frames of each well, one ``.npz`` file a well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from storage_schemas import store
from storage_schemas.errors import SchemaError
from storage_schemas.keys import WellKey

Labels = NDArray[np.int32]


@dataclass(frozen=True)
class SiteTruth:
    """The truth about a site.

    Attributes:
        nuclei: (T, H, W) int32, one value a cell in all frames.
        cells: (T, H, W) int32, the same cells whole.
        parents: (n, 3) int64: daughter, mother, the daughter's first frame.
        bad_frames: (m,) int64, frames out of focus.
    """

    nuclei: Labels
    cells: Labels
    parents: NDArray[np.int64]
    bad_frames: NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """The truth folder of a simulated screen.

    Attributes:
        url: of the simulated screen.
    """

    url: str

    def has(self, well: WellKey) -> bool:
        """Whether a well's truth, which is written after its images, is there."""
        return store.exists(self._path(well))

    def write(
        self,
        well: WellKey,
        labels: dict[str, tuple[Labels, Labels]],
        parents: dict[str, pd.DataFrame],
        bad_frames: dict[str, list[int]],
    ) -> None:
        """Write a well's truth, atomically: by site, nuclei and cells, divisions, and frames out of focus."""
        fields: dict[str, NDArray[Any]] = {}
        for site, (nuclei, cells) in labels.items():
            fields[f"{site}/nuclei"], fields[f"{site}/cells"] = nuclei, cells
            links = parents[site][["track", "parent", "frame"]]
            fields[f"{site}/parents"] = links.to_numpy(np.int64).reshape(-1, 3)
            fields[f"{site}/bad_frames"] = np.array(bad_frames[site], np.int64)
        store.write_npz(self._path(well), fields)

    def read(self, well: WellKey, site: str) -> SiteTruth:
        """The truth about a site.

        Raises:
            SchemaError: if there is none, or its file is truncated.
        """
        path = self._path(well)
        stored = store.read_npz(path)
        names = [f"{site}/{part}" for part in ("nuclei", "cells", "parents", "bad_frames")]
        if not all(name in stored for name in names):
            raise SchemaError(path, f"has no site {site!r}")
        nuclei, cells, parents, bad_frames = (stored[name] for name in names)
        return SiteTruth(nuclei, cells, parents, bad_frames)

    def _path(self, well: WellKey) -> str:
        return store.join(self.url, "truth", well.plate, f"{well.well}.npz")
