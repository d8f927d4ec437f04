"""Stage `embed`: clips and a network in; an embedding a cell out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
import ray
import torch

from pipelines.cluster import embedding_actors, one_pass_actors
from pipelines.config import RunConfig
from pipelines.inputs import Inputs
from pipelines.one_pass import Embedders
from pipelines.spread import spread
from pipelines.units import Counts, Work, run_units
from pipelines.vectors import CELL_KEYS, write_embeddings
from screening.embedding import EmbedConfig, embed, restore
from screening.i3d import frames_seen
from screening.similarity import Vectors
from storage_schemas.checkpoint import read_manifest, read_weights
from storage_schemas.clips import Clips, channel_names, open_clips, read_clips
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, embeddings_form, open_table, row_count

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
    actors, cpus = embedding_actors(config.resources)
    context = EmbedContext(screen, config.embed, fingerprint, cpus.threads, screen.checkpoint)
    work = Work(
        EmbedWells,
        (context,),
        num_cpus=cpus.asked,
        num_gpus=config.resources.embed_gpus,
        memory_mb=config.resources.embed_memory_mb,
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


class ClipEmbedder:
    """Holds a network and embeds clips that it is handed.

    Attributes:
        manifest: of the network.
    """

    def __init__(self, checkpoint: str, config: EmbedConfig, threads: int) -> None:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self.manifest = read_manifest(checkpoint)
        self._config = config
        self._network, self._normalisation = restore(self.manifest, read_weights(checkpoint))
        self._network.to("cuda" if torch.cuda.is_available() else "cpu")

    def embed(self, clips: Clips) -> Vectors:
        """(N, D) float32 of clips (N, C, T, H, W) with the channels of the network."""
        frames = frames_seen(self._network.config, clips.shape[2])
        return embed(self._network, clips, self._normalisation, frames, self._config)


class EmbedWells:
    """Embeds a well at a time from its clips on disk."""

    def __init__(self, context: EmbedContext) -> None:
        self._context = context
        self._embedder = ClipEmbedder(context.checkpoint, context.config, context.threads)

    def __call__(self, well: WellKey) -> float:
        """Embed one well's clips and write them; no part of it can fail alone."""
        screen = self._context.screen
        vectors = self.vectors(screen.clips(well))
        cells = open_table(screen.cells(well), CELLS, [*CELL_KEYS, "clip"])
        cells = cells.filter(pc.is_valid(cells["clip"])).sort_by("clip")
        screen.write_failures("embed", well, [])
        write_embeddings(screen.embeddings(well), cells, vectors, self._context.fingerprint)
        return 0.0

    def vectors(self, url: str) -> Vectors:
        """(n, D) embeddings of the clips of an array.

        Raises:
            SchemaError: if they have other channels than the network was trained with, or cannot be read.
        """
        manifest = self._embedder.manifest
        clips = open_clips(url)
        manifest.check_channels(url, channel_names(clips))
        vectors = np.empty((clips.shape[0], manifest.embedding_dim), np.float32)
        # A slice at a time: memory does not grow with the cells of a well.
        step = self._context.config.read_clips
        for start in range(0, len(vectors), step):
            block = read_clips(url, slice(start, start + step))
            vectors[start : start + len(block)] = self._embedder.embed(block)
        return vectors


@contextmanager
def embedders(config: RunConfig) -> Iterator[Embedders]:
    """Actors with the network of the configuration, for as long as the block lasts.

    Raises:
        InputError: if there is no such network.
    """
    assert config.network is not None, "the configuration has seen to it"
    resources = config.resources
    manifest = read_manifest(config.network)
    actors, cpus = one_pass_actors(resources)
    actor = ray.remote(
        num_cpus=cpus.asked,
        num_gpus=resources.embed_gpus,
        memory=resources.embed_memory_mb * 2**20,
        scheduling_strategy="SPREAD",
        max_restarts=-1,
        max_task_retries=resources.attempts,
    )(ClipEmbedder)
    made = tuple(actor.remote(config.network, config.embed, cpus.threads) for _ in range(actors))
    try:
        yield Embedders(manifest.embedding_dim, made, config.embed.read_clips)
    finally:
        for each in made:
            ray.kill(each)
