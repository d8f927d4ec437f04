"""The report page: complete, self-contained, escaped, and whole when parts are missing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from reported import HOSTILE, evaluation, example, screen
from skimage.color import deltaE_ciede2000, rgb2lab

from screening.report import (
    Example,
    Live,
    ReportData,
    embedding_map,
    heatmaps,
    layout,
    moa_similarity,
    render,
    typical_cells,
)
from screening.report import clips as film
from screening.report import groups as styles
from screening.report.points import point_map
from screening.splits import TESTS

SECTIONS = (
    "summary",
    "notes",
    "plates",
    "quality",
    "training",
    "map",
    "tests",
    "confusion",
    "similarity",
    "activity",
    "predictions",
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
        self.scripts: dict[str | None, str] = {}
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
        if self.open and self.open[-1] == "script":
            name = self.elements[-1][1].get("id")
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def data(self, name: str) -> Any:
        """What a block of JSON holds."""
        return json.loads(self.scripts[name])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def wide(n_mechanisms: int) -> ReportData:
    """A screen of as many mechanisms, one well each, on one 384-well plate."""
    moas = [f"mechanism {i}" for i in range(n_mechanisms)]
    wells = [f"{'ABCDEFGHIJKLMNOP'[i // 24]}{i % 24 + 1}" for i in range(n_mechanisms)]
    frame = pd.DataFrame({"plate": "p", "well": wells, "compound": moas, "moa": moas})
    return ReportData("wide", plate_maps=frame.assign(role="treatment", n_cells=5))


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of a screen in which every part is there; drawing it costs the most."""
    return render(screen())


# --- The page ------------------------------------------------------------------------------------


def test_every_section_is_there_and_labelled(whole: str) -> None:
    page = Page(whole)
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


def test_imported_profiles_are_not_said_to_be_untested() -> None:
    words = Page(render(ReportData("x", imported=True))).words
    assert "made elsewhere" in words
    assert "could not be held" not in words


def test_the_empty_screen_says_what_is_missing() -> None:
    page = Page(render(ReportData("Nothing yet")))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    assert not page.all("table")
    assert not page.all("canvas")
    for sentence in (
        "This test could not be held; it needs enough compounds",
        "no plate can be drawn",
        "No image quality was measured",
        "No training was logged",
        "nothing to map",
        "no neighbours can be listed",
        "No activity was computed",
        "No mechanism was predicted",
        "no profiles of compounds of known mechanism",
        "No cell was kept",
    ):
        assert sentence in page.words


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(ReportData) if f.name != "title"])
def test_any_part_can_be_missing(part: str) -> None:
    empty = {"mapped": "well"}.get(part, getattr(ReportData(""), part))
    page = Page(render(dataclasses.replace(screen(), **{part: empty})))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)


def test_nothing_is_loaded_from_outside(whole: str) -> None:
    text = whole
    for tag, attributes in Page(text).elements:
        for name in ("src", "srcset", "href", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith("#" if tag in ("a", "use") else ("data:image/", "#"))
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of a language, which nothing is loaded from"


@pytest.mark.parametrize("live", [False, True])
def test_only_the_pages_own_script_may_run(live: bool) -> None:
    text = render(screen(HOSTILE), live=Live(1000, ("compound", "well"), (HOSTILE,)) if live else None)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(text).all("meta")[1]["content"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert ("connect-src" in policy) == live


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
        activity=pd.DataFrame({HOSTILE: [HOSTILE]}),
        predictions=pd.DataFrame({HOSTILE: [HOSTILE]}),
        similarity=pd.DataFrame([[1.0]], index=[HOSTILE], columns=[HOSTILE]),
        plate_measures={"n_cells": HOSTILE},
        examples=[example(HOSTILE, (HOSTILE,))],
    )
    page = Page(render(data))
    kinds = [script.get("type") for script in page.all("script")]
    assert kinds == ["application/json", "application/json", "application/json", None, "text/plain"]
    assert HOSTILE in page.data("plates-data")["measures"][0]["label"]
    assert HOSTILE in page.data("map-data")["wells"][0]
    assert {HOSTILE} <= {compound["name"] for compound in page.data("gallery-data")["compounds"]}
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert page.words.count('<script>alert("x")</script>') > 10


def test_data_in_the_page_cannot_end_the_element_they_stand_in() -> None:
    name = "</script>\u2028\u2029<!-- ]]> javascript:alert(1)"
    text = render(screen(name))
    data = re.findall(r"<script type=\"application/json\"[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    assert len(data) == 3
    assert not set("<>&\u2028\u2029") & set("".join(data))
    assert name in {compound["name"] for compound in Page(text).data("gallery-data")["compounds"]}
    assert not re.search(r"""(?:href|src|action|style)=["']?[^"'>]*javascript:""", text)


def test_tables_have_captions_and_scopes_and_figures_have_texts(whole: str) -> None:
    page = Page(whole)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in head for head in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    drawings = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert drawings
    assert all(drawing.get("aria-label") for drawing in drawings)


# --- Its parts -----------------------------------------------------------------------------------


def test_the_headline_is_a_sentence_with_interval_and_chance(whole: str) -> None:
    words = Page(whole).words
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


def test_numbers_are_read_rounded_and_downloaded_in_full(whole: str) -> None:
    text = whole
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
    assert heatmaps.plate_shape(heatmaps.well_positions(wells)) == shape


def test_well_positions() -> None:
    assert heatmaps.well_positions(["A01", "B7", "AA1"]) == [(0, 0), (1, 6), (26, 0)]
    assert [heatmaps.row_name(i) for i in (0, 25, 26, 51, 52, 701)] == [*("A", "Z", "AA", "AZ", "BA", "ZZ")]
    named_and_not = heatmaps.well_positions(["A1", "left", "right"])
    assert named_and_not == [(0, 0), (2, 0), (2, 1)]
    assert len(set(heatmaps.well_positions([f"position {i}" for i in range(30)]))) == 30


def test_ragged_plates_and_unmeasured_wells_are_drawn() -> None:
    data = screen()
    wells = data.plate_maps.drop(index=[1, 4]).reset_index(drop=True)
    wells.loc[0, "n_cells"] = None
    text = render(dataclasses.replace(data, plate_maps=wells))
    page = Page(text)
    drawn = [cell for cell in page.all("td") if "title" in cell]
    assert len(drawn) == 2 * len(wells)
    assert [cell.get("class") for cell in drawn].count("unmeasured") == 1
    assert len([cell for cell in page.all("td") if cell.get("class") == "none"]) == 2 * 2
    titles = {cell["title"] for cell in drawn}
    assert "A01: DMSO, negative control, not measured" in titles
    assert "B03: drug A, 0.5 uM, fusion, 12 cells" in titles


def test_plates_can_be_coloured_by_every_measure_on_one_scale() -> None:
    data = screen()
    wells = data.plate_maps.assign(bad_frames=np.linspace(0.25, 0.75, 12), activity=[None, *range(-5, 6)])
    measures = {"n_cells": "cells", "bad_frames": "bad frames", "activity": "activity", "absent": "nothing"}
    page = Page(render(dataclasses.replace(data, plate_maps=wells, plate_measures=measures)))
    cells, bad, activity = page.data("plates-data")["measures"]
    assert (cells["label"], cells["low"], cells["high"]) == ("cells", "0", "12")
    assert (bad["low"], bad["high"], bad["shades"][0], bad["shades"][-1]) == ("0.25", "0.75", 0, 63)
    assert bad["texts"][0] == ".25"
    assert (activity["shades"][:2], activity["texts"][:2]) == ([None, 0], ["", "-5"])
    assert [option["value"] for option in page.all("option")][3:6] == ["0", "1", "2"]


def test_mechanisms_are_told_apart_by_colour_marker_and_number() -> None:
    groups = styles.groups([f"m{i}" for i in range(84)] + [styles.CONTROL, styles.UNKNOWN])
    known = [group for label, group in groups.items() if label.startswith("m")]
    assert list(groups)[:3] == ["m0", "m1", "m2"]
    assert len({(g.colour, g.marker) for g in known if g.colour != styles.NEUTRAL}) == 84
    assert len({group.code for group in groups.values()}) == 86
    assert len({group.colour for group in known[:12]}) == 12


def test_more_mechanisms_than_styles_share_one_that_says_so() -> None:
    words = Page(render(wide(100))).words
    assert styles.OTHER in words
    assert "mechanism 83" in words


# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("vision", BLINDNESS)
def test_colours_differ_to_every_vision(vision: str) -> None:
    shown = np.array([to_rgb(colour) for colour in (*styles.PALETTE, styles.NEUTRAL)])
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.asarray(BLINDNESS[vision]).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    difference = deltaE_ciede2000(lab[:, None], lab[None])
    assert difference[~np.eye(len(lab), dtype=bool)].min() > 12
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() >= 2
    dark = 0.0137  # of the dark page's cards
    assert ((luminance + 0.05) / (dark + 0.05)).min() >= 2


@pytest.mark.parametrize("colour", [*styles.PALETTE, styles.NEUTRAL, *heatmaps.SCALE[::9]])
def test_text_on_wells_is_readable(colour: str) -> None:
    def luminance(hexadecimal: str) -> float:
        channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pair = sorted((luminance(colour), luminance(styles.ink_on(colour))))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


# --- Clips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [("one",), ("a", "b"), ("a", "b", "c"), tuple("abcde")])
def test_clips_are_film_strips_that_stand_in_the_page(channels: tuple[str, ...]) -> None:
    data = ReportData("x", examples=[example(channels=channels)])
    page = Page(render(data))
    (clip,) = page.data("gallery-data")["clips"]
    assert (clip["frames"], clip["width"], clip["height"]) == (4, 16, 16)
    strip = Image.open(io.BytesIO(base64.b64decode(page.scripts["clip-0"])))
    assert (strip.format, strip.size) == ("WEBP", (64, 16))
    assert set(channels) <= set(page.words.split())


def test_frames_of_a_strip_are_in_order_and_reduced() -> None:
    levels = np.linspace(0, 255, 60, dtype=np.uint8)
    clip = np.broadcast_to(levels[None, :, None, None], (1, 60, 200, 100))
    strip = film.film_strip(Example("x", "", clip, {"a": "#ffffff"}), {"a": 255.0})
    assert (strip.frames, strip.width, strip.height) == (film.CLIP_FRAMES, 48, film.CLIP_SIDE)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip.strip))).convert("L"), dtype=int)
    of_frame = pixels.reshape(strip.height, strip.frames, strip.width).mean(axis=(0, 2))
    assert (np.diff(of_frame) > 0).all()
    assert (of_frame[0] < 3, of_frame[-1] > 252) == (True, True)


def test_channels_are_added_in_their_colours() -> None:
    clip = np.zeros((2, 1, 2, 2), dtype=np.uint8)
    clip[0, 0, 0, 0] = 50
    clip[1, 0, 0] = 100
    shown = Example("", "", clip, {"a": "#ff0000", "b": "#0000ff"})
    frames = film.composite(shown, {"a": 100.0, "b": 100.0})
    expected = [[[128, 0, 255], [0, 0, 255]], [[0, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(frames[0], expected)


def test_brightness_is_shared_so_clips_compare() -> None:
    dim, bright = (
        Example("", "", np.full((1, 1, 8, 8), level, dtype=np.uint8), {"a": "#ffffff"}) for level in (20, 200)
    )
    brightest = film.brightness([dim, bright])
    assert brightest == {"a": 200.0}
    assert film.composite(dim, brightest).max() == round(255 * 20 / 200)
    black = Example("", "", np.zeros((1, 1, 8, 8), dtype=np.uint8), {"a": "#ffffff"})
    assert film.composite(black, film.brightness([black])).max() == 0


def test_the_budget_of_clips_is_shared_evenly_and_what_is_left_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [example(compound) for compound in "abcde" for _ in range(8)]
    size = len(film.film_strips(examples[:1])[0][0].strip)
    monkeypatch.setattr(film, "CLIP_BUDGET", 12 * size)
    page = Page(render(ReportData("x", examples=examples)))
    shown = [len(compound["clips"]) for compound in page.data("gallery-data")["compounds"]]
    assert shown == [3, 3, 2, 2, 2]
    assert "28 more clips are left out" in page.words


# --- The gallery ---------------------------------------------------------------------------------


def test_typical_cells_are_the_medoid_and_those_nearest_to_it() -> None:
    embeddings = np.random.default_rng(0).normal(size=(40, 6)) + 1
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = np.array([[1 - float(np.dot(a, b)) for b in unit] for a in unit])
    medoid = int(distance.sum(axis=1).argmin())
    assert typical_cells(embeddings, 5).tolist() == np.argsort(distance[medoid])[:5].tolist()
    assert typical_cells(embeddings, 1).tolist() == [medoid]
    assert typical_cells(embeddings[:2], 5).size == 2
    assert typical_cells(embeddings[:0], 5).size == 0


def test_the_gallery_shows_neighbours_in_order_and_controls_last(whole: str) -> None:
    compounds = Page(whole).data("gallery-data")["compounds"]
    assert [compound["name"] for compound in compounds] == ["drug A", "drug B", "drug C", "DMSO"]
    drug, _, _, dmso = compounds
    assert drug["near"] == [[1, 0.912], [2, -0.2]]
    assert (drug["moa"], drug["clips"]) == ("fission", [0, 2])
    assert (dmso["moa"], dmso["control"], dmso["clips"]) == ("negative control", True, [1])


# --- Mechanisms and the map ----------------------------------------------------------------------


def test_similarity_of_mechanisms_is_the_mean_over_pairs_of_compounds() -> None:
    profiles = np.random.default_rng(0).normal(size=(9, 5))
    moa = pd.Series(["b", "a", "b", None, "a", "c", "b", "a", None])
    found = moa_similarity(profiles, moa)
    assert list(found.index) == list(found.columns) == ["a", "b", "c"]
    for one in "abc":
        for other in "abc":
            pairs = [
                np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q)
                for i, p in enumerate(profiles)
                for j, q in enumerate(profiles)
                if i != j and moa[i] == one and moa[j] == other
            ]
            expected = np.mean(pairs) if pairs else np.nan
            np.testing.assert_allclose(found.loc[one, other], expected, atol=1e-12)
    assert moa_similarity(profiles, pd.Series([None] * 9)).empty


def test_the_map_holds_every_point_where_it_lies() -> None:
    cells = screen().embedding_map.assign(replicate="1").reset_index(drop=True)
    labels = styles.groups(styles.mechanisms(cells, {"DMSO"}))
    found = point_map(cells, labels, {"DMSO"})
    assert found is not None
    x, y = (np.frombuffer(base64.b64decode(found.points[axis]), "<u2") / 65535 for axis in "xy")
    of = np.frombuffer(base64.b64decode(found.points["well"]), "<u4")
    assert {(x.min(), x.max()), (y.min(), y.max())} >= {(0.0, 1.0)}
    rows = sorted((round(a, 4), round(1 - b, 4), *found.wells[w][:3]) for a, b, w in zip(x, y, of, strict=True))
    low, width = cells[["x", "y"]].min(), float((cells[["x", "y"]].max() - cells[["x", "y"]].min()).max())
    shift = (width - (cells[["x", "y"]].max() - low)) / 2
    scaled = (cells[["x", "y"]] - low + shift) / width
    names = cells[["plate", "well", "compound"]].itertuples(index=False, name=None)
    wanted = sorted((a, b, *name) for (a, b), name in zip(scaled.to_numpy(), names, strict=True))
    assert [row[2:] for row in rows] == [row[2:] for row in wanted]
    np.testing.assert_allclose([row[:2] for row in rows], [row[:2] for row in wanted], atol=2e-4)
    # One replicate tells nothing that the plates do not.
    assert [colouring.name for colouring in found.colourings] == ["mechanism", "plate"]


def test_the_map_says_in_words_how_often_neighbours_share_a_label() -> None:
    rng = np.random.default_rng(0)
    apart = np.repeat([[0.0, 0.0], [100.0, 0.0]], 40, axis=0) + rng.normal(size=(80, 2))
    cells = pd.DataFrame(
        {
            "x": apart[:, 0],
            "y": apart[:, 1],
            "compound": ["a"] * 40 + ["b"] * 40,
            "moa": ["m"] * 40 + ["n"] * 40,
            "plate": "p",
            "well": ["A1"] * 40 + ["A2"] * 40,
        }
    )
    found = point_map(cells, styles.groups(["m", "n"]), set())
    assert found is not None
    assert found.colourings[0].words.startswith("Of the 15 points nearest to a point, 100% share its mechanism;")
    assert "50% would" in found.colourings[0].words
    assert found.colourings[1].words == "All points are of one plate."


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
    monkeypatch.setattr(layout, "MAX_FITTED", fitted)
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
