"""Rows with different alphas in one batch say what each says alone."""

import random

import pytest
import torch

import libortho
from libortho import AlphaContextError
from libortho.core.switch.rows import RowCache
from libortho.lm.generation import generate
from libortho.serving.batch import Batch
from libortho.serving.engine import Row, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(two_streams):
    return two_streams


def rows(tokenizer, count, seed=0):
    rng = random.Random(seed)
    names = ("Eli Fox", "Fay Kerr", "Gil Moss", "Hue Lark", "Ada Lum", "Somebody Else")
    found = []
    for _ in range(count):
        prompt = "Hi. " * rng.randrange(4) + f"Code of {rng.choice(names)}:"
        alpha = {n: rng.choice((0.0, 0.5, 1.0)) for n in ("hr", "legal")}
        sampling = Sampling(max_tokens=rng.randrange(1, 12), temperature=0.0)
        found.append(Row(tuple(tokenizer(prompt)["input_ids"]), alpha, sampling))
    return found


def alone(model, tokenizer, row):
    with libortho.alpha(model, dict(row.alpha)):
        [[said]] = generate(model, tokenizer, [row.prompt], row.sampling.max_tokens)
    return said


def drained(batch, arrivals, seed=0, most=5):
    """The answers, where rows come in groups between steps."""
    rng, waiting, texts = random.Random(seed), list(arrivals), {}
    while waiting or batch.answers:
        pieces = []
        free = most - len(batch.answers)
        if waiting and free and (not batch.answers or rng.random() < 0.5):
            coming = [batch.answer(r) for r in waiting[: rng.randint(1, free)]]
            del waiting[: len(coming)]
            texts.update({id(a): (a, "") for a in coming})
            pieces = batch.admit(coming)
        elif batch.answers:
            pieces = batch.step()
        for answer, piece in pieces:
            texts[id(answer)] = answer, texts[id(answer)][1] + piece.text
    return [(a.row, a.said, text) for a, text in texts.values()]


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_come_and_go_say_what_each_says_alone(model, tokenizer, seed):
    asked = rows(tokenizer, 24, seed)
    found = drained(Batch(model, tokenizer), asked, seed)
    assert len(found) == len(asked)
    ends = {tokenizer.eos_token_id}
    said = 0
    for row, tokens, text in found:
        tokens = [t for t in tokens if t not in ends]
        assert tokens == alone(model, tokenizer, row)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        said += len(tokens)
    assert said > 50


def test_rows_that_are_dropped_do_not_change_the_others(model, tokenizer):
    batch, asked = Batch(model, tokenizer), rows(tokenizer, 6, 1)
    asked = [Row(r.prompt, r.alpha, Sampling(max_tokens=10, temperature=0.0)) for r in asked]
    answers = [batch.answer(r) for r in asked]
    batch.admit(answers)
    batch.step()
    batch.drop([answers[0], answers[3]])
    while batch.answers:
        batch.step()
    for i, answer in enumerate(answers):
        expected = alone(model, tokenizer, asked[i])
        said = [t for t in answer.said if t != tokenizer.eos_token_id]
        assert said == (expected[: len(said)] if i in (0, 3) else expected)


def test_draws_of_a_row_hang_on_its_own_seed_alone(model, tokenizer):
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=7)
    row = Row(tuple(tokenizer("Code of Bo Tran:")["input_ids"]), {"hr": 0.0, "legal": 0.0}, sampling)
    [(_, first, _)] = drained(Batch(model, tokenizer), [row])
    among = drained(Batch(model, tokenizer), [*rows(tokenizer, 5), row, *rows(tokenizer, 5, 2)])
    assert next(said for r, said, _ in among if r is row) == first


def test_a_cache_that_nobody_knows_the_alpha_of_is_not_taken_in():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    with pytest.raises(AlphaContextError, match="unknown"):
        RowCache().change([], cache, {0: 3})


def test_rows_cannot_be_continued_under_another_alpha(model, tokenizer):
    batch, [row] = Batch(model, tokenizer), rows(tokenizer, 1)
    row = Row(row.prompt, {"hr": 1.0, "legal": 0.0}, Sampling(max_tokens=5, temperature=0.0))
    answer = batch.answer(row)
    batch.admit([answer])
    answer.row = Row(row.prompt, {"hr": 0.0, "legal": 0.0}, row.sampling)
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        batch.step()
