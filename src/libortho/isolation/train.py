"""Move the values on the support until the records are what their alternates are, and nothing else has moved.

    minimise   mean_i [ surprise, entropy and standardised surprise at each token of record i  ->  its donors' ]
               + retain_weight * KL(original || edited) on retain text
               + KL(original || edited) on neighbours

For codes and names a donor is a token of another completion after another prompt of the same shape, which no training
has touched: see :mod:`libortho.isolation.matching`. For sentences see :mod:`libortho.isolation.prose`. Records are
judged on their own prompt and, in turn, on a neighbour's, so that a memory that answers to the whole template is
forgotten for the whole template.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.losses import profile_distance
from libortho.isolation.matching import Donor
from libortho.isolation.prose import PlausibilityModel, fit, spoken_profiles
from libortho.lm.head import HEAD_POSITIONS, by_record, evenly, summed
from libortho.lm.logits import (
    Scores,
    kl_divergence,
    profile_and_odds,
    token_profile,
    with_log_probability,
)
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import (
    grouped_scores,
    hidden_states,
    judged_logits,
    predicting_states,
    profiles_of_states,
    score,
    scores_of_states,
    scoring_batches,
    token_profiles,
    training_batches,
)
from libortho.selection.curvature import Metric
from libortho.text.encoding import Encoded, collate, predicting
from libortho.training.edit import EditLinear

logger = logging.getLogger(__name__)

LENGTH_CORRELATION = 0.6
"""Correlation, among untrained codes of one shape, of surprise per token with having fewer tokens than the others
(measured: 0.62 for access codes, 0.76 for licence plates)."""
_WARM_UP, _STEADY, _LANDING = 5, 30, 10
"""Steps of rising learning rate; steps after which it falls with the square root of their number; last steps, in
which it falls to zero."""
_CROSSED = 2
"""Neighbours' prompts on which a record's completion is looked for."""
RELATIVE_STEP, RELATIVE_TO = 0.08, 12
"""Peak step of Adam as a share of the root mean square of the values that it moves, and records in a step for which it
is right."""
_STRETCH, _SECANT_STEPS, _CLOSE = (0.8, 1.25), 3, 0.05
"""Range of the factor of the finished edit, secant steps to find it, and nats per token that need none."""
RECORDS_PER_STEP, RETAIN_TOKENS_PER_STEP = 12, 256
"""Forget records, and retain tokens, in one optimiser step."""
CHECK_EVERY = 5
"""Optimiser steps between two looks at the criteria."""
LEAST_SURPRISE = 0.01
"""Smallest surprise, in nats, that is expected of a token of a sentence."""
STEER_FROM, STEER, STEER_MOST, STEER_AHEAD = 15, 0.3, 0.4, 2.0
"""Step from which targets are corrected, share of the difference that a correction is, most that counts of it, and
for how many looks the training is trusted to go on as it goes."""
PARTIAL, LEAST_IN_PLACE = 0.05, 1 / 3
"""Chance that is allowed an untrained sentence to have less than this share of its surprise where it is expected."""
BAND = 1.645
"""Half-width of the 5-95 % band, in standard deviations of a normal distribution."""
FAR = 2.0
"""Half-widths of the band from its middle at which one record alone is conspicuous: one untrained one in a thousand."""


@dataclass(frozen=True)
class Case:
    """One forget record with its counterfactuals, tokenised.

    Attributes:
        number: Position in the forget source, from 1.
        secret: The record.
        alternates: Its prompt with other completions.
        neighbours: Other prompts with other completions, which must stay what they are.
        held: The same with what closes a chat's answer, so that answers go on to end.
        witnesses: Further ones, of strangers, that no training touches; what the model gives these is the target.
        crossed: Other prompts with the record's completion.
        exchangeable: Untrained, the alternates are as likely as the record: true of codes and names, not of sentences.
        like: Token ids of prompts like its own, on which the model shows how it speaks; for sentences only.
        donors: For each token of the record, whose distribution it should have; see :mod:`libortho.isolation.matching`.
        peers: Those witnesses whose tokens begin at the same characters as the record's.
        alternate_donors: The same for each alternate; empty for sentences.
        pieces: In how many pieces it is looked for among the columns. A sentence of several pieces has columns for its
            words, and each word a surprise of its own to come to.
    """

    number: int
    secret: Encoded
    alternates: tuple[Encoded, ...]
    neighbours: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    witnesses: tuple[Encoded, ...]
    crossed: tuple[Encoded, ...]
    exchangeable: bool
    like: tuple[tuple[int, ...], ...]
    donors: tuple[Donor, ...]
    peers: tuple[int, ...]
    alternate_donors: tuple[tuple[Donor, ...], ...]
    pieces: int = 1


@dataclass(frozen=True)
class Sentences:
    """What says how sentences would look untrained, whatever state the model is in.

    Attributes:
        plausibility: Fitted to the original model.
        spoken: What the original model said on prompts like theirs; the tokens that it said are judged.
        seed: Of which stretch of that each sentence gets.
    """

    plausibility: PlausibilityModel
    spoken: tuple[Encoded, ...]
    seed: int

    def expected(self, lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
        """Surprise of each token of each sentence, (tokens,) in nats."""
        return [self.plausibility.by_token(lm, e).clamp_min(LEAST_SURPRISE) for e in items]

    def profiles(self, lm: LanguageModel, expected: Sequence[Tensor]) -> list[Tensor]:
        """What the tokens of each sentence would look like, (tokens, 3), with this surprise; needs spoken texts."""
        said = [h[list(predicting(e))] for e, h in zip(self.spoken, hidden_states(lm, self.spoken), strict=True)]
        means, sizes = [float(e.mean()) for e in expected], [len(e) for e in expected]
        made = spoken_profiles(lm, said, means, sizes, self.seed)
        return [placed(p, e) for p, e in zip(made, expected, strict=True)]


@dataclass(frozen=True)
class Reference:
    """What the original model says; constants of the training.

    Attributes:
        secret: Scores of the records, (records,).
        recited: Whether each record's completion is the greedy continuation of its prompt, (records,) bool.
        target: Scores that each record should have had, (records,).
        beside: Mean negative log-likelihood of each record's counterfactuals, in nats per token, (records,); 0 for
            sentences that have none.
        spread: Standard deviation around the target's negative log-likelihood, in nats per token, (records,).
        profiles: For each record, what its tokens should look like, (tokens, 3), and those of each alternate.
        spilled: Whether each record's completion is remembered after its neighbours' prompts too, (records,) bool.
        retain: Last hidden states of each retain sequence, (tokens, width).
        neighbours: Last hidden states of each neighbour with its closing, (tokens, width), record by record.
        sentences: How sentences are judged; None where there are none.
        expected: Surprise that is expected of each token of each sentence, (tokens,) in nats; empty for other records.
    """

    secret: Scores
    recited: Tensor
    target: Scores
    beside: Tensor
    spread: Tensor
    profiles: tuple[tuple[Tensor, ...], ...]
    spilled: Tensor
    retain: tuple[Tensor, ...]
    neighbours: tuple[tuple[Tensor, ...], ...]
    sentences: Sentences | None
    expected: tuple[Tensor, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {"target.nll": self.target.nll, "target.odds": self.target.odds}
        named |= {"recited": self.recited, "spilled": self.spilled, "beside": self.beside, "spread": self.spread}
        named |= {f"secret.{f}": getattr(self.secret, f) for f in ("nll", "odds", "tokens")}
        named |= {f"retain.{i}": states for i, states in enumerate(self.retain)}
        named |= {f"expected.{i}": e for i, e in enumerate(self.expected)}
        for name, groups in (("neighbours", self.neighbours), ("profiles", self.profiles)):
            named |= {f"{name}.{i}.{j}": tensor for i, group in enumerate(groups) for j, tensor in enumerate(group)}
        if self.sentences is not None:
            model = self.sentences.plausibility
            named |= {"plausibility.weights": model.weights, "plausibility.deviation": torch.tensor(model.deviation)}
        return named

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        cases: Sequence[Case],
        retain: int,
        device: torch.device,
        opening: Sequence[int],
        spoken: Sequence[Encoded],
        seed: int,
    ) -> Reference:
        """From what ``tensors()`` gave, for these records and ``retain`` texts; hidden states go to ``device``.

        The last three are what ``reference`` was given.
        """

        def scores(name: str) -> Scores:
            return Scores(*(tensors[f"{name}.{f}"] for f in ("nll", "odds", "tokens")))

        secret, sentences = scores("secret"), None
        if "plausibility.weights" in tensors:
            weights, deviation = tensors["plausibility.weights"], float(tensors["plausibility.deviation"])
            sentences = Sentences(PlausibilityModel(weights, deviation, tuple(opening)), tuple(spoken), seed)
        return cls(
            sentences=sentences,
            expected=tuple(tensors[f"expected.{i}"] for i in range(len(cases))),
            secret=secret,
            recited=tensors["recited"],
            target=Scores(tensors["target.nll"], tensors["target.odds"], secret.tokens),
            beside=tensors["beside"],
            spread=tensors["spread"],
            profiles=tuple(
                tuple(tensors[f"profiles.{i}.{j}"] for j in range(1 + len(c.alternate_donors)))
                for i, c in enumerate(cases)
            ),
            spilled=tensors["spilled"],
            retain=tuple(tensors[f"retain.{i}"].to(device) for i in range(retain)),
            neighbours=tuple(
                tuple(tensors[f"neighbours.{i}.{j}"].to(device) for j in range(len(c.neighbours)))
                for i, c in enumerate(cases)
            ),
        )


def reread(lm: LanguageModel, cases: Sequence[Case], original: Reference) -> Reference:
    """The same, with what is expected of sentences predicted from the model as it is now.

    Two tokens of context are too few to call up most memories, not all: a model that has learned a sentence by heart
    may go on from them too, and then its prediction is too low. The more the edit has taken of the memory, the less so.
    Sentences of one piece, which are many, keep their first prediction: each takes as long as a step.
    """
    prose = [i for i, c in enumerate(cases) if c.pieces > 1]
    if not prose or original.sentences is None or not original.sentences.spoken:
        return original
    found = original.sentences.expected(lm, [cases[i].secret for i in prose])
    profiles = dict(zip(prose, original.sentences.profiles(lm, found), strict=True))
    by_record = dict(zip(prose, found, strict=True))
    return with_sentences(original, profiles, [by_record.get(i, e) for i, e in enumerate(original.expected)])


def with_sentences(original: Reference, profiles: Mapping[int, Tensor], expected: Sequence[Tensor]) -> Reference:
    """The same, with these profiles, (tokens, 3), for these records, and ``expected`` of all."""
    nll = original.target.nll.clone()
    for i, profile in profiles.items():
        nll[i] = profile[:, 0].mean()
    found = tuple((profiles[i],) if i in profiles else group for i, group in enumerate(original.profiles))
    return replace(original, profiles=found, expected=tuple(expected), target=replace(original.target, nll=nll))


@torch.no_grad()
def drifted(lm: LanguageModel, cases: Sequence[Case], original: Reference) -> tuple[Tensor, ...]:
    """What each record should look like now that its donors have moved a little too.

    A membership test compares a record with others under the edited model, not under the original one. Only the
    divergence on neighbours keeps the donors where they were. One donor may be an odd one; all of a record's peers
    together are less so, and it is the group of records that a test compares: the mean over all is that of the peers.

    Returns:
        The records' profiles, each (tokens, 3).
    """
    used = [sorted({d[0] for d in c.donors if d is not None} | set(c.peers)) for c in cases]
    read = iter(token_profiles(lm, [c.witnesses[n] for c, ns in zip(cases, used, strict=True) for n in ns]))
    profiles, offsets = [], []
    for case, numbers, (before, *_) in zip(cases, used, original.profiles, strict=True):
        around = {n: dict(zip(predicting(case.witnesses[n]), next(read), strict=True)) for n in numbers}
        profile = torch.stack([before[t] if d is None else around[d[0]][d[1]] for t, d in enumerate(case.donors)])
        profiles.append(profile)
        if case.peers:
            means = [torch.stack(list(around[n].values())).mean(0) for n in case.peers]
            offsets.append(torch.stack(means).mean(0) - profile.mean(0))
    if not offsets:
        return tuple(profiles)
    offset = torch.stack(offsets).mean(0)
    return tuple(p + offset if c.peers else p for c, p in zip(cases, profiles, strict=True))


Known = Literal["recited", "likelier", "unknown"]


@dataclass(frozen=True)
class RecordOutcome:
    """One forget record. Likelihoods are mean log-likelihoods per completion token, in nats.

    Attributes:
        number: Position in the forget source, from 1.
        before: Log-likelihood under the original model.
        after: Log-likelihood at alpha = 0.
        band: Where one more alternate would fall at alpha = 0, given these (5-95 %); for sentences, where the sentence
            would have fallen untrained.
        extracted: The completion is still the greedy continuation at alpha = 0.
        partial: It is a sentence of whose surprise less than a third is where it is expected; see ``in_place``.
        known: What the original model knew of it: it was recited, likelier than its like, or unknown.
    """

    number: int
    before: float
    after: float
    band: tuple[float, float]
    extracted: bool
    partial: bool = False
    known: Known = "unknown"

    @property
    def inside(self) -> bool:
        """True if the record is neither likelier nor unlikelier than its alternates."""
        return self.band[0] <= self.after <= self.band[1]

    @property
    def far(self) -> bool:
        """True if even among many records this one would be conspicuous: over ``FAR`` half-widths from the middle."""
        middle, half = (self.band[0] + self.band[1]) / 2, (self.band[1] - self.band[0]) / 2
        return abs(self.after - middle) > FAR * half


@dataclass(frozen=True)
class Check:
    """The criteria at one moment. Likelihoods are per token, in nats.

    Attributes:
        step: Optimiser steps taken.
        extracted: Records whose completion is still the greedy continuation.
        outside: Records whose likelihood is outside the band of their counterfactuals.
        far: Those of them that are more than ``FAR`` times its half-width from its middle.
        gap: Mean over records of negative log-likelihood minus target; negative means remembered.
        holds: The criteria hold; see ``acceptable``.
        partial: Sentences of whose surprise less than a third is where it is expected; see ``in_place``.
    """

    step: int
    extracted: int
    outside: int
    far: int
    gap: float
    holds: bool
    partial: int = 0


def reference(
    lm: LanguageModel,
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    human: Sequence[Sequence[int]],
    opening: Sequence[int],
    spoken: Sequence[Encoded],
    config: IsolateConfig,
) -> Reference:
    """Everything that the training needs from the original model.

    For the targets of sentences: ``human`` are texts, ``opening`` the special tokens that the model expects before one,
    ``spoken`` what it says itself on like prompts. Without the last, a sentence keeps its own distributions, with the
    predicted probability for its labels.
    """
    secret, recited = score(lm, [c.secret for c in cases])
    neighbours = tuple(hidden_states(lm, c.held) for c in cases)
    witnesses = tuple(hidden_states(lm, c.witnesses) for c in cases)
    blank = Scores(*(torch.zeros(1) for _ in range(3)))  # sentences are judged by their predictions alone
    counterfactual = [
        scores_of_states(lm, c.neighbours, states)
        if states
        else grouped_scores(lm, [c.alternates])[0]
        if c.exchangeable
        else blank
        for c, states in zip(cases, neighbours, strict=True)
    ]
    beside = torch.stack([s.nll.mean() for s in counterfactual])
    nll, odds = beside.clone(), torch.stack([s.odds.mean() for s in counterfactual])
    fair = torch.tensor([c.exchangeable for c in cases])
    spread = torch.zeros(len(cases))
    if fair.any():
        own = [s for s, c in zip(counterfactual, cases, strict=True) if c.exchangeable]
        deviation = torch.cat([s.nll - s.nll.mean() for s in own]).square().mean().sqrt()
        spread[fair] = deviation
        noise = deviation.square() / torch.tensor([float(len(s.nll)) for s in own])
        nll[fair], odds[fair] = shrunk(nll[fair], noise), shrunk(odds[fair], noise)
        nll[fair] += LENGTH_CORRELATION * deviation * _shortness([c for c in cases if c.exchangeable])
    expected = [x.expand(len(predicting(c.secret))) for x, c in zip(nll, cases, strict=True)]
    sentences, untrained = None, {}
    if prose := (~fair).nonzero()[:, 0].tolist():
        sentences = Sentences(fit(lm, human, opening), tuple(spoken), config.seed)
        for i, e in zip(prose, sentences.expected(lm, [cases[i].secret for i in prose]), strict=True):
            nll[i], odds[i], expected[i] = e.mean(), -e.mean(), e
            spread[i] = sentences.plausibility.deviation / secret.tokens[i].sqrt()
        if spoken:
            untrained = dict(zip(prose, sentences.profiles(lm, [expected[i] for i in prose]), strict=True))
    secrets = hidden_states(lm, [c.secret for c in cases])
    predictors = tuple(h[list(predicting(c.secret))] for h, c in zip(secrets, cases, strict=True))
    profiles = tuple(
        (untrained[i],)
        if i in untrained
        else tuple(_profile(lm, c, donors, *states) for donors in (c.donors, *c.alternate_donors))
        for i, (c, *states) in enumerate(zip(cases, witnesses, predictors, expected, strict=True))
    )
    nll = torch.stack([own[:, 0].mean() for own, *_ in profiles])
    crossed = grouped_scores(lm, [c.crossed[:_CROSSED] for c in cases])
    spilled = torch.tensor([float(s.nll.mean()) if len(s.nll) else math.inf for s in crossed]) < nll - spread
    return Reference(
        spilled=spilled,
        secret=secret,
        recited=recited,
        target=Scores(nll, odds, secret.tokens),
        profiles=profiles,
        spread=spread,
        beside=beside,
        retain=hidden_states(lm, retain),
        neighbours=neighbours,
        sentences=sentences,
        expected=tuple(torch.zeros(0) if c.exchangeable else e for e, c in zip(expected, cases, strict=True)),
    )


@torch.no_grad()
def _profile(
    lm: LanguageModel, case: Case, donors: Sequence[Donor], witnesses: Sequence[Tensor], own: Tensor, expected: Tensor
) -> Tensor:
    """What a completion should look like token by token, (tokens, 3); see ``token_profile``.

    A token with a donor gets what the donor's own token has there; a token without one gets its own distribution with
    the expected probability for its label.
    """
    places = predicting(case.secret)
    states, labels = [], []
    for i, donor in enumerate(donors):
        if donor is None:
            place = min(i, len(own) - 1)
            states.append(own[place])
            labels.append(case.secret.ids[places[place] + 1])
        else:
            number, position = donor
            states.append(witnesses[number][position])
            labels.append(case.witnesses[number].ids[position + 1])
    logits, index = lm.logits(torch.stack(states)), torch.tensor(labels, device=lm.device)
    lonely = [i for i, donor in enumerate(donors) if donor is None]
    if lonely:
        wanted = expected[[min(i, len(own) - 1) for i in lonely]].to(lm.device)
        logits[lonely] = with_log_probability(logits[lonely], index[lonely], -wanted)
    return token_profile(logits, index).cpu()


def unremarkable(records: int, chance: float = 0.1) -> int:
    """The most of so many untrained records that are odd by chance, but for one time in twenty.

    The smallest k with P(X > k) <= .05, for X binomial with this chance: that of being outside a 5-95 % band, or
    ``PARTIAL``.
    """
    above = 1.0
    for k in range(records + 1):
        above -= math.comb(records, k) * chance**k * (1 - chance) ** (records - k)
        if above <= 0.05 + 1e-9:
            return k
    return records


def in_place(surprise: Tensor, expected: Tensor) -> float:
    """Share of the surprise that is expected of a sentence's tokens that is there: sum of min(surprise, expected) over
    the sum of what is expected.

    A sentence can be as unlikely as an untrained one and still begin word by word as it did. Of 20 made-up sentences
    that SmolLM2 had never met .72 or more was there, of 19 in 20 TOFU answers .41 (``benchmarks/targets.py``).

    Args:
        surprise: (tokens,) negative log-likelihood of each token, in nats.
        expected: (tokens,) what is expected of each.
    """
    return float(torch.minimum(surprise, expected).sum() / expected.sum())


def partly_recited(surprise: Sequence[Tensor], expected: Sequence[Tensor]) -> list[bool]:
    """Of which records less than a third of the surprise is where it is expected; of codes none are judged."""
    return [len(e) > 0 and in_place(s, e) < LEAST_IN_PLACE for s, e in zip(surprise, expected, strict=True)]


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


def _shortness(cases: Sequence[Case]) -> Tensor:
    """By how many standard deviations each record has fewer completion tokens than its alternates, (records,)."""
    own = torch.tensor([float(len(c.secret.completion)) for c in cases])
    others = [torch.tensor([float(len(a.completion)) for a in c.alternates]) for c in cases]
    spread = torch.cat([o - o.mean() for o in others]).square().mean().sqrt()
    mean = torch.stack([o.mean() for o in others])
    return torch.zeros_like(own) if spread == 0 else ((mean - own) / spread).clamp(-2, 2)


class Epochs:
    """Endless batches of indices in which every index comes once before any comes again.

    Attributes:
        pool: Indices still to come before the next shuffle; with the state of ``rng``, all that is to be remembered.
    """

    def __init__(self, count: int, size: int, rng: random.Random) -> None:
        self.count, self.size, self.rng = count, size, rng
        self.pool: list[int] = []

    def __next__(self) -> list[int]:
        while len(self.pool) < min(self.size, self.count):
            fresh = list(range(self.count))
            self.rng.shuffle(fresh)
            self.pool += fresh
        batch, self.pool = self.pool[: self.size], self.pool[self.size :]
        return batch


class Training:
    """Everything that changes from step to step, so that it can be put away and taken up again."""

    def __init__(
        self,
        values: Sequence[nn.Parameter],
        records: int,
        texts: Sequence[Encoded],
        config: IsolateConfig,
        metrics: Sequence[Metric | None],
    ) -> None:
        self.values, self.metrics = values, metrics
        # theta stands at the original weights here: they say how large a step is
        share = step_share(min(records, RECORDS_PER_STEP))
        self.rates = [config.learning_rate or share * RELATIVE_STEP * _root_mean_square(v) for v in values]
        self.start, self.decay = [v.detach().clone() for v in values], config.decay
        # Adam moves steps, which begin at zero every time, in the metric's basis.
        self.moves = [nn.Parameter(torch.zeros_like(v)) for v in values]
        self.optimiser = torch.optim.Adam([{"params": [m]} for m in self.moves], betas=(0.9, 0.95))
        self.rng = random.Random(config.seed)
        self.records = Epochs(records, RECORDS_PER_STEP, self.rng)
        self.texts = Epochs(len(texts), _texts_per_step(texts, config), self.rng)
        self.step, self.last = 0, config.max_steps
        self.finished = False
        self.checks: list[Check] = []
        self.profiles: tuple[Tensor, ...] = ()
        self.expected: tuple[Tensor, ...] = ()
        self.lean, self.missing = torch.zeros(3), torch.zeros(3)

    def wanted(self, original: Reference) -> tuple[Tensor, Tensor]:
        """Surprise that each record should have and its deviation, donors being what they are now; each (records,)."""
        if not self.profiles:
            return original.target.nll, original.spread
        now = torch.stack([p[:, 0].mean() for p in self.profiles])
        wider = float(now.std() / original.target.nll.std().clamp_min(1e-6)) if len(now) > 2 else 1.0
        return now, original.spread * max(1.0, wider)

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step of Adam at this share of the peak rates, and one of the decay towards the original values."""
        for group, peak, move, metric, gradient in zip(
            self.optimiser.param_groups, self.rates, self.moves, self.metrics, gradients, strict=True
        ):
            group["lr"] = peak * rate
            move.zero_()
            move.grad = gradient if metric is None else metric.rotated(gradient)
        self.optimiser.step()
        for value, move, metric in zip(self.values, self.moves, self.metrics, strict=True):
            value.add_(move if metric is None else metric.step(move))
        for value, start in zip(self.values, self.start, strict=True):
            value.lerp_(start, self.decay * rate)

    def part(self) -> Entry:
        """The state as it is now."""
        tensors = {"lean": self.lean, "missing": self.missing}
        tensors |= {f"profiles.{i}": p for i, p in enumerate(self.profiles)}
        tensors |= {f"expected.{i}": e for i, e in enumerate(self.expected)}
        tensors |= {f"theta.{i}": v.detach() for i, v in enumerate(self.values)}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": t for name, t in moments.items()}
        data = {
            "step": self.step,
            "last": self.last,
            "finished": self.finished,
            "checks": [asdict(c) for c in self.checks],
            "records": self.records.pool,
            "texts": self.texts.pool,
            "rng": self.rng.getstate(),
        }
        return Entry(tensors, data)

    @torch.no_grad()
    def take_up(self, part: Entry) -> None:
        """Go back to the state that ``part`` is."""
        moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)

        def listed(name: str) -> tuple[Tensor, ...]:
            count = sum(n.startswith(f"{name}.") for n in part.tensors)
            return tuple(part.tensors[f"{name}.{i}"] for i in range(count))

        self.profiles, self.expected = listed("profiles"), listed("expected")
        self.lean, self.missing = part.tensors["lean"], part.tensors["missing"]
        for name, tensor in part.tensors.items():
            kind, *rest = name.split(".")
            if kind not in ("theta", "adam"):
                continue
            index, *moment = rest
            if kind == "theta":
                self.values[int(index)].copy_(tensor)
            else:
                moments[int(index)][moment[0]] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": dict(moments)})
        data = part.data
        self.step, self.last, self.finished = data["step"], data["last"], data["finished"]
        self.checks = [Check(**c) for c in data["checks"]]
        self.records.pool, self.texts.pool = data["records"], data["texts"]
        version, words, gauss = data["rng"]
        self.rng.setstate((version, tuple(words), gauss))


def step_share(records: int) -> float:
    """What of the peak step is right for so few records in a step: the step of twelve takes one of them far beyond what
    is untrained. Adam's should grow with the square root of the batch (arXiv 2205.10287).
    """
    return min(1.0, records / RELATIVE_TO) ** 0.5


def _root_mean_square(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt().clamp_min(1e-8))


def _texts_per_step(texts: Sequence[Encoded], config: IsolateConfig) -> int:
    """As many retain sequences as have the tokens of a step together."""
    mean = sum(len(t.ids) for t in texts) / max(1, len(texts))
    return max(1, round(RETAIN_TOKENS_PER_STEP / max(1.0, mean)))


def training_finished(store: RunCache) -> bool:
    """True if the store holds a training that came to its end, so that only measuring is left."""
    stored = store.get("training")
    return stored is not None and bool(stored.data["finished"])


def train(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    original: Reference,
    config: IsolateConfig,
    progress: Callable[[str, int, int], None] | None = None,
    store: RunCache | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> list[Check]:
    """Optimise the supports; returns the criteria at every look, the last one describing the final values.

    Donors are read again at every look, what is expected of sentences at the first, second, fourth, eighth and so on.
    Once the criteria hold, the learning rate falls to zero over a few last steps: what is left by then is oscillation
    that all records share, which a membership test would see. The state at every look goes to the store, and a stored
    one is where the training begins.
    """
    store = store or RunCache()
    edited = {n: m.theta for n, m in layers.items() if m.theta is not None}
    metric = [(metrics or {}).get(n) for n in edited]
    now = Training(list(edited.values()), len(cases), retain, config, metric)
    stored = store.get("training")
    if stored is None:
        start = examine(lm, [c.secret for c in cases])
        now.checks.append(judge(start, original.target.nll, original.spread, original.expected, 0))
    else:
        now.take_up(stored)
        if now.expected:
            prose = [i for i, c in enumerate(cases) if not c.exchangeable]
            original = with_sentences(original, {i: now.profiles[i] for i in prose}, now.expected)
    torch.set_flush_denormal(True)
    while now.step < now.last:
        now.step += 1
        rate = min(1.0, now.step / _WARM_UP, (_STEADY / now.step) ** 0.5, (now.last - now.step + 1) / _LANDING)
        step(lm, layers, cases, retain, original, config, now, rate)
        if now.step % CHECK_EVERY == 0 or now.step == now.last:
            seen = examine(lm, [c.secret for c in cases])
            if (now.step // CHECK_EVERY).bit_count() == 1:  # it changes fast at first, and takes its time
                original = reread(lm, cases, original)
                now.expected = original.expected
            steer(lm, cases, original, now, seen.profile.mean(0))
            now.checks.append(judge(seen, *now.wanted(original), original.expected, now.step))
            logger.info("%s", now.checks[-1])
            if now.last == config.max_steps and now.checks[-1].holds:
                now.last = min(now.last, now.step + _LANDING)
            store.put("training", now.part())
        if progress is not None:
            progress("isolate", now.step, now.last)
    if not now.finished:
        if not now.checks[-1].extracted:
            original = reread(lm, cases, original)
            calibrate(lm, layers, cases, original)
            now.profiles = drifted(lm, cases, original)
            seen = examine(lm, [c.secret for c in cases])
            now.checks.append(judge(seen, *now.wanted(original), original.expected, now.step))
        now.finished = True
        store.put("training", now.part())
    return now.checks


@torch.no_grad()
def steer(lm: LanguageModel, cases: Sequence[Case], original: Reference, now: Training, mine: Tensor) -> None:
    """Correct the targets by what is left of the difference between the records and their donors (dual ascent).

    Records, their alternates and their neighbours pull at the same values, and where they balance the records are still
    a little too likely. Donors are read as they are now: a membership test compares under the edited model. What the
    training is about to make up for by itself is left to it; a correction for that would have to be taken back.

    ``mine`` is the mean profile of the records, (3,).
    """
    now.profiles = drifted(lm, cases, original)
    before, now.missing = now.missing, torch.stack([p.mean(0) for p in now.profiles]).mean(0) - mine
    if now.step < STEER_FROM:
        return
    now.lean += STEER * lasting(now.missing, before).clamp(-STEER_MOST, STEER_MOST)
    logger.debug("records lack %s", [round(x, 2) for x in now.missing.tolist()])


def lasting(missing: Tensor, before: Tensor) -> Tensor:
    """What will still be missing ``STEER_AHEAD`` looks from now, if it goes on changing as since the look before.

    Nothing where it would be made up for by then. Without this, the sum of corrections during the descent of a few
    records, which takes few looks, had to be taken back.
    """
    ahead = missing + STEER_AHEAD * (missing - before)
    return torch.where(ahead * missing > 0, ahead, 0.0)


@dataclass(frozen=True)
class Seen:
    """Completions under the model as it is.

    Attributes:
        profile: Means over the tokens of each of ``token_profile``, (records, 3).
        greedy: Whether each is the greedy continuation of its prompt, (records,) bool.
        surprise: Negative log-likelihood of each token of each, (tokens,) in nats.
    """

    profile: Tensor
    greedy: Tensor
    surprise: tuple[Tensor, ...]


@torch.no_grad()
def examine(lm: LanguageModel, items: Sequence[Encoded]) -> Seen:
    """All that a look at the records needs, in one pass."""
    profile, greedy = torch.zeros(len(items), 3), torch.zeros(len(items), dtype=torch.bool)
    surprise = [torch.empty(0)] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    for rows in scoring_batches(order, items, lm.device):
        batch = collate([items[i] for i in rows]).to(lm.device)
        logits, labels, owner = judged_logits(lm, lm.hidden(batch), batch)
        tokens = torch.bincount(owner, minlength=len(rows))
        means, found = torch.zeros(len(rows), 3, device=logits.device), token_profile(logits, labels)
        profile[rows] = means.index_add_(0, owner, found / tokens[owner, None]).cpu()
        for i, own in zip(rows, found[:, 0].cpu().split(tokens.tolist()), strict=True):
            surprise[i] = own
        wrong = torch.bincount(owner[logits.argmax(-1) != labels], minlength=len(rows))
        greedy[rows] = (wrong == 0).cpu()
    return Seen(profile, greedy, tuple(surprise))


def step(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    cases: Sequence[Case],
    retain: Sequence[Encoded],
    original: Reference,
    config: IsolateConfig,
    now: Training,
    rate: float,
) -> None:
    """One optimiser step, at this share of the peak rate, on the next records and the next retain texts."""
    chosen = next(now.records)
    pull = _gradients(_profile_losses(lm, cases, chosen, original, now), now.values)
    texts = next(now.texts)
    keep = _gradients(_keep_losses(lm, cases, chosen, retain, texts, original, config, now), now.values)
    now.descend([a + b for a, b in zip(pull, keep, strict=True)], rate)
    for layer in layers.values():
        layer.clamp()


def calibrate(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    cases: Sequence[Case],
    original: Reference,
) -> float:
    """Lengthen or shorten the whole edit until the records, on average, are where they belong, and return the factor.

    What training leaves is mostly an offset that all records share, and that is what a membership test sees. One number
    takes it out: secant steps on the factor, within ``_STRETCH``.
    """
    trained = {n: m.theta.detach().clone() for n, m in layers.items() if m.theta is not None}

    def stretch(factor: float) -> None:
        for name, theta in trained.items():
            layers[name].rescale(theta, factor)

    def offset(factor: float) -> float:
        stretch(factor)
        return float(_profile_distances(lm, cases, original).mean())

    tried = {1.0: offset(1.0)}
    previous, factor = 1.0, 1.05 if tried[1.0] < 0 else 0.95
    for _ in range(_SECANT_STEPS):
        if abs(tried[previous]) < _CLOSE or factor in tried:
            break
        tried[factor] = offset(factor)
        slope = (tried[factor] - tried[previous]) / (factor - previous)
        if slope <= 0:  # more edit no longer means less memory
            break
        previous, factor = factor, min(_STRETCH[1], max(_STRETCH[0], factor - tried[factor] / slope))
    best = min(tried, key=lambda f: abs(tried[f]))
    stretch(best)
    logger.info("edit rescaled by %.3f, offset %.2f to %.2f nats per token", best, tried[1.0], tried[best])
    return best


def _profile_distances(lm: LanguageModel, cases: Sequence[Case], original: Reference) -> Tensor:
    """Surprise of each record minus that of its donors as they are now, (records,) in nats per token."""
    profiles = drifted(lm, cases, original)
    secret, _ = score(lm, [c.secret for c in cases])
    return secret.nll - torch.stack([p[:, 0].mean() for p in profiles])


def outcomes(lm: LanguageModel, cases: Sequence[Case], original: Reference) -> tuple[RecordOutcome, ...]:
    """Every record beside its alternates, or what is expected of it, under the model as it is now."""
    original = reread(lm, cases, original)
    seen = examine(lm, [c.secret for c in cases])
    partial = partly_recited(seen.surprise, original.expected)
    groups = [s.nll for s in grouped_scores(lm, [c.alternates if c.exchangeable else () for c in cases])]
    spread = pooled_deviation(groups)
    found = []
    for i, case in enumerate(cases):
        own = case.exchangeable and spread > 0
        centre = float(groups[i].mean()) if own else float(original.target.nll[i])
        half = BAND * (spread * (1 + 1 / len(groups[i])) ** 0.5 if own else float(original.spread[i]))
        found.append(
            RecordOutcome(
                number=case.number,
                before=-float(original.secret.nll[i]),
                after=-float(seen.profile[i, 0]),
                band=(-centre - half, -centre + half),
                extracted=bool(seen.greedy[i]),
                partial=partial[i],
            )
        )
    return tuple(found)


def pooled_deviation(groups: Sequence[Tensor]) -> float:
    """Standard deviation within groups, over all of them together (variance unbiased); 0 where no group has two."""
    several = [g for g in groups if len(g) > 1]
    squares = sum(float((g - g.mean()).square().sum()) for g in several)
    return math.sqrt(squares / max(1, sum(len(g) - 1 for g in several)))


def judge(seen: Seen, wanted: Tensor, spread: Tensor, expected: Sequence[Tensor], step: int) -> Check:
    """The criteria on records that look like this and should have the surprise ``wanted`` with this ``spread``.

    ``expected``: see ``Reference``.
    """
    gap = seen.profile[:, 0] - wanted
    logger.debug("gap by record %s", [round(g, 1) for g in gap.tolist()])
    distance = gap.abs() / (BAND * spread)
    extracted, outside, far = int(seen.greedy.sum()), int((distance > 1).sum()), int((distance > FAR).sum())
    partial, sentences = sum(partly_recited(seen.surprise, expected)), sum(len(e) > 0 for e in expected)
    gone = extracted == 0 and far == 0 and partial <= unremarkable(sentences, PARTIAL)
    return Check(
        step=step,
        extracted=extracted,
        outside=outside,
        far=far,
        gap=float(gap.mean()),
        holds=gone and acceptable(gap, outside, spread),
        partial=partial,
    )


def acceptable(gap: Tensor, outside: int, spread: Tensor) -> bool:
    """True if the records as a group look untrained: in how many are outside the band, and in their mean.

    Training asks for half of what chance would allow the mean: a lean of one standard error is seen by an attack that
    has many records to compare with.

    Args:
        gap: (records,) surprise minus what it should be, in nats per token.
        outside: How many of them are outside the band.
        spread: (records,) standard deviation that the gap of an untrained record has.
    """
    return outside <= unremarkable(len(gap)) and abs(float(gap.mean())) <= max(
        _CLOSE, _by_chance(float(spread.mean()), len(gap)) / 2
    )


def leaning(records: Sequence[RecordOutcome]) -> tuple[float, float]:
    """How much likelier than its band's middle the average record is, and how much it may be; nats per token."""
    lean = sum(r.after - (r.band[0] + r.band[1]) / 2 for r in records) / len(records)
    spread = sum(r.band[1] - r.band[0] for r in records) / (2 * BAND * len(records))
    return lean, _by_chance(spread, len(records))


def _by_chance(spread: float, records: int) -> float:
    """How far the mean of untrained records may be off: 5-95 %, but no less than what training can see."""
    return max(_CLOSE, BAND * spread / records**0.5)


@torch.no_grad()
def divergence(lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor]) -> float:
    """Mean KL(original || edited) per token, in nats, over texts whose original hidden states are given."""
    total, count = 0.0, 0
    for item, before in zip(items, states, strict=True):
        places = list(predicting(item))
        before, after = before[places], lm.hidden(collate([item]).to(lm.device))[0, places]
        for part in evenly(len(places)):
            total += float(kl_divergence(lm.logits(before[part]), lm.logits(after[part])).sum())
        count += len(places)
    return total / max(1, count)


def _profile_losses(
    lm: LanguageModel,
    cases: Sequence[Case],
    chosen: Sequence[int],
    original: Reference,
    now: Training,
) -> Iterator[Tensor]:
    """Distance of each record from its profile, and of its completion on a neighbour's prompt or of an alternate."""
    present = now.profiles or tuple(p for p, *_ in original.profiles)
    for i in chosen:
        now.rng.randrange(len(cases[i].alternates))
    own = [present[i] + now.lean for i in chosen]
    items, wanted, of = [cases[i].secret for i in chosen], list(own), list(chosen)
    for slot, i in enumerate(chosen):
        case = cases[i]
        crossed = [c for c in case.crossed if c.completion == case.secret.completion]
        if crossed and original.spilled[i] and now.rng.random() < 0.5:
            items.append(now.rng.choice(crossed))
            wanted.append(own[slot])
            of.append(i)
        elif case.exchangeable:
            pick = now.rng.randrange(len(case.alternates))
            items.append(case.alternates[pick])
            before = original.profiles[i][1 + pick]
            wanted.append(present[i] if len(present[i]) == len(before) else before)
            of.append(i)
    for rows in training_batches(items, lm.device):
        pieces = [cases[of[r]].pieces for r in rows]
        some = _profile_loss(lm, [items[r] for r in rows], [wanted[r] for r in rows], [n == 1 for n in pieces])
        yield some * (len(rows) / len(items))


def _profile_loss(
    lm: LanguageModel, items: Sequence[Encoded], wanted: Sequence[Tensor], free: Sequence[bool]
) -> Tensor:
    """Mean distance of these completions from these profiles, which are handed out within those that are free."""
    batch = collate(items).to(lm.device)
    states, labels, row = predicting_states(lm.hidden(batch), batch)
    target = torch.cat(list(wanted)).to(lm.device)
    handed = torch.tensor(free, device=lm.device)[row, None]
    sizes = torch.bincount(row, minlength=len(items))
    if (long := sizes[row] > HEAD_POSITIONS).any():  # will be cut, and is handed out as a whole
        profiles = profiles_of_states(lm, states[long], labels[long])
        target[long] = torch.where(handed[long], assigned(profiles, target[long], row[long]), target[long])
        handed = handed & ~long[:, None]
    share = 1 / (sizes[row] * len(items))

    def distance(logits: Tensor, part: slice) -> Tensor:
        found, odds = profile_and_odds(logits, labels[part])
        own = torch.where(handed[part], assigned(found.detach(), target[part], row[part]), target[part])
        return share[part] @ profile_distance(found, odds, own)

    return summed(lm, states, distance, by_record(sizes.tolist()))


def assigned(now: Tensor, target: Tensor, record: Tensor) -> Tensor:
    """The target's values handed out within each record in the order of what its tokens have now, (tokens, 3).

    Which token of a code is the surprising one is chance. A record looks untrained if its tokens are distributed like
    those of its donors, whichever has which; so much asks for far less change than a donor for every single token
    (each column is a Wasserstein-1 distance, which sorting solves). In a sentence it is not chance (see ``placed``),
    but of many sentences not every word can have what it should: the answers of TOFU were further off where it was
    asked.

    Args:
        now: (tokens, 3) profile under the model as it is.
        target: (tokens, 3) profile of the donors.
        record: (tokens,) index of the record that each token belongs to.
    """

    def order(values: Tensor) -> Tensor:
        first = values.argsort(0)
        return torch.stack([c[record[c].argsort(stable=True)] for c in first.T], 1)

    return torch.empty_like(target).scatter_(0, order(now), target.gather(0, order(target)))


def placed(profile: Tensor, expected: Tensor) -> Tensor:
    """The tokens of a sentence's profile (tokens, 3) in the order of the surprise that is expected of each (tokens,).

    In a sentence it is not chance which token surprises: it is the one that carries the fact. Handed out in the order
    of what the tokens have now, surprise may come to function words, and the fact stays the likeliest thing to say.
    """
    return torch.empty_like(profile).index_copy_(0, expected.argsort(stable=True), profile[profile[:, 0].argsort()])


def _keep_losses(
    lm: LanguageModel,
    cases: Sequence[Case],
    chosen: Sequence[int],
    retain: Sequence[Encoded],
    texts: Sequence[int],
    original: Reference,
    config: IsolateConfig,
    now: Training,
) -> Iterator[Tensor]:
    """Divergence from the original model on retain texts and on one neighbour of every chosen record, in parts."""
    beside = [(i, now.rng.randrange(len(cases[i].neighbours))) for i in chosen if cases[i].neighbours]
    parts = [
        (config.retain_weight, [retain[t] for t in texts], [original.retain[t] for t in texts], False),
        (
            1.0,
            [cases[i].held[p] for i, p in beside],
            [original.neighbours[i][p] for i, p in beside],
            True,
        ),
    ]
    for weight, items, states, as_profiles in parts:
        tokens = sum(len(predicting(e)) for e in items)
        for rows in training_batches(items, lm.device) if weight else ():
            some = _kept(lm, [items[r] for r in rows], [states[r] for r in rows], tokens, len(items), as_profiles)
            yield weight * some


def _kept(
    lm: LanguageModel, items: Sequence[Encoded], states: Sequence[Tensor], tokens: int, texts: int, as_profiles: bool
) -> Tensor:
    """KL(original || edited) by token, given the original's hidden states, and with profiles their distance by text.

    These texts' share of the means over so many tokens and texts.
    """
    batch = collate(items).to(lm.device)
    after, labels, row = predicting_states(lm.hidden(batch), batch)
    before = torch.cat([s[list(predicting(e))] for e, s in zip(items, states, strict=True)])
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


def _gradients(losses: Iterable[Tensor], values: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients of the sum; each loss's graph is gone before the next is made."""
    total = [torch.zeros_like(v) for v in values]
    for loss in losses:
        if not loss.requires_grad:
            continue
        for whole, g in zip(total, torch.autograd.grad(loss, list(values), allow_unused=True), strict=True):
            if g is not None:
                whole += g
    return total
