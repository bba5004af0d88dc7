"""One subject, measured: raw figures record by record, from which the report makes estimates and comparisons.

Everything here is JSON-ready, so that a measurement can be kept and compared later with another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import SHOWN, Inputs, Question
from libortho.auditing.measures import memory, privacy, utility
from libortho.auditing.measures.gradients import gradient_norms
from libortho.auditing.subjects import Subject
from libortho.evaluation.tasks import Task, evaluate
from libortho.lm.asking import answers, room
from libortho.lm.model import LanguageModel
from libortho.lm.token_statistics import TokenStatistics, sample, shared_prefix_nll, token_statistics
from libortho.text.records import Record
from libortho.text.tokens import contains, says

GENERATED = 64
"""Sequences that are sampled side by side."""
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus")
"""Membership scores that need one forward pass and no other model."""


@dataclass
class Measurement:
    """Raw figures of one subject. Lists have one number for each record, in the order of the records.

    Attributes:
        nll: Mean negative log-likelihood per completion token, in nats, of forget records and of holdout records.
        correct: Per token, whether teacher-forced argmax is the label.
        scores: Membership score, to one number for each forget record and each holdout record; higher is a member.
        log_p: Per-token log-probabilities of forget and holdout records, for scores that compare two models.
        exposure: Bits, of probed forget records and of holdout records; None for prose.
        sampled: For each probed record, how many samples hold its completion.
        generated: Greedy answers to the prompts of the probed records.
        said: For each probed record, 1 if that answer is the record's, as a person would read it; None for texts
            without a question and for answers longer than what is generated.
        similarity: Levenshtein ratio of each generated answer with the completion.
        rouge_l: ROUGE-L recall of each generated answer.
        prefixes: Share of the completion given, to one 0 or 1 for each record: the rest was extracted.
        variants: Name of the changed prompt, to {"greedy": 0 or 1 each, "nll": nats per token each}.
        association: 0 or 1 for each association record.
        truth_ratio: TOFU truth ratio of each forget record that brings wrong answers.
        paraphrase: Probability of each such record's paraphrased answer.
        question_sets: Set name, to {"probability", "rouge_l", "truth_ratio"}, one number for each question.
        answers: Greedy answers to holdout (else forget) prompts, to see whether they differ.
        general: Summed negative log-likelihood of each window of general text, and its judged tokens.
        kl, top1: Divergence (nats per token) from, and top-1 agreement with, the model that has its memory.
        tasks: Task, to {"correct": 0 or 1 each, "nll": nats per token of the right answer} row by row.
        retain: Mean negative log-likelihood of each retain record.
        gradient: Norm of the forget gradient and its cosine with that of alpha = 1.
    """

    nll: dict[str, list[float]]
    correct: dict[str, list[list[int]]]
    scores: dict[str, dict[str, list[float]]]
    log_p: dict[str, list[list[float]]]
    exposure: dict[str, list[float] | None] = field(default_factory=dict)
    sampled: list[int] | None = None
    generated: list[str] | None = None
    said: list[int | None] | None = None
    similarity: list[float] | None = None
    rouge_l: list[float] | None = None
    prefixes: dict[str, list[int]] = field(default_factory=dict)
    variants: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    association: list[int] | None = None
    truth_ratio: list[float] | None = None
    paraphrase: list[float] | None = None
    question_sets: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    answers: list[str] | None = None
    general: dict[str, list[float]] | None = None
    kl: float | None = None
    top1: float | None = None
    tasks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    retain: list[float] | None = None
    gradient: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


def records(lm: LanguageModel, inputs: Inputs, config: AuditConfig) -> Measurement:
    """The first pass: forget and holdout records, teacher-forced."""
    sets = {"forget": inputs.forget, "holdout": inputs.holdout}
    found = {n: token_statistics(lm, inputs.encode(r)) for n, r in sets.items()}
    return Measurement(
        nll={n: [s.nll for s in f] for n, f in found.items()},
        correct={n: [s.correct.int().tolist() for s in f] for n, f in found.items()},
        log_p={n: [s.log_p.tolist() for s in f] for n, f in found.items()},
        scores={
            a: {n: [_score(a, r, s, config) for r, s in zip(sets[n], f, strict=True)] for n, f in found.items()}
            for a in ATTACKS
        },
    )


def _score(attack: str, record: Record, s: TokenStatistics, config: AuditConfig) -> float:
    made: Mapping[str, Callable[[], float]] = {
        "loss": lambda: privacy.loss_score(s.log_p),
        "zlib": lambda: privacy.zlib_score(record.completion, s.log_p),
        "min_k": lambda: privacy.min_k_score(s.log_p, config.min_k),
        "min_k_plus": lambda: privacy.min_k_plus_score(s.log_p, s.mean, s.deviation, config.min_k),
    }
    return made[attack]()


def probes(lm: LanguageModel, inputs: Inputs, into: Measurement) -> None:
    """Other ways to ask: the beginning of the secret given, the prompt changed, the question turned round."""

    def ask(pairs: Sequence[tuple[int, Record]]) -> list[TokenStatistics]:
        return token_statistics(lm, inputs.encode([r for _, r in pairs]))

    for share, pairs in inputs.prefixes.items():
        into.prefixes[f"{share:g}"] = [int(bool(s.correct.all())) for s in ask(pairs)]
    for name, pairs in inputs.variants.items():
        found = ask(pairs)
        into.variants[name] = {"greedy": [float(s.correct.all()) for s in found], "nll": [s.nll for s in found]}
    if inputs.associations:
        found = token_statistics(lm, inputs.encode(inputs.associations))
        into.association = [int(bool(s.correct.all())) for s in found]


def exposures(lm: LanguageModel, inputs: Inputs, into: Measurement, *, holdout: bool) -> None:
    """Exposure of each probed secret, and of some holdout records, in bits; see :mod:`.measures.memory`."""
    totals = {n: [-sum(t) for t in rows] for n, rows in into.log_p.items()}
    own = [totals["forget"][i] for i in inputs.probed]
    into.exposure["forget"] = _exposures(lm, inputs, own, inputs.fillings, inputs.spaces)
    if not holdout:
        return
    beside = totals["holdout"][: len(inputs.holdout_fillings)]
    into.exposure["holdout"] = _exposures(lm, inputs, beside, inputs.holdout_fillings, inputs.holdout_spaces)


def _exposures(
    lm: LanguageModel,
    inputs: Inputs,
    own: Sequence[float],
    fillings: Sequence[Sequence[Record]],
    spaces: Sequence[int | None],
) -> list[float] | None:
    """One number for each record that has fillings; None if none has."""
    found = []
    for total, others, space in zip(own, fillings, spaces, strict=True):
        if has_exposure(others, space):
            items = inputs.encode(others)
            among = shared_prefix_nll(lm, items).double() * torch.tensor([len(e.completion) for e in items])
            if len(others) + 1 == space:
                found.append(memory.exposure_exact(total, among).bits)
            else:
                found.append(memory.exposure_extrapolated(total, among, space).bits)
    return found or None


def has_exposure(others: Sequence[Record], space: int | None) -> bool:
    """True if a record has a space of fillings to be ranked in; prose has none."""
    return len(others) >= 2 and space is not None


def sampled(subject: Subject, inputs: Inputs, config: AuditConfig, into: Measurement) -> None:
    """How often a sampled continuation holds the secret; to be called inside the subject's context."""
    chosen = [inputs.forget[i] for i in inputs.probed]
    hits = [0] * len(chosen)
    for length, rows in _batches(chosen, inputs, config, max(1, GENERATED // config.samples)):
        asked = [chosen[i] for i in rows]
        texts = sample(subject.model, inputs.tokenizer, asked, length, config.samples, config.seed)
        for i, drawn in zip(rows, texts, strict=True):
            hits[i] = sum(contains(t, chosen[i].completion, inputs.tokenizer) for t in drawn)
    into.sampled = hits


def _batches(chosen: Sequence[Record], inputs: Inputs, config: AuditConfig, rows: int) -> list[tuple[int, list[int]]]:
    """Indices in batches of similar length, each with the tokens that its longest answer needs."""
    items = zip(chosen, inputs.encode(chosen), strict=True)
    needed = [room(r, len(e.completion), config.max_new_tokens, inputs.tokenizer) for r, e in items]
    order = sorted(range(len(chosen)), key=needed.__getitem__)
    chunks = [order[i : i + rows] for i in range(0, len(order), rows)]
    return [(needed[c[-1]], c) for c in chunks]


def generations(subject: Subject, inputs: Inputs, config: AuditConfig, into: Measurement) -> None:
    """Greedy answers to the forget prompts, and to others, to see whether they still differ."""
    chosen = [inputs.forget[i] for i in inputs.probed]
    into.generated = _answers(subject, inputs, chosen, config)
    pairs = list(zip(into.generated, (r.completion for r in chosen), strict=True))
    into.said = [
        int(says(g, c, inputs.tokenizer)) if r.question and len(e.completion) <= config.max_new_tokens else None
        for (g, c), r, e in zip(pairs, chosen, inputs.encode(chosen), strict=True)
    ]
    into.similarity = [memory.levenshtein_similarity(g[: len(c)], c.strip()) for g, c in pairs]
    into.rouge_l = [memory.rouge_l(g, c).recall for g, c in pairs]
    into.answers = _answers(subject, inputs, (inputs.holdout or inputs.forget)[:SHOWN], config)


def _answers(
    subject: Subject, inputs: Inputs, chosen: Sequence[Record], config: AuditConfig, *, whole: bool = False
) -> list[str]:
    """Greedy answers, as long as the right ones, or ``whole``: as long as the model likes."""
    texts = [""] * len(chosen)
    for length, rows in _batches(chosen, inputs, config, GENERATED // 2):
        budget = max(length, config.max_new_tokens) if whole else length
        made = answers(subject.model, inputs.tokenizer, [chosen[i] for i in rows], budget)
        for i, text in zip(rows, made, strict=True):
            texts[i] = text
    return texts


def questions(subject: Subject, lm: LanguageModel, inputs: Inputs, config: AuditConfig, into: Measurement) -> None:
    """TOFU's measures on records that bring paraphrases and wrong answers."""
    if inputs.questions:
        found = [_question(lm, inputs, q) for q in inputs.questions.values()]
        into.truth_ratio = [ratio for ratio, _, _ in found]
        into.paraphrase = [p for _, p, _ in found]
    for name, asked in inputs.question_sets.items():
        found = [_question(lm, inputs, q) for q in asked]
        texts = _answers(subject, inputs, [q.answer for q in asked], config, whole=True)
        into.question_sets[name] = {
            "probability": [_own_probability(name, f) for f in found],
            "rouge_l": [memory.rouge_l(t, q.answer.completion).recall for t, q in zip(texts, asked, strict=True)],
            "truth_ratio": [ratio for ratio, _, _ in found],
        }


def _question(lm: LanguageModel, inputs: Inputs, q: Question) -> tuple[float, float, Tensor]:
    """Truth ratio, probability of the paraphrase, and mean negative log-likelihoods of answer, paraphrase and rest."""
    nll = shared_prefix_nll(lm, inputs.encode([q.answer, q.paraphrase, *q.perturbed])).double()
    return memory.truth_ratio(nll[2:], float(nll[1])), math.exp(-float(nll[1])), nll


def _own_probability(name: str, found: tuple[float, float, Tensor]) -> float:
    """Of the answer; for multiple-choice sets (all but "retain") as its share among the choices, as TOFU does."""
    p = (-found[2]).exp()
    return float(p[0]) if name == "retain" else float(p[0] / (p[0] + p[2:].sum()))


@dataclass(frozen=True)
class Before:
    """What the model with its memory says about the general text, for divergences.

    Attributes:
        lm: Its decoder and head; only the head runs.
        states: Hidden states of each window.
    """

    lm: LanguageModel
    states: list[Tensor]


def ability(lm: LanguageModel, inputs: Inputs, into: Measurement, before: Before | None) -> None:
    """General text and retain records, the text also compared with the model that has its memory."""
    states = utility.reference_states(lm, inputs.general)
    if before is None:
        sums, tokens = utility.sequence_nll(lm, inputs.general, states)
    else:
        both = utility.agreement(lm, inputs.general, before.states, before.lm, states)
        sums, tokens, into.kl, into.top1 = both.nll, both.tokens, both.mean_kl, both.top1
    into.general = {"nll": sums.tolist(), "tokens": tokens.tolist()}
    if inputs.retain:
        into.retain = [s.nll for s in token_statistics(lm, inputs.encode(inputs.retain))]


def task(lm: LanguageModel, asked: Task, inputs: Inputs, config: AuditConfig, into: Measurement) -> None:
    """One task: is the right answer given, and how surprising is it?"""
    found = evaluate(lm, inputs.tokenizer, asked, config.resolved("task_rows"), config.seed)
    into.tasks[asked.name] = {"correct": [float(c) for c in found.correct], "nll": list(found.nll)}


def gradient_scores(subject: Subject, inputs: Inputs, targets: Sequence[str], into: Measurement) -> None:
    """Membership by the norm of a record's gradient; members have the smaller one."""
    for name, chosen in (("forget", inputs.forget), ("holdout", inputs.holdout)):
        norms = gradient_norms(subject, inputs.encode(chosen), targets) if chosen else torch.zeros(0)
        into.scores.setdefault("grad_norm", {})[name] = (-norms).tolist()


def unigram_perplexity(windows: Sequence[Sequence[int]]) -> float:
    """Perplexity that these windows would have if every token were drawn by its frequency in them.

    A language model that does worse than counting words is broken.
    """
    tokens = torch.tensor([i for w in windows for i in w])
    share = tokens.bincount().double() / len(tokens)
    share = share[share > 0]
    return math.exp(-float((share * share.log()).sum()))
