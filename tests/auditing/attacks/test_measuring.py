import statistics

import pytest
import torch

import tiny
from libortho.auditing.attacks.measuring import GENERAL_TOKENS, general_subset, halves, measure
from libortho.core.errors import DataError
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import perplexity
from libortho.text.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_levels_are_those_of_the_models_own_loss_and_generation(planted, tokenizer, forget, general):
    level = measure(LanguageModel(planted), forget, general)
    losses = [
        float(planted(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss.detach()) for e in forget
    ]
    hits = []
    for row in tiny.FORGET:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        output = planted.generate(**prompt, max_new_tokens=6, do_sample=False)
        hits.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == row["completion"])
    assert level["nll"] == pytest.approx(statistics.fmean(losses), abs=1e-5)
    assert level["extraction"] == statistics.fmean(hits) == 1.0
    assert level["perplexity"] == pytest.approx(perplexity(LanguageModel(planted), general))
    assert measure(LanguageModel(planted), forget)["perplexity"] is None
    with pytest.raises(DataError, match="no forget record"):
        measure(LanguageModel(planted), [])


def test_halves_part_all_records_and_follow_the_seed():
    first, second = halves(17, 0)
    assert sorted(first + second) == list(range(17))
    assert (len(first), len(second)) == (8, 9)
    assert halves(17, 0) == (first, second) != halves(17, 1)
    with pytest.raises(DataError, match="at least 2"):
        halves(1, 0)


def test_the_subset_of_general_text_stops_once_it_is_long_enough():
    texts = [Encoded((1,) * 400, (1,) * 400)] * 5
    assert GENERAL_TOKENS == 1024
    assert len(general_subset(texts)) == 3
    assert len(general_subset(texts[:2])) == 2
