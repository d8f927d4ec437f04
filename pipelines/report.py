"""Stage `report`: everything a run has found, as one HTML page; and the same page of any finished screen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.config import RunConfig
from pipelines.inputs import Inputs, well_keys
from pipelines.predict import NoMechanismError, Predictions, predict
from pipelines.predict import readable as readable_predictions
from pipelines.query import nearest_compounds
from pipelines.segment import open_calibration
from pipelines.statistics import read_statistics, readable
from pipelines.status import stage_table
from pipelines.units import Counts
from pipelines.vectors import CELL_KEYS, EmbeddedCells, read_profiles, rows_of, sample_rows
from screening.quality import limits, summarise, worst_sites
from screening.report import (
    Example,
    ReportData,
    channel_colours,
    embedding_map,
    moa_similarity,
    render,
    typical_cells,
)
from screening.site import SegmentConfig
from storage_schemas import store
from storage_schemas.ahead import ahead
from storage_schemas.clips import as_bytes, channel_names, open_clips, read_clips
from storage_schemas.errors import InputError
from storage_schemas.index import index_exists
from storage_schemas.keys import TrackKey, WellKey
from storage_schemas.screen import Manifest, Screen
from storage_schemas.tables import CELLS, COMPOUNDS, PLATE_MAP, QUALITY, TRAINING_METRICS, open_table

OUTPUT_VERSION = 5  # raised when the same configuration gives another page

_MAPPED = 20_000  # cells or wells; more would be one blot, and a heavy page
_CLIPS = 600  # read for the page, which keeps the memory that they take in bounds
_CELLS_OF_COMPOUND = 4  # shown at most
_WELLS_OF_COMPOUND = 32  # that they are chosen from: of controls there may be thousands
_NEIGHBOURS = 5
_MEASURES = {  # columns of the plate map that wells are coloured by
    "n_cells": "cells in each well",
    "normalised_precision": "activity of its treatment (normalised mAP)",
    "control_distance": "distance of its treatment from the controls",
    "bad_frames": "share of bad frames",
}
_WORST_SITES = 50  # listed beside the failed ones


def report(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Write the page.

    Returns:
        Counts, and notes for the reader.
    """
    data = collect(screen, inputs.notes)
    store.write_bytes(screen.report, render(data).encode())
    return {"clips shown": len(data.examples), "compounds": len(inputs.compounds)}, []


def write_report(url: str, out: str | None = None) -> str:
    """Write the page of a screen as it is now, however far it has come and wherever its profiles are from.

    Args:
        url: the screen.
        out: the file to write; that of the screen by default.

    Returns:
        Where the page is.

    Raises:
        SchemaError: if there is no screen.
    """
    screen = Screen.open(store.absolute(url))
    page = render(collect(screen)).encode()
    target = screen.report if out is None else store.absolute(out)
    store.write_bytes(target, page)
    return target


def collect(screen: Screen, notes: Sequence[str] = ()) -> ReportData:
    """What a screen has to show; what it lacks is left empty.

    Args:
        screen: run, in part or whole, or with imported profiles.
        notes: what a reader should know beside the notes of the stages.
    """
    manifest = screen.read_manifest()
    rng = np.random.default_rng([int(manifest.config.get("seed", 0)), 5])
    compounds = open_table(screen.compounds, COMPOUNDS).to_pandas()
    maps = open_table(screen.plate_map, PLATE_MAP).to_pandas()
    maps = maps.merge(compounds[["compound", "moa"]], on="compound", how="left")
    judged = read_quality(well_keys(maps), screen)
    activity = read_statistics(screen, "activity")
    predicted = _predictions(screen)
    cells = EmbeddedCells(screen, well_keys(maps)) if screen.done_units("embed") else None
    counted, keys, vectors = _mapped_vectors(screen, cells, rng)
    return ReportData(
        title=str(manifest.config.get("title") or screen.url.rstrip("/").rpartition("/")[2]),
        provenance=_provenance(screen, manifest),
        counts=stage_table(screen).query("stage != 'report'"),
        plate_maps=_plate_maps(maps, counted, judged, activity),
        plate_measures=_MEASURES,
        quality=pd.DataFrame() if judged.empty else summarise(judged),
        quality_limits=_quality_limits(manifest, screen, judged),
        bad_sites=bad_sites(screen, judged),
        training=_training(screen),
        embedding_map=_map(maps, keys, vectors, rng),
        mapped="well" if cells is None and len(counted) else "cell",
        imported=manifest.has_imported_profiles,
        evaluation=store.read_json(screen.evaluation) if store.exists(screen.evaluation) else {},
        similarity=_similarity(screen),
        activity=readable(activity),
        consistency=readable(read_statistics(screen, "consistency")),
        doses=_tested(readable(read_statistics(screen, "doses"))),
        controls=readable(read_statistics(screen, "controls")),
        predictions=readable_predictions(predicted.table),
        prediction_notes=predicted.notes,
        retrieval=nearest_compounds(screen, _NEIGHBOURS) if index_exists(screen.index) else pd.DataFrame(),
        examples=[] if cells is None else _examples(screen, maps, cells),
        notes=[
            *_scaling_note(manifest),
            *notes,
            *(note for record in manifest.stages.values() for note in record.notes),
            *(f"{failure.unit} failed: {failure.message}" for failure in screen.failures("embed")),
        ],
    )


def read_example(screen: Screen, key: TrackKey) -> Example:
    """A cell's clip.

    Raises:
        InputError: if the screen has no such cell, or no clip of it.
    """
    well = WellKey(key.plate, key.well)
    cells = open_table(screen.cells(well), CELLS, ["site", "track", "clip"]).to_pandas()
    here = (cells["site"] == key.site) & (cells["track"] == key.track) & cells["clip"].notna()
    if not here.any():
        raise InputError(f"{key}: the screen has no clip of this cell")
    chosen = pd.DataFrame({"compound": [str(key)], "site": [key.site], "track": [key.track]})
    return _read_examples(screen, well, chosen)[0]


def read_quality(wells: Sequence[WellKey], screen: Screen) -> pd.DataFrame:
    """Quality of all wells that have been segmented; nothing of imported cells, which have no images."""
    done = screen.done_units("segment")
    urls = [screen.quality(well) for well in wells if well in done]
    there = compress(urls, ahead(store.exists, urls))
    tables = [table.to_pandas() for table in ahead(partial(open_table, form=QUALITY), there)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def bad_sites(screen: Screen, judged: pd.DataFrame) -> pd.DataFrame:
    """Failed sites (and wells), then those with flags and bad frames, the worst first."""
    failures = screen.failures("segment")
    failed = pd.DataFrame(
        {
            "site": [failure.unit for failure in failures],
            "outcome": "failed",
            "reason": [failure.kind for failure in failures],
            "what": [failure.message for failure in failures],
        }
    )
    if judged.empty:
        return failed
    worst = worst_sites(judged, _WORST_SITES)
    flagged = pd.DataFrame(
        {
            "site": worst["plate"] + "/" + worst["well"] + "/" + worst["site"],
            "outcome": worst["site_flag"].map(lambda flag: "no clips" if flag else "used"),
            "reason": worst["site_flag"].where(worst["site_flag"] != "", worst["flags"]),
            "what": [
                f"{share:.0%} of frames bad{f': {flags}' if flags else ''}"
                for share, flags in zip(worst["bad"], worst["flags"], strict=True)
            ],
        }
    )
    return pd.concat([failed, flagged], ignore_index=True)


def _provenance(screen: Screen, manifest: Manifest) -> dict[str, object]:
    inputs = manifest.config.get("inputs") or {}
    source = {"cells of": screen.segmented.url} if screen.segmented is not None else {"plates": inputs.get("plates")}
    return {
        **{f"version of {name}": version for name, version in manifest.software.items()},
        "seed": manifest.config.get("seed"),
        **source,
        "fingerprints": {name: record.fingerprint for name, record in manifest.stages.items()},
        "configuration": manifest.config,
    }


def _segment_config(manifest: Manifest) -> SegmentConfig | None:
    settings = manifest.config.get("segment")
    return None if settings is None else SegmentConfig.model_validate(settings)


def _quality_limits(manifest: Manifest, screen: Screen, judged: pd.DataFrame) -> pd.DataFrame:
    """The limits that frames of each plate were held to; none where sites were judged alone or in another run."""
    config = _segment_config(manifest)
    if config is None or not config.alike or judged.empty:
        return pd.DataFrame()
    rows = []
    for plate, table in judged.groupby("plate"):
        usual = open_calibration(screen.calibration(str(plate))).quality
        rows.append(limits(usual, list(table["channel"].unique()), config.quality).assign(plate=plate))
    return pd.concat(rows)[["plate", *rows[0].columns.drop("plate")]]


def _scaling_note(manifest: Manifest) -> list[str]:
    config = _segment_config(manifest)
    if config is None or config.clips.scaling.method not in ("site", "cell"):
        return []
    own = config.clips.scaling.method
    return [f"Clips are scaled {own} by {own}: their brightness does not compare between {own}s or wells."]


def _training(screen: Screen) -> pd.DataFrame:
    if not store.exists(screen.training_metrics):
        return pd.DataFrame()
    metrics = open_table(screen.training_metrics, TRAINING_METRICS).to_pandas()
    return metrics.pivot(index=["phase", "epoch"], columns="name", values="value").reset_index()


def _mapped_vectors(
    screen: Screen, cells: EmbeddedCells | None, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame, npt.NDArray[np.float32]]:
    """Number of cells of each well; keys and vectors of what the map shows: wells, where only profiles are known."""
    if cells is not None:
        every = np.ones(len(cells.counts), bool)
        return cells.per_well(), *cells.read(sample_rows(cells.counts, every, _MAPPED, rng))
    if not store.exists(screen.profiles("raw")):
        none = pd.DataFrame({"plate": [], "well": []}, dtype=str)
        return none.assign(n_cells=0), none, np.empty((0, 1), np.float32)
    wells, profiles = read_profiles(screen)
    picked = np.sort(rng.choice(len(wells), min(len(wells), _MAPPED), replace=False))
    return wells[["plate", "well", "n_cells"]], wells.iloc[picked], profiles[picked]


def _plate_maps(
    maps: pd.DataFrame, counted: pd.DataFrame, judged: pd.DataFrame, activity: pd.DataFrame
) -> pd.DataFrame:
    """A row a well with its number of embedded cells, missing where the well was not embedded, and what else is known.

    Of imported profiles the cells are as many as they say.
    """
    table = maps.merge(counted, on=["plate", "well"], how="left")
    if not judged.empty:
        frames = judged.drop_duplicates(["plate", "well", "site", "frame"])
        bad = frames.groupby(["plate", "well"])["bad"].mean().rename("bad_frames").reset_index()
        table = table.merge(bad, on=["plate", "well"], how="left")
    if not activity.empty:
        # A treatment's further columns, such as a time, may be none of the plate map's: its mean stands for all then.
        by = [name for name in ("compound", "concentration", "unit") if name in activity]
        of_treatment = activity.groupby(by, dropna=False)[["normalised_precision", "control_distance"]].mean()
        table = table.merge(of_treatment.reset_index(), on=by, how="left")
    return table.dropna(axis=1, how="all")


def _map(
    maps: pd.DataFrame, keys: pd.DataFrame, vectors: npt.NDArray[np.float32], rng: np.random.Generator
) -> pd.DataFrame:
    if keys.empty:
        return pd.DataFrame()
    placed = embedding_map(vectors, rng)
    table = keys[["plate", "well"]].assign(x=placed[:, 0], y=placed[:, 1])
    columns = ["plate", "well", "compound", "moa", "replicate"]
    return table.merge(maps[columns], on=["plate", "well"], how="left")


def _tested(table: pd.DataFrame) -> pd.DataFrame:
    """What could be tested: most screens have one dose of each compound."""
    return table if table.empty else table[table["excluded"].isna()].drop(columns="excluded")


def _similarity(screen: Screen) -> pd.DataFrame:
    """How alike the mechanisms' compounds are; nothing where no profile has a known mechanism."""
    if not store.exists(screen.profiles("raw")):
        return pd.DataFrame()
    compounds, profiles = read_profiles(screen, "compound")
    treated = (compounds["role"] != "negative_control").to_numpy()
    return moa_similarity(profiles[treated], compounds.loc[treated, "moa"])


def _predictions(screen: Screen) -> Predictions:
    """The first choice of every compound; nothing where there is none to choose from.

    Raises:
        InputError: if what is predicted from is damaged.
    """
    if not store.exists(screen.profiles("raw")):
        return Predictions(pd.DataFrame(), ())
    try:
        return predict(screen)
    except NoMechanismError:  # The section says that none was predicted.
        return Predictions(pd.DataFrame(), ())


def _examples(screen: Screen, maps: pd.DataFrame, cells: EmbeddedCells) -> list[Example]:
    """Typical cells of each compound, controls first, then by name."""
    of_well = cells.per_well().merge(maps[["plate", "well", "compound", "role"]], on=["plate", "well"], how="left")
    seen = of_well[of_well["n_cells"] > 0]
    controls = set(seen.loc[seen["role"] == "negative_control", "compound"])
    names = sorted(set(seen["compound"]), key=lambda name: (name not in controls, name))[:_CLIPS]
    each = min(max(_CLIPS // max(len(names), 1), 1), _CELLS_OF_COMPOUND)
    wells = seen.groupby("compound").indices
    chosen = [_typical(screen, cells, seen.index[wells[name]], each).assign(compound=name) for name in names]
    table = pd.concat(chosen, ignore_index=True) if chosen else pd.DataFrame(columns=CELL_KEYS)
    examples: dict[int, Example] = {}
    for _, rows in table.groupby(["plate", "well"]):
        examples |= _read_examples(screen, well_keys(rows)[0], rows)
    return [examples[i] for i in range(len(table))]


def _typical(screen: Screen, cells: EmbeddedCells, wells: pd.Index[int], n: int) -> pd.DataFrame:
    """Keys of the most typical of the cells in a compound's wells, given by position, whose clips have been kept."""
    which = np.zeros(len(cells.counts), bool)
    which[wells[:: -(-len(wells) // _WELLS_OF_COMPOUND)]] = True
    keys, embeddings = cells.read(rows_of(cells.counts, which))
    kept = _kept(screen, keys)
    return keys[kept].iloc[typical_cells(embeddings[kept], n)]


def _kept(screen: Screen, keys: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """(n,) whether the clip of a cell has been kept."""
    if screen.kept_clips != "sample":
        return np.full(len(keys), screen.kept_clips == "all")
    kept: set[tuple[str, str, str, int]] = set()
    urls = map(screen.cells, well_keys(keys.drop_duplicates(["plate", "well"])))
    for table in ahead(partial(open_table, form=CELLS, columns=[*CELL_KEYS, "clip"]), urls):
        cells = table.to_pandas()
        kept.update(cells.loc[cells["clip"].notna(), CELL_KEYS].itertuples(index=False, name=None))
    return np.array([key in kept for key in keys[CELL_KEYS].itertuples(index=False, name=None)], bool)


def _read_examples(screen: Screen, well: WellKey, chosen: pd.DataFrame) -> dict[int, Example]:
    """The clips of some cells of a well (compound, site, track), by their index."""
    table = open_table(screen.cells(well), CELLS, ["site", "track", "clip"]).to_pandas()
    found = chosen[["compound", "site", "track"]].merge(table, on=["site", "track"], how="left", validate="one_to_one")
    url = screen.clips(well)
    clips = as_bytes(read_clips(url, found["clip"].astype(int).tolist()))
    colours = channel_colours(channel_names(open_clips(url)))
    captions = f"{well}, site " + found["site"] + ", track " + found["track"].astype(str)
    rows = zip(chosen.index, found["compound"], captions, clips, strict=True)
    return {i: Example(str(compound), caption, clip, colours) for i, compound, caption, clip in rows}
