"""Tables in Markdown."""

from __future__ import annotations

from screening.markdown import table


def test_names_stand_left_and_numbers_right() -> None:
    assert table(["drug", "mAP"], [["A|B", "1.0"], ["C", "–"]]) == (
        "| drug | mAP |\n| --- | ---: |\n| A\\|B | 1.0 |\n| C | – |"
    )
    assert table(["sample"], [], names=0) == "| sample |\n| ---: |"
