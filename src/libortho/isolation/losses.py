"""The loss of a step: how far records are from their targets, and how far text to keep is from the original model.

A memorised token has p close to 1, so the gradient of its negative log-likelihood vanishes; the log-odds of the label
(its logit minus the logsumexp of all others) has a gradient of 1 whatever p is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.isolation.state import Training
from libortho.lm.head import HEAD_POSITIONS, by_record, evenly, summed
from libortho.lm.logits import SMALL, kl_divergence, profile_and_odds, token_profile
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import predicting_states, profiles_of_states, training_tokens
from libortho.text.encoding import Encoded, batches, collate

_LEAST_SURPRISE = 1e-3


def profile_distance(found: Tensor, odds: Tensor, target: Tensor) -> Tensor:
    """How far each token is from what it should look like, (tokens,).

    The sum of the Huber distances of surprise, of the logarithm of the entropy (where the model is sure, the gradient
    of the entropy itself vanishes) and of the standardised surprise from the target's; plus, while a token is likelier
    than it should be, that of its log-odds, whose gradient does not vanish as p approaches 1.

    Args:
        found: (tokens, 3), see ``token_profile``.
        odds: (tokens,), see ``label_log_odds``.
        target: (tokens, 3), what ``found`` should be.
    """
    mine, wanted = (torch.stack([x[:, 0], (x[:, 1].clamp_min(0.0) + SMALL).log(), x[:, 2]], 1) for x in (found, target))
    distance = F.smooth_l1_loss(mine, wanted, reduction="none").sum(-1)
    surprise = target[:, 0].clamp_min(_LEAST_SURPRISE)
    excess = (odds + surprise + torch.log(-torch.expm1(-surprise))).relu()
    return distance + F.smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none")


def forget_losses(
    lm: LanguageModel,
    forget: Sequence[ForgetRecord],
    chosen: Sequence[int],
    original: Original,
    state: Training,
) -> Iterator[Tensor]:
    """Distance of each record from its profile, and of its completion on a neighbour's prompt or of an alternate."""
    present = state.profiles or tuple(p for p, *_ in original.profiles)
    own = [present[i] + state.target_offset for i in chosen]
    items, wanted, of = [forget[i].secret for i in chosen], list(own), list(chosen)
    for slot, i in enumerate(chosen):
        record = forget[i]
        swapped_prompt = [c for c in record.swapped_prompt if c.completion == record.secret.completion]
        if swapped_prompt and original.leaks_to_neighbours[i] and state.rng.random() < 0.5:
            items.append(state.rng.choice(swapped_prompt))
            wanted.append(own[slot])
            of.append(i)
        elif record.kind == "code":
            pick = state.rng.randrange(len(record.alternates))
            items.append(record.alternates[pick])
            before = original.profiles[i][1 + pick]
            wanted.append(present[i] if len(present[i]) == len(before) else before)
            of.append(i)
    for rows in batches(items, training_tokens(lm.device)):
        pieces = [forget[of[r]].pieces for r in rows]
        some = profile_loss(lm, [items[r] for r in rows], [wanted[r] for r in rows], [n == 1 for n in pieces])
        yield some * (len(rows) / len(items))


def profile_loss(lm: LanguageModel, items: Sequence[Encoded], wanted: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
    """Mean distance of these completions from their profiles, a scalar.

    Args:
        lm: The model.
        items: Completions.
        wanted: Profile of each, (tokens, 3).
        free: Whether the tokens of each may share its profile out among them; see ``sorted_assignment``.
    """
    batch = collate(items).to(lm.device)
    states, labels, row = predicting_states(lm.hidden(batch), batch)
    target = torch.cat(list(wanted)).to(lm.device)
    shared = torch.tensor(free, device=lm.device)[row, None]
    sizes = torch.bincount(row, minlength=len(items))
    if (long := sizes[row] > HEAD_POSITIONS).any():  # cut below, but shared out as a whole
        profiles = profiles_of_states(lm, states[long], labels[long])
        target[long] = torch.where(shared[long], sorted_assignment(profiles, target[long], row[long]), target[long])
        shared = shared & ~long[:, None]
    share = 1 / (sizes[row] * len(items))

    def distance(logits: Tensor, part: slice) -> Tensor:
        found, odds = profile_and_odds(logits, labels[part])
        own = torch.where(shared[part], sorted_assignment(found.detach(), target[part], row[part]), target[part])
        return share[part] @ profile_distance(found, odds, own)

    return summed(lm, states, distance, by_record(sizes.tolist()))


def sorted_assignment(present: Tensor, target: Tensor, record: Tensor) -> Tensor:
    """The target's values within each record, in the order of its tokens' present values (1-D optimal transport).

    Which token of a code is the surprising one is chance: a record looks untrained if its tokens are distributed like
    the matched ones. Each column is a Wasserstein-1 distance, which sorting solves, and asks for less change than a
    target for every single token. In a sentence the order is no chance (see ``ranked_assignment``), but of many
    sentences not every word can have its own: the answers of TOFU end further off where it is asked.

    Args:
        present: (tokens, 3) profile under the present model.
        target: (tokens, 3) profile of the matched tokens.
        record: (tokens,) index of the record that each token belongs to.
    """

    def order(values: Tensor) -> Tensor:
        first = values.argsort(0)
        return torch.stack([c[record[c].argsort(stable=True)] for c in first.T], 1)

    return torch.empty_like(target).scatter_(0, order(present), target.gather(0, order(target)))


def keep_losses(
    lm: LanguageModel,
    forget: Sequence[ForgetRecord],
    chosen: Sequence[int],
    retain: Sequence[Encoded],
    texts: Sequence[int],
    original: Original,
    config: IsolateConfig,
    state: Training,
) -> Iterator[Tensor]:
    """Divergence from the original model on retain texts and on one neighbour of every chosen record, in parts."""
    beside = [(i, state.rng.randrange(len(forget[i].neighbours))) for i in chosen if forget[i].neighbours]
    parts = [
        (config.retain_weight, [retain[t] for t in texts], [original.retain[t] for t in texts], False),
        (
            1.0,
            [forget[i].held[p] for i, p in beside],
            [original.neighbours[i][p] for i, p in beside],
            True,
        ),
    ]
    for weight, items, states, as_profiles in parts:
        tokens = sum(len(s) for s in states)
        for rows in batches(items, training_tokens(lm.device)) if weight else ():
            some = _kept(lm, [items[r] for r in rows], [states[r] for r in rows], tokens, len(items), as_profiles)
            yield weight * some


def _kept(
    lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor], tokens: int, texts: int, as_profiles: bool
) -> Tensor:
    """KL(original || edited) by token, and with profiles their distance by text; ``states`` are the original's.

    These texts' share of the means over so many tokens and texts.
    """
    batch = collate(items).to(lm.device)
    after, labels, row = predicting_states(lm.hidden(batch), batch)
    before = torch.cat(list(states))
    share = 1 / (torch.bincount(row, minlength=len(items))[row] * texts)

    def of(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            original = lm.logits(before[part])
            wanted = token_profile(original, labels[part]) if as_profiles else None
        lost = kl_divergence(original, logits).sum() / tokens
        if wanted is None:
            return lost
        return lost + share[part] @ profile_distance(*profile_and_odds(logits, labels[part]), wanted)

    return summed(lm, after, of, evenly(len(after)))


def summed_gradients(losses: Iterable[Tensor], values: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients of the sum; each loss's graph is gone before the next is made."""
    total = [torch.zeros_like(v) for v in values]
    for loss in losses:
        if not loss.requires_grad:
            continue
        for whole, g in zip(total, torch.autograd.grad(loss, list(values), allow_unused=True), strict=True):
            if g is not None:
                whole += g
    return total
