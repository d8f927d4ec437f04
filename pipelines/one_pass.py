"""Embedding cells as they are cut out, so that their clips need not be kept.

Apart from `embed`, so that the tasks that segment do without torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import ray

from screening.similarity import Vectors
from storage_schemas.clips import Clips

Pending: TypeAlias = "list[ray.ObjectRef[Vectors]]"
"""Embeddings that are being made, a part of a well's clips each, in order."""

_AHEAD = 4  # parts of a well's clips that wait to be embedded


@dataclass(frozen=True)
class Embedders:
    """Actors that embed clips for whoever holds this, in tasks anywhere in the cluster.

    Attributes:
        dimension: of the embeddings.
    """

    dimension: int
    _actors: tuple[Any, ...]
    _part: int

    def submit(self, clips: Clips, pending: Pending) -> None:
        """Have clips embedded, in parts that are added to those pending.

        Waits while there are many, so that no more clips are on their way than the actors have use for.
        """
        for start in range(0, len(clips), self._part):
            if len(pending) >= _AHEAD:
                ray.wait(pending, num_returns=len(pending) - _AHEAD + 1, fetch_local=False)
            # Any actor is as good as another: whoever asks begins with one of its own.
            actor = self._actors[(os.getpid() + len(pending)) % len(self._actors)]
            pending.append(actor.embed.remote(clips[start : start + self._part]))

    def collect(self, pending: Pending) -> Vectors:
        """(N, D) of all clips that were submitted, in order.

        Raises:
            RayError: if an actor was lost more often than it is made anew.
        """
        try:
            parts = ray.get(pending)
        except ray.exceptions.RayTaskError as error:
            if error.cause is None:
                raise
            raise error.cause from error
        return np.concatenate([np.empty((0, self.dimension), np.float32), *parts])
