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
from libortho.lm.scoring import PASS_TOKENS, STATISTICS_ROWS, judged_labels, judged_states, summed_nll
from libortho.text.corpus import evaluation_text
from libortho.text.encoding import Encoded, chunk


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
        states: ``judged_states`` of the original, p, on the same items.
        reference: The original. Only its head runs, and under the subject's alpha if they share it.
        own: The subject's ``judged_states``, where they are at hand.

    Raises:
        DataError: if ``states`` are not those of ``items``, or there is no token to judge.
        TargetError: if the original's head has an alpha of its own, which nobody knows here.
    """
    if isinstance(reference.head, OrthoLinear):
        raise TargetError("the original's output head is itself split; expected a dense model to compare with")
    labels, sizes = judged_labels(items)
    mine = judged_states(lm, items, PASS_TOKENS) if own is None else own
    if [len(h) for h in states] != sizes:
        raise DataError("the reference's hidden states are of other texts; expected judged_states of the same items")
    kl, same, own_log_p = [], [], []
    columns = (torch.cat([*states]), torch.cat([*mine]), labels)
    for p, q, y in zip(*(t.split(STATISTICS_ROWS) for t in columns), strict=True):
        log_p = reference.logits(p.to(reference.device)).log_softmax(-1)
        log_q = lm.logits(q.to(lm.device)).log_softmax(-1).to(log_p.device)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
        own_log_p.append(log_q.gather(-1, y.to(log_q.device).unsqueeze(-1))[:, 0].cpu())
    return Agreement(torch.cat(kl), torch.cat(same), *summed_nll(torch.cat(own_log_p), sizes))
