"""Is the rest unharmed: perplexity, agreement with the original model, and accuracy on task files.

    perplexity          exp( sum NLL / tokens ) over general text
    agreement           KL(original || subject) in nats per token, and how often both have the same most likely token
    exact match         every token of the continuation is the most likely one after the context (LAMBADA, arithmetic)
    acc_norm            argmax over choices of log p(choice | query) / characters(choice) is the right one
    acc                 the same without the division

Contexts and continuations are joined and scored as EleutherAI's lm-evaluation-harness does (``lm_eval.api.model``,
``_encode_pair``; ``lm_eval.api.task``, ``process_results``), whose ``acc`` and ``acc_norm`` these are. All subjects are
asked the same rows, and each row's result is kept, so that differences between subjects are paired.

General text is joined and cut into consecutive windows without overlap; nothing predicts the first token of a window,
which is not judged. A perplexity of this protocol compares with others of the same window length only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libortho.core.errors import DataError, TargetError
from libortho.core.layer import OrthoLinear
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import PASS_TOKENS, by_tokens
from libortho.text.corpus import evaluation_text
from libortho.text.encoding import IGNORE, Encoded, chunk, collate

_ROWS = 256
"""Rows of logits held in fp32 at a time."""


# ---- tasks ----


# ---- general text ----


def general_items(tokenizer: Any, text: str | Path | None, sequences: int = 24, tokens: int = 256) -> list[Encoded]:
    """Windows of general text, evenly spaced among all consecutive windows of it.

    Args:
        tokenizer: The model's.
        text: A file of running text (WikiText's raw test split, for example); by default the paragraphs that ship with
            the package and that ``isolate`` never sees.
        sequences: At most so many windows.
        tokens: Length of a window; the last may be shorter.

    Raises:
        DataError: if the file is missing, is not text or holds no window, or a size is too small.
    """
    if sequences < 1 or tokens < 2:
        raise DataError(f"{sequences} windows of {tokens} tokens were asked for; expected at least 1 of at least 2")
    if text is None:
        texts = list(evaluation_text())
    else:
        try:
            texts = [Path(text).read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise DataError(f"general text: {text} is not UTF-8 text ({error})") from error
        except OSError as error:
            raise DataError(f"general text: {text} cannot be read ({error.strerror})") from error
    pieces = chunk(texts, tokenizer, tokens)
    if not pieces:
        raise DataError(f"general text: {text} holds no window of tokens; expected at least a sentence")
    step = max(1, len(pieces) // sequences)
    return [Encoded(tuple(p), tuple(p)) for p in pieces[::step][:sequences]]


@torch.no_grad()
def reference_states(lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
    """Hidden states from which the judged tokens are predicted: for each item (tokens, width), on the CPU.

    A row of them is some hundred times smaller than the logits that ``agreement`` needs of the original model.
    """
    found: dict[int, Tensor] = {}
    for rows in by_tokens(items, PASS_TOKENS):
        batch = collate([items[i] for i in rows]).to(lm.device)
        judged = batch.labels[:, 1:] != IGNORE
        states = lm.hidden(batch)[:, :-1][judged].cpu()
        found.update(zip(rows, states.split(judged.sum(1).tolist()), strict=True))
    return [found[i] for i in range(len(items))]


@torch.no_grad()
def sequence_nll(
    lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each item in nats, (items,) float64, and its judged tokens, (items,).

    Perplexity is ``exp(nll.sum() / tokens.sum())``; items resampled with replacement give its interval.

    Args:
        lm: The model.
        items: Windows of text.
        states: The model's own ``reference_states``, where they are at hand.

    Raises:
        DataError: if there is no token to judge.
    """
    labels, tokens = _labels(items)
    rows = torch.cat(reference_states(lm, items) if states is None else list(states))
    log_p = [
        _of(lm.logits(h.to(lm.device)).log_softmax(-1), y)
        for h, y in zip(rows.split(_ROWS), labels.split(_ROWS), strict=True)
    ]
    return _summed(log_p, tokens), tokens


@dataclass(frozen=True)
class Agreement:
    """How one model's predictions differ from the original's, on each judged token.

    Attributes:
        kl: KL(original || subject), (tokens,) in nats, float64.
        same: Both have the same most likely token, (tokens,) bool.
        nll: The subject's summed negative log-likelihood of each item in nats, (items,), as ``sequence_nll`` gives it.
        tokens: Judged tokens of each item, (items,), to split ``kl`` and ``same`` by.
    """

    kl: Tensor
    same: Tensor
    nll: Tensor
    tokens: Tensor

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(self.kl.mean())

    @property
    def top1(self) -> float:
        """Share of tokens on which both agree."""
        return float(self.same.double().mean())


@torch.no_grad()
def agreement(
    lm: LanguageModel,
    items: Sequence[Encoded],
    states: Sequence[Tensor],
    reference: LanguageModel,
    own: Sequence[Tensor] | None = None,
) -> Agreement:
    """Compare a model with the original on the same text; the divergence is the mean of sum_v p(v) log(p(v) / q(v)).

    Args:
        lm: The subject, q, in the context of its alpha.
        items: Windows of text.
        states: ``reference_states`` of the original, p, on the same items.
        reference: The original. Only its head runs, and under the subject's alpha if they share it.
        own: The subject's ``reference_states``, where they are at hand.

    Raises:
        DataError: if ``states`` are not those of ``items``, or there is no token to judge.
        TargetError: if the original's head has an alpha of its own, which nobody knows here.
    """
    if isinstance(reference.head, OrthoLinear):
        raise TargetError("the original's output head is itself split; expected a dense model to compare with")
    labels, tokens = _labels(items)
    mine = reference_states(lm, items) if own is None else own
    if [len(h) for h in states] != tokens.tolist():
        raise DataError("the reference's hidden states are of other texts; expected reference_states of the same items")
    kl, same, own_log_p = [], [], []
    for p, q, y in zip(*(t.split(_ROWS) for t in (torch.cat([*states]), torch.cat([*mine]), labels)), strict=True):
        log_p = reference.logits(p.to(reference.device)).log_softmax(-1)
        log_q = lm.logits(q.to(lm.device)).log_softmax(-1).to(log_p.device)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
        own_log_p.append(_of(log_q, y))
    return Agreement(torch.cat(kl), torch.cat(same), _summed(own_log_p, tokens), tokens)


def _labels(items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Judged tokens of all items, and how many each has."""
    labels = [_judged(e) for e in items]
    if not any(labels):
        raise DataError("the text holds no token that can be judged; expected at least two tokens")
    return torch.tensor([y for own in labels for y in own]), torch.tensor([len(own) for own in labels])


def _of(log_p: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, (tokens,), on the CPU."""
    return log_p.gather(-1, labels.to(log_p.device).unsqueeze(-1))[:, 0].cpu()


def _summed(log_p: Sequence[Tensor], tokens: Tensor) -> Tensor:
    return torch.stack([-part.double().sum() for part in torch.cat(list(log_p)).split(tokens.tolist())])


def _judged(item: Encoded) -> list[int]:
    """Labels that something predicts."""
    return [y for y in item.labels[1:] if y != IGNORE]


# ---- the harness itself ----
