"""Asking a finished screen: what resembles this. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.indexing import open_level
from screening import similarity
from screening.significance import enrichment
from screening.similarity import Index, Vectors
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.index import Level, index_exists, read_ids, read_manifest
from storage_schemas.keys import TrackKey, WellKey, canonical_well
from storage_schemas.screen import Screen

COLUMNS = ("rank", "id", "compound", "moa", "similarity")


class Searcher:
    """A screen's similarity index, held open: a question takes milliseconds once its level has been opened.

    Several threads may ask at once. Levels that have been opened stay what they are when the screen is indexed anew;
    :attr:`build` tells one index from another.

    Args:
        screen: with an index, or where it lies.

    Raises:
        SchemaError: if there is no index, or a file of it is damaged.
    """

    def __init__(self, screen: Screen | str) -> None:
        self.screen = Screen(screen) if isinstance(screen, str) else screen
        self.screen.check_there()
        if not index_exists(self.screen.index):
            raise SchemaError(self.screen.url, "has no index: run the stage `index` first")
        self.manifest = read_manifest(self.screen.index)
        self._indexes: dict[Level, Index] = {}
        self._ids: dict[Level, pd.DataFrame] = {}

    @property
    def build(self) -> str:
        """Which build of the index this is."""
        return self.manifest.build

    @property
    def levels(self) -> tuple[Level, ...]:
        """What can be compared: profiles that were imported come without cells."""
        return tuple(self.manifest.levels)

    def index(self, level: Level) -> Index:
        """The vectors of a level; opened when it is first asked for."""
        if level not in self._indexes:
            with self._opening(level):
                self._indexes[level] = open_level(self.screen.index, self.manifest, level)
        return self._indexes[level]

    def ids(self, level: Level) -> pd.DataFrame:
        """What they are of, in their order (:data:`storage_schemas.tables.INDEX_IDS`)."""
        if level not in self._ids:
            with self._opening(level):
                self._ids[level] = read_ids(self.screen.index, self.manifest, level)
        return self._ids[level]

    def compare_with(self, level: Level, index: Index) -> None:
        """Search other vectors of the same things: profiles that were processed together with those asked about."""
        assert len(index) == len(self.ids(level)), "they are of the same things"
        self._indexes[level] = index

    def query(
        self,
        *,
        compound: str | None = None,
        well: str | None = None,
        cell: str | None = None,
        vectors: npt.ArrayLike | None = None,
        names: Sequence[str] | None = None,
        level: Level | None = None,
        k: int = 10,
        moa: Iterable[str] = (),
        plate: Iterable[str] = (),
        exclude_same_compound: bool = False,
    ) -> pd.DataFrame:
        """What resembles a compound, a well, a cell or given vectors most.

        A compound is the mean of its vectors at the level asked for, a well of its cells' or its profile. Nothing is
        its own answer: a compound's vectors, a well and its cells, or a cell are left out.

        Args:
            compound: its id; give one of this and the next three.
            well: ``plate/well``.
            cell: ``plate/well/site/track``; it can be compared with cells only.
            vectors: (q, D) vectors, each a question of its own: embeddings for cells, normalised profiles for wells and
                compounds.
            names: (q,) what they are called in the answer; by default their numbers from 0.
            level: what to compare with: compounds (profiles), wells (profiles) or cells (embeddings). By default the
                level of what is asked about, for vectors that of cells where there are cells.
            k: how many answers; fewer where fewer are left by the filters.
            moa: only what has one of these mechanisms.
            plate: only what is on one of these plates.
            exclude_same_compound: leave out what has the compound of the well or cell, too.

        Returns:
            rank, id, compound, moa and similarity (cosine), nearest first; for vectors after a column ``query``, which
            names the vector.

        Raises:
            InputError: for anything that is not in the index, with names near it; for levels that cannot be compared,
                or vectors that do not fit.
        """
        asked = {"compound": compound, "well": well, "cell": cell, "vectors": vectors}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            raise InputError(f"ask by one of {', '.join(asked)}, not by {' and '.join(given) or 'none'}")
        if level is None:
            usual: dict[str, Level] = {"compound": "compound", "well": "well", "cell": "cell", "vectors": "cell"}
            level = usual[given[0]]
            if level not in self.levels and given[0] == "vectors":
                level = "well"
        ids = self.ids(level)
        if vectors is not None:
            if exclude_same_compound:
                raise InputError("given vectors have no compound that could be left out")
            rows = similarity.to_unit(vectors)
            labels = list(map(str, range(len(rows)))) if names is None else list(names)
            if len(labels) != len(rows):
                raise InputError(f"{len(labels)} names for {len(rows)} vectors")
            own = np.zeros(len(ids), bool)
        elif compound is not None:
            own = self._of_compound(level, compound)
            rows = self._mean(level, own)
        elif well is not None:
            rows, own = self._well(level, well, exclude_same_compound)
        else:
            assert cell is not None
            rows, own = self._cell(level, cell, exclude_same_compound)
        keep = self._keep(level, own, moa, plate)
        scores, positions = self.index(level).search(rows, k, keep)
        found = ids.iloc[positions.ravel()][["id", "compound", "moa"]].astype(object).reset_index(drop=True)
        found.insert(0, "rank", np.tile(np.arange(1, positions.shape[1] + 1), len(rows)))
        found = found.assign(similarity=scores.ravel())
        if vectors is not None:
            found.insert(0, "query", np.repeat(np.asarray(labels, object), positions.shape[1]))
        return found

    def enrichment(
        self, *, compound: str | None = None, well: str | None = None, k: int = 10, exclude_same_compound: bool = False
    ) -> pd.DataFrame:
        """Which mechanisms are more frequent among the nearest compounds than among all?

        Of compounds, since cells of a well, or wells of a compound, are no draws of their own.

        Args:
            compound: as of :meth:`query`, like the other arguments.
            well: likewise.
            k: the nearest that are counted.
            exclude_same_compound: likewise.

        Returns:
            As of :func:`screening.significance.enrichment`, the label called ``moa``.

        Raises:
            InputError: as :meth:`query`.
        """
        everything = self.query(
            compound=compound,
            well=well,
            level="compound",
            k=max(k, len(self.ids("compound"))),
            exclude_same_compound=exclude_same_compound,
        )
        labels = [[] if pd.isna(moa) else [moa] for moa in everything["moa"]]
        return enrichment(labels[:k], labels).rename(columns={"label": "moa"})

    @contextmanager
    def _opening(self, level: Level) -> Iterator[None]:
        if level not in self.manifest.levels:
            raise InputError(
                f"{self.screen.url}: its index has no level {level!r}, only {', '.join(self.levels)}: profiles that "
                "were imported come without cells"
            )
        try:
            yield
        except SchemaError as error:
            if read_manifest(self.screen.index).build != self.build:
                raise SchemaError(
                    self.screen.url, "has been indexed anew since it was opened: open it again"
                ) from error
            raise

    def _mean(self, level: Level, rows: npt.NDArray[np.bool_]) -> Vectors:
        """(1, D) mean of some vectors of a level."""
        own: Vectors = self.index(level).vectors[np.flatnonzero(rows)]
        return own.mean(axis=0, dtype=np.float64)[None].astype(np.float32)

    def _of_compound(self, level: Level, compound: str) -> npt.NDArray[np.bool_]:
        own = self._where(level, "compound", compound)
        if own is None:
            raise self._unknown("compound", compound, self.ids(level)["compound"].cat.categories)
        return own

    def _of_well(self, level: Level, key: WellKey) -> npt.NDArray[np.bool_]:
        plate, well = self._where(level, "plate", key.plate), self._where(level, "well", key.well)
        if plate is None or well is None or not (plate & well).any():
            wells = self.ids("well")["id"]
            raise self._unknown("well", str(key), wells)
        return plate & well

    def _well(self, level: Level, text: str, exclude: bool) -> tuple[Vectors, npt.NDArray[np.bool_]]:
        plate, _, name = text.rpartition("/")
        key = WellKey(plate, canonical_well(name)) if plate else WellKey.parse(text)
        # A compound's profile is compared with the well's own.
        source: Level = "well" if level == "compound" else level
        own = self._of_well(source, key)
        rows = self._mean(source, own)
        compound = self.ids(source)["compound"][own].iloc[0]
        if exclude:
            return rows, self._of_compound(level, compound)
        return rows, own if source == level else np.zeros(len(self.ids(level)), bool)

    def _cell(self, level: Level, text: str, exclude: bool) -> tuple[Vectors, npt.NDArray[np.bool_]]:
        if level != "cell":
            raise InputError(
                f"a cell's embedding cannot be compared with the normalised profiles of the level {level!r}: ask at "
                "level cell, or by the cell's well"
            )
        key = TrackKey.parse(text)
        ids = self.ids(level)
        of_well = np.flatnonzero(self._of_well(level, WellKey(key.plate, key.well)))
        here = ids["id"].iloc[of_well]
        own = np.zeros(len(ids), bool)
        own[of_well[(here == str(key)).to_numpy()]] = True
        if not own.any():
            raise self._unknown("cell", text, here)
        rows = self._mean(level, own)
        return rows, self._of_compound(level, ids["compound"][own].iloc[0]) if exclude else own

    def _keep(
        self, level: Level, own: npt.NDArray[np.bool_], moa: Iterable[str], plate: Iterable[str]
    ) -> npt.NDArray[np.bool_] | None:
        keep = ~own if own.any() else None
        for column, wanted in (("moa", moa), ("plate", plate)):
            wanted = [wanted] if isinstance(wanted, str) else list(wanted)
            if not wanted:
                continue
            if column == "plate" and level == "compound":
                raise InputError("a compound's profile is of all its plates: filter by plate at level well or cell")
            matches = np.zeros(len(own), bool)
            for name in wanted:
                here = self._where(level, column, name)
                if here is None:
                    what = "MOA" if column == "moa" else column
                    raise self._unknown(what, name, self.ids(level)[column].cat.categories)
                matches |= here
            keep = matches if keep is None else keep & matches
        return keep

    def _where(self, level: Level, column: str, value: str) -> npt.NDArray[np.bool_] | None:
        """Which rows have a value; None if none has."""
        column_of = self.ids(level)[column].cat
        code = column_of.categories.get_indexer(pd.Index([value]))[0]
        return None if code < 0 else (column_of.codes == code).to_numpy()

    def _unknown(self, what: str, name: str, known: Iterable[str]) -> InputError:
        near = similarity.suggest(name, known)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(set(known))[:5])} …"
        return InputError(f"{self.screen.url}: {what} {name!r} is not in the index; {hint}")


def nearest_compounds(screen: Screen, k: int) -> pd.DataFrame:
    """Each compound's nearest compounds: compound, moa, rank, neighbour, neighbour_moa, similarity."""
    searcher = Searcher(screen)
    ids = searcher.ids("compound")
    tables = []
    for compound, moa in zip(ids["compound"], ids["moa"], strict=True):
        found = searcher.query(compound=compound, k=k)
        found = found.rename(columns={"compound": "neighbour", "moa": "neighbour_moa"})
        tables.append(found.drop(columns="id").assign(compound=compound, moa=moa))
    columns = ["compound", "moa", "rank", "neighbour", "neighbour_moa", "similarity"]
    return pd.concat(tables, ignore_index=True)[columns]
