"""A screen on disk: the paths of everything a run writes, its manifest, and which units of work are done.

The unit of work is a well. A unit of a stage is done when its table is there; what is left to do is the listing of
wells minus the listing of tables. The manifest says with which configuration (as a fingerprint) a stage's files were
made, and a stage whose fingerprint has changed starts by removing its old files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.errors import InputError, SchemaError
from storage_schemas.keys import WellKey, check_name

VERSION = 1
PROFILES_IMPORT = "profiles_import"  # the key of a manifest's configuration that holds all of an import's

# A manifest may come from others, and some of fsspec's protocols run code or fetch pages.
_PLACE = re.compile(r"(?!.*::)(?:/|(?:file|memory|s3|s3a|gs|gcs|az|abfs|abfss)://).*")

Stage = Literal["segment", "train", "embed", "index", "statistics", "evaluate", "report"]
UnitStage = Literal["segment", "embed"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_TABLES = {"segment": "cells", "embed": "embeddings"}  # folders of the tables that commit units

# Calls a function with each of some texts; results in order, as of :func:`map`.
Mapped = Callable[[Callable[[str], str], Sequence[str]], Iterable[str]]


class StageRecord(BaseModel):
    """What the manifest says of a stage.

    Attributes:
        fingerprint: of its configuration, its inputs and the version of its output.
        done: whether it has ended; units may still have failed.
        output: fingerprint of what it made, which the stages after it depend on.
        counts: things in and out, by name.
        notes: what a reader should know: what was left out and why.
        seconds: wall-clock time of the run that ended it.
    """

    model_config = ConfigDict(extra="forbid")
    fingerprint: str
    done: bool = False
    output: str = ""
    counts: dict[str, int] = {}
    notes: list[str] = []
    seconds: float = 0.0


class Manifest(BaseModel):
    """What a screen folder holds and how it came to be.

    Attributes:
        software: version of each library that a result may depend on.
        config: what it was made with.
        inputs: fingerprint of its plates and tables.
        cells: the screen whose segmented wells it takes for its own; null where it has its own.
        stages: what is known of each stage that has begun.
    """

    model_config = ConfigDict(extra="forbid")
    form: Literal["screen"] = "screen"
    version: Literal[1] = 1
    software: dict[str, str]
    config: dict[str, Any]
    inputs: str
    cells: str | None = None
    stages: dict[str, StageRecord] = {}

    @property
    def has_imported_profiles(self) -> bool:
        """Whether its profiles were made elsewhere: there are no images, no network and no tests of one."""
        return PROFILES_IMPORT in self.config

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by name, of the run or of the import of profiles."""
        found: dict[str, Any] = self.config.get(PROFILES_IMPORT, self.config)
        return found


@dataclass(frozen=True)
class Failure:
    """A unit of work, or a site of one, that failed.

    Attributes:
        unit: the key of the well or of the site.
        kind: why, in a word or two to count by: the name of the exception where nothing better is known.
        message: what was found and what was expected.
    """

    unit: str
    kind: str
    message: str


@dataclass(frozen=True)
class Screen:
    """A screen's folder or object-store prefix.

    Attributes:
        url: where it lies.
        segmented: another screen, whose segmented wells this one takes for its own and leaves untouched; they are its
            own ones, not borrowed in turn.
    """

    url: str
    segmented: Screen | None = None

    @classmethod
    def open(cls, url: str) -> Screen:
        """A screen that is there, with the one whose segmented wells it takes.

        Raises:
            SchemaError: if there is none.
        """
        screen = cls(url)
        cells = screen.read_manifest().cells
        if cells is None:
            return screen
        if not _PLACE.fullmatch(cells):
            raise SchemaError(
                screen.manifest_url, f"takes its cells from {cells!r}; expected an absolute path, or a URL of a store"
            )
        return cls(url, cls(cells))

    # --- paths -------------------------------------------------------------------------------

    @property
    def manifest_url(self) -> str:
        """The manifest; a folder with one is a screen."""
        return self._path("manifest.json")

    @property
    def plate_map(self) -> str:
        """The plate map, checked."""
        return self._path("plate_map.parquet")

    @property
    def compounds(self) -> str:
        """The table of compounds, checked."""
        return self._path("compounds.parquet")

    def calibration(self, plate: str) -> str:
        """A plate's flat field and intensity range."""
        return self._owner("segment")._path("calibration", f"{check_name(plate, 'plate')}.npz")

    def cells(self, well: WellKey) -> str:
        """A well's tracked cells; the file that commits a unit of `segment`."""
        return self._owner("segment")._path("cells", well.plate, f"{well.well}.parquet")

    def quality(self, well: WellKey) -> str:
        """Quality measures of a well's frames."""
        return self._owner("segment")._path("quality", well.plate, f"{well.well}.parquet")

    def clips(self, well: WellKey) -> str:
        """A well's clips."""
        return self._owner("segment")._path("clips", well.plate, f"{well.well}.zarr")

    @property
    def sequences(self) -> str:
        """What imported cells were before: a row an image sequence; only where cells were imported."""
        return self._owner("segment")._path("sequences.parquet")

    @property
    def split(self) -> str:
        """Which well is for training, validation or a test."""
        return self._path("split.parquet")

    @property
    def training_runs(self) -> str:
        """Where Ray Train keeps its checkpoints while it trains."""
        return self._path("train", "runs")

    @property
    def training_metrics(self) -> str:
        """Losses and validation metrics by epoch."""
        return self._path("train", "metrics.parquet")

    @property
    def checkpoint(self) -> str:
        """The network of the best epoch."""
        return self._path("checkpoint")

    def embeddings(self, well: WellKey) -> str:
        """A well's embeddings; the file that commits a unit of `embed`."""
        return self._path("embeddings", well.plate, f"{well.well}.parquet")

    def profiles(self, table: Literal["raw", "well", "treatment", "compound", "features", "normalisation"]) -> str:
        """Profiles before and after their recipe, their features, or what they were normalised by."""
        return self._path("profiles", f"{table}.parquet")

    def statistics(self, table: str) -> str:
        """What is said of profiles with a p-value: activity, consistency, controls or doses."""
        return self._path("statistics", f"{table}.parquet")

    def predictions(self, level: str, kind: Literal["parquet", "json"]) -> str:
        """The mechanisms that cells, wells or compounds vote for, and what is to be said of them."""
        return self._path("predictions", f"{level}.{kind}")

    @property
    def index(self) -> str:
        """The similarity index, a folder (see :mod:`storage_schemas.index`)."""
        return self._path("index")

    def added(self, name: str = "") -> str:
        """Where plates of another screen lie that were added to the index, with their embeddings; or all such."""
        return self._path("added", check_name(name, "screen")) if name else self._path("added")

    @property
    def evaluation(self) -> str:
        """The held-out tests."""
        return self._path("evaluation.json")

    @property
    def report(self) -> str:
        """The report, one HTML page."""
        return self._path("report.html")

    @property
    def comparison(self) -> str:
        """Where `screening compare` keeps the methods that the screen's network is compared with."""
        return self._path("compare")

    def _path(self, *parts: str) -> str:
        return store.join(self.url, *parts)

    def _owner(self, stage: str) -> Screen:
        """The screen that a stage's files lie in."""
        return self.segmented if self.segmented is not None and stage == "segment" else self

    @property
    def kept_clips(self) -> Literal["all", "sample", "none"]:
        """Which clips lie on disk."""
        settings = self._owner("segment").read_manifest().config.get("segment") or {}
        found: Literal["all", "sample", "none"] = settings.get("clips", {}).get("store", "all")
        return found

    # --- manifest ----------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return store.exists(self.manifest_url)

    def check_there(self) -> None:
        """Refuse what is no screen.

        Raises:
            SchemaError: saying whether anything is there.
        """
        if not self.exists():
            found = "it has no manifest.json" if store.list_names(self.url) else "there is nothing at that place"
            raise SchemaError(self.url, f"is not a screen: {found}")

    def foreign_names(self) -> list[str]:
        """What a folder that is no screen holds; empty for a screen, and for a new folder."""
        names = [name for name in store.list_names(self.url) if not name.startswith(".")]
        return [] if not names or self.exists() else names

    def read_manifest(self) -> Manifest:
        """What the manifest says.

        Raises:
            SchemaError: if there is none, or one of another version.
        """
        self.check_there()
        return self._parsed(store.read_json(self.manifest_url))

    def _parsed(self, document: Any) -> Manifest:
        try:
            return Manifest.model_validate(document)
        except ValidationError as error:
            wrong = sorted({".".join(map(str, entry["loc"])) for entry in error.errors()})
            raise SchemaError(
                self.manifest_url,
                f"is not the manifest of a screen of version {VERSION} (see {', '.join(wrong)}): another version of "
                "screening wrote it, so choose another folder",
            ) from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        store.write_json(self.manifest_url, manifest.model_dump(mode="json"))

    def write_record(self, stage: Stage, record: StageRecord | None) -> None:
        """Replace what the manifest says of a stage, and nothing that another run may say of others meanwhile.

        None has it say nothing.
        """

        def change(document: Any) -> Any:
            manifest = self._parsed(document)
            stages = {name: of_other for name, of_other in manifest.stages.items() if name != stage}
            if record is not None:
                stages[stage] = record
            return manifest.model_copy(update={"stages": stages}).model_dump(mode="json")

        store.update_json(self.manifest_url, change)

    # --- units of work -----------------------------------------------------------------------

    def done_units(self, stage: UnitStage) -> set[WellKey]:
        """Wells whose table is there."""
        return set(self._owner(stage)._listed(_TABLES[stage], ".parquet"))

    def commit_times(self, stage: UnitStage) -> dict[WellKey, float]:
        """Wells whose table is there -> when it was written, in seconds since the epoch by the store's clock."""
        found = {}
        owner, folder = self._owner(stage), _TABLES[stage]
        for path, written in store.list_times(owner._path(folder)).items():
            plate, _, name = path.rpartition("/")
            if name.endswith(".parquet"):
                found[owner._listed_key(folder, plate, name, ".parquet")] = written
        return found

    def outputs(self, stage: Stage, mapped: Mapped = ahead) -> list[str]:
        """What tells one output of a stage from another of the same fingerprint.

        That is its units; of `segment` also their cells, since a unit is done again when its sites have been mended,
        and the plates' calibrations, which imported cells come without.

        Args:
            stage: which.
            mapped: how a function is called with each of many URLs; by default by threads of this process.
        """
        if stage != "segment" and stage != "embed":
            return []
        units = sorted(self.done_units(stage))
        if stage == "embed":
            return [str(unit) for unit in units]
        calibrations = [self.calibration(plate) for plate in sorted({unit.plate for unit in units})]
        files = [*map(self.cells, units), *compress(calibrations, ahead(store.exists, calibrations))]
        return [*map(str, units), *mapped(_digest, files)]

    def remove_cells(self, plate: str) -> None:
        """Remove a plate's tables of cells, so that `segment` does its wells again."""
        store.remove(self._path("cells", check_name(plate, "plate")))

    def remove_partial(self, plates: Iterable[str]) -> None:
        """Remove what workers that died have left of their wells' tables; none may be at work on these plates."""
        parts = (*_TABLES.values(), "quality", *(f"failures/{stage}" for stage in _TABLES))
        for plate in plates:
            for part in parts:
                store.remove_partial(self._path(part, plate))

    def remove_unit(self, well: WellKey) -> None:
        """Remove what `segment` has written of a well, the table that commits it first, and its embeddings."""
        for url in (self.cells(well), self.embeddings(well), self.quality(well), self.clips(well)):
            store.remove(url)

    def remove_stage(self, stage: Stage) -> None:
        """Remove everything that a stage has written, the tables that commit its units first."""
        assert self._owner(stage) is self, "what is borrowed is not removed"
        written: dict[str, Sequence[str]] = {
            "segment": ("cells", "quality", "clips", "calibration", "sequences.parquet"),
            "train": ("checkpoint", "split.parquet", "train"),
            "embed": ("embeddings",),
            "index": ("index", "profiles", "predictions"),
            "statistics": ("statistics",),
            "evaluate": ("evaluation.json",),
            "report": ("report.html",),
        }
        for name in (*written[stage], f"failures/{stage}"):
            store.remove(self._path(name))

    def write_failures(self, stage: Stage, well: WellKey, failures: Sequence[Failure]) -> None:
        """Replace what is recorded of a unit's failures: its own, or those of its sites; none if all is well.

        Written before the table that commits a unit, it is true of every committed unit, whenever a run was cut off.
        """
        if failures:
            store.write_json(self._failures(stage, well), [asdict(failure) for failure in failures])
        else:
            store.remove(self._failures(stage, well))

    def failures(self, stage: Stage, well: WellKey | None = None) -> list[Failure]:
        """Recorded failures of a stage, in order of their units; of one unit, if it is given."""
        units = sorted(self.failed_units(stage)) if well is None else [well]
        records = ahead(_read_failures, [self._failures(stage, unit) for unit in units])
        return [failure for of_unit in records for failure in of_unit]

    def failed_units(self, stage: Stage) -> set[WellKey]:
        """Wells that have failed, wholly or with some of their sites."""
        return set(self._owner(stage)._listed(f"failures/{stage}", ".json"))

    def _failures(self, stage: str, well: WellKey) -> str:
        return self._owner(stage)._path("failures", stage, well.plate, f"{well.well}.json")

    def _listed(self, folder: str, suffix: str) -> Iterable[WellKey]:
        plates = store.list_names(self._path(folder))
        listings = ahead(store.list_names, [self._path(folder, plate) for plate in plates])
        for plate, names in zip(plates, listings, strict=True):
            for name in names:
                if name.endswith(suffix):
                    yield self._listed_key(folder, plate, name, suffix)

    def _listed_key(self, folder: str, plate: str, name: str, suffix: str) -> WellKey:
        try:
            return WellKey(plate, name.removesuffix(suffix))
        except InputError as error:
            where = self._path(folder, plate, name)
            raise SchemaError(where, f"is not of this screen, remove it: {error}") from error


def _digest(url: str) -> str:
    return hashlib.sha256(store.read_bytes(url)).hexdigest()


def _read_failures(url: str) -> list[Failure]:
    try:
        return [Failure(**record) for record in store.read_json(url)] if store.exists(url) else []
    except TypeError as error:
        raise SchemaError(url, "is not a list of failures: remove it, and its well is done again") from error


def fingerprint(*parts: Any) -> str:
    """A short digest of JSON-serialisable values: equal values have equal fingerprints, in any process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
