"""The plain way from a plate to clips: what one writes with zarr, scikit-image and scipy, to measure ours against.

Every step calls the function that the libraries' galleries show for it, once a plane, object or cell. Lengths suit
the simulated plates, whose nuclei are about 14 px wide and cells 55: it is told what the engine measures. Of the
usual steps those stand here that raise F1 there; a local threshold does not and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from scipy.ndimage import binary_fill_holes, distance_transform_edt, uniform_filter
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.exposure import rescale_intensity
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed

Labels = npt.NDArray[np.int32]

NUCLEUS_SMOOTHING = 1.0  # sigma, px
CELL_SMOOTHING = 2.0  # sigma, px
SEED_DISTANCE = 5  # px
MIN_AREA = 60  # px
CELL_RADIUS = 60  # px, farthest cytoplasm from its nucleus
MAX_STEP = 30.0  # px between frames
SOFT_MASK = 11  # px, side of the mean that softens a clip's mask


@dataclass(frozen=True)
class Measures:
    """One object in one frame."""

    area: float
    box: tuple[int, int, int, int]
    means: npt.NDArray[np.float64]


def read(url: str) -> npt.NDArray[Any]:
    """A site's movie, (T, C, H, W)."""
    return np.asarray(zarr.open_array(f"{url}/0", mode="r")[:])


def segment_nuclei(image: npt.NDArray[Any]) -> Labels:
    """(H, W) labels: threshold, then a watershed of the distance transform from its peaks."""
    smooth = gaussian(image, NUCLEUS_SMOOTHING, preserve_range=True)
    # Otsu's threshold on the image as it is finds the few saturated specks and no nucleus.
    smooth = rescale_intensity(smooth, in_range=tuple(np.percentile(smooth, (1, 99.5))))
    mask = remove_small_objects(binary_fill_holes(smooth > threshold_otsu(smooth)), max_size=MIN_AREA)
    distance = distance_transform_edt(mask)
    peaks = peak_local_max(gaussian(distance, 1), min_distance=SEED_DISTANCE, labels=label(mask))
    seeds = np.zeros(image.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, seeds, mask=mask)


def segment_cells(image: npt.NDArray[Any], nuclei: Labels) -> Labels:
    """(H, W) labels: a watershed of the cytoplasm from the nuclei."""
    smooth = np.log1p(gaussian(image, CELL_SMOOTHING, preserve_range=True))
    near = distance_transform_edt(nuclei == 0) < CELL_RADIUS
    mask = ((smooth > threshold_otsu(smooth)) & near) | (nuclei > 0)
    return watershed(-smooth, nuclei, mask=mask)


def link(movie: Labels) -> Labels:
    """(T, H, W) labels with one value a track: least total distance from each frame to the next."""
    tracks = np.zeros_like(movie)
    n_tracks = 0
    previous: tuple[npt.NDArray[np.float64], list[int]] | None = None
    for t, plane in enumerate(movie):
        objects = regionprops(plane)
        places = np.array([one.centroid for one in objects]).reshape(-1, 2)
        ids = [0] * len(objects)
        if previous is not None and len(objects) and len(previous[1]):
            distance = cdist(previous[0], places)
            for before, now in zip(*linear_sum_assignment(distance), strict=True):
                if distance[before, now] <= MAX_STEP:
                    ids[now] = previous[1][before]
        for i, one in enumerate(objects):
            if ids[i] == 0:
                n_tracks += 1
                ids[i] = n_tracks
            tracks[t][one.slice][one.image] = ids[i]
        previous = places, ids
    return tracks


def measure(labels: Labels, stack: npt.NDArray[Any]) -> dict[tuple[int, int], Measures]:
    """Area, box and mean intensities of every object, by frame and track."""
    found = {}
    for t, plane in enumerate(labels):
        for one in regionprops(plane, np.moveaxis(stack[t], 0, -1)):
            found[t, one.label] = Measures(one.area, one.bbox, one.intensity_mean)
    return found


def cut(
    stack: npt.NDArray[Any],
    cells: Labels,
    measures: dict[tuple[int, int], Measures],
    low: npt.NDArray[np.float32],
    high: npt.NDArray[np.float32],
    size: int,
) -> npt.NDArray[np.uint8]:
    """(N, C, T, size, size) clips of the tracks seen in every frame, softly masked, padded where the image ends."""
    n_frames, n_channels, height, width = stack.shape
    low, high = low[:, None, None], high[:, None, None]
    half = size // 2
    clips = []
    for track in sorted({track for _, track in measures}):
        boxes = [measures[t, track].box for t in range(n_frames) if (t, track) in measures]
        if len(boxes) < n_frames or any(b[0] == 0 or b[1] == 0 or b[2] == height or b[3] == width for b in boxes):
            continue
        frames = []
        for t, (y0, x0, y1, x1) in enumerate(boxes):
            top, left = (y0 + y1) // 2 - half, (x0 + x1) // 2 - half
            inside = slice(max(top, 0), top + size), slice(max(left, 0), left + size)
            window = stack[t][:, *inside]
            mask = uniform_filter((cells[t][inside] == track).astype(np.float32), SOFT_MASK)
            window = np.clip((window - low) / (high - low), 0, 1) * mask
            before = max(-top, 0), max(-left, 0)
            missing = [(0, 0)] + [(b, size - b - n) for b, n in zip(before, window.shape[1:], strict=True)]
            frames.append(np.rint(255 * np.pad(window, missing)).astype(np.uint8))
        clips.append(np.stack(frames, axis=1))
    return np.stack(clips) if clips else np.zeros((0, n_channels, n_frames, size, size), np.uint8)
