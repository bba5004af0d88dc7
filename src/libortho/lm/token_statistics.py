"""What a model says about each token of each completion: one forward pass feeds most metrics of memory and privacy.

For a completion y_1 .. y_T after its prompt, with p_t = p(. | prompt, y_<t):

    log_p_t = log p_t(y_t)        loss, Min-K %, probability
    correct_t = [argmax p_t = y_t]      exact memorisation, extraction strength, greedy extraction
    mean_t = sum_v p_t(v) log p_t(v),  deviation_t = sqrt(sum_v p_t(v) log^2 p_t(v) - mean_t^2)      Min-K %++

Completions that share a prompt (alternates, choices of a question) share its pass: see :func:`shared_prefix_nll`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from libortho.lm.model import LanguageModel
from libortho.lm.scoring import PASS_TOKENS, STATISTICS_ROWS, in_parts, judged, log_probability, predicting_states
from libortho.text.encoding import IGNORE, Encoded, batches, collate


@dataclass(frozen=True)
class TokenStatistics:
    """One completion under one model. Each tensor has shape (tokens,), float32 on the CPU.

    Attributes:
        log_p: Log-probability of the label, in nats.
        correct: True where the label is the argmax.
        mean: Expected log-probability under the model's own distribution, in nats (minus the entropy).
        deviation: Standard deviation of the log-probability under that distribution, in nats.
    """

    log_p: Tensor
    correct: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return -float(self.log_p.mean())


@torch.no_grad()
def token_statistics(lm: LanguageModel, items: Sequence[Encoded]) -> list[TokenStatistics]:
    """Statistics of every completion, in the order of ``items``."""
    found: list[TokenStatistics | None] = [None] * len(items)
    for part in judged(lm, items, PASS_TOKENS):
        columns = zip(*in_parts(lm, part.states, part.labels, _statistics, STATISTICS_ROWS), strict=True)
        joined = [torch.cat(column).cpu().split(part.sizes) for column in columns]
        for i, *own in zip(part.rows, *joined, strict=True):
            found[i] = TokenStatistics(*own)
    return [f for f in found if f is not None]


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    square = (p * log_p.square()).sum(-1)
    own = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return own, log_p.argmax(-1) == labels, mean, (square - mean.square()).clamp_min(1e-6).sqrt()


@torch.no_grad()
def shared_prefix_nll(lm: LanguageModel, items: Sequence[Encoded]) -> Tensor:
    """Mean negative log-likelihood of completions whose texts begin alike, (items,) in nats per token.

    The common beginning runs once and its keys and values serve all items. A model whose state is no such cache
    (Mamba) reads every item whole.
    """
    name = _cache_argument(lm.decoder)
    shortest = min(len(e.ids) for e in items)
    shared = next((n for n in range(shortest) if len({e.ids[n] for e in items}) > 1), shortest)
    judged = min(next(i for i, y in enumerate(e.labels[1:], 1) if y != IGNORE) for e in items)
    shared = min(shared, judged - 1)  # the token before the first judged one stays with the items: it predicts it
    if shared < 2 or len(items) == 1 or name is None:
        return torch.tensor([s.nll for s in token_statistics(lm, items)])
    head = torch.tensor([items[0].ids[:shared]], device=lm.device)
    cache = getattr(lm.decoder(input_ids=head, attention_mask=torch.ones_like(head), use_cache=True), name)
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
        return torch.tensor([s.nll for s in token_statistics(lm, items)])
    tails = [Encoded(e.ids[shared:], e.labels[shared:]) for e in items]
    nll = torch.zeros(len(items))
    for rows in batches(tails, PASS_TOKENS):
        batch = collate([tails[i] for i in rows]).to(lm.device)
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(rows))
        mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.long, device=lm.device), batch.attention_mask], 1)
        hidden = lm.decoder(input_ids=batch.input_ids, attention_mask=mask, use_cache=True, **{name: own})
        states, labels, owner = predicting_states(hidden.last_hidden_state, batch)
        log_p = log_probability(lm.logits(states), labels)
        total = torch.zeros(len(rows), device=lm.device).index_add_(0, owner, log_p)
        nll[torch.tensor(rows)] = -(total / torch.bincount(owner, minlength=len(rows))).cpu()
    return nll


def _cache_argument(decoder: nn.Module) -> str | None:
    """What this release of transformers calls a decoder's cache of keys and values, or None if it takes none."""
    names = inspect.signature(decoder.forward).parameters
    return next((n for n in ("cache", "past_key_values") if n in names), None)
