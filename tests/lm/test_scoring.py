"""Scores and perplexity against the model's own loss, and batches of texts."""

import math

import pytest
import torch

import tiny
from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity, score, text_perplexity
from libortho.text.encoding import IGNORE, Encoded, batches

pytestmark = pytest.mark.usefixtures("one_thread")


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
    found = perplexity(LanguageModel(planted), [Encoded(tuple(t), tuple(t)) for t in texts])
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_skips_what_carries_no_loss(planted):
    ids = (70, 71, 72, 73)
    lm = LanguageModel(planted)
    masked = perplexity(lm, [Encoded(ids, (IGNORE, IGNORE, 72, IGNORE))])
    p = planted(input_ids=torch.tensor([ids])).logits.softmax(-1)[0, 1, 72]
    assert masked == pytest.approx(1 / float(p.detach()), rel=1e-4)


def test_perplexity_of_nothing_is_refused(planted, tokenizer):
    with pytest.raises(DataError, match="no token"):
        text_perplexity(planted, tokenizer, "a")
    with pytest.raises(DataError, match="no token"):
        perplexity(LanguageModel(planted), [])


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


def test_batches_hold_every_item_once_and_stay_small() -> None:
    items = [Encoded(tuple(range(n)), tuple(range(n))) for n in (5, 40, 7, 7, 90, 3)]
    found = list(batches(items, 50))
    assert sorted(i for b in found for i in b) == list(range(6))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(items[i].ids) for i in batch) <= 50
