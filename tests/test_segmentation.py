from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from screening.segmentation import CellsConfig, NucleiConfig, segment_cells, segment_movie, segment_nuclei
from storage_schemas.errors import InputError

Array = npt.NDArray[Any]


def disks(shape: tuple[int, int], centres: list[tuple[float, float]], radius: float, level: float = 100.0) -> Array:
    """Blurred bright disks on a background of 10."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    scene = np.zeros(shape)
    for cy, cx in centres:
        scene[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = level
    return np.asarray(ndimage.gaussian_filter(scene, 0.05 * radius + 0.5) + 10)


def grid(n: int, diameter: float, gap: float = 2.0) -> tuple[tuple[int, int], list[tuple[float, float]]]:
    step = gap * diameter
    side = int(n * step)
    return (side, side), [((i + 0.5) * step, (j + 0.5) * step) for i in range(n) for j in range(n)]


def best_iou(found: Array, true: Array) -> Array:
    """(n_true,) intersection over union of each true object with the found object it fits best."""
    scores = []
    for k in np.unique(true[true > 0]):
        mask = true == k
        touching = np.unique(found[mask])
        scores.append(
            max(((mask & (found == f)).sum() / (mask | (found == f)).sum() for f in touching if f), default=0)
        )
    return np.array(scores)


def f1(found: Array, true: Array) -> float:
    n_found, n_true = len(np.unique(found[found > 0])), len(np.unique(true[true > 0]))
    return float(2 * (best_iou(found, true) > 0.5).sum() / max(n_found + n_true, 1))


def is_sequential(labels: Array) -> bool:
    return labels.dtype == np.int32 and np.array_equal(np.unique(labels[labels > 0]), np.arange(1, labels.max() + 1))


@pytest.mark.parametrize("diameter", [8, 14, 24, 40])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_counts_disks_at_any_scale_and_dtype(diameter: int, dtype: type) -> None:
    shape, centres = grid(4, diameter)
    noise = np.random.default_rng(0).normal(0, 3, shape)
    image = disks(shape, centres, diameter / 2) + noise
    labels = segment_nuclei(np.clip(image, 0, 255).astype(dtype))
    assert labels.max() == len(centres)
    assert is_sequential(labels)
    assert np.median(np.bincount(labels.ravel())[1:]) == pytest.approx(np.pi / 4 * diameter**2, rel=0.25)


def test_brightness_scale_and_offset_change_nothing() -> None:
    shape, centres = grid(3, 16)
    image = disks(shape, centres, 8) + np.random.default_rng(0).normal(0, 2, shape)
    expected = segment_nuclei(image)
    np.testing.assert_array_equal(segment_nuclei(image * 250 - 1e4), expected)
    np.testing.assert_array_equal(segment_nuclei(image * 1e-3), expected)


@pytest.mark.parametrize(("diameter", "separation"), [(10, 1.0), (20, 0.8), (20, 1.0), (36, 0.8), (36, 1.0)])
def test_splits_touching_pairs(diameter: int, separation: float) -> None:
    shape, centres = grid(3, diameter, gap=3.0)
    pairs = [c for y, x in centres for c in ((y, x), (y, x + separation * diameter))]
    assert segment_nuclei(disks(shape, pairs, diameter / 2)).max() == len(pairs)


def test_keeps_an_elongated_nucleus_whole() -> None:
    scene = np.full((160, 160), 10, np.float32)
    for k, angle in enumerate((0, 30, 60, 90)):
        cv2.ellipse(scene, (40 + 80 * (k % 2), 40 + 80 * (k // 2)), (26, 10), angle, 0, 360, 100, -1)
    assert segment_nuclei(cv2.GaussianBlur(scene, (0, 0), 1.0)).max() == 4


def clusters(seed: int = 0) -> Array:
    """A noisy field of nuclei of several sizes and brightnesses, many of them touching."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((240, 300), np.float32)
    for _ in range(45):
        x, y = rng.uniform(0, 300), rng.uniform(0, 240)
        axes = tuple(int(a) for a in rng.uniform(7, 12, 2))
        cv2.ellipse(scene, (int(x), int(y)), axes, rng.uniform(0, 180), 0, 360, rng.uniform(60, 160), -1)
    return np.asarray(cv2.GaussianBlur(scene, (0, 0), 1.2) + rng.normal(20, 3, scene.shape))


TRANSFORMS = {
    "mirrored": lambda a: a[:, ::-1],
    "upside down": lambda a: a[::-1],
    "turned": lambda a: np.rot90(a),
    "transposed": lambda a: a.T,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_way_the_field_lies_hardly_matters(name: str) -> None:
    image, transform = clusters(), TRANSFORMS[name]
    assert f1(segment_nuclei(transform(image)), transform(segment_nuclei(image))) >= 0.97


@pytest.mark.parametrize("factor", [0.5, 2, 4])
def test_magnification_hardly_matters(factor: float) -> None:
    image = clusters()
    shape = tuple(int(side * factor) for side in image.shape[::-1])
    other = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    expected = cv2.resize(segment_nuclei(image), shape, interpolation=cv2.INTER_NEAREST)
    assert f1(segment_nuclei(other), expected) >= 0.93


def test_the_number_type_hardly_matters() -> None:
    image = clusters()
    expected = segment_nuclei(image)
    coarse = np.clip(image / 4, 0, 255).astype(np.uint8)
    fine = np.clip(image * 300, 0, 65535).astype(np.uint16)
    share = (image - image.min()) / np.ptp(image)
    for other in (coarse, fine, fine.astype(">u2"), share.astype(np.float16), share, np.asfortranarray(image)):
        assert f1(segment_nuclei(other), expected) >= 0.97


def test_a_slope_of_the_background_hardly_matters() -> None:
    image = clusters()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    assert f1(segment_nuclei(image + 0.5 * x + 0.3 * y), segment_nuclei(image)) >= 0.95


def test_the_number_of_threads_does_not_matter() -> None:
    image, threads = clusters(), cv2.getNumThreads()
    labels = []
    try:
        for n in (1, 2, 4):
            cv2.setNumThreads(n)
            nuclei = segment_nuclei(image)
            labels.append((nuclei, segment_cells(image, nuclei), segment_cells(None, nuclei)))
    finally:
        cv2.setNumThreads(threads)
    for other in labels[1:]:
        for one, two in zip(labels[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("diameter", [8, 60, 150])
def test_nuclei_found_at_another_resolution_are_outlined_in_that_of_the_image(diameter: int) -> None:
    """Those of 8 px are found at twice the resolution, those of 60 and 150 at less than half."""
    shape, centres = grid(3, diameter)
    image = disks(shape, centres, diameter / 2) + np.random.default_rng(0).normal(0, 2, shape)
    y, x = np.mgrid[: shape[0], : shape[1]]
    true = sum(k * ((y - cy) ** 2 + (x - cx) ** 2 <= diameter**2 / 4) for k, (cy, cx) in enumerate(centres, 1))
    assert best_iou(segment_nuclei(image), np.asarray(true)).min() > (0.8 if diameter < 10 else 0.95)


def test_hot_pixels_are_no_nuclei() -> None:
    image = np.random.default_rng(0).normal(100, 5, (200, 200))
    image[20, 30] = image[100:102, 50:52] = image[199, 7] = 5000
    assert segment_nuclei(image).max() == 0


def test_outlines_bright_and_dim_neighbours_alike() -> None:
    shape, centres = grid(3, 24)
    image = disks(shape, centres[::2], 12, 400) + disks(shape, centres[1::2], 12, 150)
    areas = np.bincount(segment_nuclei(image).ravel())[1:]
    assert len(areas) == 9
    assert areas.max() < 1.15 * areas.min()


def test_saturated_specks_do_not_hide_the_nuclei() -> None:
    shape, centres = grid(5, 14)
    image = disks(shape, centres, 7) + np.random.default_rng(0).normal(0, 2, shape)
    image[2:6, 2:6] = image[70:74, 28:31] = 65535
    true = np.zeros(shape, np.int32)
    for k, (y, x) in enumerate(centres, 1):
        cv2.circle(true, (int(x), int(y)), 7, k, -1)
    assert (best_iou(segment_nuclei(image), true) > 0.5).mean() >= 0.95


def test_few_nuclei_in_much_noise_are_found_whole() -> None:
    noise = np.random.default_rng(1).normal(100, 10, (400, 400))
    image = noise + disks((400, 400), [(100, 100), (250, 300)], 14, 60)
    areas = np.bincount(segment_nuclei(image).ravel())[1:]
    assert len(areas) == 2
    np.testing.assert_allclose(areas, np.pi * 14**2, rtol=0.2)


@pytest.mark.parametrize("amplitude", [20, 80, 150])
def test_shading_is_no_obstacle_and_no_nucleus(amplitude: float) -> None:
    y, x = np.mgrid[:256, :256]
    shading = amplitude * np.exp(-((y - 128) ** 2 + (x - 128) ** 2) / 150**2)
    assert segment_nuclei(shading + np.random.default_rng(0).normal(0, 5, shading.shape)).max() == 0
    centres = [(float(a), float(b)) for a in range(20, 250, 43) for b in range(20, 250, 43)]
    assert segment_nuclei(shading + disks(shading.shape, centres, 9)).max() == len(centres)


@pytest.mark.parametrize("blur", [0, 1, 4])
def test_noise_holds_no_nuclei(blur: int) -> None:
    noise = np.random.default_rng(0).normal(1000, 30, (256, 256))
    assert segment_nuclei(ndimage.gaussian_filter(noise, blur)).max() == 0
    assert segment_nuclei(np.random.default_rng(0).poisson(200, (256, 256)).astype(np.uint16)).max() == 0


@pytest.mark.parametrize(
    "image", [np.zeros((40, 50)), np.full((30, 30), 7, np.uint16), np.zeros((0, 5)), np.ones((1, 1))]
)
def test_empty_images_hold_no_nuclei(image: Array) -> None:
    labels = segment_nuclei(image)
    assert labels.shape == image.shape
    assert labels.dtype == np.int32
    assert not labels.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_image_gives_sequential_labels(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.exponential(1.0, (height, width)) * (rng.random((height, width)) < rng.random())
    labels = segment_nuclei(image)
    assert labels.shape == image.shape
    assert is_sequential(labels)
    cells = segment_cells(rng.random(image.shape), labels)
    np.testing.assert_array_equal(cells[labels > 0], labels[labels > 0])


@pytest.mark.parametrize(
    "image", [np.full((9, 9), np.nan), np.array([[np.inf, 0.0]]), np.zeros((2, 3, 3)), np.zeros((3, 3), complex)]
)
def test_unusable_images_are_refused(image: Array) -> None:
    with pytest.raises(InputError, match="nucleus image"):
        segment_nuclei(image)


def test_a_given_diameter_is_used() -> None:
    shape, centres = grid(3, 20)
    image = disks(shape, centres, 10)
    assert segment_nuclei(image, NucleiConfig(diameter=20)).max() == 9
    assert segment_nuclei(image, NucleiConfig(diameter=90)).max() == 0


def test_a_movie_is_segmented_by_one_diameter() -> None:
    """Swollen and shrunken nuclei are judged by what the middle frame shows, a blank frame by nothing."""
    shape, centres = grid(4, 24)
    frames = [disks(shape, centres, radius) for radius in (9, 12, 15)]
    movie = np.stack([*frames[:2], np.full(shape, 10.0), frames[2], frames[1]])
    labels = segment_movie(movie)
    assert labels.max(axis=(1, 2)).tolist() == [16, 16, 0, 16, 16]
    # The middle frame is blank, so the first one tells the diameter.
    for t in (0, 3):
        one = segment_movie(np.stack([frames[0], movie[t]]), NucleiConfig(diameter=18))
        assert (labels[t] > 0).sum() == pytest.approx((one[1] > 0).sum(), rel=0.1)
    assert not segment_movie(np.zeros((2, 32, 32))).any()
    # A config that says the diameter is taken at its word.
    np.testing.assert_array_equal(
        segment_movie(movie[:2], NucleiConfig(diameter=20))[1], segment_nuclei(movie[1], NucleiConfig(diameter=20))
    )


def nuclei_in_cells() -> tuple[Array, Array]:
    """Four nuclei, ids 7, 3, 40, 12, in cells three times as wide, two of which touch."""
    nuclei, cytoplasm = np.zeros((200, 200), np.int32), np.full((200, 200), 20, np.float32)
    for label, (x, y) in {7: (50, 50), 3: (105, 50), 40: (50, 150), 12: (150, 150)}.items():
        cv2.circle(cytoplasm, (x, y), 30, 100, -1)
        cv2.circle(nuclei, (x, y), 10, label, -1)
    return cv2.GaussianBlur(cytoplasm, (0, 0), 1), nuclei


@pytest.mark.parametrize("with_cytoplasm", [True, False])
def test_every_nucleus_has_one_cell_around_it(with_cytoplasm: bool) -> None:
    cytoplasm, nuclei = nuclei_in_cells()
    cells = segment_cells(cytoplasm if with_cytoplasm else None, nuclei)
    assert cells.dtype == np.int32
    np.testing.assert_array_equal(np.unique(cells), np.unique(nuclei))
    np.testing.assert_array_equal(cells[nuclei > 0], nuclei[nuclei > 0])
    for label in (7, 3, 40, 12):
        assert ndimage.label(cells == label)[1] == 1


def test_cells_fill_the_cytoplasm_and_no_more() -> None:
    cytoplasm, nuclei = nuclei_in_cells()
    cells = segment_cells(cytoplasm, nuclei)
    inside = cytoplasm > 60
    assert (inside & (cells > 0)).sum() / (inside | (cells > 0)).sum() > 0.92
    areas = np.bincount(cells.ravel())
    assert areas[7] == pytest.approx(areas[3], rel=0.1)
    near = segment_cells(cytoplasm, nuclei, CellsConfig(max_distance=0.25))
    assert np.bincount(near.ravel())[12] < 0.4 * areas[12]


def test_expansion_is_the_nearest_nucleus_within_reach() -> None:
    _, nuclei = nuclei_in_cells()
    cells = segment_cells(None, nuclei, CellsConfig(expansion=2.0))
    distance, (y, x) = ndimage.distance_transform_edt(nuclei == 0, return_indices=True)
    diameter = 2 * np.sqrt(np.median(np.bincount(nuclei.ravel())[[3, 7, 12, 40]]) / np.pi)
    slow = np.where(distance <= 2.0 * diameter, nuclei[y, x], 0)
    # OpenCV's distances are within a few per cent of the exact ones, so only edges may differ.
    assert (cells != slow).mean() < 0.02


def test_cytoplasm_without_contrast_leaves_the_nuclei() -> None:
    _, nuclei = nuclei_in_cells()
    np.testing.assert_array_equal(segment_cells(np.full(nuclei.shape, 5), nuclei), nuclei)
    assert not segment_cells(np.random.default_rng(0).random((20, 20)), np.zeros((20, 20), np.int32)).any()


def test_unusable_cells_input_is_refused() -> None:
    cytoplasm, nuclei = nuclei_in_cells()
    with pytest.raises(InputError, match="one site"):
        segment_cells(cytoplasm[:50], nuclei)
    with pytest.raises(InputError, match="integer labels"):
        segment_cells(cytoplasm, nuclei.astype(float))
    with pytest.raises(InputError, match="integer labels"):
        segment_cells(cytoplasm, -nuclei)
    with pytest.raises(InputError, match="cytoplasm image"):
        segment_cells(np.full(nuclei.shape, np.nan), nuclei)


def read(path: Path) -> Array:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return image if image.ndim == 2 else image[..., 0]


def read_stack(path: Path) -> Array:
    pages = cv2.imreadmulti(str(path), flags=cv2.IMREAD_UNCHANGED)[1]
    return np.stack(pages)


def decode_runs(runs: list[str], shape: tuple[int, int]) -> Array:
    """Column-major, one-based runs, a nucleus a string."""
    flat = np.zeros(shape[0] * shape[1], np.int32)
    for label, text in enumerate(runs, 1):
        numbers = np.array(text.split(), int)
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            flat[start - 1 : start - 1 + length] = label
    return flat.reshape(shape, order="F")


def test_real_dsb2018(real_data: Path) -> None:
    folder = real_data / "nuclei_dsb2018"
    runs: dict[str, list[str]] = {}
    for line in (folder / "masks_rle.csv").read_text().splitlines()[1:]:
        image, text = line.split(",")[:2]
        runs.setdefault(image, []).append(text)
    scores = []
    for path in sorted((folder / "images").glob("*.png")):
        image = read(path)
        scores.append(f1(segment_nuclei(image), decode_runs(runs[path.stem], image.shape)))
    assert len(scores) == 27
    assert np.mean(scores) >= 0.80


def test_real_dense_field(real_data: Path) -> None:
    folder = real_data / "nuclei_dense"
    assert f1(segment_nuclei(read(folder / "img2d.tif")), read(folder / "mask2d.tif")) >= 0.80


def test_real_movies_have_the_counts_of_their_readme(real_data: Path) -> None:
    frames = sorted((real_data / "mitocheck_movie" / "mitocheck-movie").glob("*.tif"))
    assert abs(segment_nuclei(read(frames[0])).max() - 13) <= 2
    assert abs(segment_nuclei(read(frames[29])).max() - 19) <= 2
    migration = read_stack(real_data / "cell_migration" / "cancer_cell_migration_crop.tif")
    assert abs(segment_nuclei(migration[0]).max() - 9) <= 2
    assert abs(segment_nuclei(migration[47]).max() - 17) <= 2


def test_real_touching_nuclei_are_told_apart(real_data: Path) -> None:
    """The counts in the data's README are of what hangs together above Otsu's threshold, half of what one sees."""
    folder = real_data / "vendor_layouts" / "ImageXpress" / "9987_Plate_3435" / "TimePoint_1"
    for path, together in zip(sorted(folder.glob("*_w1.TIF")), (8, 18, 23, 37), strict=True):
        image = read(path)
        labels = segment_nuclei(image)
        bright = cv2.threshold(image, 0, 255, cv2.THRESH_OTSU)[1]
        clumps, parts = cv2.connectedComponents((bright > 0).astype(np.uint8))
        assert clumps - 1 >= together
        assert labels.max() > 1.5 * together
        # Hardly anything of what Otsu's threshold takes for nuclei is left out.
        large = [k for k in range(1, clumps) if (parts == k).sum() >= 40]
        assert np.mean([(labels[parts == k] > 0).any() for k in large]) >= 0.95


def test_real_cell_painting(real_data: Path) -> None:
    """CellProfiler's masks leave out nuclei and cells that touch the border, so ours are compared without them too."""
    folder = real_data / "cellpainting_nf1"
    overlaps = []
    for well, count in {"B7": 28, "D6": 27, "D7": 29, "F7": 25, "H12": 23}.items():
        nuclei = segment_nuclei(read(next((folder / "Plate_2_images").glob(f"{well}_*DAPI*"))))
        cells = segment_cells(read(next((folder / "Plate_2_images").glob(f"{well}_*RFP*"))), nuclei)
        true_cells = read(next((folder / "Plate_2_masks").glob(f"{well}_*MaskCells*"))) > 0
        assert abs(len(np.unique(without_border(nuclei))) - 1 - count) <= 1
        ours = without_border(cells) > 0
        overlaps.append((ours & true_cells).sum() / (ours | true_cells).sum())
    assert min(overlaps) > 0.65
    assert np.mean(overlaps) >= 0.8


def without_border(labels: Array) -> Array:
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.where(np.isin(labels, border), 0, labels)
