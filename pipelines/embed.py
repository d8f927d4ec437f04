"""Stage `embed`: clips and a network in; an embedding a cell out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines.cluster import embedding_cpus
from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.spread import spread
from pipelines.units import Counts, Work, run_units
from pipelines.vectors import vector_column
from screening.embedding import EmbedConfig, embed, restore
from screening.i3d import frames_seen
from storage_schemas.checkpoint import read_manifest, read_weights
from storage_schemas.clips import channel_names, open_clips, read_clips
from storage_schemas.errors import SchemaError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, embeddings_form, open_table, row_count, write_table

OUTPUT_VERSION = 1  # raised when the same configuration gives other files


def embed_screen(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Embed the clips of every segmented well that has not been done.

    Returns:
        Counts over the whole stage, and notes for the reader.

    Raises:
        StageError: if too many wells fail.
    """
    segmented = screen.done_units("segment")
    units = [well for well in inputs.wells if well in segmented]
    actors = config.resources.embed_actors
    cpus = embedding_cpus(config.resources)
    context = EmbedContext(screen, config.embed, fingerprint, cpus.threads, screen.checkpoint)
    work = Work(
        EmbedWells,
        (context,),
        # An actor on a CPU computes on all that it is given; on a GPU it only feeds.
        num_cpus=cpus.asked,
        num_gpus=config.resources.embed_gpus,
        actors=actors,
        attempts=config.resources.attempts,
    )
    run_units(screen, "embed", units, work, config.max_failed_share)
    return _count(units, screen), []


def _count(units: Sequence[WellKey], screen: Screen) -> Counts:
    done = screen.done_units("embed") & set(units)
    form = embeddings_form(read_manifest(screen.checkpoint).embedding_dim)
    cells = sum(spread(partial(row_count, form=form), [screen.embeddings(well) for well in sorted(done)]))
    return {"wells": len(units), "done": len(done), "failed": len(screen.failures("embed")), "cells": cells}


@dataclass(frozen=True)
class EmbedContext:
    """What an actor is told.

    Attributes:
        screen: whose clips are embedded, and that embeddings are written to.
        config: how.
        fingerprint: that is written into them.
        threads: to compute with.
        checkpoint: the network, of this screen or another.
    """

    screen: Screen
    config: EmbedConfig
    fingerprint: str
    threads: int
    checkpoint: str


class EmbedWells:
    """Holds the network and embeds a well at a time."""

    def __init__(self, context: EmbedContext) -> None:
        torch.set_num_threads(context.threads)
        self._context = context
        self._manifest = read_manifest(context.checkpoint)
        weights = read_weights(context.checkpoint)
        self._network, self._normalisation = restore(self._manifest, weights)
        self._network.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, well: WellKey) -> float:
        """Embed one well's clips and write them; no part of it can fail alone."""
        screen = self._context.screen
        vectors = self.vectors(screen.clips(well))
        cells = open_table(screen.cells(well), CELLS, ["plate", "well", "site", "track", "clip"])
        cells = cells.filter(pa.compute.is_valid(cells["clip"])).sort_by("clip")
        assert len(cells) == len(vectors), "every clip is of a cell"
        table = cells.drop_columns(["clip"]).append_column("embedding", vector_column(vectors))
        screen.write_failures("embed", well, [])
        write_table(screen.embeddings(well), table, embeddings_form(vectors.shape[1]), self._context.fingerprint)
        return 0.0

    def vectors(self, url: str) -> npt.NDArray[np.float32]:
        """(n, D) embeddings of the clips of an array.

        Raises:
            SchemaError: if they have other channels than the network was trained with, or cannot be read.
        """
        config, manifest = self._context.config, self._manifest
        clips = open_clips(url)
        if channel_names(clips) != list(manifest.channels):
            raise SchemaError(url, f"has the channels {channel_names(clips)}, the network {list(manifest.channels)}")
        frames = frames_seen(self._network.config, clips.shape[2])
        vectors = np.empty((clips.shape[0], manifest.embedding_dim), np.float32)
        # A slice at a time: memory does not grow with the cells of a well.
        for start in range(0, len(vectors), config.read_clips):
            block = read_clips(url, slice(start, start + config.read_clips))
            vectors[start : start + len(block)] = embed(self._network, block, self._normalisation, frames, config)
        return vectors
