"""The report of a screen: one self-contained HTML page that a biologist can open, read and pass on.

The page needs no network (its content security policy forbids any), follows the reader's light or
dark scheme, works by keyboard and screen reader, and says in a sentence what is missing where a
part of the screen is. Plate maps are drawn as SVG by the template, because wells then carry their
own hover text and follow the colour scheme; curves are matplotlib SVG; the embedding map, with its
many points, is a matplotlib PNG on a transparent ground.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

# Okabe & Ito (2008), the yellow darkened to be seen on white. Groups beyond the seventh repeat the
# colours with another marker, so that no two groups need telling apart by hue alone.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a125")
MARKERS = {
    "o": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1-5 0Z",
    "^": "M0-5.5L5.5 5H-5.5Z",
    "s": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "D": "M0-6L6 0L0 6L-6 0Z",
    "v": "M0 5.5L5.5-5H-5.5Z",
    "P": "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
}
NEUTRAL = "#8a919c"
CONTROL, UNKNOWN, OTHER = "negative control", "mechanism unknown", "other groups"

# Rows and columns of the plates that are sold; the smallest that holds the wells is drawn.
PLATE_SHAPES = ((2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (16, 24), (32, 48))
OPEN_PLATES = 4
"""Plates shown unfolded; the maps of the others open on demand."""

CLIP_BUDGET = 14_000_000
"""Bytes of encoded clips in one page, so that a screen of any size stays an attachment."""
CLIP_SIDE = 192
"""Pixels: longer clips are reduced to this side."""
FRAME_MS = 180

MAX_FITTED = 2000
"""Rows the t-SNE is fitted to; it keeps the cost of a map flat."""

NOTHING = "\N{EN DASH}"

_TESTS = {
    "compound": (
        "Compounds never trained on",
        "Cells of compounds that the model never saw are matched to cells of known compounds.",
    ),
    "replicate": (
        "A replicate never trained on",
        "Cells of a held-out replicate are matched to cells of the other replicates.",
    ),
    "well": ("Wells never trained on", "Cells of held-out wells are matched to cells of trained ones."),
    "cell": (
        "Cells never trained on",
        "Held-out cells are matched to trained ones, others of their own wells among them, which flatters the network.",
    ),
    "query": ("Queries of the split's table", "Cells that the table names as queries are matched to its gallery."),
}
_USUAL_TESTS = ("compound", "replicate")
_SERIES = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--accent)"}
_INK, _MUTED, _ACCENT = _SERIES


class Example(NamedTuple):
    """A cell to show.

    clip: (C, T, H, W) uint8; channel_colours: name → CSS hex colour, a channel each, in order.
    """

    title: str
    caption: str
    clip: NDArray[np.uint8]
    channel_colours: Mapping[str, str]


@dataclass(frozen=True)
class ReportData:
    """What a report shows; any part may be left empty and is then said to be missing.

    Attributes:
        title: Name of the screen.
        provenance: Versions, seeds, fingerprints, configuration; nested values are folded away.
        counts: A row a stage: `stage`, then counts such as `in`, `out`, `failed`, `filtered`, and
            the reasons as text or as a mapping from reason to count; shown as they come.
        plate_maps: A row a well: plate, well, role, compound, moa (missing when unknown) and
            n_cells (missing when the well was not measured); further columns are listed in the
            table of wells.
        quality: A row a plate: sites, frames and the shares of them that are bad, by reason.
        quality_limits: A row a plate and channel: what is usual, and beyond which value frames are bad.
        bad_sites: A row a site that failed or that something is wrong with, the worst first.
        training: A row an epoch: `phase`, `epoch` and any numbers; each becomes a small curve.
        embedding_map: A row a cell: x, y (of `embedding_map`), compound, moa, plate, well and,
            where known, replicate.
        evaluation: As `evaluation.evaluate` returns it, under the names of the tests
            (:data:`screening.splits.TESTS`).
        retrieval: A row a neighbour: compound, moa, rank, neighbour, neighbour_moa, similarity
            (cosine). Further columns are shown as they come.
        examples: Cells to show as clips.
        notes: Sentences the reader must know, such as why a test is empty.
    """

    title: str
    provenance: Mapping[str, object] = field(default_factory=dict)
    counts: pd.DataFrame = field(default_factory=pd.DataFrame)
    plate_maps: pd.DataFrame = field(default_factory=pd.DataFrame)
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    quality_limits: pd.DataFrame = field(default_factory=pd.DataFrame)
    bad_sites: pd.DataFrame = field(default_factory=pd.DataFrame)
    training: pd.DataFrame = field(default_factory=pd.DataFrame)
    embedding_map: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    retrieval: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: Sequence[Example] = ()
    notes: Sequence[str] = ()


def render(data: ReportData) -> str:
    """The report as one HTML page without any outside reference.

    Every text of `data` is escaped; scripts other than the page's own cannot run.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("screening"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["percent"] = _percent
    controls = _control_compounds(data.plate_maps)
    mechanisms = _groups(
        [
            *_mechanisms(data.plate_maps, controls),
            *_mechanisms(data.embedding_map, controls),
        ]
    )
    clips, clips_left_out = _clips(data.examples)
    return environment.get_template("report.html.j2").render(
        title=data.title,
        tiles=_tiles(data),
        tests=[
            _test(key, data.evaluation.get(key), mechanisms)
            for key in _TESTS
            if key in (data.evaluation or _USUAL_TESTS)
        ],
        notes=list(data.notes),
        facts=_facts(data.provenance),
        counts=_table(data.counts, "counts", "Units and cells through each stage"),
        plates=_plates(data.plate_maps, mechanisms, controls),
        open_plates=OPEN_PLATES,
        mechanisms=_used(mechanisms, _mechanisms(data.plate_maps, controls)),
        wells=_table(data.plate_maps, "wells", "All wells of all plates"),
        quality=_table(data.quality, "quality", "Sites and frames of each plate, and the share of frames with a fault"),
        quality_limits=_table(
            data.quality_limits, "quality-limits", "What is usual on each plate, and what is too far"
        ),
        bad_sites=_table(data.bad_sites, "bad-sites", "Sites that failed or were flagged, and sites with bad frames"),
        curves=_training_curves(data.training),
        epochs=_table(data.training, "epochs", "Every epoch of the training"),
        maps=_maps(data.embedding_map, mechanisms, controls),
        retrieval=_table(_mark_matches(data.retrieval), "retrieval", "Nearest compounds"),
        clips=clips,
        clips_left_out=clips_left_out,
        channels=_channel_legend(data.examples),
        n_cells_mapped=len(data.embedding_map),
    )


def embedding_map(embeddings: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.float32]:
    """Positions of cells in a plane where neighbours in embedding space stay neighbours.

    Rows are scaled to unit length (retrieval is by cosine), reduced to at most 50 principal
    components and laid out by t-SNE (van der Maaten & Hinton 2008) started from the first two
    components (Kobak & Berens 2019). At most `MAX_FITTED` rows, drawn by `rng`, are fitted; every
    other row is put at the mean position of its three nearest fitted rows, so the cost grows by a
    search only. The same embeddings and the same generator state give the same map on any number
    of cores.

    Args:
        embeddings: (n, D) finite numbers.
        rng: Draws the fitted rows.

    Returns:
        (n, 2) float32.

    Raises:
        ValueError: The embeddings are not a finite matrix.
    """
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"embeddings to map must be a finite (n, D) matrix, not {vectors.shape} with "
            f"{np.count_nonzero(~np.isfinite(vectors))} values that are no number"
        )
    n = len(vectors)
    if n < 3:
        return np.column_stack([np.arange(n), np.zeros(n)]).astype(np.float32)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    fitted = np.sort(rng.permutation(n)[:MAX_FITTED])
    seed = int(rng.integers(2**31))
    # One thread: sums that threads split differ in their last bits, and t-SNE amplifies those.
    # Equal rows have no variance to explain, which divides by zero but harms nothing.
    with threadpool_limits(limits=1), np.errstate(invalid="ignore"):
        n_components = min(50, *vectors[fitted].shape)
        pca = PCA(n_components, svd_solver="full").fit(vectors[fitted])
        reduced = np.asarray(pca.transform(vectors), dtype=np.float32)
        layout = _tsne(reduced[fitted], seed)
        if len(fitted) == n:
            return layout
        search = NearestNeighbors(n_neighbors=3).fit(reduced[fitted])
        nearest = search.kneighbors(reduced, return_distance=False)
    placed: NDArray[np.float32] = layout[nearest].mean(axis=1, dtype=np.float32)
    placed[fitted] = layout
    return placed


def channel_colours(names: Sequence[str]) -> dict[str, str]:
    """Display colours of channels, told apart with any colour vision: white; green and magenta;
    blue, green and red-magenta; further ones in the order of the palette."""
    if len(names) == 1:
        return {names[0]: "#ffffff"}
    first = ("#37d67a", "#f04fd0") if len(names) == 2 else ("#4f7dff", "#37d67a", "#ff4f6d")
    return dict(zip(names, (*first, *PALETTE * len(names)), strict=False))


def _tsne(points: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(n, 2) layout of (n, D) points, n ≥ 3."""
    start = np.zeros((len(points), 2), dtype=np.float32)
    start[:, : points.shape[1]] = points[:, :2]
    spread = start[:, 0].std()
    if spread == 0:  # All points coincide: nothing to lay out.
        return start
    tsne = TSNE(
        perplexity=min(30.0, (len(points) - 1) / 3),
        init=1e-4 * start / spread,
        learning_rate="auto",
        max_iter=500,
        random_state=seed,
    )
    return np.asarray(tsne.fit_transform(points), dtype=np.float32)


# --- Groups: mechanisms, plates, replicates -----------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """How the cells and wells of one mechanism (or plate) are drawn."""

    label: str
    code: str
    colour: str
    marker: str

    @property
    def path(self) -> str:
        return MARKERS[self.marker]

    @property
    def ink(self) -> str:
        """The text colour that reads best on the group's colour."""
        return _ink_on(self.colour)


def _groups(labels: Iterable[str]) -> dict[str, _Group]:
    """A drawing style a label, in alphabetical order; the neutral groups are grey and come last."""
    names = set(labels)
    neutral = [
        _Group(label, code, NEUTRAL, marker)
        for label, code, marker in ((CONTROL, "C", "o"), (UNKNOWN, "?", "v"))
        if label in names
    ]
    styles = [(colour, marker) for marker in MARKERS for colour in PALETTE]
    known = sorted(names - {CONTROL, UNKNOWN}, key=_natural)
    groups = {name: _Group(name, str(i + 1), *styles[i]) for i, name in enumerate(known[: len(styles)])}
    rest = _Group(OTHER, "+", NEUTRAL, "s")
    return groups | dict.fromkeys(known[len(styles) :], rest) | {g.label: g for g in neutral}


def _used(groups: Mapping[str, _Group], labels: Iterable[str]) -> list[_Group]:
    """The legend of some labels, without repeats, in the order of the groups."""
    present = set(labels)
    return list(dict.fromkeys(group for name, group in groups.items() if name in present))


def _control_compounds(plate_maps: pd.DataFrame) -> set[str]:
    if plate_maps.empty or not {"role", "compound"} <= set(plate_maps.columns):
        return set()
    return set(plate_maps.loc[plate_maps["role"] == "negative_control", "compound"].astype(str))


def _mechanisms(frame: pd.DataFrame, controls: set[str]) -> list[str]:
    """The group of every row: its mechanism, or that it is a control, or that none is known."""
    if frame.empty or "moa" not in frame:
        return [UNKNOWN] * len(frame)
    compounds = frame["compound"] if "compound" in frame else [""] * len(frame)
    return [
        CONTROL if str(compound) in controls else UNKNOWN if _missing(moa) else str(moa)
        for compound, moa in zip(compounds, frame["moa"], strict=True)
    ]


# --- Numbers and tables --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    text: str
    value: str


@dataclass(frozen=True)
class _Column:
    name: str
    heading: str
    numeric: bool


@dataclass(frozen=True)
class _Table:
    """A table for the template; `value` is what is sorted and downloaded, `text` what is read."""

    name: str
    caption: str
    columns: list[_Column]
    rows: list[list[_Cell]]


def _table(frame: pd.DataFrame, name: str, caption: str) -> _Table | None:
    if frame.empty:
        return None
    columns = [
        _Column(
            str(column),
            str(column).replace("_", " "),
            pd.api.types.is_numeric_dtype(frame[column]) and not pd.api.types.is_bool_dtype(frame[column]),
        )
        for column in frame.columns
    ]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return _Table(name, caption, columns, rows)


def _cell(value: object) -> _Cell:
    if isinstance(value, Mapping):
        text = ", ".join(f"{_cell(count).text} {reason}" for reason, count in value.items())
        return _Cell(text or NOTHING, text)
    if _missing(value):
        return _Cell(NOTHING, "")
    if isinstance(value, bool | np.bool_):
        return _Cell("yes" if value else "no", "yes" if value else "no")
    if isinstance(value, int | np.integer):
        return _Cell(f"{value:,}", str(value))
    if isinstance(value, float | np.floating):
        number = float(value)
        whole = number.is_integer() and abs(number) < 1e9
        return _Cell(f"{number:,.0f}" if whole else f"{number:.3g}", f"{number:.6g}")
    return _Cell(str(value), str(value))


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _number(value: object) -> float | None:
    """A finite number, or None: evaluations write what could not be measured as null or NaN."""
    if isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value):
        return float(value)
    return None


def _percent(share: float) -> str:
    """A share as a percentage, with a decimal where whole numbers would hide it."""
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sorting key under which plate 2 comes before plate 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part.casefold())
        for part in re.split(r"(\d+)", text)
        if part
    ]


def _mark_matches(retrieval: pd.DataFrame) -> pd.DataFrame:
    """The retrieval table with a column that says whether the neighbour shares the mechanism."""
    if retrieval.empty or not {"moa", "neighbour_moa"} <= set(retrieval.columns):
        return retrieval
    known = retrieval["moa"].notna() & retrieval["neighbour_moa"].notna()
    same = retrieval["moa"].astype(object) == retrieval["neighbour_moa"].astype(object)
    matches = pd.Series(same, dtype="boolean").where(known)
    return retrieval.assign(same_moa=matches)


# --- Headline and provenance ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """A measured share in [0, 1] with its 95 % interval and what guessing reaches, where known."""

    label: str
    value: float
    low: float | None
    high: float | None
    chance: float | None

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        low, high = _percent(self.low), _percent(self.high)
        return f"{low} to {high}"

    @property
    def times_chance(self) -> float | None:
        return self.value / self.chance if self.chance else None

    @property
    def verdict(self) -> str:
        """What interval and chance say together, in words."""
        if self.chance is None or self.low is None or self.high is None:
            return "How this compares with chance was not measured."
        times = self.times_chance
        if self.low > self.chance and times is not None:
            return f"That is {times:.1f} times chance, and the interval lies above chance."
        if self.high < self.chance:
            return "That is below chance."
        return "The interval includes chance: this test shows no effect."


@dataclass(frozen=True)
class _Contrast:
    label: str
    metrics: list[_Metric]


class _ConfusionRow(NamedTuple):
    moa: int
    shares: list[float]


@dataclass(frozen=True)
class _Confusion:
    """Mechanisms as (number, name), and of each queried one the shares of its cells by answer."""

    labels: list[tuple[str, str]]
    rows: list[_ConfusionRow]


@dataclass(frozen=True)
class _Test:
    """One held-out test as the template shows it; without metrics it could not be held."""

    key: str
    title: str
    explanation: str
    size: str
    note: str
    headline: _Metric | None
    metrics: list[_Metric]
    contrasts: list[_Contrast]
    cmc: Markup | None
    confusion: _Confusion | None


def _test(key: str, result: Mapping[str, Any] | None, mechanisms: Mapping[str, _Group]) -> _Test:
    title, explanation = _TESTS[key]
    result = result or {}
    metrics = _metrics(result)
    counted = (
        ("n_queries", "query cells"),
        ("n_compounds", "compounds"),
        ("n_gallery", "reference cells"),
    )
    return _Test(
        key=key,
        title=title,
        explanation=explanation,
        size=", ".join(f"{int(result[k]):,} {what}" for k, what in counted if result.get(k)),
        note=str(result.get("note") or ""),
        headline=metrics.get("rank1"),
        metrics=list(metrics.values()),
        contrasts=[
            _Contrast(str(label), list(_metrics(contrast).values()))
            for label, contrast in (result.get("contrasts") or {}).items()
        ],
        cmc=_cmc_curve(key, result),
        confusion=_confusion(result.get("confusion") or {}, mechanisms),
    )


def _metrics(result: Mapping[str, Any]) -> dict[str, _Metric]:
    """The measured ones of rank1, rank5…, map, accuracy and auc, in this order."""
    ranks = sorted((key for key in result if re.fullmatch(r"rank\d+", key)), key=_natural)
    labels = {key: f"Rank-{key[4:]}" for key in ranks} | {
        "map": "mAP",
        "accuracy": "accuracy",
        "auc": "AUC",
    }
    found = {}
    for key, label in labels.items():
        measured = result.get(key) or {}
        value = _number(measured.get("value"))
        if value is not None:
            low, high, chance = (_number(measured.get(k)) for k in ("low", "high", "chance"))
            found[key] = _Metric(label, value, low, high, chance)
    return found


def _confusion(confusion: Mapping[str, Any], mechanisms: Mapping[str, _Group]) -> _Confusion | None:
    names = [str(name) for name in confusion.get("moas") or []]
    labels = [(mechanisms[n].code if n in mechanisms else "", n) for n in names]
    rows = [
        _ConfusionRow(i, [round(float(share), 3) for share in shares])
        for i, shares in enumerate(confusion.get("neighbours") or [])
        if shares is not None
    ]
    return _Confusion(labels, rows) if rows else None


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """The numbers at the top of the page: (number, what it counts)."""
    wells = data.plate_maps

    def distinct(column: str, rows: pd.DataFrame = wells) -> int:
        return int(rows[column].nunique()) if column in rows else 0

    treated = wells[wells["role"] != "negative_control"] if "role" in wells else wells
    cells = int(wells["n_cells"].sum()) if "n_cells" in wells else 0
    tiles = [
        (distinct("plate"), "plate", "plates"),
        (len(wells), "well", "wells"),
        (cells, "cell", "cells"),
        (distinct("compound", treated), "compound", "compounds"),
        (distinct("moa", treated), "known mechanism", "known mechanisms"),
    ]
    return [(f"{n:,}", one if n == 1 else many) for n, one, many in tiles]


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    folded: bool


def _facts(provenance: Mapping[str, object]) -> list[_Fact]:
    facts = []
    for name, value in provenance.items():
        folded = isinstance(value, Mapping | list | tuple)
        text = json.dumps(value, indent=2, default=str, ensure_ascii=False) if folded else str(value)
        facts.append(_Fact(str(name).replace("_", " "), text, folded))
    return facts


# --- Plate maps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Well:
    row: int
    column: int
    hover: str
    count: str
    count_colour: str | None
    count_ink: str
    group: _Group
    positive_control: bool


@dataclass(frozen=True)
class _Plate:
    name: str
    row_names: list[str]
    n_columns: int
    wells: list[_Well]
    summary: str


@dataclass(frozen=True)
class _Plates:
    plates: list[_Plate]
    most_cells: int
    gradient: str
    """Colours of the cell counts from 0 to `most_cells`, as CSS stops."""


def _plates(plate_maps: pd.DataFrame, mechanisms: Mapping[str, _Group], controls: set[str]) -> _Plates | None:
    if plate_maps.empty:
        return None
    counts = plate_maps["n_cells"] if "n_cells" in plate_maps else pd.Series([0])
    most = int(counts.max()) if counts.notna().any() else 0
    names = sorted(plate_maps["plate"].astype(str).unique(), key=_natural)
    plates = [
        _plate(name, plate_maps[plate_maps["plate"].astype(str) == name], mechanisms, controls, most) for name in names
    ]
    gradient = ", ".join(_count_colour(share, 1) for share in np.linspace(0, 1, 9))
    return _Plates(plates, most, gradient)


def _plate(
    name: str,
    wells: pd.DataFrame,
    mechanisms: Mapping[str, _Group],
    controls: set[str],
    most: int,
) -> _Plate:
    positions = _well_positions(wells["well"].astype(str).tolist())
    n_rows, n_columns = _plate_shape(positions)
    drawn = []
    rows: Iterator[dict[Hashable, Any]] = iter(wells.to_dict("records"))
    for position, row, label in zip(positions, rows, _mechanisms(wells, controls), strict=True):
        cells = _number(row.get("n_cells"))
        colour = None if cells is None else _count_colour(cells, most)
        group = mechanisms[label]
        # Groups beyond the palette share a style, but the hover text still names the mechanism.
        said = [f"{row['well']}: {row.get('compound', '')}"]
        if not _missing(row.get("concentration")):
            said.append(f"{_cell(row['concentration']).text} {row.get('unit') or ''}".strip())
        said.append(label)
        said.append("not measured" if cells is None else f"{cells:,.0f} cells")
        drawn.append(
            _Well(
                *position,
                hover=", ".join(said),
                count="" if cells is None else f"{cells:.0f}",
                count_colour=colour,
                count_ink=_ink_on(colour or "#ffffff"),
                group=group,
                positive_control=row.get("role") == "positive_control",
            )
        )
    measured = [int(well.count) for well in drawn if well.count]
    summary = f"{len(drawn)} wells; " + (
        f"{sum(measured):,} cells, {min(measured):,} to {max(measured):,} a well"
        if measured
        else "no well was measured"
    )
    return _Plate(name, [_row_name(r) for r in range(n_rows)], n_columns, drawn, summary)


def _well_positions(names: Sequence[str]) -> list[tuple[int, int]]:
    """(row, column) from 0 of wells named as B07; other names fill the rows beneath in order."""
    matches = [re.fullmatch(r"([A-Za-z]{1,2})0*([1-9]\d?)", name) for name in names]
    named = [(_row_index(m[1]), int(m[2]) - 1) for m in matches if m]
    n_rows, n_columns = _plate_shape(named) if named else (0, 12)
    beneath = iter(range(len(names)))
    return [
        (_row_index(m[1]), int(m[2]) - 1) if m else (n_rows + (i := next(beneath)) // n_columns, i % n_columns)
        for m in matches
    ]


def _plate_shape(positions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest usual plate that holds the wells, or just their extent where none does."""
    rows = max(row for row, _ in positions) + 1
    columns = max(column for _, column in positions) + 1
    return next((s for s in PLATE_SHAPES if s[0] >= rows and s[1] >= columns), (rows, columns))


def _row_index(letters: str) -> int:
    index = 0
    for letter in letters.upper():
        index = 26 * index + ord(letter) - ord("A") + 1
    return index - 1


def _row_name(index: int) -> str:
    """A to Z, then AA to ZZ."""
    return chr(65 + index) if index < 26 else chr(64 + index // 26) + chr(65 + index % 26)


def _count_colour(count: float, most: float) -> str:
    """From pale yellow to blue; the map's darkest end would drown the layout beside it."""
    return to_hex(colormaps["YlGnBu"](0.7 * min(count / most, 1.0) if most else 0.0))


def _ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour (relative luminance of WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#000000" if luminance > 0.179 else "#ffffff"


# --- Curves and maps by matplotlib ---------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    title: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class _Map:
    title: str
    alt: str
    png: str
    legend: list[_Group]


def _training_curves(training: pd.DataFrame) -> list[_Curve]:
    """A small curve for every number that was logged by epoch, one a phase; its scale is its own."""
    if training.empty or "epoch" not in training:
        return []
    phases = {str(phase): rows for phase, rows in training.groupby("phase")}
    return [
        curve
        for phase, rows in phases.items()
        for curve in _phase_curves(rows, phase, f" ({phase})" if len(phases) > 1 else "")
    ]


def _phase_curves(training: pd.DataFrame, phase: str, suffix: str) -> list[_Curve]:
    numbers = training.select_dtypes("number").drop(columns="epoch")
    curves = []
    for i, name in enumerate(numbers.columns):
        shown = np.isfinite(numbers[name].to_numpy(dtype=float))
        if not shown.any():
            continue
        epochs = training["epoch"].to_numpy()[shown]
        values = numbers[name].to_numpy(dtype=float)[shown]
        axes = _axes(3.2, 2.1)
        axes.plot(epochs, values, color=_ACCENT, marker="o", markersize=2.5, linewidth=1.6)
        axes.set(xlabel="epoch", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
        title = str(name).replace("_", " ") + suffix
        alt = (
            f"{title} by epoch: {values[0]:.3g} at epoch {epochs[0]}, {values[-1]:.3g} at epoch "
            f"{epochs[-1]}; lowest {values.min():.3g}, highest {values.max():.3g}."
        )
        curves.append(_Curve(title, alt, _svg(axes, f"{phase}-{i}")))
    return curves


def _cmc_curve(key: str, result: Mapping[str, Any]) -> Markup | None:
    """Share of queries with a match among the first k, by k, beside a random order's."""
    cmc = np.asarray(result.get("cmc") or [], dtype=float)
    if not cmc.size or not np.isfinite(cmc).all():
        return None
    axes = _axes(4.2, 2.9)
    axes.plot(range(1, len(cmc) + 1), cmc, color=_ACCENT, linewidth=2, label="this screen")
    chance = np.asarray(result.get("cmc_chance") or [], dtype=float)
    if chance.shape == cmc.shape:
        axes.plot(range(1, len(cmc) + 1), chance, "--", color=_MUTED, label="chance")
    axes.set(xlabel="rank k", xlim=(0.5, len(cmc) + 0.5))
    axes.set(ylabel="queries with a match", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right")
    return _svg(axes, f"cmc-{key}")


def _axes(width: float, height: float) -> Axes:
    """Empty axes of a figure (inches) in the page's colours, without a global pyplot state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return axes


def _svg(axes: Axes, prefix: str) -> Markup:
    """The figure as SVG to stand inside the page: its text is text, its colours are the page's and
    its ids begin with `prefix`, since several figures share the page's one name space."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace('id="', f'id="{prefix}-').replace("url(#", f"url(#{prefix}-")
    text = text.replace('xlink:href="#', f'href="#{prefix}-')
    for placeholder, colour in _SERIES.items():
        text = text.replace(placeholder, colour)
    return Markup(text)


def _maps(cells: pd.DataFrame, mechanisms: Mapping[str, _Group], controls: set[str]) -> list[_Map]:
    """The embedding map by mechanism, by plate and, where plates do not tell it, by replicate."""
    if cells.empty:
        return []
    colourings = [("mechanism", _mechanisms(cells, controls), mechanisms)]
    for column in ("plate", "replicate"):
        if column not in cells or cells[column].isna().all():
            continue
        labels = cells[column].astype(str).tolist()
        seen = zip(colourings[-1][1], labels, strict=True)
        if len(set(seen)) > len(set(labels)) or column == "plate":
            colourings.append((column, labels, _groups(labels)))
    return [
        _Map(
            f"Coloured by {what}",
            f"Map of {len(cells):,} cells coloured by {what}: "
            + ", ".join(group.label for group in _used(groups, labels)),
            _scatter(cells, [groups[label] for label in labels]),
            _used(groups, labels),
        )
        for what, labels, groups in colourings
    ]


def _scatter(cells: pd.DataFrame, groups: Sequence[_Group]) -> str:
    """The points as a PNG data URI on a transparent ground.

    Groups are drawn in turns, a tenth of each at a time, so that none hides those drawn before it.
    """
    figure = Figure(figsize=(5, 5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.margins(0.03)
    positions = cells[["x", "y"]].to_numpy(dtype=float)
    members = pd.Series(list(groups)).groupby(list(groups), sort=False).indices
    size = float(np.clip(12_000 / len(cells), 4, 36))
    for turn in range(10):
        for group, rows in members.items():
            assert isinstance(group, _Group)
            axes.scatter(
                positions[rows[turn::10], 0],
                positions[rows[turn::10], 1],
                s=size,
                c=group.colour,
                marker=group.marker,
                alpha=0.75,
                linewidths=0,
            )
    buffer = io.BytesIO()
    figure.set_canvas(canvas)
    figure.savefig(buffer, format="png", dpi=180, transparent=True)
    return _data_uri("image/png", buffer.getvalue())


# --- Clips ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clip:
    title: str
    caption: str
    alt: str
    moving: str
    still: str
    width: int
    height: int


def _clips(examples: Sequence[Example]) -> tuple[list[_Clip], int]:
    """Encoded clips within `CLIP_BUDGET` bytes and the number of clips left out for it."""
    brightest = _brightest(examples)
    clips: list[_Clip] = []
    spent = 0
    for example in examples:
        clip = _clip(example, brightest)
        spent += len(clip.moving) + len(clip.still)
        if spent > CLIP_BUDGET:
            break
        clips.append(clip)
    return clips, len(examples) - len(clips)


def _brightest(examples: Sequence[Example]) -> dict[str, float]:
    """Per channel the 99.8th percentile over all examples.

    It is shown as full brightness in each of them, so that clips can be compared with each other.
    """
    histograms: dict[str, NDArray[np.int64]] = {}
    for example in examples:
        for name, channel in zip(example.channel_colours, example.clip, strict=True):
            counts = np.bincount(channel.ravel(), minlength=256)
            histograms[name] = histograms.get(name, np.zeros(256, dtype=np.int64)) + counts
    return {
        name: float(max(np.searchsorted(counts.cumsum(), 0.998 * counts.sum()), 1))
        for name, counts in histograms.items()
    }


def _clip(example: Example, brightest: Mapping[str, float]) -> _Clip:
    frames = _composite(example, brightest)
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((CLIP_SIDE, CLIP_SIDE))
    channels = ", ".join(example.channel_colours)
    return _Clip(
        title=example.title,
        caption=example.caption,
        alt=f"{example.title}: a cell in {len(images)} frames, channels {channels}. {example.caption}",
        moving=_webp(images),
        still=_webp(images[len(images) // 2 : len(images) // 2 + 1]),
        width=images[0].width,
        height=images[0].height,
    )


def _composite(example: Example, brightest: Mapping[str, float]) -> NDArray[np.uint8]:
    """(T, H, W, 3) uint8: each channel in its colour, added up."""
    mixed = np.zeros((*example.clip.shape[1:], 3), dtype=np.float32)
    for channel, (name, colour) in zip(example.clip, example.channel_colours.items(), strict=True):
        intensity = np.minimum(channel / np.float32(brightest[name]), 1.0)
        mixed += intensity[..., None] * np.asarray(to_rgb(colour), dtype=np.float32)
    return (255 * np.minimum(mixed, 1.0)).round().astype(np.uint8)


def _channel_legend(examples: Sequence[Example]) -> dict[str, str]:
    return {name: c for example in examples for name, c in example.channel_colours.items()}


def _webp(frames: Sequence[Image.Image]) -> str:
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=FRAME_MS,
        loop=0,
        quality=80,
    )
    return _data_uri("image/webp", buffer.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _csp_hash(script: str) -> str:
    """A script as a content security policy names it, so that no other script runs in the page."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
