"""Progress by the tokens that models are given."""

import copy
import logging

import pytest
import torch

import libortho
import tiny
from libortho.core.progress import in_words
from libortho.lm.generation import generate
from libortho.lm.reading_progress import reading, watched


def test_every_token_of_reading_and_generation_is_counted(tiny_llama, tokenizer):
    seen: list[int] = []
    with watched([tiny_llama, tiny_llama], seen.append), torch.no_grad():
        tiny_llama(input_ids=torch.zeros(3, 5, dtype=torch.long))
        assert seen == [15]
        generate(tiny_llama, tokenizer, [[5, 6, 7]], 4)
    assert 15 + 3 < sum(seen) <= 15 + 3 + 3  # the last token is not read
    tiny_llama(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert 2 not in seen  # nothing is watched any more


def test_a_phase_is_reported_from_nothing_to_all_of_it(tiny_llama):
    told: list[tuple[str, int, int]] = []
    with reading(tiny_llama, lambda *a: told.append(a), "original", 12), torch.no_grad():
        for _ in range(3):
            tiny_llama(input_ids=torch.zeros(1, 5, dtype=torch.long))  # more than was expected
    assert told == [("original", n, 12) for n in (0, 5, 10, 11, 12)]


def test_an_error_takes_the_watch_away(tiny_llama):
    with pytest.raises(ZeroDivisionError), reading(tiny_llama, lambda *_: None, "x", 1):
        raise ZeroDivisionError
    assert not tiny_llama.get_input_embeddings()._forward_hooks


def test_isolate_reports_each_phase_as_it_goes_on(planted, tokenizer, cache):
    told: dict[str, list[int]] = {}
    totals: dict[str, int] = {}

    def note(phase: str, done: int, total: int) -> None:
        told.setdefault(phase, []).append(done)
        totals[phase] = total

    result = libortho.isolate(
        planted, tokenizer, tiny.FORGET, config=libortho.IsolateConfig(ratio=0.1, max_steps=2), progress=note
    )
    assert list(told) == ["texts", "original", "columns", "rounding", "steps", "result"]
    assert set(told) <= set(result.phase_seconds)
    for phase, done in told.items():
        assert done == sorted(done)
        assert done[-1] == totals[phase]
    assert all(len(told[p]) >= 3 for p in ("texts", "original", "rounding"))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "5 seconds"), (61, "65 seconds"), (121, "3 minutes"), (3601, "61 minutes"), (9000, "2.5 hours")],
)
def test_a_guessed_time_is_rounded_up(seconds, said):
    assert in_words(seconds) == said


def test_the_expected_time_is_said_before_the_work_where_it_is_asked_for(planted, tokenizer, cache, caplog):
    told: list[str] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase in ("steps", "audit"):
            told.extend(r.getMessage() for r in caplog.records if r.name == "libortho.expected")

    def work() -> None:
        libortho.isolate(
            planted, tokenizer, tiny.FORGET, config=libortho.IsolateConfig(ratio=0.1, max_steps=1), progress=note
        )
        libortho.audit(planted, tokenizer, tiny.FORGET, config=libortho.AuditConfig(samples=2), progress=note)

    copied = copy.deepcopy(planted)
    caplog.set_level(logging.WARNING, "libortho.expected")  # the command line asks for it, and may have run before
    work()
    assert told == []
    planted = copied
    caplog.set_level(logging.INFO, "libortho.expected")
    work()
    assert any(t.startswith("isolating takes about ") for t in told)
    assert any(t.startswith("the audit takes about ") for t in told)
