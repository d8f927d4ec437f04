"""The report page: complete, self-contained, escaped, and whole when parts are missing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from screening import report
from screening.report import Example, ReportData, channel_colours, embedding_map, render
from screening.splits import TESTS

HOSTILE = '<script>alert("x")</script>&\'"<img src=http://evil.example/x>$\\frac{'
SECTIONS = (
    "summary",
    "notes",
    "plates",
    "quality",
    "training",
    "map",
    "tests",
    "confusion",
    "retrieval",
    "examples",
    "counts",
    "provenance",
)
VOID = {"meta", "img", "source", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page in order; fails on tags that are closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} repeats an attribute"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def evaluation() -> dict[str, Any]:
    def metric(value: float, chance: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.125, "high": value + 0.125, "chance": chance}

    return {
        "rank1": metric(0.625, 0.125),
        "rank5": metric(0.75, 0.25),
        "map": metric(0.5, 0.125),
        "accuracy": metric(0.5, 0.125),
        "n_queries": 1234,
        "n_compounds": 4,
        "n_gallery": 900,
        "n_left_out": {"queries_without_moa": 3},
        "cmc": [0.625, 0.75, 0.8],
        "cmc_chance": [0.125, 0.2, 0.3],
        "confusion": {
            "moas": ["fission", "fusion", "unasked"],
            "compounds": [[1, 1, 0], [0, 2, 0], [0, 0, 0]],
            "neighbours": [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], None],
        },
        "note": None,
        "contrasts": {"fission vs fusion": {"rank1": metric(0.75, 0.5)}},
    }


def screen(compound: str = "drug A", n_rows: int = 2, n_columns: int = 3) -> ReportData:
    """A small screen in which every part is there."""
    rng = np.random.default_rng(0)
    wells = pd.DataFrame(
        [
            {
                "plate": plate,
                "well": f"{'ABCDEFGHIJKLMNOP'[row]}{column + 1:02d}",
                "role": "negative_control" if column == 0 else "treatment",
                "compound": "DMSO" if column == 0 else compound,
                "concentration": None if column == 0 else 0.5,
                "unit": "uM",
                "moa": None if column == 0 else ("fission", "fusion")[row % 2],
                "n_cells": float(10 * row + column),
            }
            for plate in ("p1", "p2")
            for row in range(n_rows)
            for column in range(n_columns)
        ]
    )
    cells = wells[["compound", "moa", "plate", "well"]].sample(50, replace=True, random_state=0)
    return ReportData(
        title="A small screen",
        provenance={"version": "1.0", "config": {"seed": 1}},
        counts=pd.DataFrame({"stage": ["segment"], "in": [1200], "out": [1000], "reasons": [{"border": 200}]}),
        plate_maps=wells,
        quality=pd.DataFrame({"plate": ["p1", "p2"], "sites": [4, 4], "frames": [32, 32], "bad": [0.0, 0.125]}),
        quality_limits=pd.DataFrame({"plate": ["p1"], "channel": ["nucleus"], "soft_below": [0.0123]}),
        bad_sites=pd.DataFrame({"site": ["p2/A01/0"], "outcome": ["failed"], "reason": ["unreadable"], "what": ["x"]}),
        training=pd.DataFrame(
            {"phase": ["train"] * 3, "epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "lr": [0.1, 0.1, 0]}
        ),
        embedding_map=cells.assign(x=rng.normal(size=50), y=rng.normal(size=50)),
        evaluation={"compound": evaluation(), "replicate": evaluation()},
        retrieval=pd.DataFrame(
            {
                "compound": [compound, compound],
                "moa": ["fission", "fission"],
                "rank": [1, 2],
                "neighbour": ["drug B", "drug C"],
                "neighbour_moa": ["fission", None],
                "similarity": [0.91234567, -0.2],
            }
        ),
        examples=[example(compound)],
        notes=["Only two compounds were screened."],
    )


def example(title: str = "a cell", channels: tuple[str, ...] = ("nucleus", "mito")) -> Example:
    clip = np.random.default_rng(1).integers(0, 255, (len(channels), 4, 16, 16), dtype=np.uint8)
    return Example(title, "in well A02", clip, channel_colours(channels))


def wide(n_mechanisms: int) -> ReportData:
    """A screen of as many mechanisms, one well each, on one 384-well plate."""
    moas = [f"mechanism {i}" for i in range(n_mechanisms)]
    wells = [f"{'ABCDEFGHIJKLMNOP'[i // 24]}{i % 24 + 1}" for i in range(n_mechanisms)]
    frame = pd.DataFrame({"plate": "p", "well": wells, "compound": moas, "moa": moas})
    return ReportData("wide", plate_maps=frame.assign(role="treatment", n_cells=5))


# --- The page ------------------------------------------------------------------------------------


def test_every_section_is_there_and_labelled() -> None:
    page = Page(render(screen()))
    sections = page.all("section")
    assert [section["id"] for section in sections] == list(SECTIONS)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in sections} <= set(ids)
    links = [link["href"] for link in page.all("a")]
    assert {f"#{name}" for name in SECTIONS} <= set(links)
    assert all(link is not None and link[1:] in ids for link in links)
    assert "class" not in sections[0]
    assert "missing" not in [attributes.get("class") for attributes in page.all("p")]


def test_each_phase_of_the_training_has_curves_of_its_own() -> None:
    training = pd.DataFrame({"phase": ["pretrain"] * 2 + ["train"] * 2, "epoch": [1, 2, 1, 2], "loss": [4.0, 3, 2, 1]})
    page = Page(render(dataclasses.replace(screen(), training=training)))
    described = [figure["aria-label"] for figure in page.all("div") if "loss" in (figure.get("aria-label") or "")]
    assert described == [
        "loss (pretrain) by epoch: 4 at epoch 1, 3 at epoch 2; lowest 3, highest 4.",
        "loss (train) by epoch: 2 at epoch 1, 1 at epoch 2; lowest 1, highest 2.",
    ]


def test_the_empty_screen_says_what_is_missing() -> None:
    page = Page(render(ReportData("Nothing yet")))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    assert not page.all("table")
    for sentence in (
        "This test could not be held; it needs enough compounds",
        "no plate can be drawn",
        "No image quality was measured",
        "No training was logged",
        "nothing to map",
        "no neighbours can be listed",
        "No cell was kept",
    ):
        assert sentence in page.words


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(ReportData) if f.name != "title"])
def test_any_part_can_be_missing(part: str) -> None:
    empty = getattr(ReportData(""), part)
    page = Page(render(dataclasses.replace(screen(), **{part: empty})))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)


def test_nothing_is_loaded_from_outside() -> None:
    text = render(screen())
    for tag, attributes in Page(text).elements:
        for name in ("src", "srcset", "href", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith("#" if tag in ("a", "use") else ("data:image/", "#"))
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_only_the_pages_own_script_may_run() -> None:
    text = render(screen(HOSTILE))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(text).all("meta")[1]["content"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_is_escaped_everywhere() -> None:
    data = screen(HOSTILE)
    data = dataclasses.replace(
        data,
        title=HOSTILE,
        provenance={HOSTILE: {HOSTILE: HOSTILE}},
        counts=pd.DataFrame({HOSTILE: [HOSTILE], "reasons": [{HOSTILE: 1}]}),
        bad_sites=pd.DataFrame({"site": [HOSTILE], "what": [HOSTILE]}),
        plate_maps=data.plate_maps.assign(plate=HOSTILE, unit=HOSTILE, moa=HOSTILE),
        training=data.training.rename(columns={"loss": HOSTILE}),
        embedding_map=data.embedding_map.assign(plate=HOSTILE, moa=HOSTILE),
        evaluation={"compound": evaluation() | {"note": HOSTILE, "contrasts": {HOSTILE: {}}}},
        notes=[HOSTILE],
        examples=[example(HOSTILE, (HOSTILE,))],
    )
    page = Page(render(data))
    assert len(page.all("script")) == 1
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert page.words.count('<script>alert("x")</script>') > 10


def test_tables_have_captions_and_scopes_and_figures_have_texts() -> None:
    page = Page(render(screen()))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in head for head in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    drawings = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert drawings
    assert all(drawing.get("aria-label") for drawing in drawings)


# --- Its parts -----------------------------------------------------------------------------------


def test_the_headline_is_a_sentence_with_interval_and_chance() -> None:
    words = Page(render(screen())).words
    assert "For 62% of the cells (95% interval 50% to 75%)" in words
    assert "guessing would give 12%" in words
    assert "5.0 times chance, and the interval lies above chance" in words
    assert "Measured on 1,234 query cells, 4 compounds, 900 reference cells." in words


def test_a_result_at_chance_is_not_sold_as_one() -> None:
    at_chance = {"rank1": {"value": 0.1, "low": 0.05, "high": 0.2, "chance": 0.1}}
    words = Page(render(ReportData("x", evaluation={"compound": at_chance}))).words
    assert "The interval includes chance: this test shows no effect." in words
    assert "lies above chance" not in words


def test_every_kind_of_test_is_shown_and_no_other() -> None:
    measured = {"value": 0.75, "low": 0.5, "high": 0.9, "chance": 0.5}
    for name in TESTS.values():
        words = Page(render(ReportData("x", evaluation={name: {"auc": measured}}))).words
        assert "AUC" in words
        assert ("Cells never trained on" in words) == (name == "cell")
        assert ("Compounds never trained on" in words) == (name == "compound")


def test_an_empty_test_says_why() -> None:
    nothing = {"value": None, "low": None, "high": None, "chance": None}
    empty = {
        "rank1": nothing,
        "map": nothing,
        "cmc": [None, None],
        "cmc_chance": [None, None],
        "confusion": {"moas": [], "compounds": [], "neighbours": []},
        "note": "no query cell has an MOA",
        "contrasts": {},
    }
    words = Page(render(ReportData("x", evaluation={"replicate": empty}))).words
    assert "This test could not be held: no query cell has an MOA." in words
    assert "nan" not in words.lower().split()


def test_numbers_are_read_rounded_and_downloaded_in_full() -> None:
    text = render(screen())
    assert '<td class="n" data-v="0.912346">0.912</td>' in text
    assert '<td class="n" data-v="1200">1,200</td>' in text
    assert "200 border" in text
    assert '<th scope="col" data-name="same_moa">same moa</th>' in text
    row = text[text.index(">drug B<") :]
    assert ">yes<" in row[: row.index("</tr>")]
    row = text[text.index(">drug C<") :]
    assert 'data-v="">' in row[: row.index("</tr>")]


@pytest.mark.parametrize(
    ("wells", "shape"),
    [
        (["A1", "A2", "B1"], (2, 3)),
        (["H12"], (8, 12)),
        (["A01", "P24"], (16, 24)),
        (["AF48"], (32, 48)),
        (["A1", "ZZ99"], (702, 99)),
    ],
)
def test_a_plate_is_the_smallest_that_holds_its_wells(wells: list[str], shape: tuple[int, int]) -> None:
    assert report._plate_shape(report._well_positions(wells)) == shape


def test_well_positions() -> None:
    assert report._well_positions(["A01", "B7", "AA1"]) == [(0, 0), (1, 6), (26, 0)]
    assert [report._row_name(i) for i in (0, 25, 26, 51, 52, 701)] == [*("A", "Z", "AA", "AZ", "BA", "ZZ")]
    named_and_not = report._well_positions(["A1", "left", "right"])
    assert named_and_not == [(0, 0), (2, 0), (2, 1)]
    assert len(set(report._well_positions([f"position {i}" for i in range(30)]))) == 30


def test_ragged_plates_and_unmeasured_wells_are_drawn() -> None:
    data = screen()
    wells = data.plate_maps.drop(index=[1, 4]).reset_index(drop=True)
    wells.loc[0, "n_cells"] = None
    text = render(dataclasses.replace(data, plate_maps=wells))
    titles = re.findall(r"<title>([^<]*)</title><!--|<g><title>([^<]*)</title>", text)
    assert len(titles) == 2 * len(wells)
    assert text.count('class="unmeasured"') == 1
    assert "A01: DMSO, negative control, not measured" in text
    assert "B03: drug A, 0.5 uM, fusion, 12 cells" in text


def test_mechanisms_are_told_apart_by_colour_marker_and_number() -> None:
    groups = report._groups([f"m{i}" for i in range(42)] + [report.CONTROL, report.UNKNOWN])
    known = [group for label, group in groups.items() if label.startswith("m")]
    assert list(groups)[:3] == ["m0", "m1", "m2"]
    assert len({(g.colour, g.marker) for g in known if g.colour != report.NEUTRAL}) == 42
    assert len({group.code for group in groups.values()}) == 44


def test_more_mechanisms_than_styles_share_one_that_says_so() -> None:
    words = Page(render(wide(60))).words
    assert report.OTHER in words
    assert "mechanism 41" in words


@pytest.mark.parametrize("colour", [*report.PALETTE, report.NEUTRAL])
def test_text_on_wells_is_readable(colour: str) -> None:
    def luminance(hexadecimal: str) -> float:
        channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pair = sorted((luminance(colour), luminance(report._ink_on(colour))))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


# --- Clips ---------------------------------------------------------------------------------------


def decode(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize("channels", [("one",), ("a", "b"), ("a", "b", "c"), tuple("abcde")])
def test_clips_move_and_have_a_still_for_those_who_want_none(channels: tuple[str, ...]) -> None:
    data = ReportData("x", examples=[example(channels=channels)])
    page = Page(render(data))
    (moving,), (still,) = page.all("img"), page.all("source")
    assert decode(moving["src"]).n_frames == 4  # type: ignore[attr-defined]
    assert getattr(decode(still["srcset"]), "n_frames", 1) == 1
    assert still["media"] == "(prefers-reduced-motion: reduce), print"
    assert set(channels) <= set(page.words.split())


def test_channels_are_added_in_their_colours() -> None:
    clip = np.zeros((2, 1, 2, 2), dtype=np.uint8)
    clip[0, 0, 0, 0] = 50
    clip[1, 0, 0] = 100
    shown = Example("", "", clip, {"a": "#ff0000", "b": "#0000ff"})
    frames = report._composite(shown, {"a": 100.0, "b": 100.0})
    expected = [[[128, 0, 255], [0, 0, 255]], [[0, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(frames[0], expected)


def test_brightness_is_shared_so_clips_compare() -> None:
    dim, bright = (
        Example("", "", np.full((1, 1, 8, 8), level, dtype=np.uint8), {"a": "#ffffff"}) for level in (20, 200)
    )
    brightest = report._brightest([dim, bright])
    assert brightest == {"a": 200.0}
    assert report._composite(dim, brightest).max() == round(255 * 20 / 200)
    black = Example("", "", np.zeros((1, 1, 8, 8), dtype=np.uint8), {"a": "#ffffff"})
    assert report._composite(black, report._brightest([black])).max() == 0


def test_clips_beyond_the_budget_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "CLIP_BUDGET", 10_000)
    page = Page(render(ReportData("x", examples=[example() for _ in range(40)])))
    shown = len(page.all("img"))
    assert 0 < shown < 40
    assert f"{40 - shown} more clips are left out" in page.words


def test_a_384_well_screen_stays_an_attachment() -> None:
    data = screen(n_rows=16, n_columns=24)
    assert len(render(data)) < 5_000_000
    assert report.CLIP_BUDGET < 20_000_000


# --- The embedding map ---------------------------------------------------------------------------


def clusters(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, n)
    return 10 * np.eye(3, 8)[label] + rng.normal(size=(n, 8)), label


def test_the_map_is_the_same_again() -> None:
    embeddings, _ = clusters(60)
    first = embedding_map(embeddings, np.random.default_rng(0))
    again = embedding_map(embeddings, np.random.default_rng(0))
    assert first.shape == (60, 2)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("fitted", [2000, 60])
def test_neighbours_stay_neighbours(fitted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_FITTED", fitted)
    embeddings, label = clusters(150)
    placed = embedding_map(embeddings, np.random.default_rng(0))
    distance = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert np.mean(label[distance.argmin(axis=1)] == label) > 0.95


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (2, 8), (3, 8), (5, 1)])
def test_small_maps(shape: tuple[int, int]) -> None:
    embeddings = np.random.default_rng(0).normal(size=shape)
    placed = embedding_map(embeddings, np.random.default_rng(0))
    assert placed.shape == (shape[0], 2)
    assert np.isfinite(placed).all()


def test_a_map_of_equal_cells_is_one_point() -> None:
    placed = embedding_map(np.ones((10, 4)), np.random.default_rng(0))
    np.testing.assert_allclose(placed, np.broadcast_to(placed[0], placed.shape), atol=1e-3)


def test_embeddings_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        embedding_map(np.full((5, 4), np.nan), np.random.default_rng(0))
