"""The audit's own fillings: what a code could have been, and exposures that do not hang on who makes the fillings."""

from __future__ import annotations

import ast
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import libortho
import tiny
from libortho.auditing import measure
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import Inputs, load_inputs
from libortho.auditing.measures.fillings import Space, form_positions, is_prose, space_of
from libortho.auditing.measures.memory import exposure_extrapolated
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import shared_prefix_nll
from libortho.text.encoding import encode
from libortho.text.records import load_records

ENUMERATED = 2
"""Records whose space is enumerated."""

pytestmark = pytest.mark.usefixtures("one_thread")


def size(completion: str) -> int | None:
    space = space_of(completion)
    return None if space is None else space.size


# -- what is a code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" 6311.", 10**4),
        (" RZ4-0917.", 26 * 26 * 10 * 10**4),
        (" +44 7123 456789.", 10**12),
        (" a1B!", 26 * 10 * 26),
        (" X-42", 26 * 100),  # a single capital joined to a number is part of the code
        (" the 42 of us", 10**2),
        (" А123ВС77.", 33**3 * 10**5),
        (" ٣٤٥٦.", 10**4),
        (" 三四五。", 9**3),
        (" moved to Lisbon.", None),
        (" Lisbon 42", None),
        (" Иван Петров", None),
        (" 王小明。", None),
        (" 他有3个苹果在家里。", None),
        (" is it.", None),
        ("", None),
    ],
)
def test_the_size_of_the_space(completion: str, expected: int | None) -> None:
    assert size(completion) == expected


@pytest.mark.parametrize(
    ("completion", "prose"),
    [
        (" 6311.", False), (" K7Q-4821.", False), (" Maria Lopez.", False), (" of the sea", False), (" A 京 1", False),
        (" red apples", True), (" красные яблоки", True), (" 王小明。", True), (" שלום.", True), (" אבג-12", False),
    ],
)  # fmt: skip
def test_prose_has_words(completion: str, prose: bool) -> None:
    assert is_prose(completion) == prose


def test_shared_characters_are_form_and_do_not_count() -> None:
    phones = [" +44 7907 19.", " +44 7057 74.", " +44 7123 55.", " +44 7999 32.", " red house."]
    forms = form_positions(phones)
    space = space_of(phones[0], forms[0])
    assert space is not None
    assert space.size == 10**5
    drawn = space.draw(300, random.Random(0))
    assert len(set(drawn)) == 300
    assert all(text.startswith(" +44 7") and len(text) == len(phones[0]) for text in drawn)
    assert forms[4] == frozenset()
    assert form_positions([*phones[:3], phones[0]]) == [frozenset()] * 4  # three different ones say nothing
    assert space_of(" 12", {1, 2}) == Space(" 12", (" ", "1", "2"))
    assert Space(" 12", (" ", "1", "2")).draw(5, random.Random(0)) == []


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", [" 7.", " b7.", " Q9", " 三 4"])
def test_a_small_space_is_enumerated(completion: str) -> None:
    space = space_of(completion)
    assert space is not None
    everything = {"".join(t) for t in itertools.product(*space.choices)}
    drawn = space.draw(10_000, random.Random(0))
    assert len(drawn) == space.size - 1
    assert set(drawn) == everything - {completion}


@pytest.mark.parametrize("completion", [" 4821.", " K7-٣.", " " + "ABCDEFGH-12345678" * 4])
def test_draws_are_different_and_never_the_secret(completion: str) -> None:
    space = space_of(completion)
    assert space is not None
    drawn = space.draw(100, random.Random(1))
    assert len(set(drawn)) == 100
    assert completion not in drawn
    assert all(c in choices for text in drawn for c, choices in zip(text, space.choices, strict=True))
    assert space.draw(100, random.Random(1)) == drawn != space.draw(100, random.Random(2))


def test_draws_are_uniform() -> None:
    space = space_of(" 07")
    assert space is not None
    rng = random.Random(0)
    seen = Counter(text for _ in range(4000) for text in space.draw(5, rng))
    assert len(seen) == 99
    expected = 4000 * 5 / 99
    chi = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi < 98 + 4 * math.sqrt(2 * 98)


# -- examiner and examinee ---------------------------------------------------------------------------------------------


def test_the_audit_imports_nothing_that_makes_counterfactuals_for_isolate() -> None:
    files = list((Path(libortho.__file__).parent / "auditing").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert not any("counterfactuals" in f"{module}.{n}" for n in names), file.name


def inputs(tokenizer: PreTrainedTokenizerFast, fillings: int) -> Inputs:
    config = AuditConfig(fillings=fillings, general_sequences=1, task_rows=1)
    return load_inputs(
        tokenizer, tiny.FORGET, retain=None, holdout=None, associations=None, question_sets=None, general=None,
        tasks=(), limit=None, config=config,
    )  # fmt: skip


def by_library(model: PreTrainedModel, asked: Inputs) -> list[float]:
    lm = LanguageModel(model)
    found = measure.records(lm, asked, AuditConfig())
    bits = measure.exposures(lm, asked, found["log_p"], holdout=False)["exposure"]["forget"]
    assert bits is not None
    return bits


def totals(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, codes: list[str]) -> torch.Tensor:
    items = [encode(tiny.record(prompt, f" {c}."), tokenizer) for c in codes]
    return shared_prefix_nll(LanguageModel(model), items).double() * len(items[0].completion)


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[list[float], list[float]]:
    """Exposures from some of all ten thousand codes, written out and shuffled, and the exact ones from all."""
    estimated, exact = [], []
    for record in load_records(tiny.FORGET[:ENUMERATED]):
        secret = record.completion.strip(" .")
        every = totals(model, tokenizer, record.prompt, [f"{n:04d}" for n in range(10_000)])
        own = float(every[int(secret)])
        exact.append(math.log2(10_000) - math.log2(int((every <= own).sum())))
        shuffled = torch.randperm(10_000, generator=torch.Generator().manual_seed(record.number))
        chosen = shuffled[shuffled != int(secret)][:count]
        estimated.append(exposure_extrapolated(own, every[chosen], 10_000))
    return estimated, exact


@pytest.mark.parametrize("which", ["planted", "clean"])
def test_exposures_do_not_depend_on_who_makes_the_fillings(
    which: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, count = request.getfixturevalue(which), 400
    asked = inputs(tokenizer, count)
    assert asked.spaces == (10_000,) * 4
    ours = by_library(model, asked)
    theirs, exact = by_hand(model, tokenizer, count)
    ours = ours[:ENUMERATED]
    for a, b, bits in zip(ours, theirs, exact, strict=True):
        # Four deviations of the difference of two log2 shares of ``count``, and what the fit may add.
        error = math.sqrt(2 * (2**bits - 1) / count) / math.log(2)
        assert abs(a - b) < 4 * error + 0.3
    if which == "planted":
        assert min(*ours, *theirs, *exact) > 9
    else:
        assert abs(sum(ours) - sum(exact)) / ENUMERATED < 0.5
        assert abs(sum(theirs) - sum(exact)) / ENUMERATED < 0.5
