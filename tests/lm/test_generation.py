"""What a model says: sampled from its whole distribution, batch by batch, and ended where it ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from libortho.lm import generation
from libortho.lm.generation import generate

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 30], [7], [11, 12, 13, 14, 15]]


def probabilities(model: nn.Module, prompt: list[int], temperature: float) -> Tensor:
    """Of the token after the prompt, (vocabulary,)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]  # type: ignore[operator]
    return (logits / temperature).softmax(-1)


def said(model: nn.Module, tokenizer: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[Any]:
    return generate(model, tokenizer, prompts, tokens, **{"temperature": 1.0, "seed": 0, **options})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_first_token_is_said_as_often_as_it_is_likely(
    tiny_llama: nn.Module, tokenizer: Any, temperature: float
) -> None:
    """After prompts of three lengths in one batch; the likeliest tokens, and all others together."""
    count = 4000
    found = said(tiny_llama, tokenizer, PROMPTS, 1, temperature=temperature, samples=count)
    for prompt, texts in zip(PROMPTS, found, strict=True):
        p = probabilities(tiny_llama, prompt, temperature)
        firsts = Counter(t[0] if t else None for t in texts)
        likely = p.topk(8).indices.tolist()
        rest = count - sum(firsts[t] for t in likely)
        pairs = [(firsts[t], float(p[t])) for t in likely] + [(rest, 1 - float(p[likely].sum()))]
        for times, share in pairs:
            assert abs(times / count - share) < 4.5 * (share * (1 - share) / count) ** 0.5


def test_the_second_token_follows_from_the_first(tiny_llama: nn.Module, tokenizer: Any) -> None:
    """Each sample goes on from what it said itself."""
    prompt, count = PROMPTS[0], 4000
    [texts] = said(tiny_llama, tokenizer, [prompt], 2, temperature=0.5, samples=count)
    pairs = Counter(map(tuple, texts))
    first = probabilities(tiny_llama, prompt, 0.5)
    checked = 0
    for one in first.topk(3).indices.tolist():
        second = probabilities(tiny_llama, [*prompt, one], 0.5)
        for two in second.topk(3).indices.tolist():
            share = float(first[one] * second[two])
            assert abs(pairs[one, two] / count - share) < 4.5 * (share * (1 - share) / count) ** 0.5
            checked += share * count > 20
    assert checked > 3


def test_each_prompt_has_its_samples_in_order_and_they_differ(tiny_llama: nn.Module, tokenizer: Any) -> None:
    """At a low temperature all begin with what their prompt makes likeliest; at a high one each says something else."""
    cold = said(tiny_llama, tokenizer, PROMPTS, 4, temperature=1e-4, samples=3)
    greedy = said(tiny_llama, tokenizer, PROMPTS, 4, temperature=0.0)
    assert cold == [texts * 3 for texts in greedy]
    assert len({tuple(t) for [t] in greedy}) == 3
    hot = said(tiny_llama, tokenizer, PROMPTS, 12, temperature=2.0, samples=5)
    assert [len(texts) for texts in hot] == [5, 5, 5]
    assert len({tuple(t) for texts in hot for t in texts}) == 15


def test_samples_are_those_of_the_seed(tiny_llama: nn.Module, tokenizer: Any) -> None:
    first = said(tiny_llama, tokenizer, PROMPTS, 8, samples=2, seed=1)
    assert said(tiny_llama, tokenizer, PROMPTS, 8, samples=2, seed=1) == first
    assert said(tiny_llama, tokenizer, PROMPTS, 8, samples=2, seed=2) != first


def test_a_seed_leaves_torchs_own_generator_alone_and_none_draws_from_it(tiny_llama: nn.Module, tokenizer: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    said(tiny_llama, tokenizer, PROMPTS, 8)
    assert torch.equal(torch.get_rng_state(), before)
    own = said(tiny_llama, tokenizer, PROMPTS, 8, seed=None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert said(tiny_llama, tokenizer, PROMPTS, 8, seed=None) != own
    torch.manual_seed(3)
    assert said(tiny_llama, tokenizer, PROMPTS, 8, seed=None) == own
    said(tiny_llama, tokenizer, PROMPTS, 8, seed=None, temperature=0.0)


def test_what_cannot_be_said_is_not(tiny_llama: nn.Module, tokenizer: Any) -> None:
    """A token that the model rules out, at a temperature at which all others are about as likely."""
    head = tiny_llama.get_submodule("lm_head")
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.arange(0, 100), -torch.inf))
    [texts] = said(tiny_llama, tokenizer, [[5]], 3, temperature=50.0, samples=300)
    assert min(t for text in texts for t in text) >= 100


def test_a_sample_ends_where_the_text_does(tiny_llama: nn.Module, tokenizer: Any) -> None:
    """One of them before others of its batch, and without what ended it."""
    end = tokenizer.eos_token_id
    assert probabilities(tiny_llama, [5], 30.0)[end] > 0.001
    [texts] = said(tiny_llama, tokenizer, [[5]], 40, temperature=30.0, samples=60)
    lengths = {len(t) for t in texts}
    assert min(lengths) < 40 == max(lengths)
    assert all(end not in t for t in texts)


def test_the_head_is_given_states_that_lie_side_by_side(tiny_llama: nn.Module, tokenizer: Any) -> None:
    """For a view of the last positions, torch's CPU matmul copies the head's weight for every row."""
    seen = []
    head = tiny_llama.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        said(tiny_llama, tokenizer, PROMPTS, 2)
    finally:
        handle.remove()
    assert len(seen) == 2
    assert all(x.is_contiguous() for x in seen)
    assert not head._forward_pre_hooks


def test_samples_of_a_model_with_windows_of_attention_are_the_same_too(tokenizer, monkeypatch):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    asked = ([5, 6, 7, 8, 9, 10], [11, 12])
    shared = generate(model, tokenizer, asked, 6, samples=4, temperature=1.0, seed=1)
    monkeypatch.setattr(generation, "_read_once", lambda *_: None)
    assert shared == generate(model, tokenizer, asked, 6, samples=4, temperature=1.0, seed=1)


def test_samples_of_one_prompt_read_it_once(tiny_llama, tokenizer, monkeypatch):
    asked = ([5, 6, 7, 8, 9], [11, 12])
    read: list[int] = []
    handle = tiny_llama.get_input_embeddings().register_forward_hook(lambda m, a, y: read.append(y.shape[:2].numel()))
    shared = [generate(tiny_llama, tokenizer, asked, 3, samples=4, temperature=t, seed=1) for t in (0.0, 1.0)]
    tokens = sum(read)
    handle.remove()
    monkeypatch.setattr(generation, "_read_once", lambda *_: None)
    apart = [generate(tiny_llama, tokenizer, asked, 3, samples=4, temperature=t, seed=1) for t in (0.0, 1.0)]
    assert shared == apart
    assert tokens == 2 * (2 * 4 + 8 * 3)  # both prompts but for their last tokens, then one token after another
