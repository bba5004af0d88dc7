"""The steps of an audit, in order, and what they find."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from libortho.auditing import measure as measuring
from libortho.auditing import summary as summaries
from libortho.auditing.attacks import ATTACKS, Attack, AttackInputs
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import Inputs
from libortho.auditing.measures.depth import logit_lens, unlearning_depth
from libortho.auditing.measures.gradients import forget_gradient, gradient_cosine, gradient_layers, gradient_norm
from libortho.auditing.schema import (
    OFF,
    ON,
    REFERENCE,
    CurvePoint,
    DepthData,
    DepthScoreData,
    Measurement,
    baseline_key,
    estimate_data,
)
from libortho.auditing.subjects import Subject, at
from libortho.core.layer import ortho_layers
from libortho.core.progress import Progress, tell
from libortho.core.run_cache import Entry, RunCache, run_key
from libortho.evaluation.intervals import mean_estimate
from libortho.lm.checks import fingerprint
from libortho.lm.model import LanguageModel
from libortho.lm.reading_progress import SLOWER, tokens_per_second, watched
from libortho.lm.scoring import PASS_TOKENS, judged_states
from libortho.text.encoding import Encoded
from libortho.text.records import Record

Result = TypeVar("Result")
_CURVE_HOLDOUT, _CURVE_WINDOWS = 32, 4
"""Holdout records and windows of general text at each point of the alpha curve."""
_GRADIENT_RECORDS = 16
"""Forget records whose summed gradient is compared between subjects."""
_COMPARED = ("audited", "switch on", "reference")
"""Roles of the subjects that verdicts are about."""
_TIMED_WINDOWS = 2
"""Windows of general text by which the time is estimated."""
_TASK_TOKENS = 60
"""Typical tokens of one row of a task, to estimate time; of arithmetic a fifth."""


Stage = Literal["yardsticks", "attacks"]
"""What is over: the audited model and those that it is compared with are measured; all attacks have run."""


@dataclass
class Step:
    """One piece of work and its size, in tokens that pass through the model.

    ``ends``: the stage of the audit that is over with it, if one is.
    """

    name: str
    cost: float
    run: Callable[[], None]
    ends: Stage | None = None


@dataclass
class Findings:
    """What the steps have found so far; the seconds are by the name of the step."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    attacks: dict[str, Any] | None = None
    depth: DepthData | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Plan:
    """All work of one audit, in order; each step has its size in tokens, so that time can be estimated.

    Attributes:
        steps: To be run one after another.
        yardsticks: The audited subject, and those that verdicts compare it with.
        found: What they have found.
        baseline: Key of the subject with its memory, from which others diverge; None if there is none.
    """

    def __init__(self, subjects: Sequence[Subject], inputs: Inputs, config: AuditConfig, cache: RunCache) -> None:
        self.subjects, self.inputs, self.config, self.cache = subjects, inputs, config, cache
        self.steps: list[Step] = []
        self.found = Findings()
        self.by_key = {s.key: s for s in subjects}
        self.audited = subjects[0]
        self.split = any(layer.streams for layer in ortho_layers(self.audited.model).values())
        self.baseline = baseline_key(self.by_key)
        self._baseline: measuring.Baseline | None = None
        self._baseline_gradient: dict[str, torch.Tensor] | None = None
        self._targets = gradient_layers(self.audited)
        self._fingerprints = {s.key: fingerprint(s.model) for s in subjects}
        self.yardsticks = [s for s in subjects if s.role in _COMPARED or s.key == self.baseline]
        self._compared = " ".join(f"{s.key} {self._fingerprints[s.key]}" for s in self.yardsticks)
        self._restored: set[str] = set()
        for subject in sorted(self.yardsticks, key=lambda s: s.key != self.baseline):  # others are compared with it
            self._measure(subject)
        self.steps[-1].ends = "yardsticks"
        for subject in subjects:
            if subject not in self.yardsticks:
                self._measure(subject)
        if self.split:
            for value in config.alphas or ():
                self._curve(value)
        if config.profile == "full":
            self._attacks()
            self._depth()

    def expected_seconds(self) -> float:
        """How long the steps will take, by how fast the audited model reads general text."""
        with self.audited.enter():
            rate = tokens_per_second(self.audited.language_model(), self.inputs.general[:_TIMED_WINDOWS])
        return SLOWER * sum(s.cost for s in self.steps) / rate

    def run(self, progress: Progress | None, reached: Callable[[Stage], None]) -> None:
        """Run all steps.

        Args:
            progress: Called with "audit", and with what is done and what there is in tokens.
            reached: Called as a stage is over.
        """
        total, done, within = sum(s.cost for s in self.steps), 0.0, 0.0

        def count(tokens: int) -> None:
            nonlocal within
            within += tokens
            tell(progress, "audit", int(done + min(within, step.cost)), int(total))

        with watched([s.model for s in self.subjects], count):
            for step in self.steps:
                began, within = time.monotonic(), 0.0
                step.run()
                done += step.cost
                self.found.seconds[step.name] = self.found.seconds.get(step.name, 0.0) + time.monotonic() - began
                tell(progress, "audit", int(done), int(total))
                if step.ends is not None:
                    reached(step.ends)

    def _some(self, size: str) -> list[Record]:
        """A random choice of forget records, in their order."""
        forget = self.inputs.forget
        few = min(self.config.resolved(size), len(forget))
        return [forget[i] for i in sorted(random.Random(self.config.seed).sample(range(len(forget)), few))]

    def _kept(self, name: str, make: Callable[[], Result], of: str | None = None) -> Result:
        """A JSON-ready result from the cache, or made and put there.

        It depends on the audited model, the baseline and the reference, unless ``of`` says otherwise.
        """
        entry = run_key(name, self._compared if of is None else of)
        result: Result = self.cache.get_or_compute(entry, lambda: Entry({}, make())).data
        return result

    def _add(self, name: str, tokens: float, run: Callable[[], None]) -> None:
        self.steps.append(Step(name, max(1.0, tokens), run))

    def _tokens(self, records: Iterable[Record]) -> int:
        return sum(len(e.ids) for e in self.inputs.encode(list(records)))

    def _measure(self, subject: Subject) -> None:
        """One subject; what is in the cache by the time its turn comes is taken from there.

        So several processes can share one cache. States and gradients of the baseline are not kept.
        """
        measured, key = self.found.measured, subject.key
        # divergence and cosine are from the baseline
        beside = "" if self.baseline is None else self._fingerprints[self.baseline]
        name = run_key("subject", key, self._fingerprints[key], beside)

        def begin() -> None:
            entry = self.cache.get(name)
            if entry is not None:
                measured[key] = entry.data
                self._restored.add(key)
            else:
                measured[key] = {}
                measure(lambda lm: measuring.records(lm, self.inputs, self.config))

        def measure(work: Callable[[LanguageModel], Measurement]) -> None:
            if key not in self._restored:
                with subject.enter():
                    part = work(subject.language_model())
                measured[key] = measuring.merged(measured[key], part)

        def end() -> None:
            if key not in self._restored:
                self.cache.put(name, Entry({}, measured[key]))

        if key == self.baseline:
            self._add("utility", sum(len(e.ids) for e in self.inputs.general), partial(self._measure_baseline, subject))
        self._add("records", self._tokens([*self.inputs.forget, *self.inputs.holdout]), begin)
        for step, tokens, work in self._measurements(subject):
            self._add(step, tokens, partial(measure, work))
        self._add("store", 1, end)

    def _measure_baseline(self, baseline: Subject) -> None:
        """What the others are compared with: states on general text, and the forget gradient."""
        with baseline.enter():
            lm = baseline.language_model()
            self._baseline = measuring.Baseline(lm, judged_states(lm, self.inputs.general, PASS_TOKENS))
        self._baseline_gradient = self._forget_gradient(baseline)

    def _forget_gradient(self, subject: Subject) -> dict[str, torch.Tensor]:
        items = self.inputs.encode(self.inputs.forget[:_GRADIENT_RECORDS])
        return forget_gradient(subject, items, self._targets)

    def _measurements(self, subject: Subject) -> Iterator[tuple[str, float, Callable[[LanguageModel], Measurement]]]:
        """Name, size and work of all measurements of a subject after the first pass."""
        m, config, is_baseline = self.inputs, self.config, subject.key == self.baseline
        full = config.profile == "full"
        yield (
            "utility",
            sum(len(e.ids) for e in m.general),
            lambda lm: measuring.ability(lm, m, None if is_baseline else self._baseline),
        )
        if subject.role == "control" and not is_baseline:
            return
        for task in m.tasks:
            rows = min(len(task.questions), config.resolved("task_rows"))
            size = _TASK_TOKENS * rows / (5 if task.name == "arithmetic" else 1)
            yield task.name, size, partial(measuring.task, inputs=m, config=config, asked=task)
        if not is_baseline or full:
            probes = [r for pairs in [*m.prefixes.values(), *m.variants.values()] for _, r in pairs]
            yield "prompts", self._tokens([*probes, *m.associations]), lambda lm: measuring.probes(lm, m)
        level = not (is_baseline and self.split)  # at alpha = 1 nobody asks for the never-trained level
        if subject.role != "reference" or full:
            fillings = [r for group in [*m.fillings, *(m.holdout_fillings if level else ())] for r in group]
            yield (
                "exposure",
                0.6 * self._tokens(fillings),
                lambda lm: measuring.exposures(lm, m, self.found.measured[subject.key]["log_p"], holdout=level),
            )
        answers = sum(len(e.completion) for e in m.encode([m.forget[i] for i in m.probed]))
        yield "generation", 4 * answers, lambda lm: measuring.generations(lm, m, config)
        if not is_baseline or full:
            yield "samples", config.samples * answers, lambda lm: measuring.sampled(lm, m, config)
        asked = [*m.questions.values(), *(q for qs in m.question_sets.values() for q in qs)]
        if asked:
            texts = [r for q in asked for r in (q.answer, q.paraphrase, *q.perturbed)]
            yield "questions", self._tokens(texts), lambda lm: measuring.questions(lm, m, config)
        yield "gradients", 3 * self._tokens(m.forget[:_GRADIENT_RECORDS]), lambda _: self._gradient(subject)
        if full and m.holdout and subject.role != "other":
            yield (
                "gradients",
                3 * self._tokens([*m.forget, *m.holdout]),
                lambda _: measuring.gradient_scores(subject, m, self._targets),
            )

    def _gradient(self, subject: Subject) -> Measurement:
        """Norm of the forget gradient, and its direction beside the baseline's."""
        other = self._baseline_gradient
        own = other if subject.key == self.baseline and other is not None else self._forget_gradient(subject)
        found = {"norm": gradient_norm(own)}
        return {"gradient": found if other is None else {**found, "cosine": gradient_cosine(own, other)}}

    def _curve(self, value: float) -> None:
        m = replace(self.inputs, holdout=self.inputs.holdout[:_CURVE_HOLDOUT])
        text = replace(m, general=m.general[:_CURVE_WINDOWS], retain=())
        at_end = {0.0: OFF, 1.0: ON}.get(value)

        def make() -> CurvePoint:
            subject, before = at(self.audited.model, value), self._baseline
            part = before and measuring.Baseline(before.lm, before.states[:_CURVE_WINDOWS])
            with subject.enter():
                lm = subject.language_model()
                found = measuring.records(lm, m, self.config)
                found = measuring.merged(found, measuring.ability(lm, text, part))
            return summaries.curve_point(value, found)

        def run() -> None:
            if at_end is None:
                self.found.curve.append(self._kept(f"curve {value:g}", make, self._fingerprints[self.audited.key]))
            else:
                found = measuring.beginning(self.found.measured[at_end], _CURVE_HOLDOUT, _CURVE_WINDOWS)
                same: Measurement = {"kl": 0.0} if at_end == self.baseline else {}
                self.found.curve.append(summaries.curve_point(value, measuring.merged(found, same)))

        size = self._tokens([*m.forget, *m.holdout]) + sum(len(e.ids) for e in text.general)
        self._add("curve", size if at_end is None else 1, run)

    def _attacks(self) -> None:
        records = self._some("attack_records")
        inputs = AttackInputs(
            subjects=self.subjects,
            records=records,
            items=self.inputs.encode(records),
            general=self.inputs.general,
            tokenizer=self.inputs.tokenizer,
            seed=self.config.seed,
        )
        found: dict[str, Any] = {}
        self.found.attacks = found

        def run(attack: Attack[Any]) -> None:
            found[attack.name] = self._kept(attack.name, partial(attack.run, inputs))

        for attack in ATTACKS:
            if attack.applies(inputs):
                self._add(attack.name, attack.passes * self._tokens(records), partial(run, attack))
        self._add("store", 1, lambda: None)
        self.steps[-1].ends = "attacks"

    def _depth(self) -> None:
        chosen = self._some("depth_records")
        items, tokens = self.inputs.encode(chosen), self._tokens(chosen)
        lens = [s for s in self.subjects if s.role in ("audited", "switch on", "reference") or s.key == self.baseline]
        judged = [self.audited, *(s for s in self.subjects if s.role == "other")]
        why = self._no_depth()

        def run() -> None:
            found: dict[str, DepthScoreData] = {}
            for s in [] if why else judged:
                models = f"{self._compared} {self._fingerprints[s.key]}"
                found[s.key] = self._kept(f"depth {s.key}", partial(self._score, s, items), models)
            lenses = {s.key: self._kept(f"lens {s.key}", partial(logit_lens, s, items)) for s in lens}
            nothing: DepthScoreData = {"uds": None, "withheld": why, "layers": [], "unscored": None}
            main = found.pop(self.audited.key, nothing)
            others = {k: v["uds"] for k, v in found.items()}
            self.found.depth = {**main, "records": len(items), "others": others, "logit_lens": lenses}

        self._add("depth", (0 if why else 62 * tokens * len(judged)) + tokens * len(lens), run)

    def _no_depth(self) -> str | None:
        if self.baseline is None:
            return "the depth score needs the model with its memory; pass original"
        if REFERENCE not in self.by_key:
            return "the depth score needs a model that was never trained on the forget set; pass reference"
        return None

    def _score(self, subject: Subject, items: Sequence[Encoded]) -> DepthScoreData:
        assert self.baseline is not None
        score = unlearning_depth(self.by_key[self.baseline], subject, self.by_key[REFERENCE], items)
        layers = score.to_dict()["layers"]
        if not score.values:
            why = "no layer encodes any record: the model with its memory is no surer of them than the reference"
            return {"uds": None, "withheld": why, "unscored": score.unscored, "layers": layers}
        uds = estimate_data(mean_estimate(score.values, seed=self.config.seed))
        return {"uds": uds, "withheld": None, "unscored": score.unscored, "layers": layers}
