"""The steps of an audit, in order, and what they find."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from libortho.auditing import attacks
from libortho.auditing import measure as measuring
from libortho.auditing import summary as summaries
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import Inputs
from libortho.auditing.measure import Before, Measurement
from libortho.auditing.measures import utility
from libortho.auditing.measures.depth import logit_lens, unlearning_depth
from libortho.auditing.measures.gradients import forget_gradient, gradient_cosine, gradient_layers, gradient_norm
from libortho.auditing.report import json_ready
from libortho.auditing.schema import baseline_key
from libortho.auditing.subjects import Subject, at
from libortho.core.files import write_atomically
from libortho.core.layer import ortho_layers
from libortho.evaluation.intervals import mean_estimate
from libortho.evaluation.tasks import Task
from libortho.lm.checks import fingerprint
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded
from libortho.text.records import Record

_CURVE_HOLDOUT, _CURVE_WINDOWS = 64, 6
"""Holdout records and windows of general text at each point of the alpha curve."""


_GRADIENT_RECORDS = 16
"""Forget records whose summed gradient is compared between subjects."""


_TASK_TOKENS = 80
"""Typical tokens of one row of a task, to estimate time."""


@dataclass
class Step:
    """One piece of work and its size, in tokens that pass through the model."""

    name: str
    cost: float
    run: Callable[[], None]


@dataclass
class State:
    """What the steps have found so far."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    attacks: dict[str, Any] | None = None
    depth: dict[str, Any] | None = None
    gradient: dict[str, torch.Tensor] | None = None
    before: Before | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Plan:
    """All work of one audit, in order; each step has its size in tokens, so that time can be estimated."""

    def __init__(
        self, subjects: Sequence[Subject], inputs: Inputs, config: AuditConfig, state: State, store: Store
    ) -> None:
        self.subjects, self.inputs, self.config, self.state = subjects, inputs, config, state
        self.store = store
        self.steps: list[Step] = []
        self.by_key = {s.key: s for s in subjects}
        self.audited = subjects[0]
        self.split = any(layer.streams for layer in ortho_layers(self.audited.model).values())
        self.baseline = baseline_key(self.by_key)
        """Who has its memory, and is what others diverge from."""
        self.targets = gradient_layers(self.audited)
        self.attacked = self._some("attack_records")
        yardsticks = [s for s in subjects if s.key in (self.audited.key, self.baseline, "reference")]
        self.prints = {s.key: fingerprint(s.model) for s in subjects}
        self.all = " ".join(f"{s.key} {self.prints[s.key]}" for s in yardsticks)
        self.done: set[str] = set()
        for subject in self._order():
            self._measure(subject)
        if self.split:
            for value in config.alphas:
                self._curve(value)
        if config.profile == "full":
            self._attacks()
            self._depth()

    def _some(self, size: str) -> list[Record]:
        """A random choice of forget records, in their order."""
        forget = self.inputs.forget
        few = min(self.config.resolved(size), len(forget))
        return [forget[i] for i in sorted(random.Random(self.config.seed).sample(range(len(forget)), few))]

    def _kept(self, name: str, make: Callable[[], Any], of: str | None = None) -> Any:
        """A JSON-ready result from the store, or made and put there.

        It depends on the audited model, the one with its memory and the reference, unless ``of`` says otherwise.
        """
        key = f"{name} {self.all if of is None else of}"
        found = self.store.get(key)
        if found is None:
            found = make()
            self.store.put(key, found)
        return found

    def _order(self) -> list[Subject]:
        """Who has its memory goes first: others are compared with it."""
        return sorted(self.subjects, key=lambda s: s.key != self.baseline)

    def _add(self, name: str, tokens: float, run: Callable[[], None]) -> None:
        self.steps.append(Step(name, max(1.0, tokens), run))

    def _tokens(self, records: Iterable[Record]) -> int:
        return sum(len(e.ids) for e in self.inputs.encode(list(records)))

    def _inside(self, subject: Subject, work: Callable[[LanguageModel, Measurement], None]) -> Callable[[], None]:
        def run() -> None:
            if subject.key not in self.done:
                with subject.enter():
                    work(subject.language_model(), self.state.measured[subject.key])

        return run

    def _measure(self, subject: Subject) -> None:
        """One subject; what is stored by the time its turn comes is taken from there.

        So several processes can share one store. States and gradients of the one with its memory are not stored.
        """
        beside = "" if self.baseline is None else self.prints[self.baseline]  # divergence and cosine are from this one
        name = f"subject {subject.key} {self.prints[subject.key]} {beside}"

        def begin() -> None:
            stored = self.store.get(name)
            if stored is not None:
                self.state.measured[subject.key] = Measurement(**stored)
                self.done.add(subject.key)
            else:
                with subject.enter():
                    lm = subject.language_model()
                    self.state.measured[subject.key] = measuring.records(lm, self.inputs, self.config)

        def end() -> None:
            if subject.key not in self.done:
                self.store.put(name, self.state.measured[subject.key].to_dict())

        if subject.key == self.baseline:
            self._add("utility", sum(len(e.ids) for e in self.inputs.general), self._baseline_states)
        self._add("records", self._tokens([*self.inputs.forget, *self.inputs.holdout]), begin)
        self._measure_further(subject)
        self._add("store", 1, end)

    def _baseline_states(self) -> None:
        assert self.baseline is not None
        subject = self.by_key[self.baseline]
        with subject.enter():
            lm = subject.language_model()
            self.state.before = Before(lm, utility.reference_states(lm, self.inputs.general))
        self.state.gradient = self._forget_gradient(subject)

    def _forget_gradient(self, subject: Subject) -> dict[str, torch.Tensor]:
        items = self.inputs.encode(self.inputs.forget[:_GRADIENT_RECORDS])
        return forget_gradient(subject, items, self.targets)

    def _measure_further(self, subject: Subject) -> None:
        m, config = self.inputs, self.config
        control = subject.role == "control" and subject.key != self.baseline

        def ability(lm: LanguageModel, into: Measurement) -> None:
            measuring.ability(lm, m, into, None if subject.key == self.baseline else self.state.before)

        self._add("utility", sum(len(e.ids) for e in m.general), self._inside(subject, ability))
        if control:
            return
        for task in m.tasks:
            rows = min(len(task.questions), config.resolved("task_rows"))

            def answer(lm: LanguageModel, into: Measurement, task: Task = task) -> None:
                measuring.task(lm, task, m, config, into)

            self._add(task.name, _TASK_TOKENS * rows, self._inside(subject, answer))
        probes = [r for pairs in [*m.prefixes.values(), *m.variants.values()] for _, r in pairs]
        self._add(
            "prompts", self._tokens([*probes, *m.associations]),
            self._inside(subject, lambda lm, into: measuring.probes(lm, m, into)),
        )  # fmt: skip
        level = subject.key != self.baseline or not self.split  # at alpha = 1 nobody asks for the never-trained level
        fillings = [r for group in [*m.fillings, *(m.holdout_fillings if level else ())] for r in group]
        self._add(
            "exposure", 0.5 * self._tokens(fillings),
            self._inside(subject, lambda lm, into: measuring.exposures(lm, m, into, holdout=level)),
        )  # fmt: skip
        answers = sum(len(e.completion) for e in m.encode([m.forget[i] for i in m.probed]))
        self._add(
            "generation", 3 * answers,
            self._inside(subject, lambda lm, into: measuring.generations(subject, m, config, into)),
        )  # fmt: skip
        if subject.key != self.baseline or config.profile == "full":
            self._add(
                "samples", config.samples * answers,
                self._inside(subject, lambda lm, into: measuring.sampled(subject, m, config, into)),
            )  # fmt: skip
        asked_sets = [q for qs in m.question_sets.values() for q in qs]
        if m.questions or asked_sets:
            texts = [r for q in [*m.questions.values(), *asked_sets] for r in (q.answer, q.paraphrase, *q.perturbed)]
            self._add(
                "questions", self._tokens(texts),
                self._inside(subject, lambda lm, into: measuring.questions(subject, lm, m, config, into)),
            )  # fmt: skip
        self._add(
            "gradients", 3 * self._tokens(m.forget[:_GRADIENT_RECORDS]),
            self._inside(subject, lambda lm, into: self._gradient(subject, into)),
        )  # fmt: skip
        if config.profile == "full" and m.holdout and subject.role != "other":
            self._add(
                "gradients", 3 * self._tokens([*m.forget, *m.holdout]),
                self._inside(subject, lambda lm, into: measuring.gradient_scores(subject, m, self.targets, into)),
            )  # fmt: skip

    def _gradient(self, subject: Subject, into: Measurement) -> None:
        """Norm of the forget gradient, and its direction beside that of the model with its memory."""
        gradient = self._forget_gradient(subject) if subject.key != self.baseline else self.state.gradient
        assert gradient is not None
        into.gradient = {"norm": gradient_norm(gradient)}
        if self.state.gradient is not None:
            into.gradient["cosine"] = gradient_cosine(gradient, self.state.gradient)

    def _curve(self, value: float) -> None:
        m = self.inputs
        holdout = m.holdout[:_CURVE_HOLDOUT]

        def make() -> dict[str, Any]:
            subject = at(self.audited.model, value)
            with subject.enter():
                lm = subject.language_model()
                found = measuring.records(lm, replace(m, holdout=holdout), self.config)
                part = replace(m, general=m.general[:_CURVE_WINDOWS], retain=())
                measuring.ability(lm, part, found, self._before_part())
            return summaries.curve_point(value, found)

        def run() -> None:
            name = f"curve {value:g}"
            self.state.curve.append(self._kept(name, make, self.prints[self.audited.key]))

        text = sum(len(e.ids) for e in m.general[:_CURVE_WINDOWS])
        self._add("curve", self._tokens([*m.forget, *holdout]) + text, run)

    def _before_part(self) -> Before | None:
        before = self.state.before
        return None if before is None else Before(before.lm, before.states[:_CURVE_WINDOWS])

    def _attacks(self) -> None:
        items, general = self.inputs.encode(self.attacked), list(self.inputs.general)
        seed, tokens = self.config.seed, self._tokens(self.attacked)
        found: dict[str, Any] = {}
        self.state.attacks = found
        subjects = list(self.subjects)
        asked: list[tuple[str, float, Callable[[], Any]]] = []
        if len(items) >= 2:
            asked.append(("relearning", 200 * tokens, lambda: attacks.relearning(subjects, items, general, seed=seed)))
            asked.append(
                ("prefix", 60 * tokens, lambda: attacks.adversarial_prefix(
                    subjects, self.attacked, self.inputs.tokenizer, seed=seed
                ))
            )  # fmt: skip
        reference = self.by_key.get("reference")
        for name, rounding in (("requantisation", attacks.requantisation), ("pruning", attacks.pruning)):
            asked.append((name, 10 * tokens, partial(rounding, self.audited, items, general, reference=reference)))
        if self.split:
            on = self.by_key["on"]
            asked.append(("noise", 4 * tokens, lambda: attacks.noise(on, items, general, seed=seed)))
            asked.append(
                ("recovery", 4 * tokens, lambda: attacks.stream_recovery(self.audited.model, items, seed=seed))
            )
        for name, cost, attack in asked:

            def run(name: str = name, attack: Callable[[], Any] = attack) -> None:
                found[name] = self._kept(name, lambda: attack().to_dict())

            self._add(name, cost, run)

    def _depth(self) -> None:
        chosen = self._some("depth_records")
        items, tokens = self.inputs.encode(chosen), self._tokens(chosen)
        lens = [s for s in self.subjects if s.role in ("audited", "switch on", "reference") or s.key == self.baseline]
        judged = [self.audited, *(s for s in self.subjects if s.role == "other")]
        why = self._no_depth()

        def run() -> None:
            found, lenses = {}, {}
            for s in [] if why else judged:
                found[s.key] = self._kept(
                    f"depth {s.key}", partial(self._score, s, items), f"{self.all} {self.prints[s.key]}"
                )
            for s in lens:
                lenses[s.key] = self._kept(f"lens {s.key}", partial(logit_lens, s, items))
            main = found.get(self.audited.key, {"uds": None, "withheld": why, "layers": [], "unscored": None})
            others = {k: v["uds"] for k, v in found.items() if k != self.audited.key}
            self.state.depth = {**main, "records": len(items), "others": others, "logit_lens": lenses}

        self._add("depth", (0 if why else 62 * tokens * len(judged)) + tokens * len(lens), run)

    def _no_depth(self) -> str | None:
        if self.baseline is None:
            return "the depth score needs the model with its memory; pass original"
        if "reference" not in self.by_key:
            return "the depth score needs a model that was never trained on the forget set; pass reference"
        return None

    def _score(self, subject: Subject, items: Sequence[Encoded]) -> dict[str, Any]:
        assert self.baseline is not None
        score = unlearning_depth(self.by_key[self.baseline], subject, self.by_key["reference"], items)
        layers = score.to_dict()["layers"]
        if not score.values:
            why = "no layer encodes any record: the model with its memory is no surer of them than the reference"
            return {"uds": None, "withheld": why, "unscored": score.unscored, "layers": layers}
        uds = mean_estimate(score.values, seed=self.config.seed).to_dict()
        return {"uds": uds, "withheld": None, "unscored": score.unscored, "layers": layers}


class Store:
    """Finished parts of an audit on disk, so that an interrupted one goes on; without a directory it keeps nothing."""

    def __init__(self, directory: Path | None, settings: str) -> None:
        self.directory, self.settings = directory, settings

    def _path(self, name: str) -> Path | None:
        if self.directory is None:
            return None
        return self.directory / f"{hashlib.sha256(f'{self.settings} {name}'.encode()).hexdigest()[:32]}.json"

    def get(self, name: str) -> Any:
        """The finished part, as JSON gave it; None if there is none."""
        path = self._path(name)
        return None if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))

    def put(self, name: str, value: Any) -> None:
        """Keep a finished part."""
        path = self._path(name)
        if path is not None:
            write_atomically(path, json.dumps(json_ready(value)))
