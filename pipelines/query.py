"""Asking a finished screen: what resembles this, and which mechanism do its cells vote for. No Ray, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from screening import prediction, similarity
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import Level, index_exists, read_level, read_manifest
from storage_schemas.screen import Screen
from storage_schemas.tables import SPLIT, open_table

if TYPE_CHECKING:
    import faiss

NO_EFFECT = "like the negative control"


def query(screen: Screen, compound: str, k: int, level: Level = "compound") -> pd.DataFrame:
    """What resembles a compound most.

    The compound is the mean of its vectors at the level asked for; it is never its own answer.

    Args:
        screen: a screen with an index.
        compound: its id.
        k: how many answers.
        level: compounds (profiles), wells (profiles) or cells (embeddings).

    Returns:
        rank, id (see :data:`storage_schemas.tables.INDEX_IDS`), compound, moa, similarity (cosine), nearest first.

    Raises:
        InputError: for a screen without index or an unknown compound, with names near it.
    """
    index, ids = _open_index(screen, level)
    own = ids["compound"].to_numpy() == compound
    if not own.any():
        raise _unknown_compound(screen, compound)
    of_own = [index.reconstruct(int(i)) for i in np.flatnonzero(own)]
    return _neighbours(index, ids, np.mean(of_own, axis=0)[None], own, k)


def nearest_compounds(screen: Screen, k: int) -> pd.DataFrame:
    """Each compound's nearest compounds: compound, moa, rank, neighbour, neighbour_moa, similarity."""
    index, ids = _open_index(screen, "compound")
    tables = []
    for position, (compound, moa) in enumerate(zip(ids["compound"], ids["moa"], strict=True)):
        own = np.arange(len(ids)) == position
        found = _neighbours(index, ids, np.asarray(index.reconstruct(position))[None], own, k)
        found = found.rename(columns={"compound": "neighbour", "moa": "neighbour_moa"})
        tables.append(found.drop(columns="id").assign(compound=compound, moa=moa))
    columns = ["compound", "moa", "rank", "neighbour", "neighbour_moa", "similarity"]
    return pd.concat(tables, ignore_index=True)[columns]


def _open_index(screen: Screen, level: Level) -> tuple[faiss.IndexFlatIP, pd.DataFrame]:
    """One level of the index and what its vectors are.

    Raises:
        SchemaError: if there is no index, or a file of it is damaged.
    """
    if not screen.exists():
        raise SchemaError(screen.url, "is not a screen: it has no manifest.json")
    if not index_exists(screen.index):
        raise SchemaError(screen.url, "has no index: run the stage `index` first")
    dimension = read_manifest(screen.index).dimension
    stored, ids = read_level(screen.index, level)
    try:
        return similarity.deserialise(stored, len(ids), dimension), ids
    except InputError as error:
        raise SchemaError(screen.index, f"level {level!r}: {error}") from error


def _neighbours(
    index: faiss.IndexFlatIP,
    ids: pd.DataFrame,
    vector: npt.NDArray[np.float32],
    excluded: npt.NDArray[np.bool_],
    k: int,
) -> pd.DataFrame:
    # As many more as could be left out again.
    scores, positions = similarity.search(index, vector, k + int(excluded.sum()))
    kept = ~excluded[positions[0]]
    found = ids.iloc[positions[0][kept][:k]][["id", "compound", "moa"]].reset_index(drop=True)
    found.insert(0, "rank", np.arange(1, len(found) + 1))
    return found.assign(similarity=scores[0][kept][:k])


def _unknown_compound(screen: Screen, compound: str) -> InputError:
    _, known = read_level(screen.index, "compound")
    near = similarity.suggest(compound, known["compound"])
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(known['compound'][:5])} …"
    return InputError(f"{screen.url}: compound {compound!r} is not in the index; {hint}")


def predict(screen: Screen, compound: str | None) -> pd.DataFrame:
    """The mechanisms that a compound's cells vote for, by MitoReID's rule.

    Each cell votes for the MOA of its nearest cell of another compound of known MOA, or for :data:`NO_EFFECT` where
    that is a negative control: an inactive compound looks like the controls. Where the network was trained on the
    compound itself, its vote is no test of the network: the column ``split`` says so; held-out compounds come first.

    Args:
        screen: a screen with embeddings.
        compound: its id; all compounds but the negative controls by default, each with its first choice only.

    Returns:
        compound, moa, share of the votes, mean_distance (cosine), n_cells, true_moa (where known) and split.

    Raises:
        InputError: for an unknown compound, with names near it.
    """
    index, ids = _open_index(screen, "cell")
    cells = index.reconstruct_n(0, len(ids))
    split = open_table(screen.split, SPLIT).to_pandas()
    controls = set(split.loc[split["role"] == "negative_control", "compound"])
    names = ids["compound"]
    if compound is not None and compound not in set(names):
        raise _unknown_compound(screen, compound)
    if compound in controls:
        raise InputError(f"{compound!r} is a negative control: it is what the others are compared with")
    asked = (names == compound) if compound is not None else ~names.isin(controls)
    moa = ids["moa"].mask(names.isin(controls), NO_EFFECT)
    known = moa.notna().to_numpy()
    if not known.any():
        raise InputError(f"{screen.url}: no compound here has a known MOA: give them in the table of compounds")
    votes = prediction.vote(
        cells[asked.to_numpy()],
        names[asked].to_numpy(object),
        cells[known],
        moa.to_numpy(object)[known],
        names.to_numpy(object)[known],
    )
    if compound is None:
        votes = votes.groupby("compound", sort=False).head(1)
    first = split.sort_values(["plate", "well"]).groupby("compound")
    part = first["split"].agg(lambda parts: "train" if "train" in set(parts) else parts.iloc[0])
    votes = votes.assign(true_moa=votes["compound"].map(first["moa"].first()), split=votes["compound"].map(part))
    order = {"test_compound": 0, "query": 0, "validation": 1, "unused": 2}
    votes = votes.assign(order=votes["split"].map(order).fillna(3))
    keys = ["order", "compound"] if compound is None else ["order"]
    return votes.sort_values(keys, kind="stable").drop(columns="order").reset_index(drop=True)
