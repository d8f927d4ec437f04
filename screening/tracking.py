"""Tracking of labelled objects from frame to frame by global assignment, with gaps and divisions.

Neighbouring frames are joined by the assignment of least total cost (overlap, distance and change of area,
after the drift common to the frame is taken out), the ends left over are joined across missing frames the
same way, and an object that appears beside another that has halved makes both daughters of it.

Sources: K. Jaqaman et al. 2008 (assignment in two steps), C. L. Chalfoun et al. 2016 (overlap, size and
distance in the cost), V. Ulman et al. 2017 (tracks end at a division, as in the Cell Tracking Challenge).
"""

from __future__ import annotations

from dataclasses import dataclass
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

from storage_schemas.base import Config
from storage_schemas.errors import InputError

Labels = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Frames are shrunk to this diameter (px) to find their drift: an error of a tenth of a diameter does no harm.
_DRIFT_DIAMETER = 10.0


class TrackingConfig(Config):
    """What may be linked; diameters are those of the movie's median object."""

    max_distance: float | None = Field(
        None, gt=0, description="farthest an object moves between frames, px; null is 1.3 diameters"
    )
    max_drift: float = Field(
        0.5,
        ge=0,
        description="largest common drift looked for between frames, diameters: 0.5 covers a stage's "
        "jitter, moving tissue needs more, 0 looks for none",
    )
    overlap_weight: float = Field(0.5, ge=0, description="cost of no overlap, where the farthest distance costs 1")
    area_weight: float = Field(
        0.2, ge=0, description="cost of an e-fold change of area, where the farthest distance costs 1"
    )
    max_gap: int = Field(2, ge=0, description="most frames in a row that a track may miss")
    divisions: bool = Field(True, description="whether divisions are looked for")
    division_distance: float = Field(1.8, gt=0, description="farthest a daughter is from her mother, diameters")
    min_daughter_frames: int = Field(
        2, ge=1, description="frames each daughter must be seen (or to the movie's end), against flicker"
    )


@dataclass(frozen=True)
class _Objects:
    """All objects of a movie, frame by frame, in the order of their place in the image."""

    frame: Ints
    label: Ints  # as given
    place: Floats  # (n, 2) centroid y, x in px with the drift taken out
    area: Floats
    first: Ints  # (T + 1,) position of each frame's first object


def link(
    labels: npt.NDArray[np.integer[Any]],
    config: TrackingConfig = TrackingConfig(),  # noqa: B008
) -> tuple[Labels, pd.DataFrame]:
    """Give every object the id of its track.

    Args:
        labels: (T, H, W) integer labels, 0 background; a value need not mean the same object in two frames.
        config: what may be linked.

    Returns:
        The movie with one value a track, (T, H, W) int32, 1..n ordered by first frame, then by label there;
        and the divisions, a row a daughter, columns ``track``, ``parent`` and ``frame`` (the daughter's
        first): the mother's track ends where her daughters' begin. Every object is in exactly one track, and
        the result depends on which pixels share a label, not on its value.

    Raises:
        InputError: the labels are not (T, H, W) integers from 0 on.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise InputError(f"labels must be (T, H, W) integers from 0 on, not {labels.ndim}-d {labels.dtype}")
    if not labels.any():
        none = pd.DataFrame({"track": [], "parent": [], "frame": []}, dtype=np.int64)
        return np.zeros(labels.shape, np.int32), none
    planes, objects = _measure(labels)
    n = len(objects.frame)
    diameter = 2 * float(np.sqrt(np.median(objects.area) / np.pi))
    reach = config.max_distance or 1.3 * diameter
    drift = np.array([estimate_drift(a, b, diameter, config.max_drift) for a, b in _neighbours(planes)])
    travelled = np.concatenate([np.zeros((1, 2)), np.cumsum(drift.reshape(-1, 2), axis=0)])
    objects.place[:] -= travelled[objects.frame]

    before = np.full(n, -1)  # the same cell one object earlier
    for t, (a, b) in enumerate(_neighbours(planes)):
        one, other = _link_frames(a, b, t, drift[t], objects, reach, config)
        before[other] = one
    mother = np.full(n, -1)
    if config.divisions:
        _find_divisions(objects, before, mother, config.division_distance * diameter, config)
    _close_gaps(objects, before, mother, reach, config)

    root = np.arange(n)
    for i in np.flatnonzero(before >= 0):
        root[i] = root[before[i]]
    starts = np.flatnonzero(before < 0)
    starts = starts[np.lexsort((objects.label[starts], objects.frame[starts]))]
    track = np.zeros(n, np.int32)
    track[starts] = np.arange(1, len(starts) + 1)
    track = track[root]
    for t, plane in enumerate(planes):
        ids = track[objects.first[t] : objects.first[t + 1]]
        planes[t] = np.concatenate([np.zeros(1, np.int32), ids])[plane]
    daughters = starts[mother[starts] >= 0]
    parents = {
        "track": track[daughters].astype(np.int64),
        "parent": track[mother[daughters]].astype(np.int64),
        "frame": objects.frame[daughters],
    }
    return planes, pd.DataFrame(parents)


def estimate_drift(before: Labels, after: Labels, diameter: float, max_drift: float) -> Floats:
    """Shift (dy, dx) in px by which the objects of a frame have moved together since the frame before.

    It is the peak of the normalised cross-correlation of the two foregrounds, which unlike phase correlation
    looks at the shared part of the fields only. Where no peak stands out within ``max_drift`` diameters, (0, 0).
    """
    none = np.zeros(2)
    scale = min(1.0, _DRIFT_DIAMETER / diameter)
    shrunk = [
        cv2.resize((p > 0).astype(np.float32), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for p in (before, after)
    ]
    reach = min(int(np.ceil(max_drift * diameter * scale)), min(shrunk[0].shape) // 4)
    if reach < 1:
        return none
    template = shrunk[0][reach:-reach, reach:-reach]
    if np.ptp(template) == 0 or np.ptp(shrunk[1]) == 0:
        return none
    match = cv2.matchTemplate(shrunk[1], template, cv2.TM_CCOEFF_NORMED)
    y, x = (int(i) - reach for i in np.unravel_index(match.argmax(), match.shape))
    stands_out = match.max() > max(0.3, match[reach, reach] + 0.1)
    # A maximum on the rim of the search is a slope, not a peak.
    if not stands_out or max(abs(y), abs(x)) == reach:
        return none
    return np.array([float(y) / scale, float(x) / scale])


def _neighbours(planes: Labels) -> list[tuple[Labels, Labels]]:
    return list(pairwise(planes))


def _measure(labels: npt.NDArray[np.integer[Any]]) -> tuple[Labels, _Objects]:
    """Every frame relabelled 1..n in the order of place, and its objects."""
    planes = np.zeros(labels.shape, np.int32)
    frames, ids, places, areas = [], [], [], []
    for t, plane in enumerate(labels):
        inside = np.flatnonzero(plane)
        label, compact = np.unique(plane.ravel()[inside], return_inverse=True)
        area = np.bincount(compact, minlength=len(label)).astype(float)
        pixels = np.divmod(inside, plane.shape[1])
        place = np.stack([np.bincount(compact, p, minlength=len(label)) / area for p in pixels], axis=1)
        order = np.lexsort((place[:, 1], place[:, 0]))
        rank = np.empty(len(label), np.int32)
        rank[order] = np.arange(1, len(label) + 1)
        planes[t].ravel()[inside] = rank[compact]
        frames.append(np.full(len(label), t))
        ids.append(label[order].astype(np.int64))
        places.append(place[order])
        areas.append(area[order])
    first = np.cumsum([0, *(len(f) for f in frames)])
    return planes, _Objects(
        frame=np.concatenate(frames),
        label=np.concatenate(ids),
        place=np.concatenate(places),
        area=np.concatenate(areas),
        first=first,
    )


def _link_frames(
    a: Labels,
    b: Labels,
    t: int,
    drift: Floats,
    objects: _Objects,
    reach: float,
    config: TrackingConfig,
) -> tuple[Ints, Ints]:
    """Objects of frame ``t`` and what each of them is in the next frame."""
    here, there = objects.first[t], objects.first[t + 1]
    one, other, distance = _near(objects.place[here:there], objects.place[there : objects.first[t + 2]], reach)
    shared = _overlap(a, b, drift)[one + 1, other + 1]
    one, other = one + here, other + there
    union = objects.area[one] + objects.area[other] - shared
    growth = np.abs(np.log(objects.area[one] / objects.area[other]))
    cost = (distance / reach) ** 2 + config.overlap_weight * (1 - shared / union) + config.area_weight * growth
    return _assign(one, other, cost, 1 + config.overlap_weight)


def _overlap(a: Labels, b: Labels, drift: Floats) -> Ints:
    """(na + 1, nb + 1) pixels that label i of ``a``, moved by the drift, shares with label j of ``b``."""
    (y, x), (height, width) = np.rint(drift).astype(int), a.shape
    moved = a[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)].astype(np.int64)
    still = b[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]
    na, nb = int(a.max()) + 1, int(b.max()) + 1
    return np.bincount((moved * nb + still).ravel(), minlength=na * nb).reshape(na, nb)


def _near(a: Floats, b: Floats, reach: float) -> tuple[Ints, Ints, Floats]:
    """Pairs of points at most ``reach`` apart, in order, and their distances."""
    if len(a) == 0 or len(b) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    pairs = cKDTree(a).sparse_distance_matrix(cKDTree(b), reach, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"]))]
    return pairs["i"].astype(np.int64), pairs["j"].astype(np.int64), pairs["v"]


def _assign(one: Ints, other: Ints, cost: Floats, max_cost: float) -> tuple[Ints, Ints]:
    """One-to-one pairs of least total cost, where leaving two ends apart costs ``max_cost``.

    Pairs that share no object even through others are solved apart: the sum is the same, and the time grows
    with the crowding and not with the square of the number of objects.
    """
    allowed = cost < max_cost
    one, other, cost = one[allowed], other[allowed], cost[allowed]
    if one.size == 0:
        return one, other
    rows, row = np.unique(one, return_inverse=True)
    columns, column = np.unique(other, return_inverse=True)
    size = len(rows) + len(columns)
    graph = coo_matrix((np.ones(len(row)), (row, column + len(rows))), shape=(size, size))
    group = connected_components(graph, directed=False)[1][row]
    order = np.argsort(group, kind="stable")
    chosen = []
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        r, i = np.unique(row[members], return_inverse=True)
        c, j = np.unique(column[members], return_inverse=True)
        table = np.full((len(r), len(c)), max_cost)
        edge = np.full(table.shape, -1)
        table[i, j] = cost[members]
        edge[i, j] = members
        chosen.append(edge[linear_sum_assignment(table)])
    kept = np.concatenate(chosen)
    kept = np.sort(kept[kept >= 0])
    return one[kept], other[kept]


def _find_divisions(objects: _Objects, before: Ints, mother: Ints, reach: float, config: TrackingConfig) -> None:
    """Write ``mother`` for both daughters of each division, and cut the link from her to either of them.

    Candidates are two objects nearer than ``reach`` to where she was, either both new or one of them what
    she was linked to. Her area is the largest of her last frames, and no less than the movie's median,
    since she contracts before she divides. The likeliest are taken first.
    """
    n = len(before)
    after = np.full(n, -1)
    after[before[before >= 0]] = np.flatnonzero(before >= 0)
    age = np.ones(n, np.int64)  # frames from here to the end of the track
    for i in range(n - 1, -1, -1):
        if after[i] >= 0:
            age[i] += age[after[i]]
    lasting = age >= np.minimum(config.min_daughter_frames, objects.frame[-1] - objects.frame + 1)
    was = objects.area.copy()
    for _ in range(3):
        was = np.where(before >= 0, np.maximum(was, was[before]), was)
    was = np.maximum(was, np.median(objects.area))

    candidates: list[tuple[float, int, int, int]] = []
    for t in range(1, len(objects.first) - 1):
        past, now, end = objects.first[t - 1 : t + 2]
        m, d, _ = _near(objects.place[past:now], objects.place[now:end], reach)
        m, d = m + past, d + now
        free = lasting[d] & ((before[d] < 0) | (before[d] == m))
        m, d = m[free], d[free]
        for parent in np.unique(m):
            beside = d[m == parent]
            heir = int(after[parent])
            for a, b in combinations(beside.tolist(), 2):
                if heir < 0 or heir in (a, b):
                    cost = _division_cost(objects, was[parent], parent, a, b, heir >= 0)
                    if cost is not None:
                        candidates.append((cost, int(parent), a, b))
    taken: set[int] = set()
    for _, parent, a, b in sorted(candidates):
        if taken.isdisjoint((~parent, a, b)):  # a mother may herself be a daughter, so she is noted apart
            taken.update((~parent, a, b))
            before[[a, b]] = -1
            mother[[a, b]] = parent


def _division_cost(objects: _Objects, was: float, mother: int, a: int, b: int, goes_on: bool) -> float | None:
    """How unlike a division the mother and two daughters are, or None where they cannot be one.

    A mother whose track was followed on must be clearly larger than either, unless she had contracted; where
    she vanished and two objects came in her place, that is evidence enough.
    """
    between = objects.place[a] - objects.place[b]
    middle = (objects.place[a] + objects.place[b]) / 2 - objects.place[mother]
    lopsided = float(np.hypot(*middle) / max(np.hypot(*between), 1e-9))
    unlike = abs(float(np.log(objects.area[a] / objects.area[b])))
    limit = np.inf if not goes_on else 1.1 if objects.area[mother] < 0.7 * was else 0.9
    larger, both = max(objects.area[a], objects.area[b]) / was, (objects.area[a] + objects.area[b]) / was
    if lopsided > 0.35 or unlike > np.log(2) or not 0.4 < both < 3 or larger > limit:
        return None
    return lopsided + unlike + abs(float(np.log(both)))


def _close_gaps(objects: _Objects, before: Ints, mother: Ints, reach: float, config: TrackingConfig) -> None:
    """Join ends of tracks to later beginnings within ``config.max_gap`` missing frames."""
    if config.max_gap == 0:
        return
    goes_on = np.zeros(len(before), bool)
    goes_on[before[before >= 0]] = True
    goes_on[mother[mother >= 0]] = True
    ends = np.flatnonzero(~goes_on)
    starts = np.flatnonzero((before < 0) & (mother < 0))
    one, other, cost = [], [], []
    for step in range(2, config.max_gap + 2):
        for t in np.unique(objects.frame[ends]):
            here, there = ends[objects.frame[ends] == t], starts[objects.frame[starts] == t + step]
            # A cell wanders: its likely distance grows with the root of the time.
            i, j, distance = _near(objects.place[here], objects.place[there], reach * np.sqrt(step))
            growth = np.abs(np.log(objects.area[here[i]] / objects.area[there[j]]))
            one.append(here[i])
            other.append(there[j])
            cost.append(distance**2 / (reach**2 * step) + config.area_weight * growth)
    if one:
        i, j = _assign(np.concatenate(one), np.concatenate(other), np.concatenate(cost), 1.0)
        before[j] = i
