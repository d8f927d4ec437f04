"""Batches of clips for training: which clips there are, and the actors that read and augment them.

Apart from `train`, so that readers start without Ray Train.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self

import cv2
import numpy as np
import pandas as pd
import ray
import torch

from pipelines.cluster import READER_CPUS
from pipelines.units import is_passing
from screening.augmentation import AugmentConfig, apply, draw
from screening.splits import CELL, is_of_cells, parts_of
from screening.training import TrainingError
from storage_schemas.ahead import ahead
from storage_schemas.clips import read_clips
from storage_schemas.errors import InputError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, open_table

_AHEAD = 2  # batches that each reader has been asked for
_READERS_START = 300  # seconds until readers without room are an error


@dataclass(frozen=True)
class ClipTable:
    """Clips and what each is called, a position a clip in all of them.

    Attributes:
        url: (n,) of the clip's array.
        clip: (n,) position in that array.
        label: (n,) class, -1 for a clip of no class.
        name: (n,) text form of the cell's key, for messages.
    """

    url: np.ndarray[Any, Any]
    clip: np.ndarray[Any, Any]
    label: np.ndarray[Any, Any]
    name: np.ndarray[Any, Any]

    def take(self, positions: np.ndarray[Any, Any]) -> ClipTable:
        """Those clips, in that order."""
        return ClipTable(*(column[positions] for column in vars(self).values()))

    def read(self, cache: ClipCache | None = None) -> np.ndarray[Any, Any]:
        """The clips' pixels, (n, C, T, H, W) as stored, n at least 1; each array that is not cached is opened once."""
        found = {} if cache is None else cache.get(self)
        left = np.array([i for i in range(len(self.clip)) if i not in found], np.int64)
        order = left[np.argsort(self.url[left], kind="stable")]
        urls, starts = np.unique(self.url[order], return_index=True)
        for url, places in zip(urls, np.split(order, starts[1:]) if len(urls) else [], strict=True):
            found.update(zip(places.tolist(), read_clips(url, self.clip[places].tolist()), strict=True))
        if cache is not None:
            cache.put(self, found)
        return np.stack([found[i] for i in range(len(self.clip))])


class ClipCache:
    """Clips kept as they are read, until there is no more room; none is dropped, so memory has a bound.

    A batch that is scattered over wells costs some hundred times as much from Zarr (benchmarks/clip_reading.py).
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._kept: dict[tuple[str, int], np.ndarray[Any, Any]] = {}

    def get(self, clips: ClipTable) -> dict[int, np.ndarray[Any, Any]]:
        """Position in the table -> pixels, of the clips that are kept."""
        keys = zip(clips.url, clips.clip.tolist(), strict=True)
        return {i: self._kept[key] for i, key in enumerate(keys) if key in self._kept}

    def put(self, clips: ClipTable, pixels: dict[int, np.ndarray[Any, Any]]) -> None:
        """Keep as many as there is room for."""
        for i, clip in pixels.items():
            key = (clips.url[i], int(clips.clip[i]))
            if key not in self._kept and clip.nbytes <= self._room:
                self._room -= clip.nbytes
                self._kept[key] = clip.copy()


def clip_table(screen: Screen, wells: pd.DataFrame) -> ClipTable:
    """The clips of some wells (columns plate, well and label), those of failed wells left out.

    Rows with a site and a track are single cells.
    """
    done = screen.done_units("segment")
    urls: list[str] = []
    clips: list[int] = []
    labels: list[int] = []
    names: list[str] = []
    named = {
        WellKey(str(plate), str(well)): rows for (plate, well), rows in wells.groupby(["plate", "well"], sort=False)
    }
    there = [key for key in named if key in done]
    tables = ahead(partial(open_table, form=CELLS, columns=[*CELL, "clip"]), map(screen.cells, there))
    for key, table in zip(there, tables, strict=True):
        rows, cells = named[key], table.to_pandas()
        cells = parts_of(cells[cells["clip"].notna()], rows)
        if is_of_cells(rows):
            cells = cells[cells["split"].notna()]
        urls += [screen.clips(key)] * len(cells)
        clips += cells["clip"].astype(int).tolist()
        labels += cells["label"].astype("Int64").fillna(-1).astype(int).tolist()
        names += [f"{key}/{site}/{track}" for site, track in zip(cells["site"], cells["track"], strict=True)]
    return ClipTable(
        np.array(urls, object), np.array(clips, np.int64), np.array(labels, np.int64), np.array(names, object)
    )


class BatchReader:
    """Reads the clips of one row of a plan, and augments those for training."""

    def __init__(self, sources: Mapping[str, ClipTable], config: AugmentConfig, cache_bytes: int) -> None:
        # Its share of the machine is a fraction of a core; more threads would take them from the training step.
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._sources = sources
        self._config = config
        self._cache = ClipCache(cache_bytes)

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Read one batch.

        Args:
            row: ``kind`` (which source) and ``positions`` in it; for kind ``train`` also the ``seed`` of the
                augmentation of the whole batch, how many clips ``of`` it there are, and where these ``start`` in it.

        Returns:
            kind, clips (n, C, T, H, W) as stored, label (n,) and name (n strings).
        """
        picked = self._sources[row["kind"]].take(np.asarray(row["positions"], np.int64))
        pixels = picked.read(self._cache)
        if row["kind"] == "train":
            seed = np.random.SeedSequence([int(part) for part in row["seed"]])
            generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            # Drawn for the whole batch, so that a clip is changed alike whichever worker gets it.
            drawn = draw(int(row["of"]), self._config, generator)[row["start"] : row["start"] + len(pixels)]
            pixels = apply(torch.from_numpy(pixels), drawn, self._config).numpy()
        return {"kind": row["kind"], "clips": pixels, "label": picked.label, "name": picked.name.tolist()}


class BatchStream:
    """Batches in order from reader actors anywhere in the cluster, read ahead of whoever takes them.

    Not through Ray Data: while a slow training step lets no output through, its executor turns in circles, and that in
    the process that trains. A reader that is lost with its node is started again elsewhere.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        sources: Mapping[str, ClipTable],
        config: AugmentConfig,
        *,
        readers: int,
        cache_bytes: int,
    ) -> None:
        """Start the readers.

        Args:
            rows: what to read, as for :meth:`BatchReader.read`; taken as they are needed.
            sources: kind -> clips.
            config: of the augmentation.
            readers: how many actors read.
            cache_bytes: that each may keep in memory.

        Raises:
            TrainingError: if the cluster has no room for them.
        """
        # SPREAD also keeps readers out of the placement group of a worker or a trial, which has no room for them.
        where = {"num_cpus": READER_CPUS, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(**where, max_restarts=-1, max_task_retries=-1)(BatchReader)
        shared = ray.put(sources)
        self._readers = [actor.remote(shared, config, cache_bytes) for _ in range(readers)]
        self._next_reader = 0
        self._rows = iter(rows)
        self._ahead: deque[ray.ObjectRef[dict[str, Any]]] = deque()
        try:
            ray.get([reader.__ray_ready__.remote() for reader in self._readers], timeout=_READERS_START)
        except ray.exceptions.GetTimeoutError as error:
            self.close()
            raise TrainingError(
                f"no room for {readers} reader(s) of {READER_CPUS} CPUs each within {_READERS_START} s: lower "
                "resources.train_readers, train_workers or train_cpus, or add CPUs to the cluster"
            ) from error
        self._ask(_AHEAD * readers)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            TrainingError: for what a user should mend in the clips.
        """
        if not self._ahead:
            raise StopIteration
        try:
            batch = ray.get(self._ahead.popleft())
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError) and not is_passing(error.cause):
                raise TrainingError(str(error.cause)) from error
            raise
        self._ask(1)
        # Ray's objects are read-only, and torch wants to be able to write.
        return {**batch, "clips": batch["clips"].copy(), "label": batch["label"].copy()}

    def close(self) -> None:
        """Let go of the readers, which end when they have read what they were asked for."""
        self._ahead.clear()
        self._readers.clear()

    def _ask(self, count: int) -> None:
        for row in islice(self._rows, count):
            self._ahead.append(self._readers[self._next_reader].read.remote(row))
            self._next_reader = (self._next_reader + 1) % len(self._readers)
