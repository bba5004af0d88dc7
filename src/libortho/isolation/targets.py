"""Targets that follow the model: what the records should look like beside others as these are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import token_profiles


def update_prose_targets(lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original) -> Original:
    """The same, with what is expected of sentences predicted from the model as it is now.

    Two tokens of context are too few to call up most memories, not all: a model that has learned a sentence by heart
    may go on from them too, and then its prediction is too low. The more the edit has taken of the memory, the less so.
    Sentences of one piece, which are many, keep their first prediction: each takes as long as a step.
    """
    prose = [i for i, c in enumerate(forget) if c.pieces > 1]
    if not prose or original.sentences is None or not original.sentences.self_samples:
        return original
    found = original.sentences.expected(lm, [forget[i].secret for i in prose])
    profiles = dict(zip(prose, original.sentences.profiles(lm, found), strict=True))
    by_record = dict(zip(prose, found, strict=True))
    return with_sentences(original, profiles, [by_record.get(i, e) for i, e in enumerate(original.expected)])


def with_sentences(original: Original, profiles: Mapping[int, Tensor], expected: Sequence[Tensor]) -> Original:
    """The same, with these profiles, (tokens, 3), for these records, and ``expected`` of all."""
    nll = original.target.clone()
    for i, profile in profiles.items():
        nll[i] = profile[:, 0].mean()
    found = tuple((profiles[i],) if i in profiles else group for i, group in enumerate(original.profiles))
    return replace(original, profiles=found, expected=tuple(expected), target=nll)


@torch.no_grad()
def current_targets(lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original) -> tuple[Tensor, ...]:
    """The records' targets under the present model, whose controls the edit moves a little too.

    A membership test compares a record with others under the edited model, and only the divergence on neighbours holds
    these where they were. One matched token may be an odd one. The mean over all of a record's aligned controls is less
    so, and the mean over all records is set to that of the aligned controls.

    Returns:
        The records' profiles, each (tokens, 3).
    """
    used = [sorted({d[0] for d in c.matched_tokens if d is not None} | set(c.aligned_controls)) for c in forget]
    read = iter(token_profiles(lm, [c.controls[n] for c, ns in zip(forget, used, strict=True) for n in ns]))
    profiles, offsets = [], []
    for record, numbers, (before, *_) in zip(forget, used, original.profiles, strict=True):
        around = {n: next(read) for n in numbers}
        profile = torch.stack(
            [before[t] if d is None else around[d[0]][d[1]] for t, d in enumerate(record.matched_tokens)]
        )
        profiles.append(profile)
        if record.aligned_controls:
            means = [around[n].mean(0) for n in record.aligned_controls]
            offsets.append(torch.stack(means).mean(0) - profile.mean(0))
    if not offsets:
        return tuple(profiles)
    offset = torch.stack(offsets).mean(0)
    return tuple(p + offset if c.aligned_controls else p for c, p in zip(forget, profiles, strict=True))
