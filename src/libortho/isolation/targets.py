"""What the records should look like untrained, and what else the training needs of the original model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from libortho.isolation.config import IsolateConfig
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.matching import MatchedToken
from libortho.isolation.prose import SurprisalRegressor, fit, spoken_profiles
from libortho.lm.logits import Scores, completion_scores, token_profile, with_log_probability
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import grouped_scores, judged_labels, judged_states, score, token_profiles
from libortho.text.encoding import Encoded, predicting

LENGTH_CORRELATION = 0.6
"""Correlation, among untrained codes of one shape, of surprise per token with having fewer tokens than the others
(measured: 0.62 for access codes, 0.76 for licence plates)."""
_CROSSED = 2
"""Neighbours' prompts on which a record's completion is looked for."""
LEAST_SURPRISE = 0.01
"""Smallest surprise, in nats, that is expected of a token of a sentence."""


@dataclass(frozen=True)
class Sentences:
    """What says how sentences would look untrained, whatever state the model is in.

    Attributes:
        plausibility: Fitted to the original model.
        spoken: What the original model said on prompts like theirs; the tokens that it said are judged.
        seed: Of which stretch of that each sentence gets.
    """

    plausibility: SurprisalRegressor
    spoken: tuple[Encoded, ...]
    seed: int

    def expected(self, lm: LanguageModel, items: Sequence[Encoded]) -> list[Tensor]:
        """Surprise of each token of each sentence, (tokens,) in nats."""
        return [self.plausibility.by_token(lm, e).clamp_min(LEAST_SURPRISE) for e in items]

    def profiles(self, lm: LanguageModel, expected: Sequence[Tensor]) -> list[Tensor]:
        """What the tokens of each sentence would look like, (tokens, 3), with this surprise; needs spoken texts."""
        said = judged_states(lm, self.spoken)
        means, sizes = [float(e.mean()) for e in expected], [len(e) for e in expected]
        made = spoken_profiles(lm, said, means, sizes, self.seed)
        return [ranked_assignment(p, e) for p, e in zip(made, expected, strict=True)]


@dataclass(frozen=True)
class Reference:
    """What the original model says; constants of the training.

    Attributes:
        secret: Scores of the records, (records,).
        recited: Whether each record's completion is the greedy continuation of its prompt, (records,) bool.
        target: Surprise that each record should have had, (records,) in nats per token.
        beside: Mean negative log-likelihood of each record's counterfactuals, in nats per token, (records,); 0 for
            sentences that have none.
        spread: Standard deviation around the target's negative log-likelihood, in nats per token, (records,).
        profiles: For each record, what its tokens should look like, (tokens, 3), and those of each alternate.
        leaks_to_neighbours: Whether each record's completion is remembered after its neighbours' prompts too,
            (records,) bool.
        retain: ``judged_states`` of each retain sequence, (tokens, width).
        neighbours: ``judged_states`` of each neighbour with its closing, (tokens, width), record by record.
        sentences: How sentences are judged; None where there are none.
        expected: Surprise that is expected of each token of each sentence, (tokens,) in nats; empty for other records.
    """

    secret: Scores
    recited: Tensor
    target: Tensor
    beside: Tensor
    spread: Tensor
    profiles: tuple[tuple[Tensor, ...], ...]
    leaks_to_neighbours: Tensor
    retain: tuple[Tensor, ...]
    neighbours: tuple[tuple[Tensor, ...], ...]
    sentences: Sentences | None
    expected: tuple[Tensor, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {"target": self.target}
        named |= {
            "recited": self.recited,
            "leaks_to_neighbours": self.leaks_to_neighbours,
            "beside": self.beside,
            "spread": self.spread,
        }
        named |= {f"secret.{f}": getattr(self.secret, f) for f in ("nll", "tokens")}
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
        cases: Sequence[ForgetRecord],
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
            return Scores(*(tensors[f"{name}.{f}"] for f in ("nll", "tokens")))

        secret, sentences = scores("secret"), None
        if "plausibility.weights" in tensors:
            weights, deviation = tensors["plausibility.weights"], float(tensors["plausibility.deviation"])
            sentences = Sentences(SurprisalRegressor(weights, deviation, tuple(opening)), tuple(spoken), seed)
        return cls(
            sentences=sentences,
            expected=tuple(tensors[f"expected.{i}"] for i in range(len(cases))),
            secret=secret,
            recited=tensors["recited"],
            target=tensors["target"],
            beside=tensors["beside"],
            spread=tensors["spread"],
            profiles=tuple(
                tuple(tensors[f"profiles.{i}.{j}"] for j in range(1 + len(c.alternate_matched_tokens)))
                for i, c in enumerate(cases)
            ),
            leaks_to_neighbours=tensors["leaks_to_neighbours"],
            retain=tuple(tensors[f"retain.{i}"].to(device) for i in range(retain)),
            neighbours=tuple(
                tuple(tensors[f"neighbours.{i}.{j}"].to(device) for j in range(len(c.neighbours)))
                for i, c in enumerate(cases)
            ),
        )


def update_prose_targets(lm: LanguageModel, cases: Sequence[ForgetRecord], original: Reference) -> Reference:
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
    nll = original.target.clone()
    for i, profile in profiles.items():
        nll[i] = profile[:, 0].mean()
    found = tuple((profiles[i],) if i in profiles else group for i, group in enumerate(original.profiles))
    return replace(original, profiles=found, expected=tuple(expected), target=nll)


@torch.no_grad()
def current_targets(lm: LanguageModel, cases: Sequence[ForgetRecord], original: Reference) -> tuple[Tensor, ...]:
    """What each record should look like now that its donors have moved a little too.

    A membership test compares a record with others under the edited model, not under the original one. Only the
    divergence on neighbours keeps the donors where they were. One donor may be an odd one; all of a record's
    aligned_controls
    together are less so, and it is the group of records that a test compares: the mean over all is that of the
    aligned_controls.

    Returns:
        The records' profiles, each (tokens, 3).
    """
    used = [sorted({d[0] for d in c.matched_tokens if d is not None} | set(c.aligned_controls)) for c in cases]
    read = iter(token_profiles(lm, [c.controls[n] for c, ns in zip(cases, used, strict=True) for n in ns]))
    profiles, offsets = [], []
    for case, numbers, (before, *_) in zip(cases, used, original.profiles, strict=True):
        around = {n: next(read) for n in numbers}
        profile = torch.stack(
            [before[t] if d is None else around[d[0]][d[1]] for t, d in enumerate(case.matched_tokens)]
        )
        profiles.append(profile)
        if case.aligned_controls:
            means = [around[n].mean(0) for n in case.aligned_controls]
            offsets.append(torch.stack(means).mean(0) - profile.mean(0))
    if not offsets:
        return tuple(profiles)
    offset = torch.stack(offsets).mean(0)
    return tuple(p + offset if c.aligned_controls else p for c, p in zip(cases, profiles, strict=True))


def reference(
    lm: LanguageModel,
    cases: Sequence[ForgetRecord],
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
    neighbours = tuple(judged_states(lm, c.held) for c in cases)
    controls = tuple(judged_states(lm, c.controls) for c in cases)
    blank = Scores(torch.zeros(1), torch.zeros(1))  # sentences are judged by their predictions alone
    counterfactual = [
        _scores_of_states(lm, c.neighbours, states)
        if states
        else grouped_scores(lm, [c.alternates])[0]
        if c.kind == "code"
        else blank
        for c, states in zip(cases, neighbours, strict=True)
    ]
    beside = torch.stack([s.nll.mean() for s in counterfactual])
    nll = beside.clone()
    fair = torch.tensor([c.kind == "code" for c in cases])
    spread = torch.zeros(len(cases))
    if fair.any():
        own = [s for s, c in zip(counterfactual, cases, strict=True) if c.kind == "code"]
        deviation = torch.cat([s.nll - s.nll.mean() for s in own]).square().mean().sqrt()
        spread[fair] = deviation
        noise = deviation.square() / torch.tensor([float(len(s.nll)) for s in own])
        nll[fair] = shrunk(nll[fair], noise)
        nll[fair] += LENGTH_CORRELATION * deviation * shortness([c for c in cases if c.kind == "code"])
    expected = [x.expand(len(predicting(c.secret))) for x, c in zip(nll, cases, strict=True)]
    sentences, untrained = None, {}
    if prose := (~fair).nonzero()[:, 0].tolist():
        sentences = Sentences(fit(lm, human, opening), tuple(spoken), config.seed)
        for i, e in zip(prose, sentences.expected(lm, [cases[i].secret for i in prose]), strict=True):
            nll[i], expected[i] = e.mean(), e
            spread[i] = sentences.plausibility.deviation / secret.tokens[i].sqrt()
        if spoken:
            untrained = dict(zip(prose, sentences.profiles(lm, [expected[i] for i in prose]), strict=True))
    predictors = judged_states(lm, [c.secret for c in cases])
    profiles = tuple(
        (untrained[i],)
        if i in untrained
        else tuple(_profile(lm, c, donors, *states) for donors in (c.matched_tokens, *c.alternate_matched_tokens))
        for i, (c, *states) in enumerate(zip(cases, controls, predictors, expected, strict=True))
    )
    nll = torch.stack([own[:, 0].mean() for own, *_ in profiles])
    swapped_prompt = grouped_scores(lm, [c.swapped_prompt[:_CROSSED] for c in cases])
    leaks_to_neighbours = (
        torch.tensor([float(s.nll.mean()) if len(s.nll) else math.inf for s in swapped_prompt]) < nll - spread
    )
    return Reference(
        leaks_to_neighbours=leaks_to_neighbours,
        secret=secret,
        recited=recited,
        target=nll,
        profiles=profiles,
        spread=spread,
        beside=beside,
        retain=judged_states(lm, retain),
        neighbours=neighbours,
        sentences=sentences,
        expected=tuple(torch.zeros(0) if c.kind == "code" else e for e, c in zip(expected, cases, strict=True)),
    )


@torch.no_grad()
def _profile(
    lm: LanguageModel,
    case: ForgetRecord,
    donors: Sequence[MatchedToken],
    controls: Sequence[Tensor],
    own: Tensor,
    expected: Tensor,
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
            control, token = donor
            states.append(controls[control][token])
            labels.append(int(judged_labels([case.controls[control]])[0][token]))
    logits, index = lm.logits(torch.stack(states)), torch.tensor(labels, device=lm.device)
    lonely = [i for i, donor in enumerate(donors) if donor is None]
    if lonely:
        wanted = expected[[min(i, len(own) - 1) for i in lonely]].to(lm.device)
        logits[lonely] = with_log_probability(logits[lonely], index[lonely], -wanted)
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


def shortness(cases: Sequence[ForgetRecord]) -> Tensor:
    """By how many standard deviations each record has fewer completion tokens than its alternates, (records,)."""
    own = torch.tensor([float(len(c.secret.completion)) for c in cases])
    others = [torch.tensor([float(len(a.completion)) for a in c.alternates]) for c in cases]
    spread = torch.cat([o - o.mean() for o in others]).square().mean().sqrt()
    mean = torch.stack([o.mean() for o in others])
    return torch.zeros_like(own) if spread == 0 else ((mean - own) / spread).clamp(-2, 2)


def ranked_assignment(profile: Tensor, expected: Tensor) -> Tensor:
    """The tokens of a sentence's profile (tokens, 3) in the order of the surprise that is expected of each (tokens,).

    In a sentence it is not chance which token surprises: it is the one that carries the fact. Handed out in the order
    of what the tokens have now, surprise may come to function words, and the fact stays the likeliest thing to say.
    """
    return torch.empty_like(profile).index_copy_(0, expected.argsort(stable=True), profile[profile[:, 0].argsort()])
