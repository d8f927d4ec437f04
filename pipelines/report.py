"""Stage `report`: everything a run has found, as one HTML page."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipelines.config import RunConfig
from pipelines.inputs import Inputs, well_keys
from pipelines.query import nearest_compounds
from pipelines.segment import open_calibration
from pipelines.status import stage_table
from pipelines.units import Counts
from pipelines.vectors import read_embeddings
from screening.quality import limits, summarise, worst_sites
from screening.report import Example, ReportData, channel_colours, embedding_map, render
from storage_schemas import store
from storage_schemas.clips import as_bytes, channel_names, open_clips, read_clips
from storage_schemas.screen import Screen
from storage_schemas.tables import CELLS, QUALITY, TRAINING_METRICS, open_table

OUTPUT_VERSION = 3  # raised when the same configuration gives another page

_MAPPED_CELLS = 20_000  # more would be one blot, and a heavy page
_EXAMPLES = 40  # clips in the page
_NEIGHBOURS = 5
_WORST_SITES = 50  # listed beside the failed ones


def report(config: RunConfig, inputs: Inputs, screen: Screen, fingerprint: str) -> tuple[Counts, list[str]]:
    """Write the page.

    Returns:
        Counts, and notes for the reader.
    """
    rng = np.random.default_rng([config.seed, 5])
    manifest = screen.read_manifest()
    metrics = open_table(screen.training_metrics, TRAINING_METRICS).to_pandas()
    keys, embeddings = read_embeddings(screen, inputs.wells)
    maps = inputs.plate_map.merge(inputs.compounds[["compound", "moa"]], on="compound", how="left")
    examples = _examples(screen, maps, rng)
    judged = read_quality(inputs, screen)
    data = ReportData(
        title=config.title,
        provenance={
            **{f"version of {name}": version for name, version in manifest.software.items()},
            "seed": config.seed,
            **_source(inputs),
            "fingerprints": {name: record.fingerprint for name, record in manifest.stages.items()},
            "configuration": manifest.config,
        },
        counts=stage_table(screen).query("stage != 'report'"),
        plate_maps=_plate_maps(screen, maps, keys),
        quality=pd.DataFrame() if judged.empty else summarise(judged),
        quality_limits=_quality_limits(config, screen, judged),
        bad_sites=bad_sites(screen, judged),
        training=metrics.pivot(index=["phase", "epoch"], columns="name", values="value").reset_index(),
        embedding_map=_map(maps, keys, embeddings, rng),
        evaluation=store.read_json(screen.evaluation),
        retrieval=nearest_compounds(screen, _NEIGHBOURS),
        examples=examples,
        notes=[
            *_scaling_note(config),
            *inputs.notes,
            *(note for record in manifest.stages.values() for note in record.notes),
            *(f"{failure.unit} failed: {failure.message}" for failure in screen.failures("embed")),
        ],
    )
    store.write_bytes(screen.report, render(data).encode())
    return {"clips shown": len(examples), "compounds": len(inputs.compounds)}, []


def read_quality(inputs: Inputs, screen: Screen) -> pd.DataFrame:
    """Quality of all wells that have been segmented; nothing of imported cells, which have no images."""
    done = screen.done_units("segment")
    urls = [screen.quality(well) for well in inputs.wells if well in done]
    tables = [open_table(url, QUALITY).to_pandas() for url in urls if store.exists(url)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _quality_limits(config: RunConfig, screen: Screen, judged: pd.DataFrame) -> pd.DataFrame:
    """The limits that frames of each plate were held to; none where sites were judged alone or in another run."""
    if config.segment is None or not config.segment.alike or judged.empty:
        return pd.DataFrame()
    rows = []
    for plate, table in judged.groupby("plate"):
        usual = open_calibration(screen.calibration(str(plate))).quality
        rows.append(limits(usual, list(table["channel"].unique()), config.segment.quality).assign(plate=plate))
    return pd.concat(rows)[["plate", *rows[0].columns.drop("plate")]]


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


def _source(inputs: Inputs) -> dict[str, object]:
    if inputs.cells is not None:
        return {"cells of": inputs.cells.url}
    return {"plates": {plate.name: plate.url for plate in inputs.plates.values()}}


def _scaling_note(config: RunConfig) -> list[str]:
    if config.segment is None or config.segment.clips.scaling.method not in ("site", "cell"):
        return []
    own = config.segment.clips.scaling.method
    return [f"Clips are scaled {own} by {own}: their brightness does not compare between {own}s or wells."]


def _plate_maps(screen: Screen, maps: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    """A row a well with its number of embedded cells, missing where the well was not embedded."""
    counted = keys.groupby(["plate", "well"]).size().rename("n_cells").reset_index()
    table = maps.merge(counted, on=["plate", "well"], how="left")
    done = screen.done_units("embed")
    empty = [key in done for key in well_keys(table)]
    table["n_cells"] = table["n_cells"].mask(table["n_cells"].isna() & np.array(empty), 0)
    return table.dropna(axis=1, how="all")


def _map(
    maps: pd.DataFrame, keys: pd.DataFrame, embeddings: npt.NDArray[np.float32], rng: np.random.Generator
) -> pd.DataFrame:
    picked = np.sort(rng.choice(len(keys), min(len(keys), _MAPPED_CELLS), replace=False))
    placed = embedding_map(embeddings[picked], rng)
    table = keys.iloc[picked].assign(x=placed[:, 0], y=placed[:, 1])
    columns = ["plate", "well", "compound", "moa", "replicate"]
    return table.merge(maps[columns], on=["plate", "well"], how="left")


def _examples(screen: Screen, maps: pd.DataFrame, rng: np.random.Generator) -> list[Example]:
    """A cell of one well of each compound, a compound of each MOA first, controls among them."""
    done = screen.done_units("segment")
    here = [key in done for key in well_keys(maps)]
    wells = maps[here].drop_duplicates("compound")
    wells = wells.assign(turn=wells.groupby("moa", dropna=False).cumcount())
    wells = wells.sort_values(["turn", "moa", "compound"])
    examples: list[Example] = []
    for key, compound, moa, role in zip(well_keys(wells), wells["compound"], wells["moa"], wells["role"], strict=True):
        if len(examples) == _EXAMPLES:
            break
        cells = open_table(screen.cells(key), CELLS, ["site", "track", "clip"]).to_pandas()
        cells = cells[cells["clip"].notna()]
        if cells.empty:
            continue
        cell = cells.iloc[int(rng.integers(len(cells)))]
        clips = open_clips(screen.clips(key))
        kind = "negative control" if role == "negative_control" else moa
        title = f"{compound} ({kind})" if isinstance(kind, str) else str(compound)
        clip = as_bytes(read_clips(screen.clips(key), [int(cell["clip"])]))[0]
        caption = f"{key}, site {cell['site']}, track {cell['track']}"
        examples.append(Example(title, caption, clip, channel_colours(channel_names(clips))))
    return examples
