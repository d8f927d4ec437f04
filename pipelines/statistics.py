"""Statistics of a screen's profiles: which treatments are active, which labels consistent, and how good the plates are.

Activity, and what else compares wells with the negative controls, is of profiles that were only scaled to these
(``statistics.recipe``), whatever the screen's own recipe: whitening is fitted to the controls and makes wells that it
was not fitted to differ from them. Consistency is of the profiles that answer queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ConfigDict, ValidationError

from pipelines.config import ConfigError, RunConfig
from pipelines.inputs import Inputs
from pipelines.profiles import feature_names
from pipelines.stage import do_stage
from pipelines.units import Counts
from pipelines.vectors import read_profiles
from screening import statistics as science
from screening.profiles import ProfilesConfig, process
from screening.statistics import StatisticsConfig, with_fdr
from storage_schemas import store
from storage_schemas.base import Config
from storage_schemas.errors import SchemaError
from storage_schemas.screen import Screen, fingerprint
from storage_schemas.tables import (
    ACTIVITY,
    CONSISTENCY,
    CONTROLS,
    DOSES,
    METADATA_PREFIX,
    TableForm,
    open_table,
    write_table,
)

OUTPUT_VERSION = 2  # raised when the same configuration gives other numbers

TABLES: dict[str, TableForm] = {
    "activity": ACTIVITY,
    "consistency": CONSISTENCY,
    "controls": CONTROLS,
    "doses": DOSES,
}

_KINDS = ("moa", "target")
_VERDICTS = ("active", "replicates", "consistent", "dose_dependent")
_DETAILS = {"role", "n_wells", "expected_precision", "n_relabelings", "control_distance", "replicate_p_value"}


def statistics(config: RunConfig, inputs: Inputs, screen: Screen, mark: str) -> tuple[Counts, list[str]]:
    """Stage `statistics`: profiles in; tables of what they say, with p-values, out.

    Returns:
        Counts, and notes for the reader.
    """
    return _write(screen, _Settings(seed=config.seed, statistics=config.statistics, profiles=config.profiles))


class _Settings(Config):
    """What a screen's statistics depend on beside its profiles."""

    model_config = ConfigDict(extra="ignore")
    seed: int = 0
    statistics: StatisticsConfig = StatisticsConfig()
    profiles: ProfilesConfig = ProfilesConfig()


def compute(url: str, changes: Mapping[str, Any] | None = None) -> Screen:
    """Do the statistics of a screen that was run or whose profiles were imported, unless they are done.

    Args:
        url: the screen.
        changes: settings of :class:`screening.statistics.StatisticsConfig` that differ from the screen's.

    Raises:
        ConfigError: for settings that cannot be.
        SchemaError: if there are no profiles.
    """
    screen = Screen.open(store.absolute(url))
    settings = _Settings.model_validate(screen.read_manifest().settings)
    try:
        own = StatisticsConfig.model_validate({**settings.statistics.model_dump(), **(changes or {})})
    except ValidationError as error:
        problems = "; ".join(f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors())
        raise ConfigError(f"the settings of the statistics are not usable: {problems}") from error
    settings = settings.model_copy(update={"statistics": own})
    mark = _identity(screen, settings)
    record = screen.read_manifest().stages.get("statistics")
    # A run that has done them knows the stage by another mark, which is left as it is.
    if record is None or not record.done or not _is_of(screen, mark):
        do_stage(screen, "statistics", mark, lambda: _write(screen, settings), {}, whole=True)
    return screen


def _identity(screen: Screen, settings: _Settings) -> str:
    """Of all that the tables depend on."""
    read = [screen.profiles("raw"), screen.profiles("compound"), screen.plate_map, screen.compounds]
    digests = [hashlib.sha256(store.read_bytes(each)).hexdigest() for each in read if store.exists(each)]
    return fingerprint("statistics", OUTPUT_VERSION, settings.model_dump(mode="json"), digests)


def _is_of(screen: Screen, mark: str) -> bool:
    """Whether the tables are there and were made of the same."""
    try:
        for name, form in TABLES.items():
            open_table(screen.statistics(name), form, [], fingerprint=mark)
    except SchemaError:
        return False
    return True


def read_statistics(screen: Screen, table: str) -> pd.DataFrame:
    """One of :data:`TABLES`; empty where the stage has not been done.

    Further columns that say what a treatment is stand behind the compound, without their prefix.
    """
    url = screen.statistics(table)
    if not store.exists(url):
        return pd.DataFrame()
    found = open_table(url, TABLES[table]).to_pandas()
    whole = {name: "Int64" for name in map(str, found) if name.startswith("n_")}
    found = found.astype(whole).astype({name: "boolean" for name in _VERDICTS if name in found})
    further = [name for name in map(str, found) if name.startswith(METADATA_PREFIX)]
    first, *others = [name for name in found if name not in further]
    return found[[first, *further, *others]].rename(columns=lambda name: str(name).removeprefix(METADATA_PREFIX))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of a table that a reader looks at first; those that say what a treatment is if they differ."""
    known = {name for form in TABLES.values() for name in form.schema.names}
    shown = [name for name in table if (table[name].nunique() > 1 if name not in known else name not in _DETAILS)]
    return table[shown].rename(columns={"mean_average_precision": "map", "normalised_precision": "normalised"})


class _Wells(NamedTuple):
    """Wells beside their profiles, one way or another."""

    metadata: pd.DataFrame
    scaled: npt.NDArray[np.float32]  # to the controls, without whitening
    processed: npt.NDArray[np.float32]  # by the screen's own recipe


def _write(screen: Screen, config: _Settings) -> tuple[Counts, list[str]]:
    """Compute all tables and write them."""
    wells, notes = _read_wells(screen, config.statistics)
    by = ["compound", *(name for name in config.profiles.treatment if name in wells.metadata and name != "compound")]
    distance = _distance(wells)
    found = {
        "activity": _activity(wells, distance, by, config.statistics, config.seed),
        "controls": _controls(wells, distance),
        "doses": _doses(wells.metadata, distance, by, config.statistics, config.seed),
    }
    found["consistency"], left_out = _consistency(screen, found["activity"], config.statistics, config.seed)
    mark = _identity(screen, config)
    for name, table in found.items():
        write_table(screen.statistics(name), _prefixed(table, TABLES[name]), TABLES[name], mark)
    counts = {
        "treatments": len(found["activity"]),
        "active": int(found["activity"]["active"].sum()),
        "not tested": int(found["activity"]["excluded"].notna().sum()),
        "labels": len(found["consistency"]),
        "consistent": int(found["consistency"]["consistent"].sum()),
        "labels not tested": int(found["consistency"]["excluded"].notna().sum()),
    }
    return counts, [*notes, *left_out]


def _read_wells(screen: Screen, config: StatisticsConfig) -> tuple[_Wells, list[str]]:
    """All wells; those on plates without controls are zero where they are compared with these."""
    metadata, processed = read_profiles(screen)
    _, raw = read_profiles(screen, processed=False)
    controlled = metadata["plate"].isin(set(metadata.loc[metadata["role"] == "negative_control", "plate"])).to_numpy()
    notes = []
    if not controlled.all():
        plates = sorted(set(metadata.loc[~controlled, "plate"]))
        notes.append(
            f"{int((~controlled).sum())} wells are on plates without negative controls ({', '.join(plates[:5])}): "
            "they take no part in activity"
        )
    scaled = np.zeros((len(raw), 0), np.float32)
    if controlled.any():
        names = feature_names(screen, raw.shape[1])
        done = process(raw[controlled], metadata[controlled].reset_index(drop=True), config.recipe, names)
        scaled = np.zeros((len(raw), done.values.shape[1]), np.float32)
        scaled[controlled] = done.values
    return _Wells(metadata, scaled, processed), notes


def _distance(wells: _Wells) -> npt.NDArray[np.float64]:
    control = (wells.metadata["role"] == "negative_control").to_numpy()
    return science.control_distance(wells.scaled, wells.metadata["plate"].to_numpy(object), control)


def _activity(
    wells: _Wells, distance: npt.NDArray[np.float64], by: list[str], config: StatisticsConfig, seed: int
) -> pd.DataFrame:
    """A row a treatment, the most active first."""
    metadata = wells.metadata
    control = (metadata["role"] == "negative_control").to_numpy()
    treated = metadata[~control]
    groups = treated.groupby(by, sort=True, dropna=False)
    codes = np.full(len(metadata), -1)
    codes[~control] = groups.ngroup()
    table = groups.agg(role=("role", "first"), moa=("moa", "first"), n_wells=("well", "size")).reset_index()
    tested = science.activity(
        wells.scaled, codes, metadata["plate"].to_numpy(object), control, config.n_permutations, seed
    )
    tested = with_fdr(tested, config.fdr, "active")
    agreed = science.reproducibility(wells.processed[~control], codes[~control], config.n_permutations, seed)
    of_treatment = pd.Series(distance[~control]).groupby(codes[~control]).median()
    table = pd.concat([table, tested, agreed], axis=1).assign(control_distance=of_treatment.to_numpy())
    order = ["p_value", "mean_average_precision", *by]
    return table.sort_values(order, ascending=[True, False] + [True] * len(by), ignore_index=True)


def _consistency(
    screen: Screen, activity: pd.DataFrame, config: StatisticsConfig, seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """A row a mechanism and a row a target, and how many compounds had none."""
    metadata, profiles = read_profiles(screen, "compound")
    taken = (metadata["role"] != "negative_control").to_numpy()
    notes = []
    if config.active_only:
        active = set(activity.loc[activity["active"].fillna(False).astype(bool), "compound"])
        taken = taken & metadata["compound"].isin(active).to_numpy()
    tables = []
    for kind in _KINDS:
        labels = [_labels(text, config.separator) for text in metadata.loc[taken, kind]]
        without = sum(not each for each in labels)
        if without == len(labels):
            continue
        if without:
            notes.append(f"{without} of {len(labels)} compounds have no {kind} and take no part in its consistency")
        table = science.consistency(profiles[taken], labels, config.n_permutations, seed)
        table.insert(0, "kind", kind)
        tables.append(with_fdr(table, config.fdr, "consistent"))
    if not tables:
        if config.active_only and not taken.any():
            why = "no compound is active, and only active ones were to be compared (statistics.active_only)"
        else:
            why = f"no {'active ' if config.active_only else ''}compound has a known mechanism or target"
        notes.append(f"{why}, so there is no consistency to test")
        empty = with_fdr(science.consistency(profiles[:0], [], config.n_permutations, seed), config.fdr, "consistent")
        tables = [empty.assign(kind=pd.Series(dtype=object))]
    found = pd.concat(tables, ignore_index=True)
    order = ["kind", "p_value", "mean_average_precision", "label"]
    return found.sort_values(order, ascending=[True, True, False, True], ignore_index=True), notes


def _labels(text: Any, separator: str) -> list[str]:
    return [] if pd.isna(text) else [part.strip() for part in str(text).split(separator) if part.strip()]


def _controls(wells: _Wells, distance: npt.NDArray[np.float64]) -> pd.DataFrame:
    """A row a plate: how far its positive controls are from its negative ones."""
    rows = []
    for plate, of_plate in wells.metadata.groupby("plate", sort=True).indices.items():
        role = wells.metadata["role"].to_numpy(object)[of_plate]
        negative, positive = role == "negative_control", role == "positive_control"
        counts = {"n_wells": len(of_plate), "n_negative": int(negative.sum()), "n_positive": int(positive.sum())}
        excluded = None
        if min(counts["n_negative"], counts["n_positive"]) < 3:
            excluded = "fewer than three positive or three negative controls"
        spread = distance[of_plate]
        rows.append(
            {"plate": plate, **counts}
            | science.separation(wells.scaled[of_plate], negative, positive)
            | {"control_distance": _median(spread[negative]), "treated_distance": _median(spread[role == "treatment"])}
            | {"excluded": excluded}
        )
    return pd.DataFrame(rows)


def _median(values: npt.NDArray[np.float64]) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if values.size else float("nan")


def _doses(
    metadata: pd.DataFrame, distance: npt.NDArray[np.float64], by: list[str], config: StatisticsConfig, seed: int
) -> pd.DataFrame:
    """A row a compound and whatever else but the concentration makes a treatment."""
    treated = (metadata["role"] != "negative_control").to_numpy() & metadata["concentration"].notna().to_numpy()
    keys = [name for name in by if name != "concentration"]
    wells = metadata[treated]
    groups = wells.groupby(keys, sort=True, dropna=False)
    table = groups.size().reset_index()[keys]
    codes = np.asarray(groups.ngroup(), np.int64)
    found = science.dose_response(
        codes, wells["concentration"].to_numpy(), distance[treated], config.n_permutations, seed
    )
    table = pd.concat([table, with_fdr(found, config.fdr, "dose_dependent")], axis=1)
    order = ["p_value", "spearman", *keys]
    return table.sort_values(order, ascending=[True, False] + [True] * len(keys), ignore_index=True)


def _prefixed(table: pd.DataFrame, form: TableForm) -> pd.DataFrame:
    """Columns that the form does not have are metadata."""
    known = set(form.schema.names)
    return table.rename(columns=lambda name: name if name in known else f"{METADATA_PREFIX}{name}")
