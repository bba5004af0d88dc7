import random
import statistics
from collections.abc import Callable

import pytest
import torch

import tiny
from libortho.auditing.attacks import prefix
from libortho.auditing.attacks.measuring import halves, measure
from libortho.auditing.attacks.prefix import SENTENCES, mutated, search_prefix, with_prefix
from libortho.text.records import load_records

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_search_finds_what_it_looks_for_and_never_does_worse_than_nothing():
    def wants(words: int) -> Callable[[str], float]:
        return lambda text: abs(len(text.split()) - words)

    best, empty, lowest = search_prefix(wants(15), 60, random.Random(0))
    assert (empty, lowest) == (15.0, 0.0)
    assert len(best.split()) == 15
    assert search_prefix(wants(0), 30, random.Random(0)) == ("", 0.0, 0.0)
    tried: list[str] = []
    search_prefix(lambda text: tried.append(text) or float(len(text)), 20, random.Random(0))
    assert len(tried) == 21
    assert tuple(tried[1 : 1 + len(SENTENCES)]) == SENTENCES


def test_a_mutation_changes_the_text():
    rng = random.Random(0)
    texts = {mutated("one two three", ["word"], rng) for _ in range(60)}
    assert {"two three", "word two three", "one word two three", f"one two three {SENTENCES[0]}"} <= texts
    assert "one two three" not in texts
    assert mutated("", ["word"], rng) in {"word", *SENTENCES}


def test_a_prefix_goes_after_a_beginning_of_text(tokenizer):
    assert with_prefix(tiny.record("Code:", " 1"), "Now.", tokenizer).prompt == "Now. Code:"
    assert with_prefix(tiny.record("<s>Code:", " 1"), "Now.", tokenizer).prompt == "<s>Now. Code:"
    assert with_prefix(tiny.record("Code:", " 1"), "", tokenizer) == tiny.record("Code:", " 1")


def test_the_prefix_is_judged_on_the_other_half(audited, asked, tokenizer, forget, unchanged):
    records = load_records(tiny.FORGET)
    found = prefix.run(asked(audited), evaluations=20)
    search, judged = halves(len(records), 0)
    for figures in (found, found["reference"]):
        assert figures["search_nll_after"] <= figures["search_nll_before"]
    with audited[0].enter():
        lm = audited[0].language_model()
        before = measure(lm, [forget[i] for i in judged])
        assert (found["nll_before"], found["extraction_before"]) == (before["nll"], before["extraction"])
        assert found["search_nll_before"] == pytest.approx(measure(lm, [forget[i] for i in search])["nll"])
        texts = [f"{found['best']} {records[i].prompt}".lstrip() + records[i].completion for i in judged]
        ids = [tokenizer(t)["input_ids"] for t in texts]
        assert max(map(len, ids)) <= 128  # the model's positions
        labels = [[-100] * (len(i) - 6) + i[-6:] for i in ids]
        with torch.no_grad():
            losses = [
                float(lm.model(input_ids=torch.tensor([i]), labels=torch.tensor([y])).loss)
                for i, y in zip(ids, labels, strict=True)
            ]
    assert found["nll_after"] == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert found == prefix.run(asked(audited), evaluations=20)
