"""The page of a screen of 384-well plates: its size, what writing it costs, and how soon a browser shows it.

Three plates, 352 compounds of 20 mechanisms, a map of 20,000 cells and as many clips as the report reads, of the size
that MitoReID's have (3 channels, 16 frames, 128 px); the numbers in them are random. Chromium opens the page from disk.

    python benchmarks/report.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from screening.report import Example, ReportData, channel_colours, moa_similarity, render

PLATES, COMPOUNDS, MOAS, CELLS, CLIPS = 3, 352, 20, 20_000, 600
REPEATS = 5


def screen() -> ReportData:
    """A finished screen, every section of it filled."""
    rng = np.random.default_rng(0)
    compounds = np.array([f"compound {i + 1}" for i in range(COMPOUNDS)])
    moas = np.array([f"mechanism {i % MOAS + 1}" for i in range(COMPOUNDS)])
    plates = []
    for plate in range(PLATES):
        order = rng.permutation(384)
        wells = [f"{chr(65 + i // 24)}{i % 24 + 1:02d}" for i in order]
        treated = np.arange(384) < COMPOUNDS
        which = np.where(treated, np.arange(384), 0)
        plates.append(
            pd.DataFrame(
                {
                    "plate": f"plate {plate + 1}",
                    "well": wells,
                    "compound": np.where(treated, compounds[which % COMPOUNDS], "DMSO"),
                    "concentration": 10.0,
                    "unit": "uM",
                    "role": np.where(treated, "treatment", "negative_control"),
                    "replicate": str(plate + 1),
                    "moa": np.where(treated, moas[which % COMPOUNDS], None),
                    "n_cells": rng.integers(40, 250, 384),
                    "bad_frames": rng.random(384).round(3),
                }
            )
        )
    maps = pd.concat(plates, ignore_index=True)
    profiles = rng.normal(size=(COMPOUNDS, 64))
    near = [rng.choice(np.delete(np.arange(COMPOUNDS), i), 5, replace=False) for i in range(COMPOUNDS)]
    retrieval = pd.DataFrame(
        {
            "compound": np.repeat(compounds, 5),
            "moa": np.repeat(moas, 5),
            "rank": np.tile(np.arange(1, 6), COMPOUNDS),
            "neighbour": compounds[np.concatenate(near)],
            "neighbour_moa": moas[np.concatenate(near)],
            "similarity": np.sort(rng.random((COMPOUNDS, 5)))[:, ::-1].ravel(),
        }
    )
    table = pd.DataFrame(
        {"compound": compounds, "moa": moas, "share": rng.random(COMPOUNDS), "p": rng.random(COMPOUNDS)}
    )
    epochs = np.arange(1, 31)
    score = {"value": 0.6, "low": 0.5, "high": 0.7, "chance": 0.05}
    share = rng.dirichlet(np.ones(MOAS), MOAS)
    names = sorted(set(moas))
    test = {
        **{name: score for name in ("rank1", "rank5", "map", "accuracy", "auc")},
        "cmc": np.linspace(0.6, 1, 50).tolist(),
        "cmc_chance": np.linspace(0.05, 1, 50).tolist(),
        "roc": {"fpr": np.linspace(0, 1, 101).tolist(), "tpr": np.sqrt(np.linspace(0, 1, 101)).tolist()},
        "confusion": {"moas": names, "neighbours": share.tolist()},
    }
    return ReportData(
        "384-well screen",
        plate_maps=maps,
        plate_measures={"n_cells": "cells in each well", "bad_frames": "share of bad frames"},
        training=pd.DataFrame({"phase": "train", "epoch": epochs, **{f"loss {i}": 1 / epochs for i in range(6)}}),
        embedding_map=maps.sample(CELLS, replace=True, random_state=0).assign(
            x=rng.normal(size=CELLS), y=rng.normal(size=CELLS)
        ),
        evaluation={"compound": test, "replicate": test},
        similarity=moa_similarity(profiles, pd.Series(moas)),
        activity=table,
        predictions=table,
        retrieval=retrieval,
        examples=[example(name, rng) for name in np.resize(["DMSO", *compounds], CLIPS).tolist()],
    )


def example(compound: str, rng: np.random.Generator) -> Example:
    """A clip with texture at the scale of organelles, and some noise."""
    moving = gaussian_filter(rng.random((3, 16, 128, 128), dtype=np.float32), (0, 1.5, 2, 2))
    moving = (moving - moving.min()) / (moving.max() - moving.min())
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    clip = 255 * moving * np.exp(-2 * (x**2 + y**2)) + rng.normal(0, 2, moving.shape)
    return Example(compound, "plate 1/A01, site 0, track 0", clip.clip(0, 255).astype(np.uint8), channel_colours("abc"))


def open_in_browser(page: Path, browser: str) -> dict[str, list[float]]:
    """Seconds until something is seen, and until all of the page can be used, for each repeat."""
    from playwright.sync_api import sync_playwright

    seconds: dict[str, list[float]] = {"first view": [], "ready": []}
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(REPEATS):
            tab = chromium.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri(), wait_until="load")
            tab.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            seconds["first view"].append(tab.evaluate(entry) / 1000)
            ready = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
            seconds["ready"].append(tab.evaluate(ready) / 1000)
            tab.close()
        chromium.close()
    return seconds


def main() -> None:
    data = screen()
    started = time.process_time()
    text = render(data)
    print(f"page             {len(text.encode()) / 1e6:6.1f} MB")
    print(f"rendering        {time.process_time() - started:6.1f} CPU s")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium is installed here: how soon the page is seen was not measured")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        page.write_text(text, encoding="utf-8")
        for name, seconds in open_in_browser(page, browser).items():
            print(f"{name:16} {np.median(seconds):6.2f} s, at most {max(seconds):.2f} s of {REPEATS}")


if __name__ == "__main__":
    main()
