"""What a step solves: every record is said, and nothing else has moved.

    record i       mean_t nll_t of its judged tokens          residual sqrt(2 .)
    kept text j    mean_t KL(base_t || tuned_t)               residual HELD sqrt(2 .)

A negative log-likelihood is the divergence from the distribution that has the record's token alone, so that both are
the cross-entropy and the divergence of a loss of two terms; the step takes them as equations, which is why it needs far
fewer of them than a descent (see :mod:`libortho.training.gauss_newton`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.lm.gradients import Tapped
from libortho.lm.head import evenly
from libortho.lm.logits import kl_divergence
from libortho.lm.scoring import log_probability
from libortho.text.encoding import Encoded
from libortho.training.system import HELD, System, by_text, root_of_divergence, shares

Divergence = Callable[[Tensor, slice], Tensor]
"""Logits of some positions (positions, vocabulary), and which they are, to what each is off by, (positions,) nats."""


@dataclass(frozen=True)
class Look:
    """A record as a step found it: its loss in nats per token, and whether every token was the first choice."""

    loss: float
    said: bool


class TuneEquations(System):
    """Of records to be learned and texts to be kept."""

    def records(self, items: Sequence[Encoded]) -> list[Look]:
        """Add the equations of these records; returns what they look like."""
        found: dict[int, Look] = {}
        for rows, seen in self._read(items):
            first: list[Tensor] = []

            def surprise(logits: Tensor, part: slice, seen: Tapped = seen, first: list[Tensor] = first) -> Tensor:
                labels = seen.labels[part]
                first.append(logits.argmax(-1) == labels)
                return -log_probability(logits, labels)

            loss = self._divergences(seen, surprise, 1.0).tolist()
            wrong = torch.bincount(seen.owner[~torch.cat(first)], minlength=len(rows)).tolist()
            found |= {r: Look(own, n == 0) for r, own, n in zip(rows, loss, wrong, strict=True)}
        return [found[r] for r in range(len(items))]

    def kept(self, items: Sequence[Encoded], states: Sequence[Tensor], weight: float = HELD) -> None:
        """Add the equations of these texts, which the base reads with these hidden states, (tokens, width) each."""
        for rows, seen in self._read(items):
            before = torch.cat([states[r] for r in rows]).to(seen.states.device)

            def moved(logits: Tensor, part: slice, before: Tensor = before) -> Tensor:
                with torch.no_grad():
                    wanted = self._lm.logits(before[part])
                return kl_divergence(wanted, logits)

            self._divergences(seen, moved, weight)

    def _divergences(self, seen: Tapped, divergence: Divergence, weight: float) -> Tensor:
        """Add one equation for each text; returns its mean divergence, (texts,) in nats per token."""
        share, found, of_states = shares(seen), [], []
        for part in evenly(len(seen.states)):
            mine = seen.states[part].detach().requires_grad_()
            with torch.enable_grad():
                own = divergence(self._lm.logits(mine), part)
                of_states.append(torch.autograd.grad(share[part] @ own, mine)[0])
            found.append(own.detach())
        each = by_text(seen, torch.cat(found))
        residual = root_of_divergence(each)
        self._put(seen, torch.cat(of_states), weight * residual, weight / residual)
        return each
