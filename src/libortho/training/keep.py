"""How far a model has moved on text that it must keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.lm.head import evenly
from libortho.lm.logits import kl_divergence
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.text.encoding import Encoded


@torch.no_grad()
def divergence(lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor]) -> float:
    """Mean KL(original || edited) per token, in nats, over texts whose original ``judged_states`` are given."""
    total, count = 0.0, 0
    for before, after in zip(states, judged_states(lm, items), strict=True):
        for part in evenly(len(after)):
            total += float(kl_divergence(lm.logits(before[part]), lm.logits(after[part])).sum())
        count += len(after)
    return total / max(1, count)
