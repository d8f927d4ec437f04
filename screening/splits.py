"""What the network learns from and what it is tested on, as a table anyone can read.

Each part of a screen has one role:

- ``train``: the network learns from it;
- ``validation``: chooses the best epoch, looked up among training cells; never learnt from, never tested on;
- ``test_compound``, ``test_replicate``, ``test_well``, ``test_cell`` and, in tables made by hand, ``query``: the
  queries of one test each, called by what of theirs was never trained on;
- ``gallery``: among which queries are looked up, never learnt from; where nothing has this role, the training cells are
  the gallery;
- ``unused``: embedded, and nothing else.

What must not be on both sides is the *unit*. By compound is the question of a screen: does the network know the
mechanism of a compound that it has never seen? By replicate asks whether it withstands a new plate. By well and by cell
the compounds, and by cell even the neighbours in the well, have been trained on. MitoReID (Nature Computational Science
2024) splits by cell: cells of one well share their compound, their neighbours and their illumination, so that a cell
whose neighbours were trained on tests memory too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Annotated, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from pydantic import Field

from screening.layouts import natural
from storage_schemas.base import Config
from storage_schemas.errors import InputError
from storage_schemas.tables import PARTS, SPLIT

_Item = TypeVar("_Item", bound=Hashable)

Unit = Literal["compound", "replicate", "well", "cell"]

WELL = ["plate", "well"]
CELL = [*WELL, "site", "track"]

# The queries of a test, what the test is called, and what they must not share with what was trained on.
TESTS: dict[str, str] = {
    "test_compound": "compound",
    "test_replicate": "replicate",
    "test_well": "well",
    "test_cell": "cell",
    "query": "query",
}
_SHARED: dict[str, list[str]] = {"compound": ["compound"], "replicate": ["replicate"], "well": WELL, "cell": CELL}

_VALIDATION_SHARE = 0.2
_TEST_SHARE = 0.2


class ByCompound(Config):
    """Compounds are divided within each MOA, and the last replicate is held out: two tests."""

    method: Literal["compound"] = Field("compound", description="no compound is on both sides")
    validation_share: float = Field(
        _VALIDATION_SHARE, ge=0, lt=1, description="share of each MOA's compounds to choose the best epoch on"
    )
    test_share: float = Field(
        _TEST_SHARE, ge=0, lt=1, description="share of each MOA's compounds never trained on, to test on"
    )
    hold_out_replicate: bool = Field(
        True, description="never train on the last replicate, and test trained compounds there"
    )


class ByReplicate(Config):
    """The last replicate is for the test, and of three or more the one before it for validation."""

    method: Literal["replicate"] = Field("replicate", description="no replicate is on both sides")


class ByWell(Config):
    """The wells of each compound are divided."""

    method: Literal["well"] = Field("well", description="no well is on both sides")
    validation_share: float = Field(
        _VALIDATION_SHARE, ge=0, lt=1, description="share of each compound's wells to choose the best epoch on"
    )
    test_share: float = Field(
        _TEST_SHARE, ge=0, lt=1, description="share of each compound's wells never trained on, to test on"
    )


class ByCell(Config):
    """The cells of each compound are divided, as MitoReID does; neighbours in a well are on both sides."""

    method: Literal["cell"] = Field("cell", description="cells are divided; scores are optimistic")
    validation_share: float = Field(
        _VALIDATION_SHARE, ge=0, lt=1, description="share of each compound's cells to choose the best epoch on"
    )
    test_share: float = Field(
        _TEST_SHARE, ge=0, lt=1, description="share of each compound's cells never trained on, to test on"
    )
    gallery_share: float = Field(
        0.2, ge=0, lt=1, description="share of each compound's cells to look them up among; 0: among the training cells"
    )


class FromTable(Config):
    """As the table inputs.split says."""

    method: Literal["table"] = Field("table", description="as the table inputs.split says")
    unit: Unit = Field("well", description="what must not be both trained on and tested on")


SplitConfig = Annotated[ByCompound | ByReplicate | ByWell | ByCell | FromTable, Field(discriminator="method")]


class Split(NamedTuple):
    """The table of the split and what a reader should know about it."""

    table: pd.DataFrame
    notes: list[str]


def unit(config: SplitConfig) -> Unit:
    """What must not be on both sides."""
    return config.unit if isinstance(config, FromTable) else config.method


def split(
    plate_map: pd.DataFrame,
    compounds: pd.DataFrame,
    config: SplitConfig,
    seed: int,
    label: Literal["moa", "compound"] = "moa",
    cells: pd.DataFrame | None = None,
    given: pd.DataFrame | None = None,
) -> Split:
    """Divide a screen.

    By compound: of each MOA's compounds, at least one is trained on; with two or more at least one is for testing, with
    three or more at least one for validation (unless its share is 0), in all replicates. By well and by cell the wells
    or cells of each compound are divided likewise. The draw does not depend on the order of the tables. Negative
    controls are trained on, as a class of their own, but not in a replicate that is held out. What fits no
    question is ``unused``: compounds without a known MOA (unless compounds are what is told apart), and in the held-out
    replicate negative controls and compounds that have no known MOA or were not trained on.

    Args:
        plate_map: a row a well: ``plate``, ``well``, ``compound``, ``role``, ``replicate``.
        compounds: a row a compound: ``compound``, ``moa`` (None or NaN: not known).
        config: how to divide.
        seed: of the draw.
        label: what the network tells apart; as ``compound``, those without a known MOA are trained on.
        cells: a row a cell: ``plate``, ``well``, ``site``, ``track``; needed by cell.
        given: for the method ``table``: ``plate``, ``well``, ``site`` and ``track`` (null where a row is a well), and
            ``split``.

    Returns:
        A table with the columns of :data:`storage_schemas.tables.SPLIT`, a row a well of the plate map in its order
        (``site`` and ``track`` null), or by cell a row a cell; and notes, a sentence each, on what could not be
        tested, and why.

    Raises:
        InputError: if a compound of the plate map is not among the compounds, the given table names what is not there
            or has nothing to train on, or there are no cells to divide.
    """
    table = _annotated(plate_map, compounds)
    without_moa = "train" if label == "compound" else "unused"
    rng = np.random.default_rng(seed)
    match config:
        case ByCompound():
            done, notes = _by_compound(table, config, without_moa, rng)
        case ByReplicate():
            done, notes = _by_replicate(table, without_moa)
        case ByWell():
            shares = {"test_well": config.test_share, "validation": config.validation_share}
            done, notes = _within_compounds(table.sort_values(WELL), shares, without_moa, rng)
        case ByCell():
            shares = {
                "test_cell": config.test_share,
                "gallery": config.gallery_share,
                "validation": config.validation_share,
            }
            done, notes = _within_compounds(_of_cells(table, cells), shares, without_moa, rng)
        case FromTable():
            done, notes = _as_given(table, given)
    if unit(config) == "cell":
        notes = [
            *notes,
            "Cells of one well stand on both sides of this split, as in MitoReID's: scores are optimistic.",
        ]
    unknown = table["compound"][table["moa"].isna() & (table["role"] != "negative_control")]
    if len(unknown) and not isinstance(config, FromTable):
        fate = "trained on, not tested" if without_moa == "train" else "embedded, not trained on"
        notes = [f"{unknown.nunique()} compounds have no known MOA: they are {fate}.", *notes]
    return Split(done.sort_index(kind="stable")[SPLIT.schema.names], notes)


def parts_of(cells: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """What the split says of each cell.

    Args:
        cells: ``plate``, ``well``, ``site`` and ``track`` of each, and any other columns.
        table: a split as :func:`split` gives it.

    Returns:
        The cells, in order, with the table's ``compound``, ``moa``, ``role``, ``replicate`` and ``split``; null for
        cells that it does not know.
    """
    keys = CELL if is_of_cells(table) else WELL
    said = table.drop(columns=[name for name in CELL if name not in keys])
    if keys == CELL:
        said = said.astype({"track": cells["track"].dtype})
    return cells.merge(said, on=keys, how="left", validate="many_to_one")


def is_of_cells(table: pd.DataFrame) -> bool:
    """Whether a split has a row a cell, and not a row a well."""
    return bool(table["track"].notna().any())


def _annotated(plate_map: pd.DataFrame, compounds: pd.DataFrame) -> pd.DataFrame:
    moa_of = compounds.set_index("compound")["moa"]
    missing = sorted(set(plate_map["compound"]) - set(moa_of.index))
    if missing:
        raise InputError(
            f"compounds {', '.join(missing[:5])} of the plate map are not in the compounds table: add a row for each"
        )
    moa = plate_map["compound"].map(moa_of)
    moa = moa.astype(object).where(moa.notna(), None)
    return plate_map[[*WELL, "compound", "role", "replicate"]].assign(
        moa=moa, site=None, track=pd.array([pd.NA] * len(plate_map), "Int32")
    )


def _is_control(table: pd.DataFrame) -> pd.Series[bool]:
    return table["role"] == "negative_control"


def _replicates(table: pd.DataFrame) -> list[str]:
    return sorted(table["replicate"].unique(), key=natural)


def _by_compound(
    table: pd.DataFrame, config: ByCompound, without_moa: str, rng: np.random.Generator
) -> tuple[pd.DataFrame, list[str]]:
    replicates = _replicates(table)
    held_out = replicates[-1] if config.hold_out_replicate and len(replicates) > 1 else None
    is_control = _is_control(table)
    known = table[(table["replicate"] != held_out) & ~is_control & table["moa"].notna()]
    shares = {"test_compound": config.test_share, "validation": config.validation_share}
    place: dict[str, str] = {}
    for _, wells in known.groupby("moa", sort=True):
        place |= _divide(sorted(wells["compound"].unique()), shares, rng)

    def part(compound: str, control: bool, replicate: str) -> str:
        if replicate == held_out:
            return "test_replicate" if place.get(compound) == "train" and not control else "unused"
        return "train" if control else place.get(compound, without_moa)

    parts = [part(*well) for well in zip(table["compound"], is_control, table["replicate"], strict=True)]
    count = set(parts)
    notes = []
    if held_out is not None:
        notes.append(f"Replicate {held_out} is held out: nothing in it is trained on.")
    elif config.hold_out_replicate:
        notes.append("There is one replicate only, so none is held out: test_replicate is empty.")
    if "test_compound" not in count and config.test_share > 0:
        notes.append("No MOA has two compounds, so none is held out: test_compound is empty.")
    if "validation" not in count and config.validation_share > 0:
        notes.append("No MOA has three compounds, so there is no validation: the last epoch counts as best.")
    if held_out is not None and "test_replicate" not in count:
        notes.append(
            f"Replicate {held_out} has no compound of a known MOA that was trained on, so test_replicate is empty."
        )
    return table.assign(split=parts), notes


def _by_replicate(table: pd.DataFrame, without_moa: str) -> tuple[pd.DataFrame, list[str]]:
    replicates = _replicates(table)
    if len(replicates) < 2:
        raise InputError(
            f"a split by replicate needs two replicates, the plate map has {replicates}: add plates, or choose another "
            "split.method"
        )
    roles = dict(zip(replicates[::-1], ["test_replicate", *["validation"] * (len(replicates) > 2)], strict=False))
    notes = [f"Replicate {replicates[-1]} is held out: nothing in it is trained on."]
    if len(replicates) == 2:
        notes.append("There are two replicates only, so there is no validation: the last epoch counts as best.")
    part = table["replicate"].map(roles).fillna("train")
    trained = set(table["compound"][part == "train"])
    tested = table["compound"].isin(trained) & table["moa"].notna() & ~_is_control(table)
    part = part.mask((part != "train") & ~tested, "unused")
    part = part.mask((part == "train") & table["moa"].isna() & ~_is_control(table), without_moa)
    return table.assign(split=part), notes


def _within_compounds(
    rows: pd.DataFrame, shares: dict[str, float], without_moa: str, rng: np.random.Generator
) -> tuple[pd.DataFrame, list[str]]:
    """Divide the rows (wells or cells, in an order of their own) of each compound."""
    part = ["train" if control else without_moa for control in _is_control(rows)]
    compound = rows["compound"].mask(_is_control(rows) | rows["moa"].isna())
    for _, positions in sorted(rows.groupby(compound.to_numpy()).indices.items()):
        for position, own in _divide(list(positions), shares, rng).items():
            part[position] = own
    empty = [name for name, share in shares.items() if share > 0 and name not in set(part)]
    return rows.assign(split=part), [f"No compound has enough to divide, so {name} is empty." for name in empty]


def _of_cells(table: pd.DataFrame, cells: pd.DataFrame | None) -> pd.DataFrame:
    """A row a cell of the wells, in the order of the cells' keys."""
    if cells is None or cells.empty:
        raise InputError(
            "a split by cell needs cells to divide, and there are none yet: segment first, or name a screen that has "
            "them (inputs.cells)"
        )
    wells = table.drop(columns=["site", "track"])
    return wells.merge(cells[CELL], on=WELL).sort_values(CELL, ignore_index=True)


def _as_given(table: pd.DataFrame, given: pd.DataFrame | None) -> tuple[pd.DataFrame, list[str]]:
    assert given is not None, "the method table comes with a table"
    known = pd.MultiIndex.from_frame(table[WELL])
    foreign = given[~pd.MultiIndex.from_frame(given[WELL]).isin(known)]
    if len(foreign):
        raise InputError(f"the split table names wells that the plate map has not: {_names(foreign, WELL)}")
    if "train" not in set(given["split"]):
        raise InputError("the split table has nothing to train on: give at least one well the part train")
    wells = table.drop(columns=["site", "track"])
    if is_of_cells(given):
        done = wells.merge(given, on=WELL).sort_values(CELL, ignore_index=True)
        return done, ["Cells that the split table does not name are unused."]
    done = table.merge(given[[*WELL, "split"]], on=WELL, how="left", validate="one_to_one")
    left = int(done["split"].isna().sum())
    notes = [f"{left} wells are not in the split table: they are unused."] if left else []
    return done.assign(split=done["split"].fillna("unused")), notes


def _divide(items: Sequence[_Item], shares: dict[str, float], rng: np.random.Generator) -> dict[_Item, str]:
    """Draw items for each part, at least one where its share is not 0, as long as one is left to train on."""
    drawn = [items[i] for i in rng.permutation(len(items))]
    parts: list[str] = []
    for part, share in shares.items():
        wanted = max(round(share * len(items)), 1) if share > 0 else 0
        parts += [part] * min(wanted, len(items) - 1 - len(parts))
    return dict(zip(drawn, parts + ["train"] * (len(items) - len(parts)), strict=True))


def check_leaks(table: pd.DataFrame, unit: Unit) -> None:
    """Refuse a split in which something tested on was also trained on.

    Queries of a named test must not share what it is called by with training and validation, those called ``query``
    not the unit; validation must not share the unit with training, and a gallery not a well (by cell, not a cell).

    Args:
        table: as :func:`split` gives it, or made by hand.
        unit: what must not be on both sides.

    Raises:
        InputError: naming the first compounds, replicates, wells or cells that stand on both sides.
    """
    unknown = sorted(set(table["split"]) - set(PARTS))
    if unknown:
        raise InputError(f"the split table has the unknown parts {unknown}: choose from {PARTS}")
    keys = CELL if is_of_cells(table) else WELL
    twice = table[table.duplicated(keys)]
    if len(twice):
        raise InputError(f"{keys[-1]}s stand more than once in the split table: {_names(twice, keys)}")
    by_part = dict(list(table.groupby("split")))
    for part, own in by_part.items():
        name = str(part)
        if name in ("train", "unused"):
            continue
        level = _level(name, unit)
        for other in ("train",) if name in ("validation", "gallery") else ("train", "validation"):
            if other in by_part:
                _refuse_shared(own, by_part[other], level, name, other)


def _level(part: str, unit: Unit) -> str:
    """What rows of a part must not share with what is trained on."""
    if part == "gallery":
        return "cell" if unit == "cell" else "well"
    return unit if part in ("validation", "query") else TESTS[part]


def _refuse_shared(left: pd.DataFrame, right: pd.DataFrame, level: str, left_name: str, right_name: str) -> None:
    columns = [name for name in _SHARED[level] if left[name].notna().any()]
    shared = left[pd.MultiIndex.from_frame(left[columns]).isin(pd.MultiIndex.from_frame(right[columns]))]
    if len(shared):
        raise InputError(
            f"the split leaks: {level} {_names(shared, columns)} is in {left_name} and in {right_name}; "
            f"keep each {level} in one of them"
        )


def _names(rows: pd.DataFrame, columns: Iterable[str]) -> str:
    texts = rows[list(columns)].astype(str).agg("/".join, axis=1)
    return ", ".join(sorted(set(texts))[:5])
