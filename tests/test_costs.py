"""What docs/scaling.md says that a large screen takes is what the model prints."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from machines import ROOT


def printed(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "costs.py"), *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in told.partition("Extrapolated:\n")[2].splitlines())


def amounts(plates: int) -> dict[str, float]:
    rows = re.findall(r"^  (.+?) {2,}([\d,.]+) ?(.*)$", printed(f"--plates={plates}"), re.MULTILINE)
    return {f"{name}, {unit}".rstrip(", "): float(number.replace(",", "")) for name, number, unit in rows}


def page() -> str:
    return (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_page_has_what_is_printed() -> None:
    assert f"Extrapolated:\n{printed()}\n```" in page()


@pytest.mark.slow
def test_smaller_and_larger_screens_are_as_the_page_says() -> None:
    said = " ".join(page().split())
    small, large = amounts(63), amounts(6250)
    network = small["embedding, CPU hours"]
    assert (
        f"prints {small['wells']:,.0f} wells, {small['cells with a clip'] / 1e6:.1f} million cells with a clip, "
        f"{small['pixels, TB, not stored so']:.1f} TB of pixels, {network + small['segmentation, CPU hours']:.0f} CPU "
        f"hours ({network:.0f} of them the network) and {small['requests, one an object, million']:.1f} million "
        "requests."
    ) in said
    hours = large["embedding, CPU hours"] + large["segmentation, CPU hours"]
    assert (
        f"prints {large['wells'] / 1e6:.1f} million wells, {large['cells with a clip'] / 1e6:.0f} million cells with a "
        f"clip, {large['pixels, TB, not stored so']:.0f} TB of pixels, {hours:,.0f} CPU hours and "
        f"{large['requests, one an object, million']:,.0f} million requests; {large['stored: plates, TB']:.0f} TB of "
        f"plates, {large['stored: clips, TB']:.0f} TB of clips, {large['stored: embeddings, TB']:.1f} TB of embeddings."
    ) in said
