"""Real movies from TIFF files to a query: the steps of docs/movies.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage_schemas.plate import open_labels, open_plate

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples" / "movies"
COMMAND = [sys.executable, "-c", "from screening.cli import main; main()"]


@pytest.fixture(scope="module")
def movies(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of docs/movies.md after its commands."""
    folder = tmp_path_factory.mktemp("movies")
    for file in EXAMPLES.iterdir():
        shutil.copy(file, folder)
    plate = folder / "movies.zarr"
    ingest = ["ingest", "--channel", "nucleus"]
    pattern = r"P(?P<site>\d+)--T(?P<time>\d+)--Z(?P<z>\d+)"
    for arguments in (
        [real_data / "mitocheck_movie/mitocheck-movie", plate, "--well", "A01", "--pattern", pattern],
        [real_data / "cell_migration/cancer_cell_migration_crop.tif", plate, "--well", "A02", "--axes", "TYX"],
        [real_data / "nuclei_tracks/example_images.tif", plate, "--well", "A03", "--axes", "TYX"],
        ["run", folder / "run.yaml", "--out", folder / "screen", "--set", "train.epochs=3"],
    ):
        command = [] if arguments[0] == "run" else ingest
        subprocess.run([*COMMAND, *map(str, [*command, *arguments])], check=True, timeout=400)
    return folder


def test_every_movie_is_embedded(movies: Path) -> None:
    for well, frames in (("A01", 30), ("A02", 48), ("A03", 6)):
        cells = pq.read_table(movies / f"screen/cells/movies/{well}.parquet").to_pandas()
        embedded = pq.read_table(movies / f"screen/embeddings/movies/{well}.parquet")
        assert len(embedded) == (cells["excluded"] == "").sum() > 0
        assert set(cells["centroid_y"].map(len)) == {frames}


@pytest.mark.parametrize(("well", "frame", "count"), [("A01", 0, 13), ("A01", 29, 19), ("A02", 0, 9), ("A02", 47, 17)])
def test_counts_of_nuclei_are_those_of_the_data(movies: Path, well: str, frame: int, count: int) -> None:
    (site,) = open_plate(str(movies / "movies.zarr")).sites(well).values()
    nuclei = open_labels(site, "nuclei")[frame]
    assert len(set(nuclei.ravel().tolist()) - {0}) == pytest.approx(count, abs=2)


def test_a_query_finds_the_other_movies(movies: Path) -> None:
    arguments = ["query", str(movies / "screen"), "--compound", "HeLa H2B-GFP", "--format", "json"]
    answer = subprocess.run([*COMMAND, *arguments], check=True, capture_output=True, text=True, timeout=60)
    assert {row["id"] for row in json.loads(answer.stdout)} == {"migrating cancer cells", "confluent nuclei"}


def test_the_report_shows_cells_and_says_what_was_not_tested(movies: Path) -> None:
    page = (movies / "screen/report.html").read_text()
    assert page.count('<script type="text/plain" id="clip-') >= 3
    assert "no query cell has an MOA" in page
