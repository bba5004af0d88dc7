"""A causal LM taken apart into decoder and output head, so that logits are computed only where they are needed.

A full row of logits is as large as the vocabulary; a hidden state is some hundred times smaller. The original model's
hidden states are therefore what is kept for the divergence terms, and heads run on the positions that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from libortho.core.errors import ConfigError, LibOrthoError, TargetError
from libortho.core.models import unwrapped
from libortho.core.targets import routed
from libortho.lm.checks import check_causal, decoder_of, embedding_rows
from libortho.text.encoding import Batch

PLAIN_ATTENTION = 128
"""Tokens up to which plain attention is the faster one in bf16 on a CPU, forward and backward together (torch 2.13)."""


class LanguageModel:
    """Hidden states and logits of a transformers causal LM.

    Attributes:
        model: The model; inside a PEFT wrapper, the transformers model with its adapters.
        checkpointing: Decoder layers run once more in the backward pass, where `isolate` has arranged for it.

    Raises:
        TargetError: if the model is an encoder-decoder, has no decoder and output embedding, or they do not reproduce
            its logits.
        ConfigError: if it was made inside ``torch.inference_mode``.
    """

    def __init__(self, model: nn.Module) -> None:
        plain: Any = unwrapped(model)
        self.model = plain
        self.checkpointing = False
        check_causal(plain)
        self.decoder = decoder_of(plain)
        self.head: nn.Module = plain.get_output_embeddings()
        config = getattr(self.model, "config", None)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._check()

    @property
    def device(self) -> torch.device:
        """Device of the output head, where batches go."""
        return next(self.head.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, (sequences, tokens, width)."""
        with self._attention(batch):
            output = self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state

    def _attention(self, batch: Batch) -> AbstractContextManager[Any]:
        """Plain attention where a backward pass through short bf16 sequences on a CPU will follow."""
        head = next(self.head.parameters())
        slow = torch.is_grad_enabled() and head.device.type == "cpu" and head.dtype is torch.bfloat16
        return sdpa_kernel(SDPBackend.MATH) if slow and batch.input_ids.shape[1] <= PLAIN_ATTENTION else nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits, (..., vocabulary), of hidden states (..., width)."""
        logits = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check(self) -> None:
        """Some families scale between decoder and logits; refuse them instead of optimising a wrong number."""
        batch = self._probe()
        try:
            whole = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            parts, whole = self.logits(self.hidden(batch)), whole.float()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, LibOrthoError):
                raise
            raise TargetError(
                f"{type(self.model).__name__} cannot be run on token ids alone as a decoder and an output head, which "
                f"isolate and audit need ({type(error).__name__}: {error})"
            ) from error
        same = whole.shape == parts.shape
        if not same or not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise TargetError(
                f"{type(self.model).__name__} changes its hidden states between decoder and logits in a way that "
                "isolate does not know; please report this model family"
            )

    def check_layers(self, layers: Mapping[str, nn.Module]) -> None:
        """Refuse layers that a forward pass does not apply once to every token.

        Raises:
            TargetError: then; the message names the layer.
        """
        batch = self._probe()
        for name, inputs in self._calls(layers, batch).items():
            once_per_token(name, inputs, batch)

    def once_per_token(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Names of the layers that a forward pass applies once to every token."""
        batch = self._probe()
        calls = self._calls(layers, batch)
        return [n for n, given in calls.items() if len(given) == 1 and _fits(n, given[0], batch.input_ids.shape)]

    def _calls(self, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[Tensor]]:
        """What each layer is given in a forward pass.

        Raises:
            TargetError: if no gradient reaches a layer.
        """
        calls: dict[str, list[Tensor]] = {n: [] for n in layers}

        def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            check_gradient(name, output)
            calls[name].append(args[0])

        handles = [m.register_forward_hook(partial(keep, n)) for n, m in layers.items()]
        try:
            with self.graph():
                self.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    @contextmanager
    def graph(self) -> Iterator[None]:
        """Within, a forward pass can be differentiated from its embeddings on, even if all parameters are frozen."""
        # A copy: some families change the embeddings in place.
        handle = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.detach().requires_grad_().clone()
        )
        try:
            with torch.enable_grad():
                yield
        finally:
            handle.remove()

    def _probe(self) -> Batch:
        """Eight tokens."""
        ids = torch.arange(2, 10, device=self.device).unsqueeze(0) % (embedding_rows(self.model) or 10)
        return Batch(ids, torch.ones_like(ids), ids)


def by_token(name: str, x: Tensor, batch: Batch) -> Tensor:
    """What a layer was given or gave, as (sequences, tokens, features); some families flatten it to two dimensions.

    Raises:
        TargetError: if it is not one row for each token of the batch.
    """
    shape = batch.input_ids.shape
    if not _fits(name, x, shape):
        raise TargetError(_not_once(name, [x], shape))
    return x.unflatten(0, shape) if x.dim() == 2 else x


def check_gradient(name: str, output: Tensor) -> None:
    """Refuse a layer whose output no gradient reaches, such as one of a reversible residual.

    Raises:
        TargetError: then.
    """
    if not output.requires_grad:
        raise TargetError(
            f"{name} gives an output that no gradient reaches (a reversible layer, or one that runs without gradients);"
            " leave it out of target_modules"
        )


def once_per_token(name: str, inputs: list[Tensor], batch: Batch) -> None:
    """Refuse a layer that was not applied once to every token of the batch.

    Raises:
        TargetError: then.
    """
    if len(inputs) != 1:
        raise TargetError(_not_once(name, inputs, batch.input_ids.shape))
    by_token(name, inputs[0], batch)


def _fits(name: str, x: Tensor, shape: torch.Size) -> bool:
    return x.shape[:-1] == shape or (x.shape[:-1] == (shape.numel(),) and not routed(name))


def _not_once(name: str, inputs: list[Tensor], shape: torch.Size) -> str:
    given = f"to {', '.join(str(tuple(x.shape)) for x in inputs[:3])}" if inputs else "at all"
    calls = f"{len(inputs)} times, {given}" if inputs else "not at all"
    return (
        f"{name} is applied {calls}; expected once, to all tokens {tuple(shape)}. A layer of one expert, one that "
        "several layers share, or one whose weight is read without calling it cannot be isolated: leave it out of "
        "target_modules"
    )


@contextmanager
def gradient_checkpointing(lm: LanguageModel) -> Iterator[None]:
    """Gradient checkpointing of the decoder layers, without their training flag, on which dropout may hang.

    Raises:
        ConfigError: if the model has no layers that transformers can checkpoint.
    """
    layers = [m for m in lm.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{type(lm.model).__name__} has no layers for gradient checkpointing; leave it off")
    own = [m.__dict__.get("forward") for m in layers]

    def twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if lm.checkpointing:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    try:
        lm.checkpointing = True
        for layer in layers:
            layer.forward = partial(twice, layer.forward)
        yield
    finally:
        lm.checkpointing = False
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
