"""Profiles against loops, recipes against their definitions, and simulated batches whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_score

from screening import retrieval
from screening.profiles import (
    NAMED_RECIPES,
    Align,
    Clip,
    Custom,
    Filter,
    Mean,
    Median,
    Modz,
    Processed,
    Raw,
    Scale,
    Sphere,
    Sphered,
    Standardised,
    TrimmedMean,
    Tvn,
    consensus_profiles,
    process,
    sum_up,
)
from storage_schemas.errors import InputError

Floats = npt.NDArray[np.float64]


def custom(*steps: Any) -> Custom:
    return Custom(steps=steps)


def only(values: Any, wells: pd.DataFrame, *steps: Any) -> Processed:
    return process(np.asarray(values), wells, custom(*steps))


# --- summing up ----------------------------------------------------------------------------------


def by_loop(rows: list[list[float]], how: Any) -> list[float]:
    """One value a dimension, from sorted lists and sums alone."""
    found = []
    for column in zip(*rows, strict=True):
        ordered, n = sorted(column), len(column)
        if isinstance(how, Median):
            found.append((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
            continue
        if isinstance(how, TrimmedMean):
            cut = int(how.share * n)
            ordered = ordered[cut : n - cut]
        found.append(sum(ordered) / len(ordered))
    return found


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from([1.0, 2.0, np.nan])), min_size=1, max_size=12),
    st.sampled_from([Mean(), Median(), TrimmedMean(share=0.2), TrimmedMean(share=0.4)]),
)
def test_aggregation_is_what_the_loop_says(keys: list[tuple[str, float]], how: Any) -> None:
    values = np.random.default_rng(len(keys)).normal(size=(len(keys), 3)).astype(np.float32)
    frame = pd.DataFrame(keys, columns=["compound", "concentration"])
    table, profiles = consensus_profiles(values, frame, how)
    assert profiles.dtype == np.float32
    assert table["n_wells"].sum() == len(keys)
    assert len(table) == len({str(key) for key in keys})
    for row, profile in zip(table.itertuples(), profiles, strict=True):
        own = [
            v.tolist()
            for v, key in zip(values, keys, strict=True)
            if str(key) == str((row.compound, row.concentration))
        ]
        assert row.n_wells == len(own)
        np.testing.assert_allclose(profile, by_loop(own, how), rtol=1e-5, atol=1e-6)


def test_replicates_that_disagree_weigh_less() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=20) + rng.normal(size=(5, 20)) * np.array([0.1, 0.2, 0.3, 0.5, 20])[:, None]
    weights = []
    for i in range(5):
        others = [spearmanr(rows[i], rows[j])[0] for j in range(5) if j != i]
        weights.append(max(sum(others) / 4, 0.01))
    expected = sum(w / sum(weights) * row for w, row in zip(weights, rows, strict=True))
    np.testing.assert_allclose(sum_up(rows, Modz()), expected, rtol=1e-5)
    assert weights[4] < min(weights[:4])
    np.testing.assert_allclose(sum_up(rows[:2], Modz()), rows[:2].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(sum_up(np.ones((3, 4)), Modz()), 1)
    with pytest.raises(InputError, match="nothing to sum up"):
        sum_up(np.empty((0, 3)))


# --- scale and clip ------------------------------------------------------------------------------


def two_plates(seed: int = 0) -> tuple[Floats, pd.DataFrame]:
    """Two plates of 12 wells, shifted and scaled; the first four of each are controls."""
    rng = np.random.default_rng(seed)
    shift, scale = np.repeat([[1.0], [-5.0]], 12, axis=0), np.repeat([[1.0], [7.0]], 12, axis=0)
    role = np.where(np.arange(24) % 12 < 4, "negative_control", "treatment")
    wells = pd.DataFrame({"plate": np.repeat(["p1", "p2"], 12), "role": role})
    return rng.normal(size=(24, 5)) * scale + shift, wells


@pytest.mark.parametrize("reference", ["controls", "plate", "treatments"])
@pytest.mark.parametrize("scale", ["none", "standard", "robust"])
def test_scaling_is_its_definition(reference: Any, scale: Any) -> None:
    values, wells = two_plates()
    done = only(values, wells, Scale(reference=reference, scale=scale))
    assert [row.plate for row in done.basis] == ["p1", "p2"]
    for row in done.basis:
        own = (wells["plate"] == row.plate).to_numpy()
        control = (wells["role"] == "negative_control").to_numpy()
        base = values[own & {"controls": control, "plate": own, "treatments": ~control}[reference]]
        assert (row.step, row.n_reference) == (1, len(base))
        for d in range(5):
            column = base[:, d].tolist()
            if scale == "robust":
                center = float(np.median(column))
                spread = 1.4826 * float(np.median([abs(v - center) for v in column]))
            else:
                center = sum(column) / len(column)
                spread = (sum((v - center) ** 2 for v in column) / (len(column) - 1)) ** 0.5
            spread = 1 if scale == "none" else spread
            np.testing.assert_allclose(row.center[d], center, rtol=1e-5)
            np.testing.assert_allclose(row.scale[d], spread, rtol=1e-5)
            np.testing.assert_allclose(done.values[own, d], (values[own, d] - center) / spread, rtol=1e-4, atol=1e-5)


def test_a_plates_shift_and_scale_vanish() -> None:
    values, wells = two_plates()
    moved = values * np.where(wells["plate"] == "p1", 3.0, 0.1)[:, None] + np.arange(5)
    expected = process(values, wells, Standardised()).values
    np.testing.assert_allclose(process(moved, wells, Standardised()).values, expected, rtol=1e-4)


def test_a_feature_whose_controls_do_not_vary_takes_the_unit_of_another_plate_or_of_all_wells() -> None:
    values, wells = two_plates()
    control = (wells["role"] == "negative_control").to_numpy()
    on_first = (wells["plate"] == "p1").to_numpy()
    values[control & on_first, 0] = 3.0
    values[control, 1] = np.float32(0.1)
    values[:, 2] = 7.0
    done = only(values, wells, Scale())
    first, second = done.basis
    assert first.scale[0] == second.scale[0] > 0
    centred = values[:, 1] - np.float32(0.1)
    np.testing.assert_allclose(first.scale[1], np.sqrt(np.mean(centred**2)), rtol=1e-5)
    assert (first.scale[2], np.abs(done.values[:, 2]).max()) == (1, 0)


def test_few_controls_on_one_plate_leave_all_plates_centred_only() -> None:
    values, wells = two_plates()
    wells.loc[2:11, "role"] = "treatment"
    done = only(values, wells, Scale())
    assert [row.n_reference for row in done.basis] == [2, 4]
    assert all((row.scale == 1).all() for row in done.basis)
    assert "plate p1 has 2 reference well(s), fewer than min_wells=3" in done.notes[0]
    assert done.notes[1:] == ()
    # What has no common unit is not brought back to one limit.
    clipped = only(values, wells, Scale(), Clip(limit=0.1))
    np.testing.assert_array_equal(clipped.values, done.values)
    assert clipped.notes[1:] == ("profiles are not clipped, since they could not be scaled",)


def test_values_are_clipped_and_the_input_is_left_alone() -> None:
    values, wells = two_plates()
    before = values.copy()
    done = only(values, wells, Clip(limit=2))
    np.testing.assert_allclose(done.values, np.clip(before, -2, 2), rtol=1e-6)
    np.testing.assert_array_equal(values, before)


# --- filter --------------------------------------------------------------------------------------


def test_what_a_filter_leaves_out_is_counted_with_its_reason() -> None:
    rng = np.random.default_rng(0)
    wells = pd.DataFrame({"plate": np.repeat(["p", "q"], 20), "role": "treatment"})
    values = rng.normal(size=(40, 9))
    values[:, 1] = 5
    values[3, 2] = np.inf
    values[0:30, 3] = np.nan
    values[:39, 4] = 0
    values[:, 5] = 2 * values[:, 0] + 1e-3 * values[:, 5]
    values[0, 6] = 1e6
    names = ["a", "flat", "gap", "holes", "zeros", "twin", "huge", "Cells_Location_Center_X", "z"]
    step = Filter(max_missing=0.1, max_correlation=0.9, max_value=1e5)
    done = process(values, wells, custom(step), names)
    assert dict(zip(names, done.excluded, strict=True)) == {
        "a": "",
        "flat": "no variance",
        "gap": "",
        "holes": "not finite",
        "zeros": "nearly always the same",
        "twin": "correlates with a",
        "huge": "too large",
        "Cells_Location_Center_X": "by its name",
        "z": "",
    }
    assert done.kept.tolist() == [0, 2, 8]
    assert done.notes == (
        "6 of 9 features are left out: 1 by its name, 1 correlated, 1 nearly always the same, 1 no variance, 1 not "
        "finite, 1 too large",
        "1 missing value(s) are the median of their plate",
    )
    expected = values[:, done.kept]
    expected[3, 1] = np.median(np.delete(values[:20, 2], 3))
    np.testing.assert_allclose(done.values, expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.6, 0.9]))
def test_no_two_features_left_correlate_and_every_one_gone_does(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(30, 4)) @ rng.normal(size=(4, 8)) + 0.3 * rng.normal(size=(30, 8))
    wells = pd.DataFrame({"plate": "p", "role": ["treatment"] * 30})
    done = only(values, wells, Filter(max_correlation=limit))
    kept: list[int] = []
    for j in range(8):
        if all(abs(np.corrcoef(values[:, i], values[:, j])[0, 1]) <= limit for i in kept):
            kept.append(j)
    assert done.kept.tolist() == kept


def test_nothing_left_is_an_error() -> None:
    wells = pd.DataFrame({"plate": "p", "role": ["treatment"] * 3})
    with pytest.raises(
        InputError, match="no feature is left: 2 of 2 features are left out: 1 no variance, 1 not finite"
    ):
        process(np.array([[1, np.nan], [1, 1], [1, 2]]), wells, Raw())


# --- sphering ------------------------------------------------------------------------------------


def mixed(n: int, d: int, seed: int = 0) -> Floats:
    """Correlated columns whose variances differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * np.geomspace(1, 30, d) + 5


def one_plate(n: int, n_controls: int) -> pd.DataFrame:
    role = np.where(np.arange(n) < n_controls, "negative_control", "treatment")
    return pd.DataFrame({"plate": "p", "role": role})


@pytest.mark.parametrize(("n_controls", "d"), [(200, 10), (60, 30), (1000, 100)])
def test_sphered_controls_have_the_identity_for_covariance(n_controls: int, d: int) -> None:
    # Not seed 0, whose 60 wells have a covariance of condition number 1e11: rounding alone may come to 1e-5 there.
    values = mixed(n_controls + 50, d, seed=1)
    done = only(values, one_plate(n_controls + 50, n_controls), Sphere(regularisation=0))
    covariance = np.cov(done.values[:n_controls].astype(np.float64).T)
    assert np.abs(covariance - np.eye(d)).max() < 1e-6
    assert np.abs(done.values[:n_controls].mean(axis=0, dtype=np.float64)).max() < 1e-6


def test_sphering_is_the_whitening_that_moves_profiles_least() -> None:
    values, wells = mixed(300, 6), one_plate(300, 300)
    done = only(values, wells, Sphere(regularisation=0)).values.astype(np.float64)
    about = values - values.mean(axis=0)
    # Of all matrices that whiten, the symmetric one: found here by Newton's iteration for C^-1/2, not by eigenvectors.
    covariance = np.cov(about.T)
    size = np.trace(covariance)
    root, inverse = covariance / size, np.eye(6)
    for _ in range(60):
        turn = (3 * np.eye(6) - inverse @ root) / 2
        root, inverse = root @ turn, turn @ inverse
    np.testing.assert_allclose(done, about @ inverse / np.sqrt(size), rtol=1e-3, atol=1e-4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    assert np.square(done - about).sum() < np.square(done @ rotation - about).sum()


@pytest.mark.parametrize("regularisation", [0.01, 0.3, 3.0])
def test_regularised_sphering_keeps_the_documented_share_of_each_axis(regularisation: float) -> None:
    values, wells = mixed(200, 5), one_plate(200, 200)
    done = only(values, wells, Sphere(regularisation=regularisation)).values.astype(np.float64)
    variances, axes = np.linalg.eigh(np.cov(values.T))
    expected = variances / (variances + regularisation * variances.mean())
    np.testing.assert_allclose(axes.T @ np.cov(done.T) @ axes, np.diag(expected), atol=1e-5)


def test_fewer_controls_than_features_are_said_and_magnify_nothing_without_limit() -> None:
    values, wells = mixed(40, 30), one_plate(40, 10)
    with pytest.raises(
        InputError, match=r"10 reference wells in 30 dimensions cannot be inverted.*regularisation above 0"
    ):
        only(values, wells, Sphere(regularisation=0))
    done = only(values, wells, Sphere(regularisation=0.3))
    assert "10 reference wells cannot show how 30 features vary together" in done.notes[0]
    mean = np.trace(np.cov(values[:10].T)) / 30
    about = values - values[:10].mean(axis=0)
    growth = np.linalg.norm(done.values, axis=1) / np.linalg.norm(about, axis=1)
    assert growth.max() <= (0.3 * mean) ** -0.5 * (1 + 1e-5)
    with pytest.raises(InputError, match=r"needs two negative controls .* found 1.*reference: plate.*--recipe raw"):
        only(values, one_plate(40, 1), Sphere())
    with pytest.raises(InputError, match="all alike"):
        only(np.ones((40, 3)), wells, Sphere())


# --- alignment of batches ------------------------------------------------------------------------


def batches(seed: int = 0) -> tuple[Floats, pd.DataFrame]:
    """Six plates: eight compounds and controls, each plate shifted, and stretched along axes of its own."""
    rng = np.random.default_rng(seed)
    d, effects = 12, rng.normal(size=(8, 12)) * 2
    parts, tables = [], []
    for plate in range(6):
        compound = np.r_[np.full(60, -1), np.repeat(np.arange(8), 3)]
        clean = np.where(compound[:, None] < 0, 0, effects[compound]) + rng.normal(size=(len(compound), d))
        variances, axes = np.exp(rng.normal(size=d)), np.linalg.qr(rng.normal(size=(d, d)))[0]
        bend = axes * variances @ axes.T
        parts.append(clean @ bend + rng.normal(size=d) * 3)
        role = np.where(compound < 0, "negative_control", "treatment")
        tables.append(pd.DataFrame({"plate": f"p{plate}", "role": role, "compound": compound}))
    return np.concatenate(parts), pd.concat(tables, ignore_index=True)


def plate_accuracy(values: Any, wells: pd.DataFrame) -> float:
    """How well plates are told apart by the squares and products of their controls' features, as covariances differ."""
    control = (wells["role"] == "negative_control").to_numpy()
    own = np.asarray(values, np.float64)[control]
    upper = np.triu_indices(own.shape[1])
    products = np.einsum("ni,nj->nij", own, own)[:, upper[0], upper[1]]
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return float(cross_val_score(model, np.c_[own, products], wells["plate"][control], cv=5).mean())


def found_elsewhere(values: Any, wells: pd.DataFrame) -> float:
    treated = (wells["role"] == "treatment").to_numpy()
    values, wells = np.asarray(values)[treated], wells[treated]
    label, plate = wells["compound"].tolist(), wells["plate"].tolist()
    return retrieval.rank(values, label, plate, values, label, plate).mean_average_precision


def test_tvn_hides_the_batch_and_keeps_the_biology() -> None:
    values, wells = batches()
    raw, scaled = (process(values, wells, recipe).values for recipe in (Raw(), Standardised()))
    tvn = process(values, wells, Tvn(limit=100, regularisation=0, prior=0)).values
    accuracy = [plate_accuracy(each, wells) for each in (raw, scaled, tvn)]
    assert accuracy[0] > 0.95
    assert accuracy[1] > 0.5
    assert accuracy[2] < 0.25  # chance is 1/6
    usual = process(values, wells, Tvn()).values
    assert accuracy[2] < plate_accuracy(usual, wells) < accuracy[1]
    assert found_elsewhere(usual, wells) > 0.65
    biology = [found_elsewhere(each, wells) for each in (raw, scaled, tvn)]
    assert biology[2] > biology[1] > biology[0]
    assert biology[2] > 0.7


def test_alignment_gives_each_batch_the_covariance_and_mean_of_all() -> None:
    values, wells = batches()
    control = (wells["role"] == "negative_control").to_numpy()
    target = np.cov(values[control].T)
    done = only(values, wells, Align(prior=0, regularisation=0)).values.astype(np.float64)
    for plate in wells["plate"].unique():
        own = done[control & (wells["plate"] == plate).to_numpy()]
        np.testing.assert_allclose(np.cov(own.T), target, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(own.mean(axis=0), values[control].mean(axis=0), atol=1e-4)


def test_alignment_says_what_it_lacks() -> None:
    values, wells = batches()
    with pytest.raises(InputError, match="no column 'day' to align batches by"):
        only(values, wells, Align(batch="day"))
    few = wells.assign(role=np.where(wells.index % 84 < 5, "negative_control", "treatment"))
    with pytest.raises(InputError, match=r"plate p0: .* cannot be inverted: set prior or regularisation"):
        only(values, few, Align(prior=0, regularisation=0))
    assert np.isfinite(only(values, few, Align()).values).all()
    with pytest.raises(InputError, match=r"no negative control .* on plate \(batch\) p3"):
        only(values, wells.assign(role=wells["role"].mask(wells["plate"] == "p3", "treatment")), Align())


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", NAMED_RECIPES)
def test_every_recipe_is_its_listed_steps_in_any_order_of_rows(recipe: Any) -> None:
    values, wells = batches()
    done = process(values, wells, recipe())
    assert done.values.dtype == np.float32
    assert len(done.kept) == done.values.shape[1] == 12
    np.testing.assert_array_equal(done.values, process(values, wells, Custom(steps=recipe().plan())).values)
    order = np.random.default_rng(0).permutation(len(values))
    again = process(values[order], wells.iloc[order], recipe()).values
    np.testing.assert_allclose(again, done.values[order], rtol=1e-3, atol=1e-4)


def test_controls_are_asked_for_only_where_they_are_needed() -> None:
    values, wells = two_plates()
    wells.loc[wells["plate"] == "p2", "role"] = "treatment"
    for recipe in NAMED_RECIPES:
        if recipe is Raw:
            continue
        with pytest.raises(InputError, match="no negative control with cells on plate p2"):
            process(values, wells, recipe())
        assert np.isfinite(process(values, wells, recipe(reference="plate")).values).all()
    with pytest.raises(InputError, match="no well that is not a negative control on plate p1"):
        only(values, wells.assign(role="negative_control"), Scale(reference="treatments"))


def test_bad_input_is_named() -> None:
    values, wells = two_plates()
    with pytest.raises(InputError, match=r"plate has shape \(3,\) for 24 rows"):
        process(values, wells[:3], Sphered())
    with pytest.raises(InputError, match="expected \\(rows, dimensions\\)"):
        process(values[0], wells, Sphered())
    with pytest.raises(InputError, match="2 names for profiles of 5 features"):
        process(values, wells, Sphered(), ["a", "b"])
    values[3, 1] = np.nan
    with pytest.raises(InputError, match=r"first is row 3.*begin the recipe with the step filter"):
        only(values, wells, Scale())
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Sphere(regularisation=-1)
