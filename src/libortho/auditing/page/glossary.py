"""The words of the report's page, read from ``glossary.toml``: measures, attacks, questions and terms."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Metric:
    """How a measure is named, written and explained.

    Attributes:
        key: In the report.
        label: Column head.
        note: Unit or direction, under the head.
        meaning: One line.
        digits: Decimals.
        share: A fraction of 1, drawn as a bar under the number.
        signed: Always written with its sign.
    """

    key: str = ""
    label: str = ""
    note: str = ""
    meaning: str = ""
    digits: int = 3
    share: bool = True
    signed: bool = False


_WORDS = tomllib.loads(resources.files("libortho.auditing.page").joinpath("glossary.toml").read_text(encoding="utf-8"))
MEMORY, PRIVACY, UTILITY = (
    tuple(Metric(**words) for words in _WORDS[group]) for group in ("memory", "privacy", "utility")
)
METRICS = {m.key: m for m in (*MEMORY, *PRIVACY, *UTILITY)}
SHARE = Metric()
"""Of any share that has no name of its own."""
MEMBERSHIP: dict[str, tuple[str, str]] = {key: (name, about) for key, (name, about) in _WORDS["attacks"].items()}
"""Membership attack to its name and to how its score is made."""
QUESTIONS: dict[str, tuple[str, str]] = {key: (asked, failed) for key, (asked, failed) in _WORDS["questions"].items()}
"""Verdict to the question that it answers and to what failed where the answer is no."""
TERMS: dict[str, str] = _WORDS["terms"]


def attack_label(attack: str) -> str:
    """The name of a membership attack; its key where it has none."""
    return MEMBERSHIP.get(attack, (attack, ""))[0]
