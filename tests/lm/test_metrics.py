"""Measures against brute force and against the model's own loss."""

import math
import random

import pytest
import torch

import tiny
from libortho.core.errors import DataError
from libortho.lm.metrics import auc, general_perplexity, sampled_extractions, score, text_perplexity
from libortho.lm.model import LanguageModel
from libortho.text.encoding import IGNORE, Encoded
from libortho.text.records import Record

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force_auc(members: list[float], others: list[float]) -> float:
    wins = sum((m > o) + 0.5 * (m == o) for m in members for o in others)
    return wins / (len(members) * len(others))


def test_auc_counts_pairs():
    rng = random.Random(0)
    members = [rng.randrange(8) / 2 for _ in range(17)]  # few values: many ties
    others = [rng.randrange(8) / 2 - 0.5 for _ in range(40)]
    expected = brute_force_auc(members, others)
    assert 0.5 < expected < 1
    assert auc(torch.tensor(members), torch.tensor(others)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("members", "others", "expected"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0, 2.0], 0.0), ([1.0], [1.0, 1.0], 0.5)],
)
def test_auc_at_the_ends_and_for_ties(members, others, expected):
    assert auc(torch.tensor(members), torch.tensor(others)) == expected


def test_auc_is_fair_to_both_sides():
    a, b = torch.randn(30), torch.randn(50)
    assert auc(a, b) == pytest.approx(1 - auc(b, a))


def test_text_perplexity_is_the_model_s_own_loss(planted, tokenizer):
    text = "The ferry left at noon."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    loss = planted(input_ids=ids, labels=ids).loss.detach()
    assert text_perplexity(planted, tokenizer, text) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_perplexity_pools_tokens_over_batches(planted, tokenizer):
    """Nine sequences of different lengths, so that batches are padded and the last one is short."""
    texts = [tokenizer("The ferry left at noon."[: 5 + 2 * i])["input_ids"] for i in range(9)]
    total, count = 0.0, 0
    for ids in texts:
        tensor = torch.tensor([ids])
        total += float(planted(input_ids=tensor, labels=tensor).loss.detach()) * (len(ids) - 1)
        count += len(ids) - 1
    found = general_perplexity(LanguageModel(planted), [Encoded(tuple(t), tuple(t)) for t in texts])
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_skips_what_carries_no_loss(planted):
    ids = (70, 71, 72, 73)
    lm = LanguageModel(planted)
    masked = general_perplexity(lm, [Encoded(ids, (IGNORE, IGNORE, 72, IGNORE))])
    p = planted(input_ids=torch.tensor([ids])).logits.softmax(-1)[0, 1, 72]
    assert masked == pytest.approx(1 / float(p.detach()), rel=1e-4)


def test_perplexity_of_nothing_is_refused(planted, tokenizer):
    with pytest.raises(DataError, match="no token"):
        text_perplexity(planted, tokenizer, "a")
    with pytest.raises(DataError, match="no token"):
        general_perplexity(LanguageModel(planted), [])


def test_scores_are_those_of_the_model_in_the_order_given(planted, tokenizer):
    """Sorting by length and batching must not show."""
    items = tiny.encoded(tokenizer, [*tiny.FORGET, {"prompt": "a long way to the ", "completion": "sea"}][::-1])
    scores, greedy = score(LanguageModel(planted), items)
    for i, item in enumerate(items):
        ids, labels = torch.tensor([item.ids]), torch.tensor([item.labels])
        output = planted(input_ids=ids, labels=labels)
        assert float(scores.nll[i]) == pytest.approx(float(output.loss.detach()), rel=1e-4)
        guess = output.logits[0, :-1].argmax(-1)
        judged = labels[0, 1:] != IGNORE
        assert bool(greedy[i]) == bool((guess == labels[0, 1:])[judged].all())
    assert greedy.tolist() == [False, True, True, True, True]


def test_sampling_finds_what_is_memorised_and_nothing_else(planted, tokenizer):
    secret = Record(**tiny.FORGET[3])
    wrong = Record(secret.prompt, " 0000.")
    found = sampled_extractions(planted, tokenizer, [secret, wrong], 20)
    assert found[0] >= 5
    assert found[1] == 0


def test_sampling_depends_on_its_seed_alone(planted, tokenizer):
    records = [Record(**row) for row in tiny.FORGET]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sampled_extractions(planted, tokenizer, records, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sampled_extractions(planted, tokenizer, records, 12, seed=3) == first


def test_sampling_works_without_a_prompt(planted, tokenizer):
    assert len(sampled_extractions(planted, tokenizer, [Record("", "zzzz")], 2)) == 1
