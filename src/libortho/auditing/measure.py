"""One subject, measured: raw figures record by record, from which the report makes estimates and comparisons.

Everything here is JSON-ready, so that a measurement can be kept and compared later with another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import SHOWN, Inputs, Question
from libortho.auditing.measures import memory, privacy, utility
from libortho.auditing.measures.gradients import gradient_norms
from libortho.auditing.schema import Measurement
from libortho.auditing.subjects import Subject
from libortho.evaluation.tasks import Task, evaluate
from libortho.lm.asking import answers, room, sample
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import PASS_TOKENS, judged_states, sequence_nll
from libortho.lm.token_statistics import TokenStatistics, shared_prefix_nll, token_statistics
from libortho.text.records import Record
from libortho.text.tokens import contains, says

GENERATED = 64
"""Sequences that are sampled side by side."""
SCORES = ("loss", "zlib", "min_k", "min_k_plus")
"""Membership scores that need one forward pass and no other model."""


def records(lm: LanguageModel, inputs: Inputs, config: AuditConfig) -> Measurement:
    """The first pass: forget and holdout records, teacher-forced."""
    sets = {"forget": inputs.forget, "holdout": inputs.holdout}
    found = {n: token_statistics(lm, inputs.encode(r)) for n, r in sets.items()}
    return {
        "nll": {n: [s.nll for s in f] for n, f in found.items()},
        "correct": {n: [s.correct.int().tolist() for s in f] for n, f in found.items()},
        "log_p": {n: [s.log_p.tolist() for s in f] for n, f in found.items()},
        "scores": {
            a: {n: [_score(a, r, s, config) for r, s in zip(sets[n], f, strict=True)] for n, f in found.items()}
            for a in SCORES
        },
    }


def merged(measured: Measurement, part: Measurement) -> Measurement:
    """Join two parts of a measurement; of figures by name, such as those of tasks, both are kept."""
    found: dict[str, Any] = dict(measured)
    for key, figures in part.items():
        found[key] = {**found.get(key, {}), **figures} if isinstance(figures, dict) else figures
    return cast(Measurement, found)


def beginning(measured: Measurement, holdout: int, windows: int) -> Measurement:
    """The part of a measurement that a point of the alpha curve has: fewer holdout records and windows of text.

    The divergence stays that of all windows.
    """
    part = {k: {**measured[k], "holdout": measured[k]["holdout"][:holdout]} for k in ("nll", "correct", "log_p")}
    scores = {n: {**s, "holdout": s["holdout"][:holdout]} for n, s in measured["scores"].items()}
    general = {k: v[:windows] for k, v in measured["general"].items()}
    return cast(Measurement, {**part, "scores": scores, "general": general, "kl": measured.get("kl")})


def _score(attack: str, record: Record, s: TokenStatistics, config: AuditConfig) -> float:
    made: Mapping[str, Callable[[], float]] = {
        "loss": lambda: privacy.loss_score(s.log_p),
        "zlib": lambda: privacy.zlib_score(record.completion, s.log_p),
        "min_k": lambda: privacy.min_k_score(s.log_p, config.min_k),
        "min_k_plus": lambda: privacy.min_k_plus_score(s.log_p, s.mean, s.deviation, config.min_k),
    }
    return made[attack]()


def probes(lm: LanguageModel, inputs: Inputs) -> Measurement:
    """Other ways to ask: the beginning of the secret given, the prompt changed, the question turned round."""

    def ask(records: Iterable[Record]) -> list[TokenStatistics]:
        return token_statistics(lm, inputs.encode(list(records)))

    def extracted(found: Sequence[TokenStatistics]) -> list[int]:
        return [int(s.correct.all()) for s in found]

    part: Measurement = {
        "prefixes": {f"{share:g}": extracted(ask(r for _, r in pairs)) for share, pairs in inputs.prefixes.items()},
        "variants": {},
    }
    for name, pairs in inputs.variants.items():
        found = ask(r for _, r in pairs)
        part["variants"][name] = {"greedy": [float(e) for e in extracted(found)], "nll": [s.nll for s in found]}
    if inputs.associations:
        part["association"] = extracted(ask(inputs.associations))
    return part


def exposures(
    lm: LanguageModel, inputs: Inputs, log_p: Mapping[str, Sequence[Sequence[float]]], *, holdout: bool
) -> Measurement:
    """Exposure of each probed secret, and of some holdout records, in bits; see :mod:`.measures.memory`.

    Args:
        lm: The subject.
        inputs: The audit's questions.
        log_p: Per-token log-probabilities of forget and holdout records, as ``records`` gives them.
        holdout: Whether holdout records are asked too.
    """
    totals = {n: [-sum(t) for t in rows] for n, rows in log_p.items()}
    own = [totals["forget"][i] for i in inputs.probed]
    found = {"forget": _exposures(lm, inputs, own, inputs.fillings, inputs.spaces)}
    if holdout:
        beside = totals["holdout"][: len(inputs.holdout_fillings)]
        found["holdout"] = _exposures(lm, inputs, beside, inputs.holdout_fillings, inputs.holdout_spaces)
    return {"exposure": found}


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
                found.append(memory.exposure_exact(total, among))
            else:
                found.append(memory.exposure_extrapolated(total, among, space))
    return found or None


def has_exposure(others: Sequence[Record], space: int | None) -> bool:
    """True if a record has a space of fillings to be ranked in; prose has none."""
    return len(others) >= 2 and space is not None


def sampled(lm: LanguageModel, inputs: Inputs, config: AuditConfig) -> Measurement:
    """How often a sampled continuation holds the secret."""
    chosen = [inputs.forget[i] for i in inputs.probed]
    hits = [0] * len(chosen)
    for length, rows in _batches(chosen, inputs, config, max(1, GENERATED // config.samples)):
        asked = [chosen[i] for i in rows]
        texts = sample(lm.model, inputs.tokenizer, asked, length, config.samples, config.seed)
        for i, drawn in zip(rows, texts, strict=True):
            hits[i] = sum(contains(t, chosen[i].completion, inputs.tokenizer) for t in drawn)
    return {"sampled": hits}


def _batches(chosen: Sequence[Record], inputs: Inputs, config: AuditConfig, rows: int) -> list[tuple[int, list[int]]]:
    """Indices in batches of similar length, each with the tokens that its longest answer needs."""
    items = zip(chosen, inputs.encode(chosen), strict=True)
    needed = [room(r, len(e.completion), config.max_new_tokens, inputs.tokenizer) for r, e in items]
    order = sorted(range(len(chosen)), key=needed.__getitem__)
    chunks = [order[i : i + rows] for i in range(0, len(order), rows)]
    return [(needed[c[-1]], c) for c in chunks]


def generations(lm: LanguageModel, inputs: Inputs, config: AuditConfig) -> Measurement:
    """Greedy answers to the forget prompts, and to others, to see whether they still differ."""
    chosen = [inputs.forget[i] for i in inputs.probed]
    generated = _answers(lm, inputs, chosen, config)
    pairs = list(zip(generated, (r.completion for r in chosen), strict=True))
    return {
        "generated": generated,
        "said": [
            int(says(g, c, inputs.tokenizer)) if r.question and len(e.completion) <= config.max_new_tokens else None
            for (g, c), r, e in zip(pairs, chosen, inputs.encode(chosen), strict=True)
        ],
        "similarity": [memory.levenshtein_similarity(g[: len(c)], c.strip()) for g, c in pairs],
        "rouge_l": [memory.rouge_l(g, c) for g, c in pairs],
        "answers": _answers(lm, inputs, (inputs.holdout or inputs.forget)[:SHOWN], config),
    }


def _answers(
    lm: LanguageModel, inputs: Inputs, chosen: Sequence[Record], config: AuditConfig, *, whole: bool = False
) -> list[str]:
    """Greedy answers, as long as the right ones, or ``whole``: as long as the model likes."""
    texts = [""] * len(chosen)
    for length, rows in _batches(chosen, inputs, config, GENERATED // 2):
        budget = max(length, config.max_new_tokens) if whole else length
        made = answers(lm.model, inputs.tokenizer, [chosen[i] for i in rows], budget)
        for i, text in zip(rows, made, strict=True):
            texts[i] = text
    return texts


def questions(lm: LanguageModel, inputs: Inputs, config: AuditConfig) -> Measurement:
    """TOFU's measures on records that bring paraphrases and wrong answers."""
    part: Measurement = {"question_sets": {}}
    if inputs.questions:
        found = [_question(lm, inputs, q) for q in inputs.questions.values()]
        part["truth_ratio"] = [ratio for ratio, _, _ in found]
        part["paraphrase"] = [p for _, p, _ in found]
    for name, asked in inputs.question_sets.items():
        found = [_question(lm, inputs, q) for q in asked]
        texts = _answers(lm, inputs, [q.answer for q in asked], config, whole=True)
        part["question_sets"][name] = {
            "probability": [_own_probability(name, f) for f in found],
            "rouge_l": [memory.rouge_l(t, q.answer.completion) for t, q in zip(texts, asked, strict=True)],
            "truth_ratio": [ratio for ratio, _, _ in found],
        }
    return part


def _question(lm: LanguageModel, inputs: Inputs, q: Question) -> tuple[float, float, Tensor]:
    """Truth ratio, probability of the paraphrase, and mean negative log-likelihoods of answer, paraphrase and rest."""
    nll = shared_prefix_nll(lm, inputs.encode([q.answer, q.paraphrase, *q.perturbed])).double()
    return memory.truth_ratio(nll[2:], float(nll[1])), math.exp(-float(nll[1])), nll


def _own_probability(name: str, found: tuple[float, float, Tensor]) -> float:
    """Probability of the right answer; of sets with choices (all but "retain") its share among them, as TOFU does."""
    p = (-found[2]).exp()
    return float(p[0]) if name == "retain" else float(p[0] / (p[0] + p[2:].sum()))


@dataclass(frozen=True)
class Baseline:
    """What the model with its memory says about the general text, for divergences.

    Attributes:
        lm: Its decoder and head; only the head runs.
        states: Hidden states of each window.
    """

    lm: LanguageModel
    states: Sequence[Tensor]


def ability(lm: LanguageModel, inputs: Inputs, baseline: Baseline | None) -> Measurement:
    """General text and retain records, the text also compared with the model that has its memory."""
    part: Measurement = {}
    states = judged_states(lm, inputs.general, PASS_TOKENS)
    if baseline is None:
        sums, tokens = sequence_nll(lm, inputs.general, states)
    else:
        both = utility.agreement(lm, inputs.general, baseline.states, baseline.lm, states)
        sums, tokens = both.nll, both.tokens
        part = {"kl": both.mean_kl, "top1": both.top1}
    part["general"] = {"nll": sums.tolist(), "tokens": tokens.tolist()}
    if inputs.retain:
        part["retain"] = [s.nll for s in token_statistics(lm, inputs.encode(inputs.retain))]
    return part


def task(lm: LanguageModel, inputs: Inputs, config: AuditConfig, asked: Task) -> Measurement:
    """One task: is the right answer given, and how surprising is it?"""
    found = evaluate(lm, inputs.tokenizer, asked, config.resolved("task_rows"), config.seed)
    return {"tasks": {asked.name: {"correct": [float(c) for c in found.correct], "nll": list(found.nll)}}}


def gradient_scores(subject: Subject, inputs: Inputs, targets: Sequence[str]) -> Measurement:
    """Membership by the norm of a record's gradient; members have the smaller one."""
    sets = {"forget": inputs.forget, "holdout": inputs.holdout}
    norms = {n: gradient_norms(subject, inputs.encode(chosen), targets) for n, chosen in sets.items()}
    return {"scores": {"grad_norm": {n: (-found).tolist() for n, found in norms.items()}}}


def unigram_perplexity(windows: Sequence[Sequence[int]]) -> float:
    """Perplexity that these windows would have if every token were drawn by its frequency in them.

    A language model that does worse than counting words is broken.
    """
    tokens = torch.tensor([i for w in windows for i in w])
    share = tokens.bincount().double() / len(tokens)
    share = share[share > 0]
    return math.exp(-float((share * share.log()).sum()))
