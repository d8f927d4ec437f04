"""Hand-made features over time: statistics against loops, and models that know their training cells only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from screening.baselines import BaselineConfig, Classifier, Scaler, log_ratios, summarise
from storage_schemas.errors import InputError

STATISTICS = BaselineConfig().statistics


def statistic_by_loop(name: str, values: list[float], times: list[float]) -> float:
    """One statistic of one feature of one cell, from the frames in which it is a number."""
    seen = [(t, v) for t, v in zip(times, values, strict=True) if math.isfinite(v)]
    if not seen:
        return math.nan
    n = len(seen)
    mean = sum(v for _, v in seen) / n
    if name == "mean":
        return mean
    if name == "sd":
        return math.sqrt(sum((v - mean) ** 2 for _, v in seen) / n)
    if name == "slope":
        middle = sum(t for t, _ in seen) / n
        spread = sum((t - middle) ** 2 for t, _ in seen)
        return sum((t - middle) * (v - mean) for t, v in seen) / spread if n > 1 else math.nan
    return seen[0][1] if name == "first" else seen[-1][1]


def test_statistics_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(50, 20, (7, 4, 6)).astype(np.float32)
    features[rng.random(features.shape) < 0.4] = np.nan
    features[0, 0] = np.nan  # nowhere defined
    features[1, 1] = [np.nan, 3, np.nan, np.nan, np.nan, np.nan]  # defined once
    features[2, 2, 3] = np.inf
    time = np.array([0, 2, 3, 7, 11, 12])
    found = summarise(features, time, STATISTICS)
    expected = [
        [
            statistic_by_loop(name, features[cell, feature].tolist(), time.tolist())
            for name in STATISTICS
            for feature in range(4)
        ]
        for cell in range(7)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(found).any()


def test_statistics_come_in_the_order_asked_for_and_frames_beyond_the_end_change_none() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(5, 3, 4))
    longer = np.concatenate([features, np.full((5, 3, 2), np.nan)], axis=2)
    found = summarise(features, np.arange(4), ("last", "mean"))
    np.testing.assert_array_equal(found[:, :3], features[..., -1])
    np.testing.assert_allclose(found[:, 3:], features.mean(axis=2))
    np.testing.assert_allclose(
        summarise(longer, np.arange(6), STATISTICS), summarise(features, np.arange(4), STATISTICS)
    )


def test_the_slope_is_that_of_the_line_whatever_frames_are_missing() -> None:
    time = np.array([0.0, 1, 4, 5, 9])
    line = (3 - 0.25 * time)[None, None, :].repeat(2, axis=0)
    line[1, 0, [0, 3]] = np.nan
    np.testing.assert_allclose(summarise(line, time, ("slope",)), [[-0.25], [-0.25]])


def test_scores_are_of_mean_0_and_sd_1_among_training_cells_and_0_where_undefined() -> None:
    rng = np.random.default_rng(2)
    summary = rng.normal([5, -100, 0.1, 7, 0], [2, 30, 0.01, 0, 1], (40, 5))
    summary[:, 3] = 0.1  # does not vary, but for rounding
    summary[:, 4] = np.nan
    summary[3, 0] = np.nan
    scaler = Scaler.fit(summary)
    scores = scaler.apply(summary)
    assert scores.shape == (40, 3)
    assert scores[3, 0] == 0
    defined = [list(range(40)) for _ in range(3)]
    defined[0].remove(3)
    for column, cells in enumerate(defined):
        assert scores[cells, column].mean() == pytest.approx(0, abs=1e-6)
        assert scores[cells, column].std() == pytest.approx(1, abs=1e-6)
    one = scaler.apply(np.array([[5.0, np.nan, 0.1, 9e9, 1.0]]))
    mean, sd = np.nanmean(summary[:, 0]), np.nanstd(summary[:, 0])
    assert one[0, 0] == pytest.approx((5 - mean) / sd, rel=1e-6)
    assert one[0, 1] == 0


@pytest.mark.parametrize("classifier", [{"method": "discriminant"}, {"method": "logistic"}])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_classifier_tells_apart_what_lies_apart(classifier: dict[str, str], n_classes: int) -> None:
    rng = np.random.default_rng(3)
    names = np.array(["b", "a", "negative control"], object)[:n_classes]
    label = rng.choice(names, 200, p=[0.8, *[0.2 / (n_classes - 1)] * (n_classes - 1)])
    scores = 4 * np.eye(3, 5)[[list(names).index(name) for name in label]] + rng.normal(size=(200, 5))
    config = BaselineConfig.model_validate({"classifier": classifier})
    model = Classifier.fit(scores[:100], label[:100], config)
    assert model.class_names == tuple(sorted(names))
    probabilities = model.probabilities(scores[100:])
    assert probabilities.shape == (100, n_classes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    voted = np.array(model.class_names)[probabilities.argmax(axis=1)]
    assert np.mean(voted == label[100:]) > 0.9
    # A point in the middle of two classes is of neither, though one is more frequent.
    middle = model.probabilities(2 * (np.eye(3, 5)[:1] + np.eye(3, 5)[1:2]))
    assert middle.max() < 0.9


def test_log_ratios_are_logarithms_less_their_mean() -> None:
    probabilities = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    logs = [[math.log(max(p, 1e-6)) for p in row] for row in probabilities.tolist()]
    expected = [[value - sum(row) / 3 for value in row] for row in logs]
    np.testing.assert_allclose(log_ratios(probabilities), expected, rtol=1e-6)


def test_steps_that_cannot_be_taken_say_why() -> None:
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(6, 2))
    with pytest.raises(InputError, match=r"1 class\(es\) \['a'\]; two are needed"):
        Classifier.fit(scores, np.array(["a"] * 6, object), BaselineConfig())
    with pytest.raises(InputError, match="each of 6 training cells"):
        Classifier.fit(scores, np.array(list("abcdef"), object), BaselineConfig())
    with pytest.raises(InputError, match="none of 2 statistics of features varies among 6 training cells"):
        Scaler.fit(np.ones((6, 2)))
    for statistics in [(), ("mean", "mean"), ("median",)]:
        with pytest.raises(ValidationError):
            BaselineConfig(statistics=statistics)
