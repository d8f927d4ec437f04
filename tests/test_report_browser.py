"""The report in a browser: nothing goes wrong, everything works by keyboard, and nobody is shut out."""

from __future__ import annotations

import csv
import dataclasses
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from browser import chromium, faults, watch  # noqa: F401 (a fixture)
from playwright.sync_api import Browser, Page, expect
from reported import HOSTILE, screen

from screening.report import ReportData, render

# What can be reached by the Tab key must show that it was.
UNSEEN_FOCUS = """() => {
  const style = getComputedStyle(document.activeElement);
  return style.outlineStyle === "none" || style.outlineWidth === "0px";
}"""


def written(data: ReportData, folder: Path) -> str:
    page = folder / "report.html"
    page.write_text(render(data), encoding="utf-8")
    return page.as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(screen(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:  # noqa: F811
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(10_000)
    wrong = watch(tab)
    tab.goto(address)
    yield tab
    assert wrong == []
    context.close()


def chosen_rows(page: Page, table: str) -> list[list[str]]:
    rows = page.locator(f"[data-table={table}] tbody tr:not([hidden])")
    return [row.locator("td").all_inner_texts() for row in rows.all()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_goes_wrong_and_nobody_is_shut_out(chromium: Browser, address: str, scheme: str) -> None:  # noqa: F811
    context = chromium.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    tab = context.new_page()
    wrong = watch(tab)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    expect(tab.locator(".shelf").first).to_be_visible()
    for fold in tab.locator("summary").all():
        if not fold.evaluate("element => element.parentElement.open"):
            fold.click()
    assert faults(tab) == []
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_the_empty_screen_is_whole_too(chromium: Browser, tmp_path: Path) -> None:  # noqa: F811
    tab = chromium.new_page()
    wrong = watch(tab)
    tab.goto(written(ReportData("Nothing yet"), tmp_path))
    assert faults(tab) == []
    assert wrong == []
    tab.close()


def test_hostile_names_do_nothing(chromium: Browser, tmp_path: Path) -> None:  # noqa: F811
    data = screen(HOSTILE)
    wells = data.plate_maps.assign(plate=HOSTILE, moa=HOSTILE)
    tab = chromium.new_page()
    wrong = watch(tab)
    tab.goto(written(dataclasses.replace(data, title=HOSTILE, plate_maps=wells, notes=[HOSTILE]), tmp_path))
    expect(tab.locator(".shelf h3").first).to_have_text(HOSTILE)
    tab.locator("#map-canvas").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#map-tip")).to_contain_text("alert")
    assert tab.locator("img[src^=http]").count() == 0
    assert wrong == []
    tab.close()


def test_every_stop_of_the_tab_key_shows_where_it_is_and_none_is_a_trap(page: Page) -> None:
    wanted = page.locator("a, button, input, select, canvas, summary, [tabindex='0']").evaluate_all(
        "all => all.filter(one => one.checkVisibility() && one.tabIndex >= 0).map((one, i) => (one.dataset.stop = i))"
    )
    reached = set()
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        stop = page.evaluate("document.activeElement.dataset.stop ?? null")
        if stop is None:
            continue
        reached.add(int(stop))
        assert not page.evaluate(UNSEEN_FOCUS), page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    assert reached == set(wanted)


def test_the_theme_is_chosen_and_kept(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.locator("#theme").focus()
    page.locator("#theme").select_option("dark")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
    page.locator("#theme").select_option("light")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == light


def test_tables_filter_sort_and_download_by_keyboard(page: Page) -> None:
    block = page.locator("[data-table=neighbours]")
    block.locator("input").focus()
    page.keyboard.type("DRUG c")
    assert [row[3] for row in chosen_rows(page, "neighbours")] == ["drug C"]
    expect(block.locator("output")).to_have_text("1 of 2 rows")
    with page.expect_download() as download:
        block.locator(".controls button").press("Enter")
    assert download.value.suggested_filename == "neighbours.csv"
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert rows[0] == ["compound", "moa", "rank", "neighbour", "neighbour_moa", "similarity", "same_moa"]
    assert rows[1:] == [["drug A", "fission", "2", "drug C", "", "-0.2", ""]]
    block.locator("input").fill("")
    head = block.locator("th", has_text="similarity")
    for order, first in (("ascending", "-0.2"), ("descending", "0.912")):
        head.locator("button").press("Enter")
        expect(head).to_have_attribute("aria-sort", order)
        assert chosen_rows(page, "neighbours")[0][5] == first
    assert block.locator("[aria-sort]").count() == 1


def test_no_name_is_a_formula_in_what_is_downloaded(chromium: Browser, tmp_path: Path) -> None:  # noqa: F811
    tab = chromium.new_page()
    tab.goto(written(screen("=cmd|' /C calc'!A0"), tmp_path))
    with tab.expect_download() as download:
        tab.locator("[data-table=wells] .controls button").dispatch_event("click")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert {row["compound"] for row in rows} == {"DMSO", "'=cmd|' /C calc'!A0"}
    tab.close()


def test_rows_without_a_value_come_last_in_any_order(page: Page) -> None:
    head = page.locator("[data-table=neighbours] th", has_text="neighbour moa").locator("button")
    for _ in range(2):
        head.press("Enter")
        assert chosen_rows(page, "neighbours")[-1][4] == "–"


def test_wells_are_coloured_by_what_is_chosen_and_read_by_arrow_keys(
    chromium: Browser,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = screen()
    wells = data.plate_maps.assign(bad_frames=[None, *(i / 16 for i in range(11))])
    measures = {"n_cells": "cells in each well", "bad_frames": "share of bad frames"}
    tab = chromium.new_page()
    wrong = watch(tab)
    tab.goto(written(dataclasses.replace(data, plate_maps=wells, plate_measures=measures), tmp_path))
    first, second = (tab.locator(f"td[data-well='{i}']") for i in range(2))
    before = second.evaluate("cell => cell.style.background")
    tab.locator("#measure").select_option(label="share of bad frames")
    expect(first).to_have_class("unmeasured")
    expect(first).to_have_text("")
    expect(second).to_have_text("0")
    assert second.evaluate("cell => cell.style.background") != before
    expect(tab.locator("#scale-high")).to_have_text("0.625")
    expect(tab.locator(".plate caption").first).to_contain_text("share of bad frames")
    tab.locator("#measure").select_option("0")
    expect(first).not_to_have_class("unmeasured")
    first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        tab.keyboard.press(key)
    expect(tab.locator("#said-m-1")).to_have_text("B01: DMSO, negative control, 10 cells")
    assert tab.locator("table.plate td[tabindex='0']").count() == 4, "one a table"
    assert wrong == []
    tab.close()


def test_the_map_is_read_by_keyboard_and_by_pointing(page: Page) -> None:
    canvas, tip = page.locator("#map-canvas"), page.locator("#map-tip")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    said = page.locator("#map-said").inner_text()
    assert tip.inner_text() == said
    assert "·" in said
    page.keyboard.press("ArrowLeft")
    assert page.locator("#map-said").inner_text()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("ArrowUp")
    compound = page.locator("#map-said").inner_text().split(" · ")[0]
    page.keyboard.press("Enter")
    expect(page.locator(".shelf h3").first).to_have_text(compound)
    expect(page.locator("#gallery-compound")).to_be_focused()
    box = canvas.bounding_box()
    assert box is not None
    first = """axis => new Uint16Array(Uint8Array.from(
        atob(JSON.parse(document.getElementById("map-data").textContent)[axis]), c => c.charCodeAt(0)).buffer)[0]"""
    x, y = (12 + page.evaluate(first, axis) / 65535 * (box["width"] - 24) for axis in "xy")
    canvas.hover(position={"x": x, "y": y})
    expect(tip).to_be_visible()


def test_groups_of_the_map_are_shown_alone(page: Page) -> None:
    picture = "document.getElementById('map-canvas').toDataURL()"
    before = page.evaluate(picture)
    button = page.locator("#map-legend button").first
    button.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    alone = page.evaluate(picture)
    assert alone != before
    button.press("Enter")
    assert page.evaluate(picture) == before
    page.locator("#map-colouring").select_option(label="plate")
    assert page.locator("#map-legend button").all_inner_texts() == ["p1", "p2"]
    expect(page.locator("#map-words")).to_contain_text("share its plate")
    assert page.evaluate(picture) != before


def test_the_gallery_goes_from_compound_to_compound_by_keyboard(page: Page) -> None:
    names = page.locator(".shelf h3")
    assert names.all_inner_texts() == ["drug A", "DMSO", "drug B", "drug C"]
    assert page.locator(".shelf").first.locator("img").count() == 2
    assert all(image.get_attribute("alt") for image in page.locator(".shelf img").all())
    page.locator("#gallery-next").press("Enter")
    expect(names.first).to_have_text("drug B")
    page.locator("#gallery-previous").press("Enter")
    expect(names.first).to_have_text("drug A")
    page.get_by_role("button", name="Show the neighbours of drug C").press("Enter")
    expect(names.first).to_have_text("drug C")
    page.locator("#gallery-compound").select_option(label="DMSO")
    expect(names.first).to_have_text("DMSO")
    widths = page.locator(".shelf img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert widths == [64], "a strip of four frames"


def test_clips_play_stop_and_step(page: Page) -> None:
    strip, play, frame = page.locator(".shelf img").first, page.locator("#gallery-play"), page.locator("#gallery-frame")
    place = "image => image.style.transform"
    expect(play).to_have_text("Pause")
    at = strip.evaluate(place)
    page.wait_for_function("at => document.querySelector('.shelf img').style.transform !== at", arg=at)
    play.press("Enter")
    expect(play).to_have_text("Play")
    stopped = strip.evaluate(place)
    page.wait_for_timeout(500)
    assert strip.evaluate(place) == stopped
    frame.focus()
    page.keyboard.press("Home")
    assert strip.evaluate(place) in ("translateX(0%)", "translateX(-0%)")
    page.keyboard.press("ArrowRight")
    assert strip.evaluate(place) == "translateX(-25%)"
    expect(frame).to_have_attribute("aria-valuetext", "frame 2 of 4")
    play.press("Space")
    expect(play).to_have_text("Pause")


def test_clips_stand_still_for_those_who_want_no_motion(chromium: Browser, address: str) -> None:  # noqa: F811
    context = chromium.new_context(reduced_motion="reduce")
    tab = context.new_page()
    tab.goto(address)
    expect(tab.locator("#gallery-play")).to_have_text("Play")
    at = tab.locator(".shelf img").first.evaluate("image => image.style.transform")
    tab.wait_for_timeout(500)
    assert tab.locator(".shelf img").first.evaluate("image => image.style.transform") == at
    tab.locator("#gallery-play").press("Enter")
    expect(tab.locator("#gallery-play")).to_have_text("Pause")
    context.close()


def test_without_scripts_tables_and_plates_are_read_all_the_same(chromium: Browser, address: str) -> None:  # noqa: F811
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address)
    expect(tab.locator("td[data-well='3']")).to_have_text("10")
    expect(tab.get_by_text("The map is drawn by the page's script")).to_be_visible()
    assert not tab.locator("[data-table=neighbours] .controls").is_visible()
    context.close()


def test_a_narrow_window_does_not_scroll_sideways(chromium: Browser, address: str) -> None:  # noqa: F811
    context = chromium.new_context(viewport={"width": 360, "height": 740})
    tab = context.new_page()
    tab.goto(address)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_profiles_without_cells_have_a_gallery_of_neighbours(chromium: Browser, tmp_path: Path) -> None:  # noqa: F811
    data = dataclasses.replace(screen(), examples=(), training=pd.DataFrame(), mapped="well")
    tab = chromium.new_page()
    wrong = watch(tab)
    tab.goto(written(data, tmp_path))
    assert tab.locator(".shelf h3").all_inner_texts() == ["drug A", "drug B", "drug C"]
    assert not tab.locator("#gallery-play").is_visible()
    expect(tab.locator("#h-map")).to_have_text("Map of the wells")
    assert faults(tab) == []
    assert wrong == []
    tab.close()


@pytest.mark.slow
def test_a_384_well_screen_is_seen_in_two_seconds_and_stays_an_attachment(chromium: Browser) -> None:  # noqa: F811
    program = Path(__file__).parents[1] / "benchmarks" / "report.py"
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=600)
    said = {line[:16].strip(): float(line[16:].split()[0]) for line in ran.stdout.splitlines()}
    assert said["page"] < 30
    assert said["first view"] < 2
