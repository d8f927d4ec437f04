"""Tables in Markdown."""

from __future__ import annotations

from screening.markdown import table, text


def test_names_stand_left_and_numbers_right() -> None:
    assert table(["drug", "mAP"], [["A|B", "1.0"], ["C", "–"]]) == (
        "| drug | mAP |\n| --- | ---: |\n| A\\|B | 1.0 |\n| C | – |"
    )
    assert table(["sample"], [], names=0) == "| sample |\n| ---: |"


def test_names_are_text_whatever_they_look_like() -> None:
    assert text('<script>alert("x")</script>') == '&lt;script>alert("x")&lt;/script>'
    assert text("[x](javascript:y) `z`") == r"\[x\](javascript:y) \`z\`"
    assert text("a\n| b |\r\n# c") == r"a \| b \| # c"
    assert text("&lt;b> R&D") == "&amp;lt;b> R&D"
