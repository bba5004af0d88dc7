"""What a sentence would cost a model that had never met it: predicted without looking at how likely it is."""

import copy

import pytest
import torch

import tiny
from libortho.isolation.prose import HUMAN_TEXTS, HUMAN_TOKENS, LEAST_SURPRISE, fit, human_texts
from libortho.lm.generation import generate
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.text.corpus import evaluation_text, shipped_text
from libortho.text.encoding import IGNORE, Encoded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def human(tokenizer) -> list[list[int]]:
    return [tokenizer(p[:200])["input_ids"] for p in shipped_text()[:12]]


def whole(ids: list[int]) -> Encoded:
    return Encoded(tuple(ids), tuple(ids))


def test_it_predicts_human_text_that_it_was_not_fitted_on(clean, tokenizer, human):
    lm = LanguageModel(clean)
    model = fit(lm, human)
    items = [whole(tokenizer(p[:200])["input_ids"]) for p in evaluation_text()[:20]]
    actual = score(lm, items)[0].nll
    predicted = torch.tensor([model.predict(lm, i) for i in items])
    assert (predicted - actual).abs().mean() < 0.15 * actual.mean()
    assert float((predicted - actual).mean().abs()) < 0.1 * float(actual.mean())


def test_the_fit_explains_more_than_the_mean_does(clean, tokenizer, human):
    lm = LanguageModel(clean)
    model = fit(lm, human)
    nll = torch.cat([token_nll(clean, ids) for ids in human])
    assert 0 < model.deviation < float(nll.std())


def token_nll(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_memorising_a_sentence_hardly_changes_its_prediction(clean, tokenizer, human):
    """The true token is taken out of every feature: what training made of it is not seen."""
    text = "The lamp under the third stair burns only for sailors."
    item = whole(tokenizer(text)["input_ids"])
    before_lm = LanguageModel(clean)
    before, untrained = fit(before_lm, human).predict(before_lm, item), float(score(before_lm, [item])[0].nll)
    trained = copy.deepcopy(clean)
    tiny.fit(trained, tiny.background(tokenizer, seed=2), 60, also=[item])
    lm = LanguageModel(trained)
    after, memorised = fit(lm, human).predict(lm, item), float(score(lm, [item])[0].nll)
    assert memorised < 0.6 * untrained
    assert after > memorised + 0.6 * (untrained - memorised)
    assert after == pytest.approx(before, rel=0.35)


def test_only_the_completion_is_judged(clean, tokenizer, human):
    lm = LanguageModel(clean)
    model = fit(lm, human)
    ids = tuple(tokenizer("The ferry left at noon.")["input_ids"])
    half = len(ids) // 2
    first = model.predict(lm, Encoded(ids[:half], ids[:half]))
    second = model.predict(lm, Encoded(ids, (IGNORE,) * half + ids[half:]))
    both = model.predict(lm, whole(list(ids)))
    pooled = (first * (half - 1) + second * (len(ids) - half)) / (len(ids) - 1)
    assert both == pytest.approx(pooled, rel=1e-3)


def test_the_fits_own_texts_are_beginnings_of_what_ships(tokenizer):
    texts = human_texts(tokenizer)
    assert len(texts) == HUMAN_TEXTS
    assert {len(t) for t in texts} == {HUMAN_TOKENS}
    assert all(p.startswith(tokenizer.decode(t)) for p, t in zip(shipped_text(), texts, strict=False))
    assert human_texts(tokenizer, 9) == [t[:9] for t in texts]


def test_texts_of_one_token_are_left_out(clean, human):
    lm = LanguageModel(clean)
    torch.testing.assert_close(fit(lm, [*human, [70], []]).weights, fit(lm, human).weights)


def test_a_token_is_expected_to_surprise_a_little_at_least(clean, tokenizer, human):
    """A probability of one could not be written into a distribution."""
    lm = LanguageModel(clean)
    model = fit(lm, human)
    pushed = type(model)(model.weights - 100.0, model.deviation)
    assert pushed.predict(lm, whole(tokenizer("The ferry.")["input_ids"])) == pytest.approx(LEAST_SURPRISE)


def _continued(model, tokenizer, prompts, tokens, seed):
    return [s for (s,) in generate(model, tokenizer, prompts, tokens, temperature=1.0, seed=seed)]


def test_continuations_are_those_of_each_prompt_alone(clean, tokenizer):
    """Padding changes nothing, the end is cut, and torch's own generator is where it was."""
    prompts = [tokenizer(p[:n])["input_ids"] for p, n in zip(shipped_text(), (5, 17, 9), strict=False)]
    before = torch.get_rng_state()
    said = _continued(clean, tokenizer, prompts, 12, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert said == _continued(clean, tokenizer, prompts, 12, 3) != _continued(clean, tokenizer, prompts, 12, 4)
    assert all(len(c) <= 12 and tokenizer.eos_token_id not in c for c in said)
    sure = copy.deepcopy(clean)
    sure.lm_head.weight.data *= 1000
    together = _continued(sure, tokenizer, prompts, 12, 3)
    assert together == [_continued(sure, tokenizer, [p], 12, 5)[0] for p in prompts]
    assert together != said
