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
    negative))`` with Euclidean distance d. A clip without another of its identity counts itself, at
    distance 0, as its positive; a batch of one identity has no negatives and loss 0.

    Args:
        embedding: (N, D) float.
        label: (N,) integers, equal for one identity.
        margin: by how much negatives must be farther than positives, in the embedding's units.

    Returns:
        A scalar.
    """
    same = label[:, None] == label[None, :]  # (N, N)
    if bool(same.all()):
        return embedding.sum() * 0.0
    with torch.no_grad():
        # The matrix-product form of cdist cancels for near pairs, so that a clip would not be at 0
        # from itself.
        distance = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
        positive = distance.masked_fill(~same, -torch.inf).argmax(dim=1)
        negative = distance.masked_fill(same, torch.inf).argmin(dim=1)
    # Only the mined pairs take part in the gradient, so only their distances are computed again.
    to_positive = torch.linalg.vector_norm(embedding - embedding[positive], dim=1)
    to_negative = torch.linalg.vector_norm(embedding - embedding[negative], dim=1)
    return functional.relu(margin + to_positive - to_negative).mean()


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
    squared = (embedding - centers[label]).square().sum(dim=1)
    return squared.clamp(min=1e-12, max=1e12).mean()
