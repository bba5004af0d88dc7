"""Recomputed activations have the alpha of their forward pass."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import libortho
from libortho.core.switch.alpha import get_switch
from switching import void

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def gradients(model: Any, tokens: torch.Tensor, value: Any) -> torch.Tensor:
    """Gradient of the loss at the first up projection; backward runs after the context."""
    model.train()
    model.zero_grad()
    with libortho.alpha(model, value):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return model.model.layers[0].mlp.up_proj.weight.grad.clone()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, [0.0, 1.0, 0.5]])
def test_checkpointed_gradients_are_those_of_the_alpha(split_llama, tokens, use_reentrant, value):
    split_llama.enable_input_require_grads()
    expected = gradients(split_llama, tokens, value)
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    split_llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(split_llama, tokens, value), expected)
    assert len(calls) == 2  # it was recomputed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_inside_another_context_uses_the_forward_alpha(split_llama, tokens, use_reentrant):
    split_llama.enable_input_require_grads()
    expected = gradients(split_llama, tokens, 0.0)
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    split_llama.zero_grad()
    with libortho.alpha(split_llama, 0.0):
        loss = split_llama(tokens, labels=tokens).loss
    with libortho.alpha(split_llama, 1.0):
        loss.backward()
    torch.testing.assert_close(split_llama.model.layers[0].mlp.up_proj.weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("values", [(0.2, 0.9), (0.9, 0.2)])
def test_two_alphas_in_one_checkpointed_backward_are_right_or_refused(split_llama, tokens, use_reentrant, values):
    def backward() -> torch.Tensor:
        split_llama.zero_grad()
        losses = []
        for value in values:
            with libortho.alpha(split_llama, value):
                losses.append(split_llama(tokens, labels=tokens).loss)
        (losses[0] - 3 * losses[1]).backward()
        return split_llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = backward()
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with pytest.raises(libortho.AlphaContextError, match="more than one alpha"):
        backward()
    split_llama.gradient_checkpointing_disable()
    torch.testing.assert_close(backward(), expected)


def test_activations_of_another_pass_are_recomputed_under_its_alpha(split_llama, tokens):
    """A hook keeps what a layer made under one alpha, and one backward goes through it and a pass under another."""

    def gradient() -> torch.Tensor:
        split_llama.zero_grad()
        kept: list[torch.Tensor] = []
        layer = split_llama.model.layers[0]
        handle = layer.mlp.register_forward_hook(lambda _, __, output: void(kept.append(output)))
        for value in (0.5, 1.0):
            with libortho.alpha(split_llama, value):
                loss = split_llama(tokens, labels=tokens).loss
        handle.remove()
        (kept[0].square().sum() + loss).backward()
        return layer.mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = gradient()
    split_llama.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected)


def test_a_checkpointed_submodule_called_alone_raises_in_backward(split_llama, tokens):
    split_llama.train()
    split_llama.gradient_checkpointing_enable({"use_reentrant": False})
    layer = split_llama.model.layers[0]
    x = torch.randn(2, 6, 64, requires_grad=True)
    with libortho.alpha(split_llama, 0.0):
        hidden = checkpoint(layer.mlp, x, use_reentrant=False)
    with pytest.raises(libortho.AlphaContextError, match="forward pass is not on record"):
        hidden.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_body_called_alone_is_recomputed_under_its_alpha(split_llama, tokens, use_reentrant):
    def gradient() -> torch.Tensor:
        split_llama.zero_grad()
        with libortho.alpha(split_llama, 0.5):
            hidden = split_llama.model(tokens).last_hidden_state
        hidden.square().sum().backward()
        return split_llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    split_llama.train()
    split_llama.enable_input_require_grads()
    expected = gradient()
    split_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradient(), expected)


def test_recorded_alphas_are_dropped_after_backward(split_llama, tokens):
    gradients(split_llama, tokens, 0.5)
    assert not get_switch(split_llama)._recompute
