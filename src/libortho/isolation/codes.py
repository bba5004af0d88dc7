"""What codes and names should look like untrained: as others of their form do, after other prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.matching import MatchedToken
from libortho.lm.logits import Scores, completion_scores, token_profile, with_log_probability
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import grouped_scores, judged_labels
from libortho.text.encoding import Encoded, predicting

LENGTH_CORRELATION = 0.6
"""Correlation, among untrained codes of one shape, of surprise per token with having fewer tokens than the others
(measured: 0.62 for access codes, 0.76 for licence plates)."""


def counterfactual_scores(lm: LanguageModel, record: ForgetRecord, states: Sequence[Tensor]) -> Scores:
    """Scores of a record's neighbours, whose ``states`` are known, or of its alternates where it has none.

    A sentence without neighbours is judged by its predictions alone, and gets a zero.
    """
    if states:
        return _scores_of_states(lm, record.neighbours, states)
    if record.kind == "code":
        return grouped_scores(lm, [record.alternates])[0]
    return Scores(torch.zeros(1), torch.zeros(1))


def expected_codes(codes: Sequence[ForgetRecord], counterfactual: Sequence[Scores]) -> tuple[Tensor, Tensor]:
    """Surprise that is expected of codes, (records,) in nats per token, and its standard deviation, a scalar."""
    deviation = torch.cat([s.nll - s.nll.mean() for s in counterfactual]).square().mean().sqrt()
    noise = deviation.square() / torch.tensor([float(len(s.nll)) for s in counterfactual])
    nll = shrunk(torch.stack([s.nll.mean() for s in counterfactual]), noise)
    return nll + LENGTH_CORRELATION * deviation * shortness(codes), deviation


@torch.no_grad()
def code_profile(
    lm: LanguageModel,
    record: ForgetRecord,
    matched: Sequence[MatchedToken],
    controls: Sequence[Tensor],
    own: Tensor,
    expected: Tensor,
) -> Tensor:
    """What a completion should look like token by token, (tokens, 3); see ``token_profile``.

    A token with a match gets what the control's own token has there; a token without one gets its own distribution with
    the expected probability for its label.
    """
    places = predicting(record.secret)
    states, labels = [], []
    for i, match in enumerate(matched):
        if match is None:
            place = min(i, len(own) - 1)
            states.append(own[place])
            labels.append(record.secret.ids[places[place] + 1])
        else:
            control, token = match
            states.append(controls[control][token])
            labels.append(record.controls[control].ids[predicting(record.controls[control])[token] + 1])
    logits, index = lm.logits(torch.stack(states)), torch.tensor(labels, device=lm.device)
    unmatched = [i for i, match in enumerate(matched) if match is None]
    if unmatched:
        wanted = expected[[min(i, len(own) - 1) for i in unmatched]].to(lm.device)
        logits[unmatched] = with_log_probability(logits[unmatched], index[unmatched], -wanted)
    return token_profile(logits, index).cpu()


@torch.no_grad()
def _scores_of_states(lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor]) -> Scores:
    """Scores of completions with the states that predict them, and maybe a closing after them."""
    labels, sizes = judged_labels(items)
    logits = lm.logits(torch.cat([s[:n] for s, n in zip(states, sizes, strict=True)]))
    owner = torch.repeat_interleave(torch.tensor(sizes)).to(lm.device)
    found = completion_scores(logits, labels.to(lm.device), owner, len(items))
    return Scores(found.nll.cpu(), found.tokens.cpu())


def shrunk(means: Tensor, noise: Tensor) -> Tensor:
    """Pull noisy means together as far as their spread is noise (empirical Bayes; Efron and Morris 1973).

    Args:
        means: (records,) one mean of a few counterfactuals for each record.
        noise: (records,) the sampling variance of each mean.
    """
    if len(means) < 2:
        return means
    between = float((means - means.mean()).square().sum() / (len(means) - 1))
    signal = max(0.0, between - float(noise.mean()))
    weight = signal / (signal + noise).clamp_min(1e-12)
    return means.mean() + weight * (means - means.mean())


def shortness(forget: Sequence[ForgetRecord]) -> Tensor:
    """By how many standard deviations each record has fewer completion tokens than its alternates, (records,)."""
    own = torch.tensor([float(len(c.secret.completion)) for c in forget])
    others = [torch.tensor([float(len(a.completion)) for a in c.alternates]) for c in forget]
    spread = torch.cat([o - o.mean() for o in others]).square().mean().sqrt()
    mean = torch.stack([o.mean() for o in others])
    return torch.zeros_like(own) if spread == 0 else ((mean - own) / spread).clamp(-2, 2)
