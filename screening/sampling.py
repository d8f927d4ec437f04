"""Batches of P identities with K clips each, so that every clip has positives and negatives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage_schemas.errors import InputError


def pk_batches(labels: NDArray[np.integer], p: int, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the batches of one epoch.

    There are as many batches as it takes to visit every clip once. Each takes ``p`` groups of ``k``
    clips of one identity; the identities with most clips left go first (ties by chance). Identities
    are distinct within a batch unless there are fewer than ``p``. Where one has run out while the
    epoch goes on (when identities are unequal in size and ``p`` is near their number), its clips
    are visited again: a rare one is seen more often.

    Args:
        labels: (n,) identity of each clip.
        p: identities a batch.
        k: clips an identity; they are distinct if it has as many, else each is drawn about equally
            often.
        rng: makes the draw; give one seeded with the run's seed and the epoch.

    Returns:
        (n_batches, p * k) positions in ``labels``; each row holds its identities one after another.

    Raises:
        InputError: if there are fewer than two identities.
    """
    identities, inverse = np.unique(labels, return_inverse=True)
    if len(identities) < 2:
        raise InputError(
            f"training needs clips of at least two identities, found {len(identities)}: "
            "check the plate map's compounds and their MOAs, or how many cells segmentation kept"
        )
    decks = [_Deck(np.flatnonzero(inverse == i), k, rng) for i in range(len(identities))]
    groups_left = np.array([-(-deck.members.size // k) for deck in decks])
    batches = np.empty((-(-int(groups_left.sum()) // p), p, k), dtype=np.int64)
    for batch in batches:
        chosen = _choose_identities(groups_left, p, rng)
        np.subtract.at(groups_left, chosen, 1)
        for group, identity in zip(batch, chosen, strict=True):
            group[:] = decks[identity].draw()
    return batches.reshape(len(batches), p * k)


def _choose_identities(groups_left: NDArray[np.int64], p: int, rng: np.random.Generator) -> NDArray[np.intp]:
    order = np.lexsort((rng.random(len(groups_left)), -groups_left))
    # Every identity before any is repeated.
    return np.resize(order, p)


class _Deck:
    """One identity's clips, dealt like cards: shuffled again once too few are left for a group."""

    def __init__(self, members: NDArray[np.intp], k: int, rng: np.random.Generator) -> None:
        self.members = members
        self.k = k
        self.rng = rng
        self.left = rng.permutation(members)

    def draw(self) -> NDArray[np.intp]:
        """The next k clips."""
        if self.members.size < self.k:
            return np.resize(self.rng.permutation(self.members), self.k)
        if self.left.size < self.k:
            # What is left goes first, and the clips that fill the group are others, so that none
            # comes twice in it.
            others = np.setdiff1d(self.members, self.left, assume_unique=True)
            self.left = np.concatenate([self.left, self.rng.permutation(others)])
        group, self.left = self.left[: self.k], self.left[self.k :]
        return group
