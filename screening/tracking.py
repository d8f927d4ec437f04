"""Tracking of labelled objects from frame to frame by global assignment, with gaps and divisions.

Neighbouring frames are joined by the assignment of least total cost (overlap, distance, change of area and
of intensity), after a drift common to the field is taken out and, where cells keep their course, each is
looked for where its own course leads. An object that appears beside another that has halved makes both
daughters of it, and the ends left over are joined across missing frames.

Sources: K. Jaqaman et al. 2008 (assignment in two steps, motion from one frame foretelling the next),
C. L. Chalfoun et al. 2016 (overlap, size and distance in the cost), V. Ulman et al. 2017 (tracks end at a
division, as in the Cell Tracking Challenge).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from screening.regions import Places, positions, shared_pixels
from storage_schemas.base import Config
from storage_schemas.errors import InputError

Labels = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Frames are shrunk to this diameter (px) to find their drift, and the peak is refined between pixels.
_DRIFT_DIAMETER = 5.0
# What fewer objects do together cannot be told from what each does by itself.
_DRIFT_CELLS = 5
# Steps of a cell that its usual area is the median of: outlasts a mitosis' contraction and a brief merger.
_USUAL_STEPS = 7


class TrackingConfig(Config):
    """What may be linked; diameters are those of the movie's median object."""

    max_distance: float | None = Field(
        None, gt=0, description="farthest an object moves between frames, px; null is 1.3 diameters"
    )
    max_drift: float = Field(
        2.5, ge=0, description="largest common drift looked for between frames, diameters; 0 looks for none"
    )
    drift_match: float = Field(
        0.6,
        ge=0,
        le=1,
        description="correlation of two frames' foregrounds from which their drift is taken out: 0.6 is a field "
        "that moves as one, 0.3 also tissue that flows",
    )
    min_persistence: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of a cell's velocity that it keeps to the next frame, from which cells are looked for "
        "where their course leads; measured on the movie; 1 never looks ahead",
    )
    overlap_weight: float = Field(0.5, ge=0, description="cost of no overlap, where the farthest distance costs 1")
    area_weight: float = Field(
        0.2, ge=0, description="cost of an e-fold change of area, where the farthest distance costs 1"
    )
    intensity_weight: float = Field(
        0.1,
        ge=0,
        description="cost of an e-fold change of intensity over the background, where the farthest distance costs 1",
    )
    max_gap: int = Field(3, ge=0, description="most frames in a row that a track may miss")
    divisions: bool = Field(True, description="whether divisions are looked for")
    division_distance: float = Field(1.8, gt=0, description="farthest a daughter is from her mother, diameters")
    min_daughter_frames: int = Field(
        2, ge=1, description="frames each daughter must be seen (or to the movie's end), against flicker"
    )


@dataclass(frozen=True, eq=False)
class Tracking:
    """A tracked movie.

    Attributes:
        labels: (T, H, W) int32, one value a track, 1..n ordered by first frame, then by the label given there;
            every object is in exactly one track.
        parents: a row a daughter, columns ``track``, ``parent`` and ``frame`` (the daughter's first, int64): the
            mother's track ends where her daughters' begin.
        drift: (T, 2) float64, how far (y, x) in px the field has moved since the last frame with objects in it;
            (0, 0) for the first frame and where no common drift was seen.
        drift_removed: (T,) bool, whether that drift was taken out before linking: where it is seen and not taken
            out, the field did not move as one (see :attr:`TrackingConfig.drift_match`).
    """

    labels: Labels
    parents: pd.DataFrame
    drift: Floats
    drift_removed: Bools


@dataclass(frozen=True, eq=False)
class _Movie:
    """All n objects of a movie, frame by frame, in the order of their place in the image."""

    planes: Labels  # (T, H, W), every frame relabelled from 1 on in the order of its objects
    inside: list[Places]  # for each frame, positions of its pixels that belong to an object
    first: Ints  # (T + 1,) position of each frame's first object
    frame: Ints
    label: Ints  # as given
    place: Floats  # (n, 2) centroid y, x in px with the drift taken out
    area: Floats
    brightness: Floats  # ln of the intensity over the background, relative to the frame's median object
    travelled: Floats  # (T, 2) drift taken out so far

    @cached_property
    def diameter(self) -> float:
        """Of the median object, px."""
        return 2 * float(np.sqrt(np.median(self.area) / np.pi))

    @cached_property
    def coarse(self) -> list[npt.NDArray[np.float32]]:
        """The foreground of every frame, shrunk to find its drift."""
        shape = self.planes.shape[1:]
        return [_shrink(inside, shape, self.diameter) for inside in self.inside]

    def at(self, t: int) -> slice:
        """Positions of the objects of a frame."""
        return slice(int(self.first[t]), int(self.first[t + 1]))


def link(
    labels: npt.NDArray[np.integer[Any]],
    config: TrackingConfig = TrackingConfig(),  # noqa: B008
    image: npt.NDArray[Any] | None = None,
) -> tuple[Labels, pd.DataFrame]:
    """Labels with one value a track, and the table of divisions: :func:`track` for those who need no more."""
    tracking = track(labels, config, image)
    return tracking.labels, tracking.parents


def track(
    labels: npt.NDArray[np.integer[Any]],
    config: TrackingConfig = TrackingConfig(),  # noqa: B008
    image: npt.NDArray[Any] | None = None,
) -> Tracking:
    """Give every object the id of its track.

    The result depends on which pixels share a label, not on its value.

    Args:
        labels: (T, H, W) integer labels, 0 background; a value need not mean the same object in two frames.
        config: what may be linked.
        image: (T, H, W), any real dtype, that the objects' intensities are measured in; None does without.

    Raises:
        InputError: the labels are not (T, H, W) integers from 0 on, or the image is of another shape or not finite.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise InputError(f"labels must be (T, H, W) integers from 0 on, not {labels.ndim}-d {labels.dtype}")
    if image is not None and (image.shape != labels.shape or not all(np.isfinite(plane).all() for plane in image)):
        raise InputError(f"image must be finite and of the labels' shape {labels.shape}, not {image.shape}")
    drift, removed = np.zeros((len(labels), 2)), np.zeros(len(labels), bool)
    if not labels.any():
        none = pd.DataFrame({"track": [], "parent": [], "frame": []}, dtype=np.int64)
        return Tracking(np.zeros(labels.shape, np.int32), none, drift, removed)
    movie = _measure(labels, image)
    reach = config.max_distance or 1.3 * movie.diameter

    steps = list(pairwise(np.flatnonzero(np.diff(movie.first)).tolist()))
    for s, e in steps:
        drift[e], removed[e] = _common_drift(movie, s, e, reach, config)
    travelled = np.cumsum(np.where(removed[:, None], drift, 0), axis=0)
    movie = replace(movie, place=movie.place - travelled[movie.frame], travelled=travelled)

    before, velocity, persistence = _link_steps(movie, steps, reach, config)
    mother = np.full(len(before), -1)
    if config.divisions:
        _find_divisions(movie, before, mother, config)
    _close_gaps(movie, before, mother, velocity, persistence, reach, config)
    return Tracking(*_number(movie, before, mother), drift, removed)


def _shrink(inside: Places, shape: tuple[int, ...], diameter: float) -> npt.NDArray[np.float32]:
    """The foreground at a size at which an object of the given diameter is a few px wide, as shares of a pixel."""
    factor = _drift_factor(diameter)
    height, width = (-(-side // factor) for side in shape)
    coarse = inside // (shape[1] * factor) * np.int32(width) + inside % shape[1] // factor
    counts = np.bincount(coarse, minlength=height * width).reshape(height, width)
    return (counts[: shape[0] // factor or 1, : shape[1] // factor or 1] / factor**2).astype(np.float32)


def _drift_factor(diameter: float) -> int:
    return max(1, round(diameter / _DRIFT_DIAMETER))


def _shift(
    before: npt.NDArray[np.float32],
    after: npt.NDArray[np.float32],
    diameter: float,
    max_drift: float,
) -> tuple[Floats, float]:
    """Shift (dy, dx), px of the full size, and match of two foregrounds that :func:`_shrink` has shrunk.

    It is the peak of their normalised cross-correlation, which unlike phase correlation looks at the shared
    part of the fields only; the match is the correlation there. Where no peak stands out within ``max_drift``
    diameters, the shift is (0, 0) and the match 0.
    """
    nothing = np.zeros(2), 0.0
    factor = _drift_factor(diameter)
    reach = min(int(np.ceil(max_drift * diameter / factor)), min(before.shape) // 4)
    if reach < 1:
        return nothing
    template = before[reach:-reach, reach:-reach]
    if np.ptp(template) == 0 or np.ptp(after) == 0:
        return nothing
    match = cv2.matchTemplate(after, template, cv2.TM_CCOEFF_NORMED).astype(np.float64)
    y, x = (int(i) for i in np.unravel_index(match.argmax(), match.shape))
    stands_out = match[y, x] > max(0.3, match[reach, reach] + 0.1)
    # A maximum on the rim of the search is a slope, not a peak.
    if not stands_out or min(y, x) == 0 or max(y, x) == 2 * reach:
        return nothing
    peak = np.array([y + _summit(*match[y - 1 : y + 2, x]), x + _summit(*match[y, x - 1 : x + 2])])
    return (peak - reach) * factor, float(match[y, x])


def _summit(left: float, middle: float, right: float) -> float:
    """Place of the top of the parabola through three values, the middle one the largest, from -0.5 to 0.5."""
    bend = left - 2 * middle + right
    return (left - right) / (2 * bend) if bend < 0 else 0.0


def _common_drift(movie: _Movie, s: int, e: int, reach: float, config: TrackingConfig) -> tuple[Floats, bool]:
    """The drift from frame ``s`` to ``e``, and whether to take it out.

    A few cells that happen to move alike correlate as well as a field that has moved, so the drift must also
    make the assignment cheaper than it is without.
    """
    if min(len(movie.area[movie.at(s)]), len(movie.area[movie.at(e)])) < _DRIFT_CELLS:
        return np.zeros(2), False
    drift, match = _shift(movie.coarse[s], movie.coarse[e], movie.diameter, config.max_drift)
    if match == 0 or match < config.drift_match:
        return drift, False
    still, moved = (_link_frames(movie, s, e, move, reach, config)[2] for move in (np.zeros(2), drift))
    return drift, moved > still


def _measure(labels: npt.NDArray[np.integer[Any]], image: npt.NDArray[Any] | None) -> _Movie:
    planes = np.zeros(labels.shape, np.int32)
    insides, frames, ids, places, areas, brightness = [], [], [], [], [], []
    for t, plane in enumerate(map(_native, labels)):
        inside = positions(plane)
        compact, label = pd.factorize(plane.ravel()[inside])
        area = np.bincount(compact, minlength=len(label)).astype(float)
        pixels = inside // plane.shape[1], inside % plane.shape[1]
        place = np.stack([np.bincount(compact, p, minlength=len(label)) / area for p in pixels], axis=1)
        order = np.lexsort((place[:, 1], place[:, 0]))
        rank = np.empty(len(label), np.int32)
        rank[order] = np.arange(1, len(label) + 1)
        planes[t].ravel()[inside] = rank[compact]
        insides.append(inside)
        frames.append(np.full(len(label), t))
        ids.append(label[order])
        places.append(place[order])
        areas.append(area[order])
        seen = np.zeros(len(label)) if image is None else _brightness(image[t], planes[t], inside, area[order])
        brightness.append(seen)
    return _Movie(
        planes=planes,
        inside=insides,
        first=np.cumsum([0, *(len(f) for f in frames)]),
        frame=np.concatenate(frames),
        label=np.concatenate(ids),
        place=np.concatenate(places),
        area=np.concatenate(areas),
        brightness=np.concatenate(brightness),
        travelled=np.zeros((len(labels), 2)),
    )


def _native(plane: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """TIFF files may come in another byte order, which neither pandas nor compiled functions read."""
    return plane if plane.dtype.isnative else plane.astype(plane.dtype.newbyteorder("="))


def _brightness(image: npt.NDArray[Any], plane: Labels, inside: Places, area: Floats) -> Floats:
    """Logarithm of each object's mean intensity over the background, relative to the frame's median object.

    Args:
        image: (H, W).
        plane: (H, W) objects, from 1 on.
        inside: positions of their pixels.
        area: of the objects, px.
    """
    if len(area) == 0:
        return np.zeros(0)
    # A sixteenth of the pixels tells the background as well.
    sample = np.s_[::4, ::4]
    background = image[sample][plane[sample] == 0]
    floor = float(np.median(background)) if background.size else float(image.min())
    owner = plane.ravel()[inside]
    signal = np.bincount(owner, image.ravel()[inside], minlength=len(area) + 1)[1:] / area - floor
    # An object no brighter than the background has no logarithm: it is as dim as a hundredth of the usual.
    usual = float(np.median(signal))
    return np.log(np.maximum(signal / usual, 0.01)) if usual > 0 else np.zeros(len(area))


def _link_steps(
    movie: _Movie, steps: list[tuple[int, int]], reach: float, config: TrackingConfig
) -> tuple[Ints, Floats, float]:
    """For each object the same cell one object earlier (-1 for none), its velocity and how much of it is kept.

    The first round knows no velocities. If its tracks show that cells keep their course, they are linked again
    with each looked for ahead, which may show more of it: directed cells are found in a few rounds.
    """
    persistence = 0.0
    steps = [(s, e) for s, e in steps if e - s <= config.max_gap + 1]
    while True:
        before, velocity = np.full(len(movie.frame), -1), np.zeros((len(movie.frame), 2))
        for s, e in steps:
            move = velocity[movie.at(s)] * _coasting(persistence, e - s)
            one, other, _ = _link_frames(movie, s, e, move, reach, config)
            before[other] = one
            velocity[other] = (movie.place[other] - movie.place[one]) / (e - s)
        found = _persistence(before, velocity)
        # The rounds end because each must raise a number that is at most 1.
        if found < config.min_persistence or found < persistence + 0.05:
            return before, velocity, persistence
        persistence = found


def _persistence(before: Ints, velocity: Floats) -> float:
    """Slope of a cell's velocity on its velocity a step before, 0..1."""
    later = np.flatnonzero(before >= 0)
    later = later[before[before[later]] >= 0]
    now, past = velocity[later], velocity[before[later]]
    # Fewer cannot tell a course from chance.
    if len(later) < 10 or not past.any():
        return 0.0
    return float(np.clip((now * past).sum() / (past**2).sum(), 0, 1))


def _coasting(persistence: float, frames: int) -> float:
    """Frames' worth of its velocity that a cell goes on by when it keeps a share of it each frame."""
    return sum(persistence**k for k in range(1, frames + 1))


def _link_frames(
    movie: _Movie, s: int, e: int, move: Floats, reach: float, config: TrackingConfig
) -> tuple[Ints, Ints, float]:
    """Objects of frame ``s`` that are expected to ``move`` (px), what they are in frame ``e``, and the cost saved.

    What is saved is against the cost of leaving all unlinked.
    """
    here, there = movie.at(s), movie.at(e)
    move = np.broadcast_to(move, (here.stop - here.start, 2))
    one, other, distance = _near(movie.place[here] + move, movie.place[there], reach)
    drift = movie.travelled[e] - movie.travelled[s]
    shared = _overlap(movie, s, e, np.rint(move + drift).astype(np.int64))[one + 1, other + 1]
    one, other = one + here.start, other + there.start
    union = movie.area[one] + movie.area[other] - shared
    cost = (distance / reach) ** 2 + config.overlap_weight * (1 - shared / union)
    cost += _change(movie, one, other, config)
    worst = 1 + config.overlap_weight
    kept = _assign(one, other, cost, worst)
    return one[kept], other[kept], float((worst - cost[kept]).sum())


def _change(movie: _Movie, one: Ints, other: Ints, config: TrackingConfig) -> Floats:
    """Cost of the change of area and intensity from one object to the other."""
    growth = np.abs(np.log(movie.area[one] / movie.area[other]))
    brightening = np.abs(movie.brightness[one] - movie.brightness[other])
    return config.area_weight * growth + config.intensity_weight * brightening


def _overlap(movie: _Movie, s: int, e: int, move: Ints) -> Ints:
    """(ns + 1, ne + 1) pixels that object i of frame ``s``, moved by ``move[i - 1]`` px, shares with j of ``e``."""
    ns, ne = (int(movie.first[t + 1] - movie.first[t]) for t in (s, e))
    return shared_pixels(movie.planes[s], movie.inside[s], move, movie.planes[e], ns, ne)


def _near(a: Floats, b: Floats, reach: float) -> tuple[Ints, Ints, Floats]:
    """Pairs of points at most ``reach`` apart, in order, and their distances."""
    if len(a) == 0 or len(b) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    pairs = cKDTree(a).sparse_distance_matrix(cKDTree(b), reach, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"]))]
    return pairs["i"].astype(np.int64), pairs["j"].astype(np.int64), pairs["v"]


def _assign(one: Ints, other: Ints, cost: Floats, max_cost: float) -> Ints:
    """Positions of the one-to-one pairs of least total cost, where leaving two ends apart costs ``max_cost``.

    Pairs that share no object even through others are solved apart: the sum is the same, and the time grows
    with the crowding and not with the square of the number of objects.
    """
    allowed = np.flatnonzero(cost < max_cost)
    if allowed.size == 0:
        return allowed
    rows, row = np.unique(one[allowed], return_inverse=True)
    columns, column = np.unique(other[allowed], return_inverse=True)
    size = len(rows) + len(columns)
    graph = coo_matrix((np.ones(len(row)), (row, column + len(rows))), shape=(size, size))
    group = connected_components(graph, directed=False)[1][row]
    alone = np.bincount(group)[group] == 1
    chosen = [allowed[alone]]
    contended = np.flatnonzero(~alone)
    contended = contended[np.argsort(group[contended], kind="stable")]
    for members in np.split(contended, np.flatnonzero(np.diff(group[contended])) + 1):
        r, i = np.unique(row[members], return_inverse=True)
        c, j = np.unique(column[members], return_inverse=True)
        table = np.full((len(r), len(c)), max_cost)
        edge = np.full(table.shape, -1)
        table[i, j] = cost[allowed[members]]
        edge[i, j] = allowed[members]
        chosen.append(edge[linear_sum_assignment(table)])
    kept = np.concatenate(chosen)
    return np.sort(kept[kept >= 0])


def _find_divisions(movie: _Movie, before: Ints, mother: Ints, config: TrackingConfig) -> None:
    """Write ``mother`` for both daughters of each division, and cut the link from her to either of them.

    Candidates are two objects near to where she was, either both new or one of them what she was linked to.
    The likeliest are taken first.
    """
    n = len(before)
    after = np.full(n, -1)
    after[before[before >= 0]] = np.flatnonzero(before >= 0)
    age = np.ones(n, np.int64)  # frames from here to the end of the track
    for i in range(n - 1, -1, -1):
        if after[i] >= 0:
            age[i] += age[after[i]]
    lasting = age >= np.minimum(config.min_daughter_frames, movie.frame[-1] - movie.frame + 1)
    reach, typical = config.division_distance * movie.diameter, float(np.median(movie.area))

    candidates: list[tuple[float, int, int, int]] = []
    for s, e in pairwise(range(len(movie.planes))):
        m, d, _ = _near(movie.place[movie.at(s)], movie.place[movie.at(e)], reach)
        m, d = m + movie.first[s], d + movie.first[e]
        free = lasting[d] & ((before[d] < 0) | (before[d] == m))
        m, d = m[free], d[free]
        parents, counts = np.unique(m, return_counts=True)
        for parent in parents[counts > 1].tolist():
            beside = d[m == parent]
            heir = int(after[parent])
            was = _usual_area(movie.area, before, parent, typical)
            for a, b in combinations(beside.tolist(), 2):
                if heir < 0 or heir in (a, b):
                    cost = _division_cost(movie, was, parent, a, b, heir >= 0)
                    if cost is not None:
                        candidates.append((cost, parent, a, b))
    taken: set[int] = set()
    for _, parent, a, b in sorted(candidates):
        if taken.isdisjoint((~parent, a, b)):  # a mother may herself be a daughter, so she is noted apart
            taken.update((~parent, a, b))
            before[[a, b]] = -1
            mother[[a, b]] = parent


def _usual_area(area: Floats, before: Ints, i: int, typical: float) -> float:
    """Area of a cell before what befell it last, and no less than the movie's typical one.

    The median of its last steps is neither the contracted area of a cell about to divide, nor that of a mask
    that held its neighbour too, whose splitting is no division.
    """
    steps: list[float] = []
    while i >= 0 and len(steps) < _USUAL_STEPS:
        steps.append(area[i])
        i = int(before[i])
    return max(typical, float(np.median(steps)))


def _division_cost(movie: _Movie, was: float, mother: int, a: int, b: int, goes_on: bool) -> float | None:
    """How unlike a division the mother and two daughters are, or None where they cannot be one.

    Together they are about as large as she is, contracted, or was before. A mother whose track was followed on
    must have been clearly larger than either, unless she had contracted; where she vanished and two objects
    came in her place, that is evidence enough.
    """
    between = movie.place[a] - movie.place[b]
    middle = (movie.place[a] + movie.place[b]) / 2 - movie.place[mother]
    lopsided = float(np.hypot(*middle) / max(np.hypot(*between), 1e-9))
    unlike = abs(float(np.log(movie.area[a] / movie.area[b])))
    now, both = float(movie.area[mother]), float(movie.area[a] + movie.area[b])
    misfit = both / min(max(both, min(now, was)), max(now, was))
    limit = np.inf if not goes_on else 1.1 if now < 0.7 * was else 0.9
    larger = max(movie.area[a], movie.area[b]) / was
    if lopsided > 0.4 or unlike > np.log(2) or not 0.4 < misfit < 3 or larger > limit:
        return None
    return lopsided + unlike + abs(float(np.log(misfit)))


def _close_gaps(
    movie: _Movie,
    before: Ints,
    mother: Ints,
    velocity: Floats,
    persistence: float,
    reach: float,
    config: TrackingConfig,
) -> None:
    """Join ends of tracks to later beginnings within ``config.max_gap`` missing frames."""
    goes_on = np.zeros(len(before), bool)
    goes_on[before[before >= 0]] = True
    goes_on[mother[mother >= 0]] = True
    ends = np.flatnonzero(~goes_on)
    starts = np.flatnonzero((before < 0) & (mother < 0))
    one, other, cost = [], [], []
    for frames in range(2, config.max_gap + 2):
        expected = movie.place + velocity * _coasting(persistence, frames)
        for t in np.unique(movie.frame[ends]):
            here, there = ends[movie.frame[ends] == t], starts[movie.frame[starts] == t + frames]
            # A cell wanders: its likely distance grows with the root of the time.
            i, j, distance = _near(expected[here], movie.place[there], reach * np.sqrt(frames))
            i, j = here[i], there[j]
            one.append(i)
            other.append(j)
            cost.append(distance**2 / (reach**2 * frames) + _change(movie, i, j, config))
    if one:
        i, j = np.concatenate(one), np.concatenate(other)
        kept = _assign(i, j, np.concatenate(cost), 1.0)
        before[j[kept]] = i[kept]


def _number(movie: _Movie, before: Ints, mother: Ints) -> tuple[Labels, pd.DataFrame]:
    """The movie's planes with one value a track, and the table of daughters."""
    root = np.arange(len(before))
    for i in np.flatnonzero(before >= 0):
        root[i] = root[before[i]]
    starts = np.flatnonzero(before < 0)
    starts = starts[np.lexsort((movie.label[starts], movie.frame[starts]))]
    track = np.zeros(len(before), np.int32)
    track[starts] = np.arange(1, len(starts) + 1)
    track = track[root]
    for t, plane in enumerate(movie.planes):
        # In place, for nobody asks again which object of its frame a pixel is of.
        inside = movie.inside[t]
        plane.ravel()[inside] = track[movie.at(t)][plane.ravel()[inside] - 1]
    daughters = starts[mother[starts] >= 0]
    parents = {
        "track": track[daughters].astype(np.int64),
        "parent": track[mother[daughters]].astype(np.int64),
        "frame": movie.frame[daughters],
    }
    return movie.planes, pd.DataFrame(parents)
