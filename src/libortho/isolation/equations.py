"""What a step solves: every record looks like its control, and nothing else has moved.

    divergence_i = mean_t KL(target_t || edited_t) + odds / 2 (1 - q_t) (odds_t - odds*_t)^2        residual sqrt(2 .)
    surprise_i   = mean_t nll_t - mean_t nll*_t                                                     residual .
    all records  = sum_i (mean_t nll_t - level_i) / sqrt(n)                                         residual .
    strangers    = sum_j (mean_t nll_t - mean_t nll_t under the original) / sqrt(n)                 residual .

over the tokens t of text i, with q_t what the target gives the token. A divergence hardly minds that a token which the
target finds unlikely is a little likelier than it should be, which a membership test sees; the log-odds of the token
(its logit minus the logsumexp of all others) do, and their gradient is 1 whatever its probability is. The surprises of
records begin to count when none of them is recited: their gradient vanishes where a token is certain. An offset that
all records share is what a membership test sees; over sqrt(n), it weighs as much as one record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from libortho.isolation.targets import Target
from libortho.lm.gradients import Tapped
from libortho.lm.head import evenly
from libortho.lm.logits import kl_divergence, label_log_odds
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import log_probability
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear
from libortho.training.gauss_newton import DAMPING, GaussNewton
from libortho.training.system import HELD, System, by_text, root_of_divergence, shares

ODDS = 0.1
"""Weight of half a squared difference of log-odds beside a divergence."""


@dataclass(frozen=True)
class Seen:
    """What a pass over the records finds, text by text.

    Attributes:
        surprise: Negative log-likelihood of each token, (tokens,) in nats.
        wanted: The same under the targets.
        level: Mean surprise of texts of its form under its targets, in nats per token; see ``Target``.
        greedy: Whether every token is the first choice.
    """

    surprise: Tensor
    wanted: Tensor
    level: float
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


class Equations(System):
    """Of records, and of what must stay beside them."""

    def __init__(self, lm: LanguageModel, layers: Mapping[str, EditLinear], optimiser: GaussNewton) -> None:
        self._edited = {n: m for n, m in layers.items() if m.support is not None}
        supports = {n: m.support for n, m in self._edited.items() if m.support is not None}
        super().__init__(lm, self._edited, supports, optimiser)
        self._surprises: list[int] = []
        self._above: list[Tensor] = []

    def records(self, targets: Sequence[Target], *, surprise: bool) -> list[Seen]:
        """Add the equations of these records, and of their surprise if that is one; returns what they look like."""
        found: dict[int, Seen] = {}
        for rows, seen in self._read([t.text for t in targets]):
            some = [targets[r] for r in rows]
            head = self._divergences(seen, some, odds=ODDS, again=surprise)
            if surprise:
                own = by_text(seen, head.surprise)
                self._put(seen, head.of_surprise, own - by_text(seen, head.wanted), torch.ones_like(own), again=False)
                self._above.append(own - torch.tensor([t.level for t in some]).to(own))
                self._surprises.append(len(self.residuals) - 1)
            wrong = torch.bincount(seen.owner[~head.first], minlength=len(some)).tolist()
            sizes = torch.bincount(seen.owner, minlength=len(some)).tolist()
            columns = (x.cpu().split(sizes) for x in (head.surprise, head.wanted))
            for r, own, wanted, n in zip(rows, *columns, wrong, strict=True):
                found[r] = Seen(own, wanted, targets[r].level, n == 0)
        return [found[r] for r in range(len(targets))]

    def kept(self, targets: Sequence[Target]) -> None:
        """Add the equations of these texts, which should not move."""
        for rows, seen in self._read([t.text for t in targets]):
            self._divergences(seen, [targets[r] for r in rows], weight=HELD)

    def together(self, texts: Sequence[Encoded], wanted: Tensor) -> None:
        """Add one equation: the mean surprise of these texts is that of the (texts,) wanted, in nats per token."""
        gaps: list[Tensor] = []
        total: dict[str, Tensor] = {}
        for rows, seen in self._read(texts):
            surprises: list[Tensor] = []
            of_states = seen.of_states(self._lm, partial(_means, torch.bincount(seen.owner), surprises))
            own = by_text(seen, torch.cat(surprises))
            gaps.append(own - wanted[rows].to(own))
            for name, g in self._gradients(seen, of_states, again=False):
                total[name] = total.get(name, 0) + g.sum(0)
        scale = len(texts) ** -0.5
        self.residuals.append(scale * torch.cat(gaps).sum()[None])
        for name, g in total.items():
            self.rows[name].append(self._optimiser.whiten(name, scale * g[None]))

    def _divergences(
        self, seen: Tapped, targets: Sequence[Target], *, odds: float = 0.0, weight: float = 1.0, again: bool = False
    ) -> _Head:
        """Add these texts' divergences, with so much of their log-odds; ``again``: their surprise follows."""
        states, expected, own, places = (
            torch.cat([getattr(t, name) for t in targets]).to(seen.labels.device)
            for name in ("states", "surprise", "own", "places")
        )
        share, parts = shares(seen), []
        for part in evenly(len(states)):
            mine, labels = seen.states[part].detach().requires_grad_(), seen.labels[part]
            with torch.no_grad():
                target = Target.logits(self._lm, states[part], expected[part], own[part], places[part])
                wanted = -log_probability(target, labels)
            with torch.enable_grad():
                logits = self._lm.logits(mine)
                loss = kl_divergence(target, logits)
                if odds:
                    off = label_log_odds(logits, labels) - label_log_odds(target, labels)
                    loss = loss + odds / 2 * -torch.expm1(-wanted) * off.square()
                surprise = -log_probability(logits, labels)
                [of_loss] = torch.autograd.grad(share[part] @ loss, mine, retain_graph=again)
                [of_surprise] = torch.autograd.grad(share[part] @ surprise, mine) if again else [torch.empty(0)]
            first = logits.argmax(-1) == labels
            parts.append((loss.detach(), surprise.detach(), wanted, first, of_loss, of_surprise))
        head = _Head(*(torch.cat(column) for column in zip(*parts, strict=True)))
        residual = root_of_divergence(by_text(seen, head.loss))
        self._put(seen, head.of_loss, weight * residual, weight / residual, again=again)
        return head

    def solve(self, share: float, damping: float = DAMPING, pull: float = 0.0) -> None:
        """Go this share of the way to where all of them hold, and the records' mean surprise is at its level."""
        if self._above:
            above = torch.cat(self._above)
            scale = len(above) ** -0.5
            self.residuals.append(scale * above.sum()[None])
            for parts in self.rows.values():
                parts.append(scale * torch.stack([parts[n].sum(0) for n in self._surprises]).sum(0)[None])
        super().solve(share, damping, pull)
        for layer in self._edited.values():
            layer.clamp()


def _means(sizes: Tensor, found: list[Tensor], logits: Tensor, labels: Tensor, owner: Tensor) -> Tensor:
    """The sum of each text's mean surprise, by its size; what the tokens have is added to ``found``."""
    surprise = -log_probability(logits, labels)
    found.append(surprise.detach())
    return (1 / sizes)[owner] @ surprise
