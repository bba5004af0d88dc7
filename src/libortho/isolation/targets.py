"""The next-token distributions that records should have: those of controls at the same places.

Untrained, a code is exchangeable with other codes of its form. Where a completion stands at character c, the model
should be as undecided as it is at character c of somebody else's completion (:mod:`.matching`), and find the record's
token there as likely as the other's own: the two change places, for a model says what it memorised to strangers too. A
token that no control matches, and every token of a sentence, keeps its own distribution, but for its own probability:
that is the one which is expected of it, by other codes or by the prediction for sentences (:mod:`.prose`).

Controls are read again under the edited model, whose controls the edit moves a little too: a membership test compares a
record with others under that model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.lm.head import evenly
from libortho.lm.logits import with_log_probability
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_labels, judged_states
from libortho.text.encoding import Encoded


@dataclass(frozen=True)
class Target:
    """A text, and the distributions that its judged tokens should have.

    Attributes:
        text: The text.
        states: (tokens, width) hidden states that give the distributions.
        surprise: (tokens,) what the record's token should have there, in nats; nan where the distribution says it.
        own, places: (tokens,) the tokens that change places there, a record's and its control's.
        level: Mean surprise of texts of a record's form under these distributions, in nats per token.
    """

    text: Encoded
    states: Tensor
    surprise: Tensor
    own: Tensor
    places: Tensor
    level: float = 0.0

    @classmethod
    def kept(cls, text: Encoded, states: Tensor) -> Target:
        """A text that should stay what it is."""
        labels, _ = judged_labels([text])
        return cls(text, states, torch.full((len(states),), torch.nan), labels, labels)

    def with_completion(self, text: Encoded) -> Target:
        """That of another completion of the prompt, whose tokens begin at the same characters: the same as far as the
        text before a token is the same; from then on no tokens change places."""
        labels, _ = judged_labels([text])
        differs = (labels != self.own).int()
        other = differs.cumsum(0) > differs
        return replace(self, text=text, own=torch.where(other, self.places, self.own))

    @staticmethod
    def logits(lm: LanguageModel, states: Tensor, surprise: Tensor, own: Tensor, places: Tensor) -> Tensor:
        """Logits of these positions, (positions, vocabulary)."""
        logits = lm.logits(states)
        pair = torch.stack([own, places], 1)
        logits = logits.scatter(1, pair, logits.gather(1, pair.flip(1)))
        given = ~surprise.isnan()
        if given.any():
            logits[given] = with_log_probability(logits[given], own[given], -surprise[given])
        return logits


@torch.no_grad()
def record_targets(
    lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original, chosen: Sequence[int]
) -> list[Target]:
    """The targets of the chosen records, by what the model as it is says of their controls."""
    used = [sorted({m[0] for m in forget[i].matched_tokens if m is not None}) for i in chosen]
    read = iter(judged_states(lm, [forget[i].controls[n] for i, own in zip(chosen, used, strict=True) for n in own]))
    found = []
    for i, numbers in zip(chosen, used, strict=True):
        record, own, expected = forget[i], original.states[i], original.expected[i]
        controls = {n: next(read) for n in numbers}
        matched = list(zip(record.matched_tokens, own, strict=True))
        states = torch.stack([s if m is None else controls[m[0]][m[1]] for m, s in matched])
        given = torch.tensor([m is not None for m in record.matched_tokens])
        labels, _ = judged_labels([record.secret])
        theirs = {n: judged_labels([record.controls[n]])[0].tolist() for n in numbers}
        places = [
            y if m is None else theirs[m[0]][m[1]] for m, y in zip(record.matched_tokens, labels.tolist(), strict=True)
        ]
        surprise = expected.masked_fill(given, torch.nan)
        level = _level(lm, states, surprise, record.alike)
        found.append(Target(record.secret, states, surprise, labels, torch.tensor(places), level))
    return found


def _level(lm: LanguageModel, states: Tensor, surprise: Tensor, alike: Sequence[Sequence[int]]) -> float:
    """Mean surprise of codes of the record's form under these distributions, in nats per token: over all tokens that
    may stand where one does, for the token that does is one draw of them."""
    found = surprise.clone()
    for part in evenly(len(states)):
        log_p = lm.logits(states[part]).log_softmax(-1)
        for t, row in enumerate(log_p, part.start):
            if found[t].isnan():
                found[t] = -row[list(alike[t])].mean()
    return float(found.mean())
