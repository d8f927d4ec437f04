"""Where cells lie on a map: their embeddings laid out in a plane."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

MAX_FITTED = 2000
"""Rows the t-SNE is fitted to; it keeps the cost of a map flat."""


def embedding_map(embeddings: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.float32]:
    """Positions of cells in a plane where neighbours in embedding space stay neighbours.

    Rows are scaled to unit length (retrieval is by cosine), reduced to at most 50 principal
    components and laid out by t-SNE (van der Maaten & Hinton 2008) started from the first two
    components (Kobak & Berens 2019). At most `MAX_FITTED` rows, drawn by `rng`, are fitted; every
    other row is put at the mean position of its three nearest fitted rows, so the cost grows by a
    search only. The same embeddings and the same generator state give the same map on any number
    of cores.

    Args:
        embeddings: (n, D) finite numbers.
        rng: Draws the fitted rows.

    Returns:
        (n, 2) float32.

    Raises:
        ValueError: The embeddings are not a finite matrix.
    """
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"embeddings to map must be a finite (n, D) matrix, not {vectors.shape} with "
            f"{np.count_nonzero(~np.isfinite(vectors))} values that are no number"
        )
    n = len(vectors)
    if n < 3:
        return np.column_stack([np.arange(n), np.zeros(n)]).astype(np.float32)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    fitted = np.sort(rng.permutation(n)[:MAX_FITTED])
    seed = int(rng.integers(2**31))
    # One thread: sums that threads split differ in their last bits, and t-SNE amplifies those.
    # Equal rows have no variance to explain, which divides by zero but harms nothing.
    with threadpool_limits(limits=1), np.errstate(invalid="ignore"):
        n_components = min(50, *vectors[fitted].shape)
        pca = PCA(n_components, svd_solver="full").fit(vectors[fitted])
        reduced = np.asarray(pca.transform(vectors), dtype=np.float32)
        layout = _tsne(reduced[fitted], seed)
        if len(fitted) == n:
            return layout
        search = NearestNeighbors(n_neighbors=3).fit(reduced[fitted])
        nearest = search.kneighbors(reduced, return_distance=False)
    placed: NDArray[np.float32] = layout[nearest].mean(axis=1, dtype=np.float32)
    placed[fitted] = layout
    return placed


def _tsne(points: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(n, 2) layout of (n, D) points, n ≥ 3."""
    start = np.zeros((len(points), 2), dtype=np.float32)
    start[:, : points.shape[1]] = points[:, :2]
    spread = start[:, 0].std()
    if spread == 0:  # All points coincide: nothing to lay out.
        return start
    tsne = TSNE(
        perplexity=min(30.0, (len(points) - 1) / 3),
        init=1e-4 * start / spread,
        learning_rate="auto",
        max_iter=500,
        random_state=seed,
    )
    return np.asarray(tsne.fit_transform(points), dtype=np.float32)
