"""Segmentation against truth, and beside the plain way: Otsu's threshold and a watershed of the distance transform.

Run: ``python benchmarks/segmentation.py``. One process, one thread, default configs. Real images are looked for in
``SCREENING_TEST_DATA``, or else in ``../shared/data`` beside the checkout; without them only the simulation is run.
CPU time is the median over rounds, ours and the plain way in turn.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.segmentation import watershed

from screening.segmentation import segment_cells, segment_nuclei
from screening.simulation import SimulationConfig, simulate_site

Array = npt.NDArray[Any]
ROUNDS = 3
WORST = 8


class Sample(NamedTuple):
    """An image and its true labels, or only their number."""

    name: str
    image: Array
    true: Array | int
    # CellProfiler keeps no nucleus that touches the border.
    whole_only: bool = False


class Score(NamedTuple):
    """How well one image was segmented; F1 and IoU are NaN where only the count is known."""

    f1: float
    iou: float
    found: int
    true: int
    milliseconds: float


def main() -> None:
    """Print a table of the data sets, the images where it does worst, and a table of cells."""
    cv2.setNumThreads(1)
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SCREENING_TEST_DATA", beside_checkout))
    real = folder.is_dir()
    if not real:
        print(f"No real data: neither SCREENING_TEST_DATA nor {beside_checkout} is there.\n")
    sets: dict[str, list[Sample]] = {}
    if real:
        sets |= {name: list(samples(folder / name)) for name, samples in REAL.items()}
    sites = {side: simulated(side) for side in (1024, 2048)}
    sets |= {f"simulated {side}²": [Sample("site", stack[0], nuclei)] for side, (stack, nuclei, _) in sites.items()}

    worst: list[tuple[float, str]] = []
    print("| nuclei | images | F1 | plain | mean IoU | plain | found / true | plain | CPU ms an image | plain |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, samples in sets.items():
        ours = [score(segment_nuclei, sample) for sample in samples]
        plain = [score(plain_nuclei, sample) for sample in samples]
        print(f"| {name} | {len(samples)} | " + " | ".join(columns(ours, plain)) + " |")
        worst += [(s.f1, f"{name}/{sample.name}") for s, sample in zip(ours, samples, strict=True) if s.f1 == s.f1]
    print("\nWorst: " + ", ".join(f"{name} {f1:.2f}" for f1, name in sorted(worst)[:WORST]))

    print("\n| cells | ours | plain | CPU ms an image | plain |\n|---|---|---|---|---|")
    if real:
        print("\n".join(cell_painting(folder / "cellpainting_nf1")))
    for side, (stack, _, cells) in sites.items():
        nuclei = segment_nuclei(stack[0])
        row = [
            timed(lambda grow=grow, stack=stack, nuclei=nuclei: grow(stack[1], nuclei))
            for grow in (segment_cells, plain_cells)
        ]
        f1s = [match(labels, cells)[0] for labels, _ in row]
        print(f"| simulated {side}², F1 | {f1s[0]:.3f} | {f1s[1]:.3f} | {row[0][1]:.0f} | {row[1][1]:.0f} |")


def plain_nuclei(image: Array) -> Array:
    """Otsu's threshold, distance transform, one seed a peak at least 5 px from the next, watershed."""
    smooth = gaussian(image.astype(float), 1)
    mask = smooth > threshold_otsu(smooth)
    distance = ndimage.distance_transform_edt(mask)
    seeds = np.zeros(image.shape, np.int32)
    peaks = peak_local_max(distance, min_distance=5, labels=ndimage.label(mask)[0])
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return np.asarray(watershed(-distance, seeds, mask=mask))


def plain_cells(cytoplasm: Array, nuclei: Array) -> Array:
    """Watershed of the inverted cytoplasm from the nuclei, above Otsu's threshold."""
    smooth = gaussian(cytoplasm.astype(float), 1)
    return np.asarray(watershed(-smooth, nuclei, mask=(smooth > threshold_otsu(smooth)) | (nuclei > 0)))


def timed(function: Callable[[], Array]) -> tuple[Array, float]:
    """The result, and the median of CPU milliseconds after one call that compiles."""
    result, milliseconds = function(), []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        milliseconds.append(1000 * (time.process_time() - start))
    return result, statistics.median(milliseconds)


def score(segment: Callable[[Array], Array], sample: Sample) -> Score:
    labels, milliseconds = timed(lambda: segment(sample.image))
    if sample.whole_only:
        labels = without_border(labels)
    found = len(np.unique(labels[labels > 0]))
    if isinstance(sample.true, int):
        return Score(np.nan, np.nan, found, sample.true, milliseconds)
    f1, iou = match(labels, sample.true)
    return Score(f1, iou, found, len(np.unique(sample.true[sample.true > 0])), milliseconds)


def match(found: Array, true: Array) -> tuple[float, float]:
    """F1 of the objects that overlap a true one by an IoU over 0.5, and the mean best IoU of the true ones."""
    _, one = np.unique(found, return_inverse=True)
    _, other = np.unique(true, return_inverse=True)
    # Background comes first, also where an image has none.
    one, other = one + (found.min() > 0), other + (true.min() > 0)
    shape = (one.max() + 1, other.max() + 1)
    both = np.bincount(one.ravel() * shape[1] + other.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    either = both.sum(1)[:, None] + both.sum(0)[None] - both
    best = (both / np.maximum(either, 1))[1:, 1:].max(axis=0, initial=0)
    return float(2 * (best > 0.5).sum() / max(sum(shape) - 2, 1)), float(best.mean()) if best.size else 1.0


def columns(ours: list[Score], plain: list[Score]) -> Iterator[str]:
    for pick in (lambda s: s.f1, lambda s: s.iou):
        for scores in (ours, plain):
            mean = statistics.fmean(map(pick, scores))
            yield f"{mean:.3f}" if mean == mean else "-"
    for scores in (ours, plain):
        if len(scores) <= 5:
            yield ", ".join(f"{s.found} / {s.true}" for s in scores)
        else:
            yield f"{sum(s.found for s in scores)} / {sum(s.true for s in scores)}"
    for scores in (ours, plain):
        yield f"{statistics.fmean(s.milliseconds for s in scores):.0f}"


def without_border(labels: Array) -> Array:
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.where(np.isin(labels, border), 0, labels)


def read(path: Path) -> Array:
    """The first channel of the first page."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise FileNotFoundError(path)
    return np.asarray(image if image.ndim == 2 else image[..., 0])


def read_pages(path: Path) -> list[Array]:
    return [np.asarray(page) for page in cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)[1]]


def dsb2018(folder: Path) -> Iterator[Sample]:
    """Run lengths: column-major, one-based, a nucleus a line."""
    runs: dict[str, list[list[int]]] = {}
    for line in (folder / "masks_rle.csv").read_text().splitlines()[1:]:
        name, numbers = line.split(",")[:2]
        runs.setdefault(name, []).append([int(number) for number in numbers.split()])
    for path in sorted((folder / "images").glob("*.png")):
        image = read(path)
        true = np.zeros(image.size, np.int32)
        for label, numbers in enumerate(runs[path.stem], 1):
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                true[start - 1 : start - 1 + length] = label
        yield Sample(path.stem[:8], image, true.reshape(image.shape, order="F"))


def dense(folder: Path) -> Iterator[Sample]:
    yield Sample("img2d", read(folder / "img2d.tif"), read(folder / "mask2d.tif"))


def tracks(folder: Path) -> Iterator[Sample]:
    pages = zip(read_pages(folder / "example_images.tif"), read_pages(folder / "example_label.tif"), strict=True)
    for t, (image, true) in enumerate(pages):
        yield Sample(f"frame {t}", image, true)


def mitocheck(folder: Path) -> Iterator[Sample]:
    frames = sorted((folder / "mitocheck-movie").glob("*.tif"))
    for t, count in ((0, 13), (29, 19)):
        yield Sample(f"frame {t}", read(frames[t]), count)


def migration(folder: Path) -> Iterator[Sample]:
    frames = read_pages(folder / "cancer_cell_migration_crop.tif")
    for t, count in ((0, 9), (47, 17)):
        yield Sample(f"frame {t}", frames[t], count)


WELLS = {"B7": 28, "D6": 27, "D7": 29, "F7": 25, "H12": 23}


def painted(folder: Path, well: str, what: str) -> Array:
    return read(next(folder.glob(f"Plate_2_*/{well}_*{what}*")))


def painted_nuclei(folder: Path) -> Iterator[Sample]:
    for well, count in WELLS.items():
        yield Sample(well, painted(folder, well, "DAPI_001.tif"), count, whole_only=True)


def cell_painting(folder: Path) -> Iterator[str]:
    """IoU of our cells and the plain way's with CellProfiler's mask, all without those that touch the border."""
    for well in WELLS:
        nuclei, cytoplasm = segment_nuclei(painted(folder, well, "DAPI_001.tif")), painted(folder, well, "RFP_001.tif")
        true = painted(folder, well, "MaskCells") > 0
        overlaps, milliseconds = [], []
        for grow in (segment_cells, plain_cells):
            cells, took = timed(lambda grow=grow, nuclei=nuclei, cytoplasm=cytoplasm: grow(cytoplasm, nuclei))
            whole = without_border(cells) > 0
            overlaps.append(f"{(whole & true).sum() / (whole | true).sum():.2f}")
            milliseconds.append(f"{took:.0f}")
        yield f"| cellpainting_nf1 {well}, IoU | " + " | ".join(overlaps + milliseconds) + " |"


def simulated(side: int) -> tuple[Array, Array, Array]:
    """(C, H, W) first frame of a site, and its true nuclei and cells."""
    config = SimulationConfig(frames=2, height=side, width=side, cells_per_site=round(18 * (side / 384) ** 2))
    site = simulate_site(config, "plate-1", "A01", 0)
    return site.stack[0], site.nuclei[0], site.cells[0]


REAL = {
    "nuclei_dsb2018": dsb2018,
    "nuclei_dense": dense,
    "nuclei_tracks": tracks,
    "mitocheck_movie": mitocheck,
    "cell_migration": migration,
    "cellpainting_nf1": painted_nuclei,
}

if __name__ == "__main__":
    main()
