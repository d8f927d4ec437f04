"""Which mechanism of action (MOA) a compound's cells vote for.

MitoReID's rule (Nature Computational Science 2024): each cell of a compound votes for the MOA of
its nearest gallery cell by cosine distance; an MOA has a share of the votes and a mean cosine
distance to the compound, and the MOAs are sorted by share, then by distance.

Shapes: n query cells, N gallery cells, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from screening.cosines import Floats, Ints
from screening.retrieval import Labels, Members, encode, nearest, unit_rows
from storage_schemas.errors import InputError

COLUMNS = ("compound", "moa", "share", "mean_distance", "n_cells")


def vote(
    query: npt.ArrayLike,
    query_compound: Labels,
    gallery: npt.ArrayLike,
    gallery_moa: Labels,
    gallery_compound: Labels,
    exclude_same_compound: bool = True,
) -> pd.DataFrame:
    """Let the cells of each compound vote for an MOA.

    Args:
        query: (n, D) embeddings of the cells that vote.
        query_compound: (n,) compound of each.
        gallery: (N, D) embeddings of cells whose MOA may be known.
        gallery_moa: (N,) MOA of each; a cell without one (None or NaN) is left out.
        gallery_compound: (N,) compound of each.
        exclude_same_compound: leave the compound's own gallery cells out, so that a compound with
            a known MOA is predicted from other compounds.

    Returns:
        A table as of :func:`tally`.

    Raises:
        InputError: shapes that do not fit each other, or embeddings that are not finite.
    """
    embeddings = np.asarray(gallery)
    moa = _objects(gallery_moa)
    compound = _objects(gallery_compound)
    if not len(embeddings) == len(moa) == len(compound):
        raise InputError(
            f"the gallery has {len(embeddings)} embeddings, {len(moa)} MOAs and "
            f"{len(compound)} compounds; expected one of each for every cell"
        )
    known = ~np.asarray(pd.isna(moa), bool)
    embeddings, moa, compound = embeddings[known], moa[known], compound[known]
    voters = _objects(query_compound)
    if exclude_same_compound:
        query_group, gallery_group = voters, compound
    else:
        # No query shares a group with any gallery cell.
        query_group, gallery_group = np.zeros(len(voters)), np.ones(len(compound))
    positions = nearest(query, query_group, embeddings, gallery_group)
    return tally(positions, query, voters, query_group, embeddings, moa, gallery_group)


def tally(
    nearest_positions: Ints,
    query: npt.ArrayLike,
    query_compound: Labels,
    query_group: Labels,
    gallery: npt.ArrayLike,
    gallery_moa: Labels,
    gallery_group: Labels,
) -> pd.DataFrame:
    """Count the votes of cells whose nearest gallery cells are already known.

    Args:
        nearest_positions: (n,) gallery position of each cell's nearest candidate, -1 for none
            (:func:`screening.retrieval.nearest` or the ``nearest`` of a Ranking).
        query: (n, D) embeddings.
        query_compound: (n,) compounds.
        query_group: (n,) groups; gallery cells of a cell's own group are not its candidates.
        gallery: (N, D) embeddings.
        gallery_moa: (N,) MOAs, all known.
        gallery_group: (N,) groups.

    Returns:
        A row for every compound (in order of appearance) and every MOA of the gallery, sorted
        within the compound by share (descending), mean distance (ascending) and MOA:
        ``share`` of the compound's votes for the MOA (0 without votes), ``mean_distance`` over all
        pairs of a cell of the compound and a candidate of the MOA (cosine distance; NaN without
        pairs), ``n_cells`` of the compound that had a candidate to vote for.
    """
    compound_code, compounds = pd.factorize(_objects(query_compound), use_na_sentinel=False)
    moa_code, moas = pd.factorize(_objects(gallery_moa))
    votes = np.zeros((len(compounds), len(moas)))
    voting = nearest_positions >= 0
    np.add.at(votes, (compound_code[voting], moa_code[nearest_positions[voting]]), 1)
    n_cells = votes.sum(axis=1)
    if not votes.size:
        return _table(compounds, moas, votes, votes, n_cells)
    distance = _mean_distances(
        np.asarray(query),
        compound_code,
        np.asarray(gallery),
        moa_code,
        encode(query_group, gallery_group, (len(compound_code), len(moa_code)), "group"),
        shape=votes.shape,
    )
    return _table(compounds, moas, votes / np.maximum(n_cells, 1)[:, None], distance, n_cells)


def _mean_distances(
    query: npt.NDArray[Any],
    compound_code: Ints,
    gallery: npt.NDArray[Any],
    moa_code: Ints,
    groups: tuple[Ints, Ints],
    shape: tuple[int, int],
) -> Floats:
    """(compounds, MOAs) mean cosine distance over pairs that share no group; NaN without pairs.

    A sum of dot products over all pairs is the dot product of the two sums, so no pair is ever
    formed; what the pairs of a shared group contribute is taken off again.
    """
    query_group, gallery_group = groups
    of_compound, of_moa = Members(compound_code), Members(moa_code)
    of_group = Members(gallery_group)
    compound_sum = np.array([_sum(query[of_compound.of(c)]) for c in range(shape[0])])
    moa_sum = np.array([_sum(gallery[of_moa.of(m)]) for m in range(shape[1])])
    similarity = compound_sum @ moa_sum.T
    pairs = np.outer(np.bincount(compound_code, minlength=shape[0]), np.bincount(moa_code, minlength=shape[1]))
    for c in range(shape[0]):
        cells = of_compound.of(c)
        for group in np.unique(query_group[cells]):
            own = of_group.of(group)
            own_cells = cells[query_group[cells] == group]
            for m in np.unique(moa_code[own]):
                excluded = own[moa_code[own] == m]
                similarity[c, m] -= _sum(query[own_cells]) @ _sum(gallery[excluded])
                pairs[c, m] -= own_cells.size * excluded.size
    mean: Floats = np.divide(similarity, pairs, out=np.full(shape, np.nan), where=pairs > 0)
    return 1 - mean


def _sum(rows: npt.NDArray[Any]) -> Floats:
    """(D,) sum of the rows at unit length."""
    return np.asarray(unit_rows(rows).sum(axis=0))


def _table(
    compounds: npt.NDArray[Any],
    moas: npt.NDArray[Any],
    share: Floats,
    distance: Floats,
    n_cells: Floats,
) -> pd.DataFrame:
    """One row a compound and MOA, sorted as :func:`tally` promises."""
    n_compounds, n_moas = share.shape
    table = pd.DataFrame(
        {
            "order": np.repeat(np.arange(n_compounds), n_moas),
            "compound": np.repeat(compounds, n_moas),
            "moa": np.tile(moas, n_compounds),
            "share": share.ravel(),
            "mean_distance": distance.ravel(),
            "n_cells": np.repeat(n_cells, n_moas).astype(np.int64),
        }
    )
    table = table.sort_values(["order", "share", "mean_distance", "moa"], ascending=[True, False, True, True])
    return table[list(COLUMNS)].reset_index(drop=True)


def _objects(values: Labels) -> npt.NDArray[Any]:
    """(n,) object array; tuples stay single entries."""
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    return np.fromiter(items, object, len(items))
