"""A key-value cache is continued under its alpha only; generation takes an alpha per prompt."""

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
)

import libortho
from libortho.core.layer import OrthoLinear
from libortho.core.switch.alpha import get_switch
from switching import GENERATE, SPLIT, generate, logits, prefill

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# -- key-value caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.5, [1.0, 0.0, 0.5]])
def test_a_cache_continued_under_its_alpha_equals_no_cache(split_llama, tokens, value):
    cache = prefill(split_llama, tokens, value)
    continued = logits(split_llama, tokens[:, 4:], value, past_key_values=cache)
    torch.testing.assert_close(continued, logits(split_llama, tokens, value)[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("first", "then"), [(1.0, 0.0), (0.0, 1.0), (0.5, [0.5] * 3), ([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]), (1.0, None)]
)
@pytest.mark.parametrize("positional", [False, True])
def test_a_cache_continued_under_another_alpha_raises(split_llama, tokens, first, then, positional):
    libortho.set_alpha(split_llama, 0.25)
    cache = prefill(split_llama, tokens, first)
    args, kwargs = ((None, None, cache), {}) if positional else ((), {"past_key_values": cache})
    other = contextlib.nullcontext() if then is None else libortho.alpha(split_llama, then)
    with other, pytest.raises(libortho.AlphaContextError, match="one request, one alpha"):
        split_llama(tokens[:, 4:], *args, **kwargs)
    assert cache.get_seq_length() == 4


def test_the_models_own_cache_is_stamped_too(split_llama, tokens):
    with libortho.alpha(split_llama, 0.0), torch.no_grad():
        cache = split_llama(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens[:, 4:], 1.0, past_key_values=cache)
    assert logits(split_llama, tokens[:, 4:], 0.0, past_key_values=cache).shape[1] == 2


def test_a_copied_cache_keeps_its_alpha(split_llama, tokens):
    cache = copy.deepcopy(prefill(split_llama, tokens, 0.0))
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens[:, 4:], 1.0, past_key_values=cache)


def test_an_unknown_cache_raises(tiny_llama, tokens):
    cache = prefill(tiny_llama, tokens, None)
    libortho.split(tiny_llama)
    with pytest.raises(libortho.AlphaContextError, match="alpha is unknown"):
        logits(tiny_llama, tokens[:, 4:], 0.0, past_key_values=cache)


def test_a_cache_emptied_again_takes_a_new_alpha(split_llama, tokens):
    cache = prefill(split_llama, tokens, 0.0)
    cache.crop(-4)
    result = logits(split_llama, tokens, 1.0, past_key_values=cache)
    torch.testing.assert_close(result, logits(split_llama, tokens, 1.0))
    with pytest.raises(libortho.AlphaContextError):
        logits(split_llama, tokens, 0.0, past_key_values=cache)


def test_a_cache_from_a_failed_forward_keeps_its_alpha(split_llama, tokens):
    cache = DynamicCache()
    handle = split_llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(split_llama, tokens[:, :4], 1.0, past_key_values=cache)
    handle.remove()
    with pytest.raises(libortho.AlphaContextError, match=r"was computed under alpha default=1\.0"):
        logits(split_llama, tokens[:, 4:], 0.0, past_key_values=cache)


# -- generation --------------------------------------------------------------------------------------------------------


def test_greedy_generation_with_mixed_alphas_equals_separate_runs(split_llama, tokens):
    values = [1.0, 0.0, 0.5]
    mixed = generate(split_llama, tokens, values, do_sample=False)
    assert mixed.shape == (3, 12)
    for row, value in enumerate(values):
        assert torch.equal(mixed[row], generate(split_llama, tokens[row : row + 1], value, do_sample=False)[0])
    assert not torch.equal(mixed[1], generate(split_llama, tokens[1:2], 1.0, do_sample=False)[0])


def test_beam_search_with_mixed_alphas_equals_separate_runs(split_llama, tokens):
    values, options = [1.0, 0.0, 0.5], {"num_beams": 3, "num_return_sequences": 2}
    mixed = generate(split_llama, tokens, values, **options)
    assert mixed.shape == (6, 12)
    for row, value in enumerate(values):
        alone = generate(split_llama, tokens[row : row + 1], value, **options)
        assert torch.equal(mixed[2 * row : 2 * row + 2], alone)


def test_returned_sequences_share_their_prompts_alpha(split_llama, tokens):
    options = {"num_return_sequences": 4, "do_sample": True, "top_k": 1}
    mixed = generate(split_llama, tokens[:2], [0.0, 1.0], **options)
    alone = [generate(split_llama, tokens[row : row + 1], float(row), do_sample=False)[0] for row in (0, 1)]
    assert not torch.equal(alone[0][6:], alone[1][6:])
    for row in range(8):
        assert torch.equal(mixed[row], alone[row // 4])


def test_generation_under_a_persistent_value_per_sequence(split_llama, tokens):
    libortho.set_alpha(split_llama, [0.0, 0.5, 1.0])
    mask = torch.ones_like(tokens)
    persistent = split_llama.generate(tokens, attention_mask=mask, do_sample=False, **GENERATE)
    assert torch.equal(persistent, generate(split_llama, tokens, [0.0, 0.5, 1.0], do_sample=False))
    with pytest.raises(libortho.AlphaError):
        split_llama.generate(tokens[:2], attention_mask=mask[:2], **GENERATE)


def test_generation_from_a_shared_prefix_cache_needs_its_alpha(split_llama, tokens):
    prompt = tokens[:1]
    with libortho.alpha(split_llama, 1.0), torch.no_grad():
        prefix = split_llama(prompt[:, :4], use_cache=True).past_key_values
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **GENERATE}
    with libortho.alpha(split_llama, 1.0):
        continued = split_llama.generate(prompt, past_key_values=copy.deepcopy(prefix), **options)
    assert torch.equal(continued, generate(split_llama, prompt, 1.0, do_sample=False))
    with libortho.alpha(split_llama, 0.0), pytest.raises(libortho.AlphaContextError):
        split_llama.generate(prompt, past_key_values=copy.deepcopy(prefix), **options)


def test_embeddings_as_input(split_llama, tokens):
    values = [0.0, 1.0, 0.5]
    embedded = split_llama.get_input_embeddings()(tokens)
    with libortho.alpha(split_llama, values), torch.no_grad():
        result = split_llama(inputs_embeds=embedded).logits
    torch.testing.assert_close(result, logits(split_llama, tokens, values))


def test_every_split_layer_reads_one_switch(split_llama):
    switches = {id(m.switch) for m in split_llama.modules() if isinstance(m, OrthoLinear)}
    assert switches == {id(get_switch(split_llama))}


def test_per_token_values_made_in_inference_mode_serve_a_later_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    libortho.split(model, libortho.SplitConfig(target_modules="0", use_low_rank=False, structure="columns", ratio=0.2))
    libortho.set_alpha(model, [1.0, 0.5])
    x = torch.randn(2, 3, 16)
    with torch.inference_mode():
        model(x)
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_switch_is_found_in_a_tree_with_a_cycle():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    model[0].back = model
    with pytest.raises(libortho.AlphaError, match="no ortho stream"):
        libortho.set_alpha(model, 0.0)


# -- layers that see all tokens in one dimension -----------------------------------------------------------------------


def test_a_state_of_one_size_is_a_cache_too(tokens):
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0)
    model: Any = libortho.split(MambaForCausalLM(config).eval(), dataclasses.replace(SPLIT, target_modules="out_proj"))
    with libortho.alpha(model, 0.0), torch.no_grad():
        output = model(tokens[:, :4], use_cache=True)
    name = next(n for n in output if n.startswith("cache"))
    cache = output[name]
    with libortho.alpha(model, 1.0), pytest.raises(libortho.AlphaContextError, match="one request, one alpha"):
        model(tokens[:, 4:5], **{name: cache})
    with libortho.alpha(model, 0.0), torch.no_grad():
        model(tokens[:, 4:5], **{name: cache})
