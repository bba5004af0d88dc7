"""What is said of a result: each criterion that it misses, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import made_up
from libortho.isolation.criteria import BAND, RecordOutcome
from libortho.isolation.result import by_chance, known_before, missed_criteria, nothing_known

MIDDLE = RecordOutcome(1, -0.1, -4.0, (-4 - BAND, -4 + BAND), extracted=False, known="recited")
FINE = [MIDDLE] * 40


def moved(by: float, count: int) -> list[RecordOutcome]:
    """So many of the records moved, and as many the other way, so that their mean is in the middle."""
    pair = [replace(MIDDLE, after=-4.0 + by), replace(MIDDLE, after=-4.0 - 0.9 * BAND)]
    return [*pair * count, *FINE[2 * count :]]


CASES: dict[str, tuple[list[RecordOutcome], int, tuple[float, float], str, str]] = {
    "extracted": ([replace(MIDDLE, extracted=True), *FINE[1:]], 0, (0.0, 0.0), "1 of 40 records are still", "FURTHER"),
    "outside": (moved(1.1 * BAND, 8), 0, (0.0, 0.0), r"8 of 40 records are outside .* \(8 likelier", "FURTHER"),
    "far": (moved(2.1 * BAND, 1), 0, (0.0, 0.0), "1 of 40 records are outside .* 1 of them far", "FURTHER"),
    "unlikelier": (moved(-2.1 * BAND, 1), 0, (0.0, 0.0), r"\(0 likelier, 1 unlikelier", "alternates="),
    "partial": ([replace(MIDDLE, partial=True)] * 9 + FINE[9:], 40, (0.0, 0.0), "9 of 40 sentences", "FURTHER.*altern"),
    "likelier": ([replace(MIDDLE, after=-3.0)] * 40, 0, (0.0, 0.0), "1.00 nats per token likelier", "FURTHER"),
    "all unlikelier": ([replace(MIDDLE, after=-5.0)] * 40, 0, (0.0, 0.0), "1.00 nats per token unlik", "alternates="),
    "retain": (FINE, 0, (0.01, 0.031), r"0.0310 .* exceeds .*\(0.0100\)", "retain="),
}


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_missed_comes_with_what_to_do(case: str, every_step: bool) -> None:
    records, sentences, divergences, said, advised = CASES[case]
    [(missed, advice)] = missed_criteria(records, sentences, divergences, every_step=every_step)
    assert re.search(said, missed)
    assert re.search(advised.replace("FURTHER", "raise max_steps" if every_step else "raise ratio"), advice)


def test_nothing_is_missed_where_everything_is_by_chance() -> None:
    assert missed_criteria(FINE, 0, (0.01, 0.029), every_step=True) == []
    assert missed_criteria(moved(1.1 * BAND, 4), 0, (0.0, 0.0), every_step=True) == []


def test_what_was_known_before_is_told_from_what_was_not() -> None:
    original = made_up.original(
        3, nll=torch.tensor([0.1, 2.0, 3.9]), recited=torch.tensor([True, False, False]), wanted=torch.full((3,), 4.0)
    )
    known = known_before(original)
    assert known == ["recited", "likelier", "unknown"]
    forget = [replace(made_up.record(4), number=n) for n in (1, 2, 3)]
    assert "1 of 3 records are unknown to the model under this wording (records 3)" in str(nothing_known(forget, known))
    assert nothing_known(forget[:2], known[:2]) is None
    assert not by_chance(known, original)
    untrained = made_up.original(
        3, nll=torch.tensor([2.0, 3.9, 4.4]), recited=torch.zeros(3, dtype=torch.bool), wanted=torch.full((3,), 4.0)
    )
    assert by_chance(known_before(untrained), untrained)  # one likelier of three
