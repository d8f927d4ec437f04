"""Profiles against loops, normalisation against its definition, and real Cell Painting wells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from screening import retrieval
from screening.profiles import (
    NoNormalisation,
    ProfilesConfig,
    ToControls,
    ToPlate,
    compound_profiles,
    normalise,
    well_profiles,
)
from storage_schemas.errors import InputError


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from(["A1", "B2"])), max_size=12),
    st.sampled_from(["mean", "median"]),
)
def test_aggregation_is_what_the_loop_says(keys: list[tuple[str, str]], how: Any) -> None:
    rng = np.random.default_rng(len(keys))
    values = rng.normal(size=(len(keys), 3)).astype(np.float32)
    plate, well = ([key[i] for key in keys] for i in (0, 1))
    config = ProfilesConfig(aggregate=how)
    table, profiles = well_profiles(values, plate, well, config)
    assert list(table[["plate", "well"]].itertuples(index=False, name=None)) == sorted(set(keys))
    assert profiles.dtype == np.float32
    assert table["n_cells"].sum() == len(keys)
    for row, profile in zip(table.itertuples(), profiles, strict=True):
        own = [v for v, key in zip(values, keys, strict=True) if key == (row.plate, row.well)]
        assert row.n_cells == len(own)
        expected = np.mean(own, axis=0) if how == "mean" else np.median(own, axis=0)
        np.testing.assert_allclose(profile, expected, rtol=1e-5, atol=1e-6)
    compounds, by_compound = compound_profiles(values, plate, config)
    assert compounds["compound"].tolist() == sorted(set(plate))
    assert compounds["n_wells"].tolist() == [plate.count(c) for c in sorted(set(plate))]
    assert by_compound.shape == (len(compounds), 3)


def wells(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two plates of 12 wells, shifted and scaled; the first four of each are controls."""
    rng = np.random.default_rng(seed)
    plate = np.repeat(["p1", "p2"], 12)
    shift, scale = np.repeat([[1.0], [-5.0]], 12, axis=0), np.repeat([[1.0], [7.0]], 12, axis=0)
    return rng.normal(size=(24, 5)) * scale + shift, plate, np.arange(24) % 12 < 4


@pytest.mark.parametrize("reference", [ToControls, ToPlate])
@pytest.mark.parametrize("scale", ["none", "standard", "robust"])
def test_normalisation_is_its_definition(reference: Any, scale: Any) -> None:
    values, plate, control = wells()
    config = ProfilesConfig(normalise=reference(scale=scale))
    normalised, table = normalise(values, plate, control, config)
    assert table["plate"].tolist() == ["p1", "p2"]
    for row in table.itertuples():
        own = plate == row.plate
        base = values[own & control] if reference is ToControls else values[own]
        assert row.n_reference == len(base)
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
            expected = (values[own, d] - center) / spread
            np.testing.assert_allclose(normalised[own, d], expected, rtol=1e-4, atol=1e-5)


def test_a_plates_shift_and_scale_vanish() -> None:
    values, plate, control = wells()
    moved = values * np.where(plate == "p1", 3.0, 0.1)[:, None] + np.arange(5)
    np.testing.assert_allclose(normalise(moved, plate, control)[0], normalise(values, plate, control)[0], rtol=1e-4)


def test_no_normalisation_is_the_identity() -> None:
    values, plate, control = wells()
    normalised, table = normalise(values, plate, ~control & False, ProfilesConfig(normalise=NoNormalisation()))
    np.testing.assert_array_equal(normalised, values.astype(np.float32))
    assert table["center"].map(np.count_nonzero).sum() == 0


def test_constant_dimensions_and_few_controls_are_centred_only() -> None:
    values, plate, control = wells()
    values[:, 2] = np.float32(0.1)
    normalised, table = normalise(values, plate, control)
    assert np.abs(normalised[:, 2]).max() < 1e-6
    assert [scale[2] for scale in table["scale"]] == [1, 1]
    control[2:12] = False
    _, table = normalise(values, plate, control)
    assert table["n_reference"].tolist() == [2, 4]
    assert all((scale == 1).all() for scale in table["scale"])


def test_bad_input_is_named() -> None:
    values, plate, control = wells()
    control[plate == "p2"] = False
    with pytest.raises(InputError, match="no negative control with cells on plate p2"):
        normalise(values, plate, control)
    with pytest.raises(InputError, match=r"well has shape \(1,\) for 24 rows"):
        well_profiles(values, plate, ["A1"])
    with pytest.raises(InputError, match="expected \\(rows, dimensions\\)"):
        compound_profiles(values[0], plate)
    values[3, 1] = np.nan
    with pytest.raises(InputError, match="first is row 3"):
        compound_profiles(values, plate)


def test_real_wells_match_their_treatment_on_other_plates(real_data: Path) -> None:
    """Same compound, dose and time on another plate, well above what the raw features reach."""
    table = pd.read_csv(real_data / "profiles_cell_injury" / "fs_plate_holdout.csv.gz")
    prefixes = ("Cells_", "Cytoplasm_", "Nuclei_")
    features = table[[c for c in table.columns if c.startswith(prefixes)]].to_numpy(np.float64)
    control = (table["injury_type"] == "Control").to_numpy()
    plate = table["Plate"].to_numpy()
    config = ProfilesConfig(normalise=ToControls(scale="standard"))
    profiles, per_plate = normalise(features, plate, control, config)
    assert per_plate["n_reference"].min() > 3
    for name in per_plate["plate"]:
        controls = profiles[control & (plate == name)]
        np.testing.assert_allclose(controls.mean(axis=0), 0, atol=1e-3)

    injury, treated = table["injury_type"].to_numpy()[~control], profiles[~control]
    compound = table["Compound Name"].to_numpy()[~control]
    ranking = retrieval.rank(treated, injury, compound, treated, injury, compound)
    chance = retrieval.chance_cmc(ranking.n_candidates[ranking.n_matches > 0], ranking.n_matches[ranking.n_matches > 0])
    assert ranking.cmc[0] > 2 * chance[0]
