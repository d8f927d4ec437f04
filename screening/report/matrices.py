"""How alike the mechanisms are: their compounds' profiles compared pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def moa_similarity(profiles: NDArray[np.floating[Any]], moa: pd.Series[Any]) -> pd.DataFrame:
    """Mean cosine similarity of the compounds of each two mechanisms.

    Args:
        profiles: (n, D) finite, a row a compound.
        moa: (n,) mechanism of each; compounds without one are left out.

    Returns:
        A square table, rows and columns by mechanism in alphabetical order. A compound is not compared with itself:
        the diagonal is of different compounds of the mechanism, and NaN where there is but one.
    """
    known = moa.notna().to_numpy()
    rows = np.asarray(profiles, dtype=np.float64)[known]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    codes, names = pd.factorize(moa[known].astype(str), sort=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, codes, unit)
    sizes = np.bincount(codes, minlength=len(names)).astype(float)
    total = sums @ sums.T
    pairs = np.outer(sizes, sizes)
    # The sum of all pairs of a mechanism with itself holds each compound's product with itself.
    own = np.bincount(codes, (unit**2).sum(axis=1), len(names))
    total[np.diag_indices_from(total)] -= own
    pairs[np.diag_indices_from(pairs)] -= sizes
    mean = np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0)
    return pd.DataFrame(np.clip(mean, -1, 1), index=names, columns=names)
