"""Layers that see all tokens in one dimension scale each by its sequence's alpha."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)

import libortho
from libortho.core.layer import ortho_layers
from switching import SPLIT, assert_separate, generate, logits, prefill

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def split_opt():
    """OPT's feed-forward layers are given (batch * tokens, features)."""
    config = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=64, init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return libortho.split(OPTForCausalLM(config).eval(), SPLIT)


@pytest.mark.parametrize("width", [6, 3, 1])  # also as many tokens as sequences
def test_flattened_tokens_take_their_sequences_value(split_opt, tokens, width):
    assert_separate(split_opt, tokens[:, :width], [1.0, 0.0, 0.5], use_cache=False)
    on, off = logits(split_opt, tokens, 1.0), logits(split_opt, tokens, 0.0)
    assert (on - off).abs().max() > 0.1


def test_flattened_tokens_of_padding_embeddings_and_caches(split_opt, tokens):
    values = [1.0, 0.0, 0.5]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert_separate(split_opt, tokens, values, attention_mask=mask, use_cache=False)
    embedded = split_opt.get_input_embeddings()(tokens)
    with libortho.alpha(split_opt, values), torch.no_grad():
        result = split_opt(inputs_embeds=embedded, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(result, logits(split_opt, tokens, values))
    cache = prefill(split_opt, tokens, values)
    continued = logits(split_opt, tokens[:, 4:], values, past_key_values=cache)
    torch.testing.assert_close(continued, logits(split_opt, tokens, values)[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_flattened_tokens_equals_separate_runs(split_opt, tokens, options):
    values = [1.0, 0.0, 0.5]
    mixed = generate(split_opt, tokens, values, **options)
    each = len(mixed) // 3
    for row, value in enumerate(values):
        alone = generate(split_opt, tokens[row : row + 1], value, **options)
        assert torch.equal(mixed[each * row : each * (row + 1)], alone)


def test_flattened_tokens_are_recomputed_under_their_values(split_opt, tokens):
    def gradient(*batches: torch.Tensor) -> torch.Tensor:
        split_opt.zero_grad()
        with libortho.alpha(split_opt, [0.0, 1.0, 0.5]):
            loss = sum(split_opt(t, labels=t).loss for t in batches)
        loss.backward()
        return split_opt.model.decoder.layers[0].fc1.weight.grad.clone()

    split_opt.eval()  # OPT drops layers out
    split_opt.enable_input_require_grads()
    expected, of_two_lengths = gradient(tokens), gradient(tokens, tokens[:, :4])
    for layer in split_opt.model.decoder.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    torch.testing.assert_close(gradient(tokens), expected)
    torch.testing.assert_close(gradient(tokens, tokens[:, :4]), of_two_lengths)


def test_what_a_row_belongs_to_is_never_guessed(split_opt, tokens):
    """A row of two tokens is no batch of two sequences, though its layers see (2, features)."""
    layer = next(iter(ortho_layers(split_opt).values()))
    with libortho.alpha(split_opt, [1.0, 0.0]):
        with pytest.raises(libortho.AlphaError, match="names 2 sequences, the batch has 1"):
            split_opt.model(tokens[:1, :2])
        with pytest.raises(libortho.AlphaError, match="call that model"):
            layer(torch.randn(2, layer.in_features))
        assert layer(torch.randn(2, 3, layer.in_features)).shape == (2, 3, layer.out_features)
    with libortho.alpha(split_opt, 1.0):
        split_opt.model(tokens[:1, :2])


class Routed(nn.Module):
    """A mixture of two experts without fused weights; the first sees every token, the last tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        order = torch.arange(len(flat)).flip(0)
        return (self.shared_expert(flat) + self.experts[0](flat[order])[order]).view_as(x)


def test_an_expert_that_sees_every_token_in_another_order_is_refused():
    config = dataclasses.replace(SPLIT, target_modules="all-linear")
    x = torch.randn(2, 3, 32)
    for pattern, right in (("re:shared.*", True), ("all-linear", False)):
        model = libortho.split(Routed(), dataclasses.replace(config, target_modules=pattern))
        with libortho.alpha(model, [1.0, 0.0]):
            if not right:
                with pytest.raises(libortho.AlphaError, match="an order of its own"):
                    model(x)
                continue
            mixed = model(x)
        for row, value in enumerate((1.0, 0.0)):
            with libortho.alpha(model, value):
                torch.testing.assert_close(mixed[row], model(x)[row])
