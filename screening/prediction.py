"""Which mechanism of action (MOA) a compound's cells or profiles vote for, and whether that could be chance.

MitoReID's rule (Nature Computational Science 2024): each cell of a compound votes for the MOA of
its nearest gallery cell by cosine distance; an MOA has a share of the votes and a mean cosine
distance to the compound, and the MOAs are sorted by share, then by distance. Profiles vote alike, for
the MOAs of their k nearest.

Shapes: n query cells, N gallery cells, D dimensions; C compounds that ask, G that are voted for, M MOAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screening.cosines import COSINE_STEPS, Floats, Ints
from screening.retrieval import Labels, Members, encode, nearest, unit_rows
from screening.significance import at_least
from storage_schemas.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

COLUMNS = ("compound", "moa", "share", "mean_distance", "n_cells")

_PAIRS = 2**23  # of compounds, whose similarities are held at once


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
            (:func:`screening.retrieval.nearest` or the ``nearest`` of a Ranking), or (n, k) of the k nearest, all
            of which get a vote.
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
        pairs), ``n_cells`` the votes of the compound: its cells that had a candidate.
    """
    compound_code, compounds = pd.factorize(_objects(query_compound), use_na_sentinel=False)
    moa_code, moas = pd.factorize(_objects(gallery_moa))
    votes = np.zeros((len(compounds), len(moas)))
    voter, position = _ballots(nearest_positions)
    np.add.at(votes, (compound_code[voter], moa_code[position]), 1)
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


def k_nearest(query: npt.ArrayLike, query_group: Labels, gallery: npt.ArrayLike, gallery_group: Labels, k: int) -> Ints:
    """Find the k nearest candidates of each of a few profiles, by cosine in float64, ties by position.

    Returns:
        (n, k) int64 gallery positions, nearest first; -1 where a profile has fewer candidates.

    Raises:
        InputError: k below 1, shapes that do not fit each other, or values that are not finite.
    """
    if k < 1:
        raise InputError(f"k is {k}; ask for at least one neighbour")
    asking, offered = unit_rows(query), unit_rows(gallery)
    groups = encode(query_group, gallery_group, (len(asking), len(offered)), "group")
    found = np.full((len(asking), k), -1)
    for i, (row, group) in enumerate(zip(asking, groups[0], strict=True)):
        candidates = np.flatnonzero(groups[1] != group)
        steps = np.rint(offered[candidates] @ row * COSINE_STEPS)
        closest = candidates[np.argsort(-steps, kind="stable")[:k]]
        found[i, : closest.size] = closest
    return found


def shares_of_compounds(
    nearest_positions: Ints, query_compound: Labels, gallery_compound: Labels
) -> tuple[csr_array, list[Any], list[Any]]:
    """Count the votes for compounds rather than for their MOAs.

    Args:
        nearest_positions: as for :func:`tally`.
        query_compound: (n,) compounds.
        gallery_compound: (N,) compounds.

    Returns:
        (C, G) shares of a compound's votes that went to each compound, sparse: a compound votes for few; and the names
        of both in order of appearance.
    """
    from scipy.sparse import csr_array

    asking, names = pd.factorize(_objects(query_compound), use_na_sentinel=False)
    offered, known = pd.factorize(_objects(gallery_compound), use_na_sentinel=False)
    voter, position = _ballots(nearest_positions)
    pairs = asking[voter], offered[position]
    votes = csr_array((np.ones(len(voter)), pairs), (len(names), len(known)))  # pairs that are there twice add up
    votes.data /= np.repeat(np.bincount(pairs[0], minlength=len(names)), np.diff(votes.indptr))
    return votes, list(names), list(known)


def share_p_values(
    shares: csr_array | Floats,
    own: Sequence[int | None],
    moa: Sequence[str | None],
    n_permutations: int = 10_000,
    seed: int = 0,
) -> tuple[Floats, list[str]]:
    """How often would an MOA get as many votes if the gallery's compounds had each other's MOAs?

    Compounds are relabelled and not cells, which are no independent evidence. Where all compounds that are voted for
    have the same share the p-value is exact (hypergeometric), else it is ``(count + 1) / (relabelings + 1)``.

    Args:
        shares: (C, G) of the votes of each compound for those of the gallery, sparse or not.
        own: (C,) which of the gallery the compound itself is, whose MOA is not dealt; None if it is not there.
        moa: (G,) of the gallery's compounds; None for what keeps its place, such as negative controls.
        n_permutations: relabelings.
        seed: of these.

    Returns:
        (C, M) p-values, 1 without votes; and the MOAs, sorted.
    """
    from scipy.sparse import csr_array

    from screening.relabelings import count_shares
    from screening.significance import TIE, arrangements

    names = sorted({each for each in moa if each is not None})
    code = np.array([-1 if each is None else names.index(each) for each in moa], np.int64)
    votes = csr_array(shares)
    votes.sort_indices()
    p = np.ones((votes.shape[0], len(names)))
    drawn: dict[int, npt.NDArray[np.int32]] = {}
    for c, (start, stop) in enumerate(pairwise(votes.indptr)):
        dealt = code >= 0
        if own[c] is not None:
            dealt[own[c]] = False
        there = dealt[votes.indices[start:stop]] & (votes.data[start:stop] > 0)
        voted, share = votes.indices[start:stop][there], votes.data[start:stop][there]
        labels = np.sort(code[dealt])
        observed = np.bincount(code[voted], share, len(names)).astype(np.float64)
        n = labels.size
        got = np.flatnonzero(observed)
        if np.ptp(share) <= TIE if voted.size else True:
            for m in got:
                p[c, m] = at_least(int((code[voted] == m).sum()), voted.size, int((labels == m).sum()), n)
            continue
        if n not in drawn or drawn[n].shape[1] < voted.size:
            drawn[n] = arrangements(voted.size, n, n_permutations, (seed,))
        weights = np.sort(share)[::-1]
        count = count_shares(weights, drawn[n], labels, observed, TIE)
        p[c, got] = (count[got] + 1) / (n_permutations + 1)
    return p, names


class Novelty(NamedTuple):
    """What is too far from all that is known.

    Attributes:
        similarity: (C,) of each compound to the nearest known one; NaN where there is none.
        threshold: below it nothing is near enough; NaN where it could not be calibrated.
        false_alarms: share of the compounds of known MOA that are below it, each without itself.
        found: share of them that are below it without all compounds of their MOA: what an unknown MOA looks like.
        controls: share of the pseudo-compounds made of negative controls that are not below it.
        n_known: compounds that it was calibrated on.
    """

    similarity: Floats
    threshold: float
    false_alarms: float
    found: float
    controls: float
    n_known: int


def novelty(
    profiles: npt.ArrayLike,
    compound: Labels,
    moa: Sequence[str | None],
    controls: npt.ArrayLike,
    false_alarms: float = 0.1,
) -> Novelty:
    """Tell compounds that resemble none of the known.

    The threshold is the similarity that all but a share ``false_alarms`` of the compounds of known MOA have to the
    nearest known compound. What it finds is measured with each MOA left out in turn.

    Args:
        profiles: (C, D) profiles of all compounds that ask.
        compound: (C,) their names.
        moa: (C,) what is known of them; None where nothing is.
        controls: (p, D) profiles of negative controls, made like those of compounds.
        false_alarms: share of known compounds that may be called unknown.

    Raises:
        InputError: shapes that do not fit each other, or values that are not finite.
    """
    unit = unit_rows(profiles)
    names = _objects(compound)
    labels = _objects(moa)
    known = ~np.asarray(pd.isna(labels), bool)
    gallery, gallery_names, gallery_moa = unit[known], names[known], labels[known]
    similarity = _most_similar(unit, gallery, names, gallery_names)
    of_moa, of_name = pd.factorize(gallery_moa)[0], pd.factorize(gallery_names)[0]
    of_both = of_moa * (of_name.max(initial=0) + 1) + of_name
    _, pair, n_same = np.unique(of_both, return_inverse=True, return_counts=True)
    tested = known.copy()
    tested[known] = np.bincount(of_moa)[of_moa] > n_same[pair]  # others of its mechanism are there
    if not tested.any():
        return Novelty(similarity, float("nan"), float("nan"), float("nan"), float("nan"), 0)
    threshold = float(np.quantile(similarity[tested], false_alarms, method="lower"))
    without_moa = _most_similar(unit[tested], gallery, labels[tested], gallery_moa)
    of_no_group = unit_rows(controls)
    of_controls = _most_similar(of_no_group, gallery, np.zeros(len(of_no_group)), np.ones(len(gallery)))
    return Novelty(
        similarity,
        threshold,
        float((similarity[tested] < threshold).mean()),
        float((~(without_moa >= threshold)).mean()),
        float((of_controls >= threshold).mean()) if of_controls.size else float("nan"),
        int(tested.sum()),
    )


def _most_similar(query: Floats, gallery: Floats, query_group: Labels, gallery_group: Labels) -> Floats:
    """(n,) cosine to the nearest of the gallery of another group; NaN where there is none."""
    groups = encode(query_group, gallery_group, (len(query), len(gallery)), "group")
    nearest_ones = np.full(len(query), -np.inf)
    # Some rows at a time: all pairs of many thousand compounds are gigabytes.
    step = max(1, _PAIRS // max(len(gallery), 1))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        own = groups[0][rows, None] == groups[1]
        nearest_ones[rows] = np.where(own, -np.inf, query[rows] @ gallery.T).max(axis=1, initial=-np.inf)
    return np.where(np.isinf(nearest_ones), np.nan, nearest_ones)


def _ballots(nearest_positions: Ints) -> tuple[Ints, Ints]:
    """Who votes and for which gallery position, a pair a vote."""
    positions = nearest_positions if nearest_positions.ndim == 2 else nearest_positions[:, None]
    voter = np.nonzero(positions >= 0)[0]
    return voter, positions[positions >= 0]


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
    of_group = Members(gallery_group, query_group)
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
