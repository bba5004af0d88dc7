"""The next token of every row, from its own distribution and with its own random numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from libortho.serving.engine import Sampling

LEAST = -9999.0
"""What OpenAI's API gives for a token that is impossible, in nats."""


class Drawer:
    """Draws the tokens of one row; what it draws does not depend on other rows."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._said = 0
        self._rng: torch.Generator | None = None
        if sampling.temperature > 0:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._rng = torch.Generator().manual_seed(seed)

    def next(self, likeliest: int, logits: Tensor) -> int:
        """The next token: a forced one, the likeliest at temperature 0, or one that is drawn."""
        place, self._said = self._said, self._said + 1
        if place < len(self.sampling.forced):
            return self.sampling.forced[place]
        return likeliest if self.sampling.temperature == 0 else self.draw(logits.cpu())

    def draw(self, logits: Tensor) -> int:
        """A token from logits, (vocabulary,) fp32 on the CPU."""
        assert self._rng is not None
        chances = torch.softmax(logits / self.sampling.temperature, -1)
        ordered, index = chances.sort(descending=True)
        if self.sampling.top_p < 1.0:
            ordered[ordered.cumsum(-1) - ordered >= self.sampling.top_p] = 0.0  # the first one stays
        # The inverse of the distribution function: torch.multinomial takes a number for every token.
        steps = ordered.double().cumsum(-1)
        at = torch.searchsorted(steps, torch.rand(1, generator=self._rng, dtype=torch.float64) * steps[-1], right=True)
        return int(index[min(int(at), len(index) - 1)])


def next_tokens(logits: Tensor, drawers: Sequence[Drawer]) -> list[int]:
    """The next token of every row, from logits (rows, vocabulary) fp32."""
    likeliest = logits.argmax(-1).tolist()
    return [d.next(likeliest[i], logits[i]) for i, d in enumerate(drawers)]


def told(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the ``count`` likeliest with theirs, of logits (vocabulary,) fp32."""
    found = torch.log_softmax(logits, -1).clamp_min(LEAST)
    top = found.topk(count) if count else None
    pairs = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(found[token]), pairs
