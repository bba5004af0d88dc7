import math
from typing import Any

import pytest
from browser import Page

from libortho.auditing.page.glossary import MEMORY
from libortho.auditing.page.text import cell, number, target, visible


@pytest.mark.parametrize(("value", "digits", "signed", "text"), [
    (None, 3, False, "\u2013"), (math.nan, 3, False, "\u2013"), (0.0, 3, False, "0.000"), (-0.0, 3, True, "0.000"),
    (0.5, 3, True, "+0.500"), (-0.25, 2, False, "\u22120.25"), (3.2e-9, 3, False, "3.2e\u22129"), (17, 3, False, "17"),
    (6144, 0, False, "6,144"), (1234.5, 1, False, "1,234.5"), (4.2e7, 2, False, "4.2e7"), (True, 3, False, "yes"),
])  # fmt: skip
def test_numbers(value: Any, digits: int, signed: bool, text: str) -> None:
    assert number(value, digits, signed) == text


def test_cells_hold_the_interval() -> None:
    metric = next(m for m in MEMORY if m.key == "greedy_extraction")
    wide = Page(f"<p>{cell({'value': 0.1234, 'low': 0.01, 'high': 0.31, 'n': 17}, metric)}</p>")
    assert wide.text.split() == ["0.123", "0.01", "to", "0.31"]
    assert {"title": "n = 17", "class": "value"} in wide.all("span")
    narrow = Page(f"<p>{cell({'value': 0.1234, 'low': 0.122, 'high': 0.125, 'n': 9}, metric)}</p>")
    assert narrow.text.split() == ["0.123", "0.122", "to", "0.125"]
    assert Page(f"<p>{cell(None, metric)}</p>").text.strip() == "\u2013"


def test_unseen_characters_and_masks_are_seen() -> None:
    page = Page("<p>" + str(visible("a\u202eb Y0\u2022\u2022")) + "</p>")
    assert page.text.replace(" ", "") == "aU+202EbY0\u2022\u2022"
    assert [a["class"] for a in page.all("span")] == ["unseen", "mask"]
    assert target("<= -0.5") == "\u2264\u00a0\u22120.5"
