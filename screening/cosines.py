"""Cosines in float32, how far they may be off, and a closer look at some in float64.

How far float32 may be off is not proven (worst cases are far from what happens) but twice what was found, and checked:
whatever is compared in float64 is also held against its float32 value, and a query for which one is off by more than
half of what is allowed is ranked in float64 altogether.

Shapes: N gallery entries, D dimensions; a chunk is some queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TILE = 4096  # gallery rows that are in float64 at a time
# Cosines are compared as integer multiples of 2**-40: vectors of one direction and other lengths
# differ in the last bits, and must tie.
COSINE_STEPS = 2.0**40
_ROUNDING = 2.0**-24  # of one float32 operation, relative


class Exact(NamedTuple):
    """What a chunk's cosines are computed from in float64 where float32 does not tell.

    Attributes:
        query: (chunk, D) float64, unit rows.
        gallery: (N, D) float32 or float64, as given.
        scale: (N,) float64, the inverse of the gallery's lengths.
        shift: (chunk,) float64, by how much the float32 values lie below the cosines.
        tolerance: (chunk,) float64, how far a float32 value of 0 may be off; see :func:`off`.
    """

    query: Floats
    gallery: npt.NDArray[Any]
    scale: Floats
    shift: Floats
    tolerance: Floats

    def steps(self, i: int, positions: Ints, similar: npt.NDArray[np.float32]) -> tuple[Floats, bool]:
        """Cosines of a query with some of the gallery in steps, and whether their float32 values are as near as said.

        Args:
            i: the query, in the chunk.
            positions: (m,) of the gallery.
            similar: (m,) float32 values.
        """
        tiles = [positions[start : start + TILE] for start in range(0, positions.size, TILE)]
        products = [self.gallery[tile].astype(np.float64) @ self.query[i] for tile in tiles]
        cosines = np.concatenate([np.zeros(0), *products]) * self.scale[positions]
        error = np.abs(cosines - self.shift[i] - similar)
        return np.rint(cosines * COSINE_STEPS), bool((error <= off(self.tolerance[i], np.abs(similar)) / 2).all())


def tolerance(largest: Floats) -> Floats:
    """How far float32 values near 0 may be off.

    Args:
        largest: (chunk,) the largest value that each query could have.
    """
    return 8 * _ROUNDING * largest + 1 / COSINE_STEPS


def off(tolerance: Any, similar: Any) -> Any:
    """How far a float32 value may be off: sums that end high have been high on the way, where rounding is coarser."""
    return tolerance + 32 * _ROUNDING * abs(similar)
