"""Rows with different alphas in one batch say what each says alone."""

import random

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

import libortho
from libortho import AlphaContextError, SplitConfig, TargetError, split
from libortho.core.streams import OrthoStream
from libortho.core.switch.rows import RowCache
from libortho.lm.generation import generate
from libortho.serving.batch import Batch
from libortho.serving.engine import Row, Sampling
from tiny import byte_tokenizer

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


def test_streams_that_are_off_can_be_computed_all_the_same(model, tokenizer, monkeypatch):
    """The same logits to the bit, and as many products as where the streams are on."""
    ids, counts = torch.tensor([tokenizer("Code of Eli Fox:")["input_ids"]] * 2), []
    switch = libortho.core.switch.alpha.get_switch(model)
    forward = OrthoStream.forward
    monkeypatch.setattr(OrthoStream, "forward", lambda *args: counts.append(1) or forward(*args))

    def run(value):
        counts.clear()
        with torch.no_grad(), libortho.alpha(model, {"hr": [value] * 2, "legal": [0.0, 0.0]}):
            return model(input_ids=ids).logits, len(counts)

    plain, none = run(0.0)
    monkeypatch.setattr(switch, "constant", True)
    off, as_many = run(0.0)
    on, many = run(1.0)
    assert torch.equal(plain, off)
    assert not torch.equal(plain, on)
    assert none == 0
    assert as_many == many > 0


def test_rows_of_a_model_that_keeps_something_else_are_refused():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba = MambaForCausalLM(config).eval()
    split(mamba, SplitConfig(target_modules=["out_proj"], group_size=None))
    with pytest.raises(TargetError, match="Mamba"):
        Batch(mamba, byte_tokenizer())


def test_rows_of_a_model_with_sliding_windows(tokenizer):
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
    )  # fmt: skip
    gemma = split(Gemma3ForCausalLM(config).eval(), SplitConfig(group_size=None, stream="hr"))
    asked = [Row(r.prompt, {"hr": r.alpha["hr"]}, r.sampling) for r in rows(tokenizer, 12)]
    for row, said, _ in drained(Batch(gemma, tokenizer), asked):
        assert [t for t in said if t != tokenizer.eos_token_id] == alone(gemma, tokenizer, row)
