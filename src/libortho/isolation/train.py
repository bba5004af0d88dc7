"""Training on the support until the records look like their controls, and nothing else has moved.

Every step asks for all records (or the next ones of many) at once; see :mod:`.equations`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from libortho.core.progress import Progress, Stopwatch, tell
from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.criteria import Criteria, check_criteria
from libortho.isolation.equations import Equations
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.isolation.targets import Target, record_targets
from libortho.lm.model import LanguageModel
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear
from libortho.training.gauss_newton import GaussNewton
from libortho.training.turns import Turns

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Share of the way to where all equations of a step hold that it goes."""
RECORDS, NEIGHBOURS, RETAIN_TOKENS = 64, 4, 128
"""Most records of one step, its neighbours (or a fourth as many as records), and its tokens of text to keep."""
KEPT_TEXTS = 24
"""Texts to keep from which these are drawn; the metric knows more."""
DECAY = 0.03
"""Share of the edit that every step takes back as it begins, so that what no equation asks for fades."""
BESIDE = 0.75
"""Share of records in whose place every other step takes a text beside them."""
LANDING = 12
"""Most steps from the first on at which no record is recited; in these nothing is taken back."""


READ_BACK = 3
"""Times that a forward and a backward pass take as long as a forward pass."""


def step_tokens(forget: Sequence[ForgetRecord]) -> int:
    """About as many tokens as one step reads."""
    mean = sum(len(r.secret.ids) for r in forget) / len(forget)
    records = min(RECORDS, len(forget))
    return round((records + 2 * max(NEIGHBOURS, records // 4)) * mean) + RETAIN_TOKENS


def training_finished(store: RunCache) -> bool:
    """True if the store holds a training that came to its end, so that only measuring is left."""
    stored = store.get("training")
    return stored is not None and bool(stored.data["finished"])


class Training:
    """The state of a training: values, whose turn it is, and what was seen of each record last."""

    def __init__(
        self,
        layers: Mapping[str, EditLinear],
        metrics: Mapping[str, KroneckerPreconditioner],
        forget: Sequence[ForgetRecord],
        retain: Sequence[Encoded],
        original: Original,
        seed: int,
    ) -> None:
        values = {n: m.values for n, m in layers.items() if m.values is not None}
        self.optimiser = GaussNewton(values, metrics)
        self.rng = random.Random(seed)
        self.records = Turns(len(forget), RECORDS, self.rng)
        self.strangers = [(i, n) for n, i in enumerate(i for i, r in enumerate(forget) if r.held)]
        # A model that says a record to strangers too is not held to what it says, but to how likely it finds it.
        self.around = [(i, n) for i, n in self.strangers if not original.leaks[i]]
        beside = max(NEIGHBOURS, self.records.size // 4)
        self.neighbours = Turns(len(self.around), beside, self.rng)
        self.level = Turns(len(self.strangers), beside, self.rng)
        size = sum(len(t.ids) for t in retain) / len(retain)
        self.retain = Turns(len(retain), max(1, round(RETAIN_TOKENS / size)), self.rng)
        self.step, self.finished = 0, False
        self.landing: int | None = None
        self.recited: dict[int, bool] = {}
        self.checks: list[Criteria] = []

    @property
    def _turns(self) -> tuple[Turns, ...]:
        return self.records, self.neighbours, self.level, self.retain

    def part(self) -> Entry:
        """The present state."""
        tensors = {f"values.{n}": v.detach() for n, v in self.optimiser.values.items()}
        data = {
            "step": self.step,
            "landing": self.landing,
            "finished": self.finished,
            "checks": [asdict(c) for c in self.checks],
            "recited": list(self.recited.items()),
            "turns": [t.pool for t in self._turns],
            "rng": self.rng.getstate(),
        }
        return Entry(tensors, data)

    @torch.no_grad()
    def take_up(self, part: Entry) -> None:
        """Restore the state that ``part`` holds."""
        for name, value in self.optimiser.values.items():
            value.copy_(part.tensors[f"values.{name}"])
        data = part.data
        self.step, self.landing, self.finished = data["step"], data["landing"], data["finished"]
        self.checks = [Criteria(**c) for c in data["checks"]]
        for turns, pool in zip(self._turns, data["turns"], strict=True):
            turns.pool = pool
        self.recited = dict(data["recited"])
        version, words, gauss = data["rng"]
        self.rng.setstate((version, tuple(words), gauss))

    def look(self, equations: Equations, lm: LanguageModel, forget: Sequence[ForgetRecord], original: Original) -> None:
        """The equations of the next records, or of texts beside some of them, and the criteria by what is seen."""
        if self.landing is None:
            self.optimiser.decay(DECAY)
        chosen, beside = next(self.records), self.step % 2 == 1 and len(self.recited) == len(forget)
        targets = record_targets(lm, forget, original, chosen)
        asked = [
            self._beside(t, forget[i], original.leaks[i]) if beside and self.rng.random() < BESIDE else t
            for i, t in zip(chosen, targets, strict=True)
        ]
        found = equations.records(asked, surprise=self.landing is not None)
        if beside:
            return
        self.recited |= {i: s.greedy for i, s in zip(chosen, found, strict=True)}
        if len(self.recited) < len(forget):
            return
        extracted = sum(self.recited.values())
        self.checks.append(check_criteria(found, original.spread[chosen], self.step, extracted))
        logger.info("%s", self.checks[-1])
        if extracted:
            self.landing = None
        else:
            self.landing = self.step if self.landing is None else self.landing
            self.finished = self.checks[-1].holds or self.step >= self.landing + LANDING

    def _beside(self, target: Target, record: ForgetRecord, leaks: Tensor) -> Target:
        """Another completion after the record's prompt, or of a record that leaks its own after another prompt."""
        swapped = [c for c in record.swapped_prompt if leaks and c.completion == record.secret.completion]
        found = []
        if swapped:
            found.append(replace(target, text=self.rng.choice(swapped)))
        if record.cut_alike:
            found.append(target.with_completion(self.rng.choice(record.cut_alike)))
        return self.rng.choice(found) if found else target

    def texts_to_keep(
        self, equations: Equations, forget: Sequence[ForgetRecord], retain: Sequence[Encoded], original: Original
    ) -> None:
        """The equations of the next texts to keep, and of the next neighbours."""
        kept = [Target.kept(retain[n], original.retain[n]) for n in next(self.retain)]
        if self.around:
            around = (self.around[t] for t in next(self.neighbours))
            kept += [Target.kept(forget[i].held[0], original.neighbours[n]) for i, n in around]
        equations.kept(kept)
        if self.strangers:
            chosen = [self.strangers[t] for t in next(self.level)]
            equations.together([forget[i].held[0] for i, _ in chosen], original.level[[n for _, n in chosen]])


def train(
    lm: LanguageModel,
    layers: dict[str, EditLinear],
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    original: Original,
    config: IsolateConfig,
    metrics: Mapping[str, KroneckerPreconditioner],
    store: RunCache,
    progress: Progress | None,
    watch: Stopwatch,
) -> tuple[list[Criteria], int]:
    """Move the supports; returns the criteria at every look since all records were seen, and the number of steps.

    A step sees the records as it begins, so that a look costs nothing, and training ends without a step after the look
    at which the criteria hold. The state goes to the store before every step, and training begins at a stored one.
    """
    retain = retain[: len(original.retain)]
    state = Training(layers, metrics, forget, retain, original, config.seed)
    if (stored := store.get("training")) is not None:
        state.take_up(stored)
    while not state.finished:
        store.put("training", state.part())
        with watch.phase("steps"):
            equations = Equations(lm, layers, state.optimiser)
            state.look(equations, lm, forget, original)
            if not state.finished:
                state.texts_to_keep(equations, forget, retain, original)
                equations.solve(SHARE)
                state.step += 1
        state.finished |= state.step >= config.max_steps
        tell(progress, "steps", state.step, state.step if state.finished else config.max_steps)
    store.put("training", state.part())
    return state.checks, state.step
