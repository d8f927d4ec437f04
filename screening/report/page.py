"""The page itself: the parts of a report put into its template."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from screening.report import clips
from screening.report.curves import training_curves
from screening.report.data import ReportData
from screening.report.gallery import gallery
from screening.report.groups import Group, control_compounds, groups, mechanisms, natural, used
from screening.report.heatmaps import INKS, SCALE, plates
from screening.report.held_out import TESTS, USUAL_TESTS, held_out_test
from screening.report.points import point_map
from screening.report.tables import cell, mark_matches, percent, table

OPEN_PLATES = 4
"""Plates shown unfolded; the maps of the others open on demand."""

_TEMPLATES = files("screening.report") / "templates"


@dataclass(frozen=True)
class Live:
    """What the form of a page needs that a server stands behind (`pipelines.serve`).

    Attributes:
        max_upload: bytes of the largest file that the server takes.
        levels: what can be compared: compounds, wells, cells.
        moas: mechanisms that answers can be restricted to.
    """

    max_upload: int
    levels: tuple[str, ...]
    moas: tuple[str, ...]


def render(data: ReportData, *, live: Live | None = None) -> str:
    """The report as one HTML page without any outside reference.

    Every text of `data` is escaped; scripts other than the page's own cannot run.

    Args:
        data: what to show.
        live: of a page that a server stands behind: it then has a form to ask the screen, and may talk to that server
            and nobody else.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("screening.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["payload"] = _payload
    controls = control_compounds(data.plate_maps)
    own = mechanisms(data.plate_maps, controls)
    styles = groups([*own, *mechanisms(data.embedding_map, controls)])
    film_strips, clips_left_out = clips.film_strips(data.examples)
    return environment.get_template("report.html.j2").render(
        live=live,
        style=Markup(_text("report.css")),
        script=Markup(_script(live)),
        policy=content_policy(live),
        title=data.title,
        imported=data.imported,
        tiles=_tiles(data),
        tests=[
            held_out_test(key, data.evaluation.get(key), styles)
            for key in TESTS
            if key in (data.evaluation or USUAL_TESTS) and not data.imported
        ],
        notes=list(data.notes),
        facts=_facts(data.provenance),
        counts=table(data.counts, "counts", "Units and cells through each stage"),
        plates=plates(data.plate_maps, data.plate_measures, styles, controls),
        scale=SCALE,
        inks=INKS,
        open_plates=OPEN_PLATES,
        mechanisms=used(styles, own),
        wells=table(data.plate_maps, "wells", "All wells of all plates"),
        quality=table(data.quality, "quality", "Sites and frames of each plate, and the share of frames with a fault"),
        quality_limits=table(data.quality_limits, "quality-limits", "What is usual on each plate, and what is too far"),
        bad_sites=table(data.bad_sites, "bad-sites", "Sites that failed or were flagged, and sites with bad frames"),
        curves=training_curves(data.training),
        epochs=table(data.training, "epochs", "Every epoch of the training"),
        map=point_map(data.embedding_map, styles, controls),
        mapped=data.mapped,
        similarity=_matrix(data.similarity, styles),
        activity=table(data.activity, "activity", "How each compound differs from the negative controls"),
        consistency=table(data.consistency, "consistency", "Whether compounds of one mechanism or target act alike"),
        doses=table(data.doses, "doses", "Whether the effect of each compound grows with its dose"),
        controls=table(data.controls, "controls", "Controls and replicates of each plate"),
        prediction_notes=list(data.prediction_notes),
        predictions=table(data.predictions, "predictions", "The mechanism that each compound is given"),
        retrieval=table(mark_matches(data.retrieval), "neighbours", "Nearest compounds"),
        gallery=gallery(film_strips, data.retrieval, data.plate_maps, controls),
        clips_left_out=clips_left_out,
        channels=clips.legend(data.examples),
    )


def content_policy(live: Live | None = None) -> str:
    """What the page may load, run and talk to: its own script, no other, and its own server if it has one."""
    digest = base64.b64encode(hashlib.sha256(_script(live).encode()).digest()).decode("ascii")
    parts = ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"]
    return "; ".join([*parts, *(["connect-src 'self'"] if live else []), "base-uri 'none'", "form-action 'none'"])


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    folded: bool


@dataclass(frozen=True)
class _Matrix:
    """Mechanisms as (number, name), and of each two their similarity; None where it cannot be said."""

    labels: list[tuple[str, str]]
    rows: list[list[float | None]]


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """The numbers at the top of the page: (number, what it counts)."""
    wells = data.plate_maps

    def distinct(column: str, rows: pd.DataFrame = wells) -> int:
        return int(rows[column].nunique()) if column in rows else 0

    treated = wells[wells["role"] != "negative_control"] if "role" in wells else wells
    cells = [(int(wells["n_cells"].sum()), "cell", "cells")] if "n_cells" in wells else []
    tiles = [
        (distinct("plate"), "plate", "plates"),
        (len(wells), "well", "wells"),
        *cells,
        (distinct("compound", treated), "compound", "compounds"),
        (distinct("moa", treated), "known mechanism", "known mechanisms"),
    ]
    return [(f"{n:,}", one if n == 1 else many) for n, one, many in tiles]


def _facts(provenance: Mapping[str, object]) -> list[_Fact]:
    facts = []
    for name, value in provenance.items():
        folded = isinstance(value, Mapping | list | tuple)
        text = json.dumps(value, indent=2, default=str, ensure_ascii=False) if folded else cell(value).text
        facts.append(_Fact(str(name).replace("_", " "), text, folded))
    return facts


def _matrix(similarity: pd.DataFrame, styles: Mapping[str, Group]) -> _Matrix | None:
    if similarity.empty:
        return None
    names = sorted(similarity.index, key=natural)
    values = similarity.loc[names, names].to_numpy(dtype=float)
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in values]
    return _Matrix([(styles[name].code if name in styles else "", name) for name in names], rows)


def _script(live: Live | None) -> str:
    return _text("report.js") + (_text("live.js") if live else "")


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _payload(value: object) -> Markup:
    """Data for the script as JSON that cannot end the element it stands in, nor open another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
