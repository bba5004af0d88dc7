"""Answers and samples of a model, against generate."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from libortho.lm.asking import answers, sample, sampled_extractions
from libortho.text.records import Record

pytestmark = pytest.mark.usefixtures("one_thread")


def test_answers_are_those_of_generate_prompt_by_prompt(
    planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["Code of Ada Lum:", "Code of Bo:", "The"]
    together = answers(planted, tokenizer, [Record(p, "") for p in prompts], 6)
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = planted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_samples_follow_the_seed_and_leave_the_generator_alone(
    planted: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [Record("Code of", ""), Record("The", "")]
    state = torch.random.get_rng_state()
    first = sample(planted, tokenizer, records, 8, 5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(texts) for texts in first] == [5, 5]
    assert len(set(first[0])) > 1
    assert sample(planted, tokenizer, records, 8, 5, seed=3) == first
    assert sample(planted, tokenizer, records, 8, 5, seed=4) != first


def test_sampling_finds_what_is_memorised_and_nothing_else(planted, tokenizer):
    secret = Record(**tiny.FORGET[3])
    wrong = Record(secret.prompt, " 0000.")
    found = sampled_extractions(planted, tokenizer, [secret, wrong], 20)
    assert found[0] >= 1  # how well so small a model knows it differs from processor to processor
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
