"""Predicting mechanisms: what a compound's cells or profiles vote for, how sure that is, or that nothing is near."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from pipelines.inputs import well_keys
from pipelines.vectors import EmbeddedCells, read_profiles, sample_rows
from screening import prediction
from screening.prediction import Novelty
from screening.profiles import consensus_profiles
from screening.retrieval import nearest
from screening.significance import benjamini_hochberg
from screening.similarity import suggest
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.screen import Screen, fingerprint
from storage_schemas.tables import ACTIVITY, COMPOUNDS, PLATE_MAP, PREDICTIONS, SPLIT, open_table, write_table

OUTPUT_VERSION = 1  # raised when the same screen gives other predictions

NO_EFFECT = "like the negative control"
NONE_KNOWN = "none of the known"

Level = Literal["cell", "well", "compound"]

_USUAL_K: Mapping[Level, int] = {"cell": 1, "well": 5, "compound": 5}
# Of compounds that the network has not been trained on, a prediction is a test.
_ORDER = {"test_compound": 0, "query": 0, "validation": 1, "unused": 2}


class PredictionConfig(Config):
    """How mechanisms are predicted, and what is too far from all of them."""

    k: int | None = Field(None, ge=1, description="neighbours that each cell or profile votes for; 1 of cells, else 5")
    max_cells: int = Field(
        100_000, ge=1, description="cells that vote, at most; of more, as many of each compound are drawn"
    )
    n_permutations: int = Field(10_000, ge=100, description="relabelings a p-value")
    false_alarms: float = Field(0.1, gt=0, lt=1, description="share of known compounds that may be called unknown")
    seed: int = Field(0, description="of the relabelings, and of the cells drawn")


class NoMechanismError(InputError):
    """No compound of a screen has a known mechanism that others could be predicted to share."""


@dataclass(frozen=True)
class Predictions:
    """What a screen's compounds are predicted to do.

    Attributes:
        table: a row a compound and candidate, columns of :data:`storage_schemas.tables.PREDICTIONS`.
        notes: how the limit of what is near was set, and what it does; how many cells were drawn, if not all vote.
    """

    table: pd.DataFrame
    notes: tuple[str, ...]


class _Items(NamedTuple):
    """What votes: cells, wells or compounds."""

    vectors: npt.NDArray[np.float32]
    compound: npt.NDArray[Any]
    role: npt.NDArray[Any]
    moa: npt.NDArray[Any]


def predict(
    screen: Screen, compound: str | None = None, level: Level | None = None, config: PredictionConfig | None = None
) -> Predictions:
    """The mechanisms that compounds are predicted to have.

    What is computed is kept in the screen, so that the next question is answered at once.

    Args:
        screen: with profiles.
        compound: one, with all its candidates; by default all but the negative controls, with their first choice only.
        level: what votes: cells (MitoReID's rule), wells or compounds; cells where there are any.
        config: the defaults when None.

    Raises:
        SchemaError: if there are no profiles, or no embeddings and cells are asked for.
        InputError: for an unknown compound, with names near it.
        NoMechanismError: if no mechanism is known.
    """
    has_cells = bool(screen.done_units("embed"))
    level = level or ("cell" if has_cells else "compound")
    if level == "cell" and not has_cells:
        raise InputError(f"{screen.url}: has no embeddings of cells; predict from --level well or compound")
    config = config or PredictionConfig()
    found = _stored(screen, level, config)
    if compound is None:
        return Predictions(found.table.drop_duplicates("compound", ignore_index=True), found.notes)
    own = found.table[found.table["compound"] == compound]
    if own.empty:
        raise _not_there(screen, compound, found.table["compound"])
    return Predictions(own.reset_index(drop=True), found.notes)


def _not_there(screen: Screen, compound: str, known: pd.Series[str]) -> InputError:
    plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    if compound in set(plate_map.loc[plate_map["role"] == "negative_control", "compound"]):
        return InputError(f"{compound!r} is a negative control: it is what the others are compared with")
    near = suggest(compound, known)
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(set(known))[:5])} …"
    return InputError(f"{screen.url}: compound {compound!r} has nothing that could vote; {hint}")


def _stored(screen: Screen, level: Level, config: PredictionConfig) -> Predictions:
    """The predictions of all compounds, made anew if anything that they depend on has changed."""
    url, notes_url = screen.predictions(level, "parquet"), screen.predictions(level, "json")
    profiles = [screen.profiles("raw"), screen.profiles("well"), screen.profiles("compound")]
    files = [*profiles, screen.plate_map, screen.compounds, screen.split, screen.statistics("activity")]
    digests = [hashlib.sha256(store.read_bytes(file)).hexdigest() if store.exists(file) else "" for file in files]
    mark = fingerprint("predict", OUTPUT_VERSION, level, config.model_dump(mode="json"), digests)
    if store.exists(url) and store.exists(notes_url):
        notes = store.read_json(notes_url)
        if notes["fingerprint"] == mark:
            return Predictions(open_table(url, PREDICTIONS, fingerprint=mark).to_pandas(), tuple(notes["notes"]))
    found = _predict(screen, level, config)
    store.remove(notes_url)
    write_table(url, found.table, PREDICTIONS, mark)
    store.write_json(notes_url, {"fingerprint": mark, "notes": list(found.notes)})
    return Predictions(open_table(url, PREDICTIONS).to_pandas(), found.notes)


def _predict(screen: Screen, level: Level, config: PredictionConfig) -> Predictions:
    items, drawn = _read(screen, level, config)
    control = items.role == "negative_control"
    # The profiles of controls are noise about nothing, and near to no one: activity tells what is like them.
    moa = items.moa.copy()
    moa[control] = NO_EFFECT if level == "cell" else None
    known = ~pd.isna(moa)
    if not (~control & known).any():
        raise NoMechanismError(f"{screen.url}: no compound here has a known MOA: give them in the table of compounds")
    asked, offered = _Items(*(each[~control] for each in items)), _Items(*(each[known] for each in items))
    gallery_moa = moa[known]
    k = config.k or _USUAL_K[level]
    groups = asked.compound, offered.compound
    if k == 1:
        positions = nearest(asked.vectors, groups[0], offered.vectors, groups[1])
    else:
        positions = prediction.k_nearest(asked.vectors, groups[0], offered.vectors, groups[1], k)
    votes = prediction.tally(
        positions, asked.vectors, asked.compound, groups[0], offered.vectors, gallery_moa, groups[1]
    ).rename(columns={"n_cells": "n_votes"})
    votes = votes.merge(_p_values(positions, asked, offered, gallery_moa, config), how="left", on=["compound", "moa"])
    votes["q_value"] = benjamini_hochberg(votes["p_value"])
    novel, notes = _novelty(screen, config)
    votes = votes.merge(novel, on="compound", how="left")
    votes = _called(votes, _still(screen) if level != "cell" else set())
    return Predictions(_in_order(votes, screen), (*drawn, *notes))


def _read(screen: Screen, level: Level, config: PredictionConfig) -> tuple[_Items, list[str]]:
    """Vectors and what is known of them; a note if not all are taken."""
    notes = []
    if level != "cell":
        metadata, vectors = read_profiles(screen, level)
    else:
        plate_map = open_table(screen.plate_map, PLATE_MAP).to_pandas()
        cells = EmbeddedCells(screen, well_keys(plate_map))
        of_well = cells.per_well().merge(plate_map, on=["plate", "well"], how="left")
        rows = _drawn(cells, of_well["compound"], config)
        if len(rows) < len(cells):
            notes.append(f"{len(rows):,} of {len(cells):,} cells vote, drawn alike from each compound (max_cells)")
        keys, vectors = cells.read(rows)
        compounds = open_table(screen.compounds, COMPOUNDS, ["compound", "moa"]).to_pandas()
        metadata = keys.merge(plate_map, on=["plate", "well"], how="left").merge(compounds, on="compound", how="left")
    return _Items(vectors, *(metadata[name].to_numpy(object) for name in ("compound", "role", "moa"))), notes


def _drawn(cells: EmbeddedCells, compounds: pd.Series[str], config: PredictionConfig) -> npt.NDArray[np.int64]:
    """The rows of the cells that vote."""
    if len(cells) <= config.max_cells:
        return np.arange(len(cells))
    rng = np.random.default_rng([config.seed, 10])
    names = sorted(set(compounds))
    each = max(config.max_cells // len(names), 1)
    drawn = [sample_rows(cells.counts, (compounds == name).to_numpy(), each, rng) for name in names]
    return np.sort(np.concatenate(drawn))


def _p_values(
    positions: npt.NDArray[np.int64], asked: _Items, offered: _Items, moa: npt.NDArray[Any], config: PredictionConfig
) -> pd.DataFrame:
    """compound, moa, p_value of all that ask and all mechanisms; controls keep their place."""
    shares, names, gallery = prediction.shares_of_compounds(positions, asked.compound, offered.compound)
    of_gallery = dict(zip(offered.compound, moa, strict=True))
    labels = [None if of_gallery[name] == NO_EFFECT else of_gallery[name] for name in gallery]
    place = {name: i for i, name in enumerate(gallery)}
    own = [place.get(name) for name in names]
    p, moas = prediction.share_p_values(shares, own, labels, config.n_permutations, config.seed)
    return pd.DataFrame(
        {"compound": np.repeat(np.array(names, object), len(moas)), "moa": moas * len(names), "p_value": p.ravel()}
    )


def _novelty(screen: Screen, config: PredictionConfig) -> tuple[pd.DataFrame, list[str]]:
    """How near each compound's profile is to that of a known one, and whether that is near enough."""
    metadata, profiles = read_profiles(screen, "compound")
    control = (metadata["role"] == "negative_control").to_numpy()
    moa = [None if pd.isna(each) else str(each) for each in metadata.loc[~control, "moa"]]
    names = metadata.loc[~control, "compound"].to_numpy(object)
    found = prediction.novelty(profiles[~control], names, moa, _of_controls(screen), config.false_alarms)
    near = found.similarity >= found.threshold if np.isfinite(found.threshold) else np.ones(len(names), bool)
    return pd.DataFrame({"compound": names, "nearest_similarity": found.similarity, "near": near}), _notes(found)


def _of_controls(screen: Screen) -> npt.NDArray[np.float32]:
    """Profiles of pseudo-compounds: the first negative control of each plate, the second of each, and so on."""
    metadata, wells = read_profiles(screen)
    control = (metadata["role"] == "negative_control").to_numpy()
    number = metadata[control].groupby("plate").cumcount()
    return consensus_profiles(wells[control], pd.DataFrame({"number": number}))[1] if control.any() else wells[:0]


def _notes(found: Novelty) -> list[str]:
    if not found.n_known:
        return [f"no mechanism has two compounds, so that {NONE_KNOWN!r} cannot be told"]
    note = (
        f"{NONE_KNOWN!r}: the nearest known compound has a similarity below {found.threshold:.3f}; so have "
        f"{found.false_alarms:.0%} of {found.n_known} known compounds (false alarms), {found.found:.0%} of them when "
        "all compounds of their mechanism are left out"
    )
    return [
        note if np.isnan(found.controls) else f"{note}, and {1 - found.controls:.0%} of groups of negative controls"
    ]


def _still(screen: Screen) -> set[str]:
    """Compounds that were tested for activity and are not active in any treatment."""
    url = screen.statistics("activity")
    if not store.exists(url):
        return set()
    activity = open_table(url, ACTIVITY, ["compound", "active"]).to_pandas()
    tested = activity[activity["active"].notna()]
    return set(tested["compound"]) - set(tested.loc[tested["active"].astype(bool), "compound"])


def _called(votes: pd.DataFrame, still: set[str]) -> pd.DataFrame:
    """What each compound is called in the end, in its every row, and what must be known of that."""
    first = votes.drop_duplicates("compound").set_index("compound")
    call = first["moa"].astype(object).where(first["n_votes"] > 0, None)
    no_effect = (call == NO_EFFECT) | first.index.isin(still)
    call = call.mask((first["n_votes"] > 0) & ~no_effect & ~first["near"].astype(bool), NONE_KNOWN).mask(
        no_effect, NO_EFFECT
    )
    return votes.assign(call=votes["compound"].map(call))


def _in_order(votes: pd.DataFrame, screen: Screen) -> pd.DataFrame:
    """With what is known of the compounds, held-out ones first, and why an answer cannot be right."""
    compounds = open_table(screen.compounds, COMPOUNDS, ["compound", "moa"]).to_pandas()
    true = compounds.set_index("compound")["moa"]
    votes = votes.assign(true_moa=votes["compound"].map(true), split=None)
    if store.exists(screen.split):
        split = open_table(screen.split, SPLIT).to_pandas()
        part = split.groupby("compound")["split"].agg(lambda parts: "train" if "train" in set(parts) else parts.iloc[0])
        votes["split"] = votes["compound"].map(part).astype(object)
    asked = votes.drop_duplicates("compound")
    per_moa = true[true.index.isin(asked["compound"])].dropna().value_counts()
    alone = votes["true_moa"].map(per_moa).eq(1)
    votes["note"] = None
    votes.loc[alone, "note"] = "alone of its mechanism: no other compound votes for it"
    votes.loc[votes["n_votes"] == 0, "note"] = "no other compound has a known mechanism: nothing votes"
    order = votes["split"].map(_ORDER).fillna(3)
    place = votes.groupby("compound", sort=False).cumcount()
    votes = votes.assign(order=order, place=place).sort_values(["order", "compound", "place"], kind="stable")
    return votes[PREDICTIONS.schema.names].reset_index(drop=True)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader looks at first; those that say nothing are left away."""
    return table[[name for name in table if name not in ("true_moa", "split", "note") or table[name].notna().any()]]
