from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from screening import clips, features
from screening.clips import (
    CellScaling,
    ClipsConfig,
    FixedScaling,
    FixedWindow,
    PlateScaling,
    Scaling,
    SiteScaling,
    TrackWindow,
)
from storage_schemas.clips import WHITE, Ranges
from storage_schemas.errors import InputError

LOW, HIGH = np.array([100, 0], np.float32), np.array([3000, 2000], np.float32)


def site(
    n_frames: int = 6, shape: tuple[int, int] = (60, 70), n_tracks: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ellipses that move, on noise: a stack (T, 2, H, W) float32 and labels (T, H, W)."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((n_frames, *shape), np.int32)
    centres = rng.uniform(14, np.array(shape) - 14, (n_tracks, 2))
    radii = rng.uniform(5, 9, n_tracks)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for frame in range(n_frames):
        for i, (cy, cx) in enumerate(centres):
            cells[frame][np.hypot(y - cy, (x - cx) / 1.3) < radii[i]] = i + 1
        centres += rng.normal(0, 1.5, centres.shape)
    return rng.uniform(-500, 4000, (n_frames, 2, *shape)).astype(np.float32), cells


def measured(stack: np.ndarray, cells: np.ndarray) -> features.Tracks:
    return features.measure(cells, cells, stack, ("a", "b"))


def cut(stack: np.ndarray, cells: np.ndarray, ids: list[int], bad: list[int], config: ClipsConfig) -> np.ndarray:
    flags = np.isin(np.arange(len(stack)), bad)
    frames = clips.choose_frames(len(stack), config)
    return clips.cut(stack, cells, measured(stack, cells), np.array(ids, int), frames, flags, LOW, HIGH, config)


def naive_cut(stack: np.ndarray, cells: np.ndarray, ids: list[int], bad: list[int], config: ClipsConfig) -> np.ndarray:
    """The same one window at a time: find the frames by search, pad, slice, mask, resize."""

    def box(track: int, frame: int) -> tuple[int, int, int, int]:
        y, x = np.nonzero(cells[frame] == track)
        return y.min(), x.min(), y.max() + 1, x.max() + 1

    good = [t for t in range(len(stack)) if not (config.repair and t in bad)]
    out = []
    for track in ids:
        seen = [t for t in good if (cells[t] == track).any()]
        shown = [min(good, key=lambda t: (abs(t - frame), t)) for frame in clips.choose_frames(len(stack), config)]
        held = [min(seen, key=lambda t: (abs(t - frame), t)) for frame in shown]
        if isinstance(config.window, FixedWindow):
            side = config.window.size
        else:
            boxes = np.array([box(track, t) for t in held])
            side = min(config.window.max_size, int((boxes[:, 2:] - boxes[:, :2]).max()))
        clip = []
        for pixels, window in zip(shown, held, strict=True):
            y0, x0, y1, x1 = box(track, window)
            top, left = (y0 + y1) // 2 - side // 2, (x0 + x1) // 2 - side // 2
            planes = []
            for channel in range(stack.shape[1]):
                share = (stack[pixels, channel] - LOW[channel]) / (HIGH - LOW)[channel]
                image = WHITE[config.dtype] * np.nan_to_num(share).clip(0, 1)
                if config.dtype != "float16":
                    image = np.floor(image + 0.5)
                padded = np.pad(image, side, mode="edge" if config.padding == "edge" else "constant")
                if config.mask == "soft":
                    mask = np.pad((cells[window] == track).astype(float), side)
                    padded = padded * cv2.blur(mask, (11, 11), borderType=cv2.BORDER_CONSTANT)
                view = padded[top + side : top + 2 * side, left + side : left + 2 * side]
                if side != config.size:
                    way = cv2.INTER_AREA if side > config.size else cv2.INTER_LINEAR
                    view = cv2.resize(view, (config.size, config.size), interpolation=way)
                planes.append(view)
            clip.append(planes)
        out.append(np.swapaxes(clip, 0, 1))
    return np.array(out)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
@pytest.mark.parametrize(
    ("mask", "padding"), [("none", "black"), ("none", "edge"), ("soft", "black"), ("soft", "edge")]
)
@pytest.mark.parametrize(
    ("window", "size"),
    [
        (FixedWindow(size=24), 24),
        (FixedWindow(size=25), 25),
        (FixedWindow(size=90), 32),
        (FixedWindow(size=16), 24),
        (TrackWindow(), 32),
        (TrackWindow(max_size=12), 12),
    ],
)
def test_equals_one_window_at_a_time(
    dtype: str, mask: str, padding: str, window: FixedWindow | TrackWindow, size: int
) -> None:
    stack, cells = site()
    cells[2][cells[2] == 3] = 0
    cells[:2][cells[:2] == 1] = 0
    cells[3][cells[3] == 2] = 0
    cells[3, :9, 20:28] = 2  # at the image's edge
    stack[1, 0, 5:9] = np.nan
    config = ClipsConfig(frames=5, window=window, size=size, mask=mask, padding=padding, dtype=dtype)
    got = cut(stack, cells, [1, 2, 3], [4], config)
    want = naive_cut(stack, cells, [1, 2, 3], [4], config)
    assert got.dtype == dtype
    assert got.shape == (3, 2, 5, size, size)
    exact = mask == "none" and size == getattr(window, "size", 0)
    # Of integers each step rounds: two levels at most. A float16 has 11 significant bits.
    # A single float reaches to within a level of 16 bit.
    tolerance = {"uint8": 0 if exact else 2, "uint16": 1 if exact else 2, "float16": 2**-11}[dtype]
    assert np.abs(got.astype(float) - want).max() <= tolerance
    assert got.max() > 0.8 * WHITE[dtype]
    if padding == "edge" and mask == "none" and size == 24:
        assert (got[1, 1, 3, 0] == got[1, 1, 3, 5]).all()
        assert got[1, 1, 3, 0].any()


@settings(max_examples=40, deadline=None)
@given(
    corner=st.tuples(st.integers(0, 19), st.integers(0, 24)),
    extent=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(8, 48),
)
def test_a_pixel_of_a_clip_is_the_pixel_of_the_site(
    corner: tuple[int, int], extent: tuple[int, int], size: int
) -> None:
    (y0, x0), (height, width) = corner, extent
    y1, x1 = min(y0 + height, 20), min(x0 + width, 25)
    # Each pixel of the site has a value of its own, 1 to 250 in one channel and its row in another.
    image = np.stack([np.arange(500).reshape(20, 25) % 250 + 1, np.mgrid[1:21, :25][0]])
    cells = np.zeros((1, 20, 25), np.int32)
    cells[0, y0:y1, x0:x1] = 1
    config = ClipsConfig(frames=1, window=FixedWindow(size=size), size=size, mask="none")
    stack = image[None].astype(np.uint16)
    ranges = np.zeros(2, np.float32), np.full(2, 255, np.float32)
    (clip,) = clips.cut(
        stack,
        cells,
        measured(stack, cells),
        np.array([1]),
        np.array([0]),
        np.zeros(1, bool),
        *ranges,
        config,
    )
    top, left = (y0 + y1) // 2 - size // 2, (x0 + x1) // 2 - size // 2
    for i, j in np.ndindex(size, size):
        y, x = top + i, left + j
        inside = 0 <= y < 20 and 0 <= x < 25
        assert clip[:, 0, i, j].tolist() == (image[:, y, x].tolist() if inside else [0, 0])


def test_bad_frames_are_repaired_only_when_asked() -> None:
    stack, cells = site()
    config = ClipsConfig(frames=6, window=FixedWindow(size=24), size=24)
    whole = cut(stack, cells, [1], [], config)
    repaired = cut(stack, cells, [1], [0, 3], config)
    np.testing.assert_array_equal(repaired[:, :, [0, 3]], whole[:, :, [1, 2]])
    np.testing.assert_array_equal(repaired[:, :, [1, 2, 4, 5]], whole[:, :, [1, 2, 4, 5]])
    as_is = cut(stack, cells, [1], [0, 3], config.model_copy(update={"repair": False}))
    np.testing.assert_array_equal(as_is, whole)


def test_soft_mask_blacks_out_other_cells() -> None:
    cells = np.zeros((1, 60, 60), np.int32)
    cells[0, 20:40, 10:30], cells[0, 20:40, 42:58] = 1, 2
    stack = np.full((1, 2, 60, 60), 5000, np.float32)
    config = ClipsConfig(frames=1, window=FixedWindow(size=60), size=60)
    clip = cut(stack, cells, [1], [], config)[0, 0, 0]
    # The window's centre (30, 20) is at (30, 30): columns move by 10.
    assert clip[30, 30] == 255
    assert (clip[:, 46:] == 0).all()
    assert 0 < clip[30, 20] < 255


def test_no_tracks_and_movies_of_one_frame() -> None:
    stack, cells = site(1)
    config = ClipsConfig(frames=1, size=16)
    assert cut(stack, cells, [], [], config).shape == (0, 2, 1, 16, 16)
    assert cut(stack, cells, [4, 2], [], config).shape == (2, 2, 1, 16, 16)
    blank = np.zeros_like(cells)
    table = clips.select(measured(stack, blank), np.array([0]), np.zeros(1, bool), (60, 70), config)
    assert list(table.columns) == ["track", "excluded", "n_missing", "n_repaired"]
    assert table.empty
    assert cut(stack, blank, [], [], config).shape == (0, 2, 1, 16, 16)


def test_a_range_without_width_gives_black_and_white() -> None:
    stack = np.array([-1, 0, 1, np.nan], np.float32).reshape(1, 4)
    for dtype, white in ((np.uint8, 255), (np.float32, 1)):
        out = np.empty((1, 4), dtype)
        clips._scale(stack, np.float32(0), np.float32(0), np.float32(white), out)
        assert out.tolist() == [[0, 0, white, 0]]


def reasons(cells: np.ndarray, bad: list[int], config: ClipsConfig) -> list[str]:
    stack = np.zeros((len(cells), 2, *cells.shape[1:]), np.float32)
    flags = np.isin(np.arange(len(cells)), bad)
    frames = clips.choose_frames(len(cells), config)
    table = clips.select(measured(stack, cells), frames, flags, cells.shape[1:], config)
    assert table.track.tolist() == list(range(1, len(table) + 1))
    return table.excluded.tolist()


def squares(n_frames: int = 4) -> np.ndarray:
    """Four tracks of 10 x 10 px away from the border."""
    cells = np.zeros((n_frames, 60, 60), np.int32)
    for track, (y, x) in enumerate([(5, 5), (5, 40), (40, 5), (40, 40)], start=1):
        cells[:, y : y + 10, x : x + 10] = track
    return cells


def test_each_rule_excludes_its_own_track() -> None:
    cells = squares()
    cells[1:3][cells[1:3] == 2] = 0
    cells[3, 0:10, 5:15] = 1
    cells[cells == 3] = 0
    cells[:, 40:44, 5:11] = 3
    config = ClipsConfig(frames=4, max_missing=0.25)
    assert reasons(cells, [], config) == [clips.BORDER, clips.SHORT, clips.SMALL, clips.KEPT]
    anywhere = ClipsConfig(frames=4, max_missing=0.5, exclude_border=False, min_relative_area=0)
    assert reasons(cells, [], anywhere) == [clips.KEPT] * 4


def test_the_last_row_and_column_are_the_border_too() -> None:
    cells = squares()
    cells[0, 50:60, 40:50] = 4
    cells[0, 5:15, 50:60] = 2
    config = ClipsConfig(frames=4)
    assert reasons(cells, [], config) == [clips.KEPT, clips.BORDER, clips.KEPT, clips.BORDER]


def test_too_many_bad_frames_exclude_all_tracks() -> None:
    config = ClipsConfig(frames=4, max_bad=0.25)
    assert reasons(squares(), [2], config) == [clips.KEPT] * 4
    assert reasons(squares(), [1, 2], config) == [clips.BAD_FRAMES] * 4
    tolerant = ClipsConfig(frames=4, max_bad=1)
    assert reasons(squares(), [0, 1, 2], tolerant) == [clips.KEPT] * 4
    assert reasons(squares(), [0, 1, 2, 3], tolerant) == [clips.BAD_FRAMES] * 4


def test_counts_missing_and_repaired_frames() -> None:
    cells = squares(8)
    cells[3:5][cells[3:5] == 1] = 0
    stack = np.zeros((8, 2, 60, 60), np.float32)
    bad = np.isin(np.arange(8), [4])
    for repair, missing in ((True, 2), (False, 2)):
        config = ClipsConfig(frames=8, repair=repair)
        table = clips.select(measured(stack, cells), np.arange(8), bad, (60, 60), config)
        # Frame 4 shows frame 3, the earlier of two good ones, where track 1 is missing as well.
        assert table.n_missing.tolist() == [missing, 0, 0, 0]
        assert table.n_repaired.tolist() == [int(repair)] * 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bad=st.sets(st.integers(0, 5)), repair=st.booleans())
def test_whatever_is_kept_can_be_cut(seed: int, bad: set[int], repair: bool) -> None:
    stack, cells = site(seed=seed)
    rng = np.random.default_rng(seed)
    for frame, track in np.argwhere(rng.random((6, 5)) < 0.3):
        cells[frame][cells[frame] == track] = 0
    config = ClipsConfig(frames=4, window=TrackWindow(), size=8, max_missing=0.9, max_bad=1, repair=repair)
    kept = [i + 1 for i, why in enumerate(reasons(cells, sorted(bad), config)) if not why]
    assert cut(stack, cells, kept, sorted(bad), config).shape == (len(kept), 2, 4, 8, 8)


@given(st.integers(1, 40), st.integers(0, 60))
def test_spread_frames_span_the_movie_without_repeats(frames: int, more: int) -> None:
    n_frames = frames + more
    chosen = clips.choose_frames(n_frames, ClipsConfig(frames=frames))
    assert len(chosen) == frames
    assert chosen[0] == 0
    assert (np.diff(chosen) > 0).all()
    if frames > 1:
        assert chosen[-1] == n_frames - 1
        assert np.ptp(np.diff(chosen)) <= 1


def test_stepped_frames_and_short_movies() -> None:
    config = ClipsConfig(frames=4, step=3)
    assert clips.choose_frames(10, config).tolist() == [0, 3, 6, 9]
    with pytest.raises(InputError, match=r"9 frames .* takes 10"):
        clips.choose_frames(9, config)
    with pytest.raises(InputError, match=r"clips\.frames"):
        clips.choose_frames(15, ClipsConfig())


def ranges(stack: np.ndarray, cells: np.ndarray, ids: list[int], config: ClipsConfig) -> Ranges:
    frames = clips.choose_frames(len(stack), config)
    bad = np.zeros(len(stack), bool)
    return clips.intensity_ranges(stack, cells, measured(stack, cells), np.array(ids), frames, bad, LOW, HIGH, config)


def test_ranges_of_plate_site_and_fixed_scaling() -> None:
    stack, cells = site()
    stack[0, 0, 0, 0] = np.nan
    of_plate = ranges(stack, cells, [1, 3], ClipsConfig(frames=2))
    assert of_plate.low.tolist() == [LOW.tolist()] * 2
    assert of_plate.high.tolist() == [HIGH.tolist()] * 2
    of_site = ranges(stack, cells, [1, 3], ClipsConfig(frames=2, scaling=SiteScaling(low=10, high=90)))
    for channel in range(2):
        want = np.nanpercentile(stack[:, channel], (10, 90))
        for clip in range(2):
            np.testing.assert_allclose([of_site.low[clip, channel], of_site.high[clip, channel]], want, rtol=1e-5)
    fixed = ranges(stack, cells, [2], ClipsConfig(frames=2, scaling=FixedScaling(low=(10,), high=(100, 200))))
    assert (fixed.low.tolist(), fixed.high.tolist()) == ([[10, 10]], [[100, 200]])
    with pytest.raises(InputError, match=r"clips\.scaling\.high has 3 values for the 2 channels"):
        ranges(stack, cells, [2], ClipsConfig(frames=2, scaling=FixedScaling(high=(1, 2, 3))))


def test_ranges_of_a_cell_are_those_of_its_own_pixels_over_the_clip() -> None:
    stack, cells = site()
    cells[1][cells[1] == 2] = 0
    config = ClipsConfig(frames=3, step=2, scaling=CellScaling(low=0, high=100))
    got = ranges(stack, cells, [4, 2], config)
    for i, track in enumerate((4, 2)):
        for channel in range(2):
            own = np.concatenate([stack[t, channel][cells[t] == track] for t in (0, 2, 4)])
            np.testing.assert_array_equal([got.low[i, channel], got.high[i, channel]], [own.min(), own.max()])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16"])
@pytest.mark.parametrize(
    "scaling", [PlateScaling(), SiteScaling(), FixedScaling(low=(-100,), high=(3500,)), CellScaling()]
)
def test_intensities_come_back(dtype: str, scaling: Scaling) -> None:
    stack, cells = site()
    config = ClipsConfig(
        frames=6, window=FixedWindow(size=24), size=24, mask="none", padding="edge", scaling=scaling, dtype=dtype
    )
    ids = [3, 1, 4]
    found = ranges(stack, cells, ids, config)
    frames, bad = np.arange(6), np.zeros(6, bool)
    tracks = measured(stack, cells)
    cutout = clips.cut(stack, cells, tracks, np.array(ids), frames, bad, found.low, found.high, config)
    back = found.intensities(cutout)
    step = {"uint8": 1 / 255, "uint16": 1 / 65535, "float16": 2**-11}[dtype]
    for i, track in enumerate(ids):
        for frame in frames:
            y, x = (tracks.box[track - 1, frame, :2] + tracks.box[track - 1, frame, 2:]) // 2
            rows, columns = (np.arange(12 - 24, 12) + centre for centre in (y, x))
            image = stack[frame][:, rows.clip(0, 59)][:, :, columns.clip(0, 69)]
            for channel in range(2):
                low, high = found.low[i, channel], found.high[i, channel]
                want = image[channel].clip(low, high)
                assert np.abs(back[i, channel, frame] - want).max() <= 0.51 * step * (high - low) + 1e-3


def test_cell_scaling_shows_a_dim_cell_like_a_bright_one_and_plate_scaling_does_not() -> None:
    cells = squares(2)
    stack = np.random.default_rng(0).uniform(50, 60, (2, 2, 60, 60)).astype(np.float32)
    pattern = np.random.default_rng(1).uniform(200, 1000, (10, 10))
    boxes = features.measure(cells, cells, stack, ("a", "b")).box[:, 0]
    for track, gain in ((1, 1.0), (2, 0.5)):
        y0, x0, y1, x1 = boxes[track - 1]
        stack[:, :, y0:y1, x0:x1] = gain * pattern
    shown = {}
    for scaling in (PlateScaling(), CellScaling()):
        config = ClipsConfig(frames=2, window=FixedWindow(size=10), size=10, mask="none", scaling=scaling)
        found = ranges(stack, cells, [1, 2], config)
        tracks, frames, bad = measured(stack, cells), np.arange(2), np.zeros(2, bool)
        shown[scaling.method] = clips.cut(
            stack, cells, tracks, np.array([1, 2]), frames, bad, found.low, found.high, config
        ).astype(int)
    assert np.abs(shown["cell"][0] - shown["cell"][1]).max() <= 1
    assert shown["plate"][0].mean() > 1.8 * shown["plate"][1].mean()


def test_config_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValidationError, match="below high"):
        SiteScaling(low=50, high=50)
    for low, high, problem in (
        ((5,), (5,), "below high"),
        ((0, 9), (5,), "below high"),
        ((0, 0), (1, 1, 1), "as many"),
        ((), (1,), "at least 1"),
    ):
        with pytest.raises(ValidationError, match=problem):
            FixedScaling(low=low, high=high)
    with pytest.raises(ValidationError):
        ClipsConfig.model_validate({"window": {"method": "fixed", "max_size": 3}})
    assert ClipsConfig.model_validate({"window": {"method": "track"}}).window == TrackWindow()
