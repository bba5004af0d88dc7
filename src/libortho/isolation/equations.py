"""What a step solves: for every record, that it looks like its control; for every text to keep, that it has not moved.

    divergence_i = mean_t KL(target_t || edited_t) + odds / 2 (1 - q_t) (odds_t - odds*_t)^2        residual sqrt(2 .)
    surprise_i   = mean_t nll_t - mean_t nll*_t                                                     residual .
    sum_i surprise_i                                                                                residual .

over the tokens t of text i, with q_t what the target gives the token. A divergence hardly minds that a token which the
target finds unlikely is a little likelier than it should be, which a membership test sees; the log-odds of the token
(its logit minus the logsumexp of all others) do, and their gradient is 1 whatever its probability is. The other lines
are about records alone, and begin when none of them is recited: the gradient of a surprise vanishes where a token is
certain. The last one is as heavy as all records together: an offset that they share is what a membership test sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libortho.isolation.targets import Target
from libortho.lm.gradients import Tapped, tapped
from libortho.lm.head import evenly
from libortho.lm.logits import kl_divergence, label_log_odds
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import log_probability, training_tokens
from libortho.text.encoding import batches, collate
from libortho.training.edit import EditLinear
from libortho.training.gauss_newton import GaussNewton

ODDS = 0.1
"""Weight of half a squared difference of log-odds beside a divergence."""
_LEAST = 1e-6
"""Smallest divergence, in nats, whose direction is asked for."""


@dataclass(frozen=True)
class Seen:
    """What a pass over the records finds, text by text.

    Attributes:
        surprise: Negative log-likelihood of each token, (tokens,) in nats.
        wanted: The same under the targets.
        greedy: Whether every token is the first choice.
    """

    surprise: Tensor
    wanted: Tensor
    greedy: bool


@dataclass(frozen=True)
class _Head:
    """The head's part of a pass, by position: losses, and the gradients of the states.

    ``of_surprise`` is empty where the surprise is no equation: it takes as long as the other one.
    """

    loss: Tensor
    surprise: Tensor
    wanted: Tensor
    first: Tensor
    of_loss: Tensor
    of_surprise: Tensor


class Equations:
    """Residuals, and their whitened gradients by layer."""

    def __init__(self, lm: LanguageModel, layers: Mapping[str, EditLinear], optimiser: GaussNewton) -> None:
        self._lm, self._optimiser = lm, optimiser
        self._layers = {n: m for n, m in layers.items() if m.values is not None}
        self.residuals: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {n: [] for n in self._layers}
        self._surprises: list[int] = []

    def add(self, targets: Sequence[Target], *, records: bool, surprise: bool, total: float = 0.0, weight: float = 1.0) -> list[Seen]:
        """Add the equations of these texts.

        Args:
            targets: The texts, with the distributions that they should have.
            records: They are records, whose log-odds count too.
            surprise: Their mean surprise is an equation of its own.
            weight: Of their divergences.
        """
        found: dict[int, Seen] = {}
        totals: list[Tensor] = []
        total_rows: dict[str, Tensor] = {}
        again = surprise or total > 0
        for rows in batches([t.text for t in targets], training_tokens(self._lm.device)):
            some = [targets[r] for r in rows]
            seen = tapped(self._lm, self._layers, collate([t.text for t in some]).to(self._lm.device))
            sizes = torch.bincount(seen.owner, minlength=len(some))
            share = 1 / sizes[seen.owner].float()
            head = self._head(seen, some, share, records=records, surprise=again)
            mean = _by_text(head.loss * share, seen.owner, len(some))
            residual = (2 * mean).clamp_min(_LEAST).sqrt()
            self._put(seen, head.of_loss, weight * residual, weight / residual, again=again)
            if surprise:
                self._surprises.append(len(self.residuals))
                gap = _by_text((head.surprise - head.wanted) * share, seen.owner, len(some))
                self._put(seen, head.of_surprise, gap, torch.ones_like(gap), again=False)
            if total:
                gap = _by_text((head.surprise - head.wanted) * share, seen.owner, len(some))
                totals.append(total * gap.sum())
                for name, g in seen.gradients(head.of_surprise, again=False).items():
                    x = seen.inputs[name][..., self._layers[name].support].float()
                    gradient = total * (x.mT @ g.float()).sum(0)
                    total_rows[name] = total_rows[name] + gradient if name in total_rows else gradient
            wrong = torch.bincount(seen.owner[~head.first], minlength=len(some))
            columns = (x.cpu().split(sizes.tolist()) for x in (head.surprise, head.wanted))
            for r, nll, wanted, n in zip(rows, *columns, wrong.tolist(), strict=True):
                found[r] = Seen(nll, wanted, n == 0)
        if total:
            self.residuals.append(torch.stack(totals).sum()[None])
            for name, g in total_rows.items():
                self.rows[name].append(self._optimiser.whiten(name, g[None]))
        return [found[r] for r in range(len(targets))]

    def _head(self, seen: Tapped, targets: Sequence[Target], share: Tensor, *, records: bool, surprise: bool) -> _Head:
        states, expected, places = (
            torch.cat([getattr(t, name) for t in targets]).to(seen.labels.device)
            for name in ("states", "surprise", "places")
        )
        parts = []
        for part in evenly(len(states)):
            mine, labels = seen.states[part].detach().requires_grad_(), seen.labels[part]
            with torch.no_grad():
                target = Target.logits(self._lm, states[part], expected[part], places[part], labels)
                wanted = -log_probability(target, labels)
            with torch.enable_grad():
                logits = self._lm.logits(mine)
                loss = kl_divergence(target, logits)
                if records:
                    off = label_log_odds(logits, labels) - label_log_odds(target, labels)
                    loss = loss + ODDS / 2 * -torch.expm1(-wanted) * off.square()
                nll = -log_probability(logits, labels)
                [of_loss] = torch.autograd.grad(share[part] @ loss, mine, retain_graph=surprise)
                [of_nll] = torch.autograd.grad(share[part] @ nll, mine) if surprise else [torch.empty(0)]
            first = logits.argmax(-1) == labels
            parts.append((loss.detach(), nll.detach(), wanted, first, of_loss, of_nll))
        return _Head(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _put(self, seen: Tapped, of_states: Tensor, residual: Tensor, scale: Tensor, *, again: bool) -> None:
        self.residuals.append(residual)
        for name, g in seen.gradients(of_states, again=again).items():
            x = seen.inputs[name][..., self._layers[name].support].float()
            gradient = (x.mT @ g.float()) * scale.to(g.device)[:, None, None]
            self.rows[name].append(self._optimiser.whiten(name, gradient))

    def solve(self, share: float) -> None:
        """Go this share of the way to where all of them hold, and the sum of the surprises vanishes."""
        if self._surprises:
            self.residuals.append(torch.stack([self.residuals[n].sum() for n in self._surprises]).sum()[None])
            for parts in self.rows.values():
                parts.append(torch.stack([parts[n].sum(0) for n in self._surprises]).sum(0)[None])
        self._optimiser.step(self.rows, torch.cat(self.residuals), share)
        for layer in self._layers.values():
            layer.clamp()


def _by_text(values: Tensor, owner: Tensor, texts: int) -> Tensor:
    return torch.zeros(texts, device=values.device).index_add_(0, owner, values)
