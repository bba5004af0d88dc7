"""Token statistics against transformers' own loss, and completions that share a prefix against one at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import shared_prefix_nll, token_statistics
from libortho.text.counterfactuals import alternates
from libortho.text.encoding import encode
from libortho.text.records import Record


def test_statistics_are_those_of_the_full_distribution(
    planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    items = tiny.encoded(tokenizer)
    found = token_statistics(LanguageModel(planted), items)
    for item, own in zip(items, found, strict=True):
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            logits = planted(ids).logits[0].double()
        places = [i for i, y in enumerate(item.labels) if y != -100]
        for t, i in enumerate(places):
            p = logits[i - 1].softmax(-1)
            log_p = p.log()
            assert float(own.log_p[t]) == pytest.approx(float(log_p[item.ids[i]]), abs=1e-4)
            assert bool(own.correct[t]) == (int(p.argmax()) == item.ids[i])
            mean = float((p * log_p).sum())
            assert float(own.mean[t]) == pytest.approx(mean, abs=1e-3)
            spread = float((p * (log_p - mean).square()).sum().sqrt())
            assert float(own.deviation[t]) == pytest.approx(max(spread, 1e-3), abs=1e-2)
        assert own.nll == pytest.approx(-float(own.log_p.mean()))


def test_statistics_do_not_depend_on_the_batch(planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = LanguageModel(planted)
    short, long = tiny.encoded(tokenizer)[0], encode(Record("", tiny.RETAIN[0]["text"]), tokenizer)
    together = token_statistics(lm, [long, short])
    alone = [token_statistics(lm, [i])[0] for i in (long, short)]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a.log_p, b.log_p, atol=1e-4)


@pytest.mark.parametrize("prompt", ["Code of Ada Lum:", ""])
def test_a_shared_prefix_gives_the_same_likelihoods(
    planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    lm = LanguageModel(planted)
    texts = alternates(" AB-6311 and 42.", 12, random.Random(0))
    items = [encode(Record(prompt, t), tokenizer) for t in [*texts, " 1.", " a longer completion, 12345."]]
    together = shared_prefix_nll(lm, items)
    one_by_one = torch.tensor([s.nll for s in token_statistics(lm, items)])
    assert torch.allclose(together, one_by_one, atol=1e-4)
    assert float(together.std()) > 0


def test_a_model_without_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="causal language model"):
        LanguageModel(nn.Linear(2, 2))
