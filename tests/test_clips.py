from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from screening import clips, features
from screening.clips import ClipsConfig, FixedScaling, FixedWindow, SiteScaling, TrackWindow
from screening.illumination import Calibration
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
                image = np.floor(255 * np.nan_to_num(share).clip(0, 1) + 0.5)
                if config.mask == "soft":
                    mask = (cells[window] == track).astype(float)
                    mask = cv2.blur(mask, (11, 11), borderType=cv2.BORDER_CONSTANT)
                    image = image * mask
                padded = np.pad(image, side)
                view = padded[top + side : top + 2 * side, left + side : left + 2 * side]
                if side != config.size:
                    way = cv2.INTER_AREA if side > config.size else cv2.INTER_LINEAR
                    view = cv2.resize(view, (config.size, config.size), interpolation=way)
                planes.append(view)
            clip.append(planes)
        out.append(np.swapaxes(clip, 0, 1))
    return np.array(out)


@pytest.mark.parametrize("mask", ["none", "soft"])
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
def test_equals_one_window_at_a_time(mask: str, window: FixedWindow | TrackWindow, size: int) -> None:
    stack, cells = site()
    cells[2][cells[2] == 3] = 0
    cells[:2][cells[:2] == 1] = 0
    stack[1, 0, 5:9] = np.nan
    config = ClipsConfig(frames=5, window=window, size=size, mask=mask)
    got = cut(stack, cells, [1, 2, 3], [4], config)
    want = naive_cut(stack, cells, [1, 2, 3], [4], config)
    assert got.dtype == np.uint8
    assert got.shape == (3, 2, 5, size, size)
    exact = mask == "none" and size == getattr(window, "size", 0)
    # Masks are 8 bit and each step rounds: two levels at most.
    assert np.abs(got - want).max() <= (0 if exact else 2)
    assert got.max() > 200


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
    out = np.empty((1, 4), np.uint8)
    clips._to_uint8(stack, np.float32(0), np.float32(0), out)
    assert out.tolist() == [[0, 0, 255, 0]]


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


def test_intensity_range_by_plate_site_or_fixed() -> None:
    calibration = Calibration(None, np.zeros(2, np.float32), LOW, HIGH)
    stack = site()[0]
    stack[0, 0, 0, 0] = np.nan
    low, high = clips.intensity_range(stack, calibration, ClipsConfig().scaling)
    assert low is LOW
    assert high is HIGH
    low, high = clips.intensity_range(stack, calibration, SiteScaling(low=10, high=90))
    for channel in range(2):
        want = np.nanpercentile(stack[:, channel], (10, 90))
        np.testing.assert_allclose([low[channel], high[channel]], want, rtol=1e-5)
    fixed = FixedScaling(low=(10,), high=(100, 200))
    low, high = clips.intensity_range(stack, calibration, fixed)
    assert (low.tolist(), high.tolist()) == ([10, 10], [100, 200])
    for wrong in (FixedScaling(high=(1, 2, 3)), FixedScaling(low=(5,), high=(5,))):
        with pytest.raises(InputError, match=r"clips\.scaling"):
            clips.intensity_range(stack, calibration, wrong)


def test_config_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValidationError, match="below high"):
        SiteScaling(low=50, high=50)
    with pytest.raises(ValidationError):
        ClipsConfig.model_validate({"window": {"method": "fixed", "max_size": 3}})
    assert ClipsConfig.model_validate({"window": {"method": "track"}}).window == TrackWindow()
