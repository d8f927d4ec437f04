"""Which wells the network learns from and which it is tested on, as a table anyone can read.

The unit is the well, never the cell: cells of one well share their compound, their neighbours and
their illumination, so a cell whose neighbours were trained on tests memory. Two questions are kept
apart:

- ``test_compound``: a compound never trained on, in the replicates that were: does the network
  know the mechanism?
- ``test_replicate``: a compound that was trained on, in a replicate that was not: does the network
  withstand a new plate?

Validation compounds, from which the best epoch is chosen, are apart from both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from screening.layouts import natural
from storage_schemas.base import Config
from storage_schemas.errors import InputError

SPLITS = ("train", "validation", "test_compound", "test_replicate", "unused")


class SplitConfig(Config):
    """How compounds and replicates are divided."""

    validation_share: float = Field(
        0.2, ge=0, lt=1, description="share of each MOA's compounds to choose the best epoch on"
    )
    test_share: float = Field(0.2, ge=0, lt=1, description="share of each MOA's compounds never trained on, to test on")
    hold_out_replicate: bool = Field(
        True, description="never train on the last replicate, and test trained compounds there"
    )


class Split(NamedTuple):
    """The table of the split and what a reader should know about it."""

    table: pd.DataFrame
    notes: list[str]


def split(
    plate_map: pd.DataFrame,
    compounds: pd.DataFrame,
    config: SplitConfig,
    seed: int,
    label: Literal["moa", "compound"] = "moa",
) -> Split:
    """Divide a screen's wells.

    Of each MOA's compounds, at least one is trained on; with two or more at least one is for
    testing, with three or more at least one for validation (unless its share is 0). A compound
    keeps its place in all replicates, so the draw does not depend on the order of the tables.
    Negative controls of the training replicates are trained on, as a class of their own. Wells that
    fit no question are ``unused``: compounds without a known MOA (unless compounds are what is told
    apart), and in the held-out replicate negative controls and compounds that were not trained on.

    Args:
        plate_map: a row a well: ``plate``, ``well``, ``compound``, ``role``, ``replicate``.
        compounds: a row a compound: ``compound``, ``moa`` (None or NaN: not known).
        config: how to divide.
        seed: of the draw.
        label: what the network tells apart; as ``compound``, those without a known MOA are trained on.

    Returns:
        A table (``plate, well, compound, moa, role, replicate, split``; a row for each row of the
        plate map, ``split`` one of :data:`SPLITS`) and notes, a sentence each, on what could not be
        tested, and why.

    Raises:
        InputError: if a compound of the plate map is not among the compounds.
    """
    moa_of = compounds.set_index("compound")["moa"]
    missing = sorted(set(plate_map["compound"]) - set(moa_of.index))
    if missing:
        raise InputError(
            f"compounds {', '.join(missing[:5])} of the plate map are not in the compounds table: add a row for each"
        )
    moa = plate_map["compound"].map(moa_of)
    moa = moa.astype(object).where(moa.notna(), None)
    table = plate_map[["plate", "well", "compound", "role", "replicate"]].copy()
    table.insert(3, "moa", moa)

    is_control = table["role"] == "negative_control"
    replicates = sorted(table["replicate"].unique(), key=natural)
    held_out = replicates[-1] if config.hold_out_replicate and len(replicates) > 1 else None

    known = table[(table["replicate"] != held_out) & ~is_control & table["moa"].notna()]
    place = _divide_compounds(known, config, np.random.default_rng(seed))
    without_moa = "train" if label == "compound" else "unused"
    seen = set(table["compound"][table["replicate"] != held_out])

    def part(compound: str, control: bool, replicate: str) -> str:
        own = "train" if control else place.get(compound, without_moa if compound in seen else "unused")
        if replicate != held_out:
            return own
        return "test_replicate" if own == "train" and not control else "unused"

    table["split"] = [part(*well) for well in zip(table["compound"], is_control, table["replicate"], strict=True)]
    return Split(table, _notes(table, held_out, config, without_moa))


def _divide_compounds(known: pd.DataFrame, config: SplitConfig, rng: np.random.Generator) -> dict[str, str]:
    place: dict[str, str] = {}
    for _, wells in known.groupby("moa", sort=True):
        names = rng.permutation(sorted(wells["compound"].unique())).tolist()
        n = len(names)
        n_test = min(_at_least_one(config.test_share, n), n - 1)
        n_validation = min(_at_least_one(config.validation_share, n), n - n_test - 1)
        for i, name in enumerate(names):
            if i < n_test:
                place[name] = "test_compound"
            elif i < n_test + n_validation:
                place[name] = "validation"
            else:
                place[name] = "train"
    return place


def _at_least_one(share: float, n: int) -> int:
    return max(round(share * n), 1) if share > 0 else 0


def _notes(table: pd.DataFrame, held_out: str | None, config: SplitConfig, without_moa: str) -> list[str]:
    count = table["split"].value_counts()
    notes = []
    unknown = table["compound"][table["moa"].isna() & (table["role"] != "negative_control")]
    if len(unknown):
        fate = "trained on, not tested" if without_moa == "train" else "embedded, not trained on"
        notes.append(f"{unknown.nunique()} compounds have no known MOA: they are {fate}.")
    if held_out is not None:
        notes.append(f"Replicate {held_out} is held out: nothing in it is trained on.")
    elif config.hold_out_replicate:
        notes.append("There is one replicate only, so none is held out: test_replicate is empty.")
    if "test_compound" not in count and config.test_share > 0:
        notes.append("No MOA has two compounds, so none is held out: test_compound is empty.")
    if "validation" not in count and config.validation_share > 0:
        notes.append("No MOA has three compounds, so there is no validation: the last epoch counts as best.")
    if held_out is not None and "test_replicate" not in count:
        notes.append(f"Replicate {held_out} has no compound that was trained on, so test_replicate is empty.")
    return notes


def check_leaks(table: pd.DataFrame) -> None:
    """Refuse a split in which something tested on was also trained on.

    Args:
        table: as :func:`split` gives it, or made by hand.

    Raises:
        InputError: naming the first wells, compounds or replicates that stand on both sides.
    """
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise InputError(f"the split table has the unknown parts {unknown}: choose from {SPLITS}")
    twice = table[table.duplicated(["plate", "well"])]
    if len(twice):
        names = twice["plate"] + "/" + twice["well"]
        raise InputError(f"wells stand more than once in the split table: {_some(names)}")
    by_part = dict(list(table.groupby("split")))
    train = by_part.get("train", table.iloc[:0])
    validation = by_part.get("validation", table.iloc[:0])
    test_compound = by_part.get("test_compound", table.iloc[:0])
    test_replicate = by_part.get("test_replicate", table.iloc[:0])
    for part, name in ((validation, "validation"), (test_compound, "test_compound")):
        _refuse_shared(part, train, "compound", name, "train")
    _refuse_shared(test_compound, validation, "compound", "test_compound", "validation")
    for part, name in ((train, "train"), (validation, "validation")):
        _refuse_shared(test_replicate, part, "replicate", "test_replicate", name)


def _refuse_shared(left: pd.DataFrame, right: pd.DataFrame, column: str, left_name: str, right_name: str) -> None:
    shared = left[column][left[column].isin(right[column])]
    if len(shared):
        raise InputError(
            f"the split leaks: {column} {_some(shared)} is in {left_name} and in {right_name}; "
            f"keep each {column} in one of them"
        )


def _some(names: pd.Series[str]) -> str:
    return ", ".join(sorted(set(names))[:5])
