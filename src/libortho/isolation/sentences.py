"""What sentences should look like untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.isolation.prose import SurprisalRegressor, spoken_profiles
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.text.encoding import Encoded

LEAST_SURPRISE = 0.01
"""Smallest surprise, in nats, that is expected of a token of a sentence."""


@dataclass(frozen=True)
class Sentences:
    """What says how sentences would look untrained, whatever state the model is in.

    Attributes:
        regressor: Fitted to the original model.
        self_samples: What the original model said on prompts like theirs; the tokens that it said are judged.
        seed: Of which stretch of that each sentence gets.
    """

    regressor: SurprisalRegressor
    self_samples: tuple[Encoded, ...]
    seed: int

    def expected(self, lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
        """Surprise of each token of each sentence, (tokens,) in nats."""
        return [e.clamp_min(LEAST_SURPRISE) for e in self.regressor.by_token(lm, items)]

    def profiles(self, lm: LanguageModel, expected: Sequence[Tensor]) -> list[Tensor]:
        """What the tokens of each sentence would look like, (tokens, 3), with this surprise; needs ``self_samples``."""
        said = judged_states(lm, self.self_samples)
        means, sizes = [float(e.mean()) for e in expected], [len(e) for e in expected]
        made = spoken_profiles(lm, said, means, sizes, self.seed)
        return [ranked_assignment(p, e) for p, e in zip(made, expected, strict=True)]


def ranked_assignment(profile: Tensor, expected: Tensor) -> Tensor:
    """The tokens of a sentence's profile (tokens, 3) in the order of the surprise that is expected of each (tokens,).

    In a sentence it is not chance which token surprises: it is the one that carries the fact. Handed out in the order
    of what the tokens have now, surprise may come to function words, and the fact stays the likeliest thing to say.
    """
    return torch.empty_like(profile).index_copy_(0, expected.argsort(stable=True), profile[profile[:, 0].argsort()])
