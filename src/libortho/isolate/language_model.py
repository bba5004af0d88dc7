"""A causal LM taken apart into decoder and output head, so that logits are computed only where they are needed.

A full row of logits is as large as the vocabulary; a hidden state is some hundred times smaller. The original model's
hidden states are therefore what is kept for the divergence terms, and heads run on the positions that carry loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from libortho.data import Batch
from libortho.errors import TargetError


class LanguageModel:
    """Hidden states and logits of a transformers causal LM.

    Attributes:
        checkpointing: Decoder layers run once more in the backward pass, where `isolate` has arranged for it.

    Raises:
        TargetError: if the model has no decoder and output embedding, or they do not reproduce its logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.checkpointing = False
        base = getattr(model, "base_model", None)
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        if base is None or base is model or head is None:
            raise TargetError(
                f"{type(model).__name__} is not a causal language model with a decoder and an output embedding; "
                "expected a transformers AutoModelForCausalLM"
            )
        self.decoder: nn.Module = base
        self.head: nn.Module = head
        config: Any = getattr(model, "config", None)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check()

    @property
    def device(self) -> torch.device:
        """Device of the output head, where batches go."""
        return next(self.head.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, (sequences, tokens, width)."""
        output = self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits, (..., vocabulary), of hidden states (..., width)."""
        logits = self.head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check(self) -> None:
        """Some families scale between decoder and logits; refuse them instead of optimising a wrong number."""
        ids = torch.arange(2, 10, device=self.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        parts = self.logits(self.hidden(Batch(ids, mask, ids)))
        if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise TargetError(
                f"{type(self.model).__name__} changes its hidden states between decoder and logits in a way that "
                "isolate does not know; please report this model family"
            )
