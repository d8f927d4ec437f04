"""Losses that make an embedding: cells of one identity together, cells of different ones apart.

Axis letters: N clips of a batch, D embedding dimension, I identities (classes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def batch_hard_triplet_loss(embedding: Tensor, label: Tensor, margin: float = 0.3) -> Tensor:
    """Triplet loss with the farthest positive and nearest negative (Hermans et al., 1703.07737).

    The mean over clips of ``max(0, margin + d(clip, farthest positive) - d(clip, nearest
    negative))`` with Euclidean distance d, 1e-6 at least. A clip without another of its identity is
    its own positive; a batch of one identity has no negatives and loss 0.

    Args:
        embedding: (N, D) float.
        label: (N,) integers, equal for one identity.
        margin: by how much negatives must be farther than positives, in the embedding's units.

    Returns:
        A scalar.
    """
    return triplet_losses(embedding, label, embedding, label, margin).mean()


def triplet_losses(
    embedding: Tensor, label: Tensor, others: Tensor, other_label: Tensor, margin: float = 0.3
) -> Tensor:
    """The batch-hard triplet loss of each clip, its positive and negative sought among other clips.

    Args:
        embedding: (N, D) float.
        label: (N,) integers, equal for one identity.
        others: (M, D) float, among them the N clips themselves.
        other_label: (M,) integers.
        margin: as for :func:`batch_hard_triplet_loss`.

    Returns:
        (N,) losses; 0 where there is no negative.
    """
    if not len(others):
        return embedding.sum(dim=1) * 0.0
    same = label[:, None] == other_label  # (N, M)
    with torch.no_grad():
        # By the matrix product, some twenty times faster than by differences. It cancels where clips are near each
        # other and far from the origin, so they are moved there first.
        center = others.mean(dim=0)
        b = others - center
        a = b if embedding is others else embedding - center
        distance = torch.addmm(torch.linalg.vecdot(b, b), a, b.T, alpha=-2)  # squared, less the clip's own square
        positive = distance.masked_fill(~same, -torch.inf).argmax(dim=1)
        negative = distance.masked_fill_(same, torch.inf).argmin(dim=1)
    # Only the mined pairs take part in the gradient, so only their distances are computed again.
    to_positive = _distance(embedding, others.index_select(0, positive))
    to_negative = _distance(embedding, others.index_select(0, negative))
    return functional.relu(margin + to_positive - to_negative).masked_fill(same.all(dim=1), 0.0)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(N,) Euclidean distances, kept from 0 where the root has no gradient."""
    difference = a - b
    squared: Tensor = torch.linalg.vecdot(difference, difference)
    return squared.clamp(min=1e-12).sqrt()


def center_loss(embedding: Tensor, label: Tensor, centers: Tensor) -> Tensor:
    """Mean squared Euclidean distance of clips to their class centres (Wen et al., ECCV 2016).

    Each distance is kept within 1e-12 and 1e12, as in the implementations in use; there is no
    factor of one half.

    Args:
        embedding: (N, D) float.
        label: (N,) int64, rows of ``centers``.
        centers: (I, D) float, learned.

    Returns:
        A scalar.
    """
    return center_losses(embedding, label, centers).mean()


def center_losses(embedding: Tensor, label: Tensor, centers: Tensor) -> Tensor:
    """(N,) squared distances of clips to their class centres, arguments as for :func:`center_loss`."""
    return (embedding - centers[label]).square().sum(dim=1).clamp(min=1e-12, max=1e12)


def mislabelled_as_control(predicted: Tensor, label: Tensor, control: int, limit: int) -> Tensor:
    """Which clips of a batch are to be left out of its loss: cells that the treatment seems not to have touched.

    Not every cell answers to its drug, and one that looks like a control teaches a wrong label. So the clips of other
    identities that the classifier puts into the control class are left out, all of them, as long as there are fewer
    than ``limit`` in the batch. As many or more are the network's fault, which must learn from them: otherwise it could
    lower its loss by taking every cell for a control. (MitoReID's rule, whose ``num_mislabel`` of 5 we read as a
    number of a batch: of one identity a batch has no more than 4 clips.)

    Args:
        predicted: (N,) integers, the class with the highest logit.
        label: (N,) integers.
        control: the class of the negative controls.
        limit: how many are too many to be left out.

    Returns:
        (N,) bool, True for a clip to be left out.
    """
    mislabelled = (predicted == control) & (label != control)
    return mislabelled & (mislabelled.sum() < limit)
