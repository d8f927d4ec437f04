"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real microscopy and profile data; tests that need it are skipped without it."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SCREENING_TEST_DATA", beside_checkout))
    if not folder.is_dir():
        pytest.skip(f"no real data: neither SCREENING_TEST_DATA nor {beside_checkout} is there")
    return folder
