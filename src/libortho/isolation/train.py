"""Training on the support until the records look like their controls, and nothing else has moved.

Every step asks for all records (or the next ones of many) at once; see :mod:`.equations`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from libortho.core.progress import Progress, Stopwatch, tell
from libortho.core.run_cache import Entry, RunCache
from libortho.isolation.config import IsolateConfig
from libortho.isolation.criteria import Criteria, check_criteria
from libortho.isolation.equations import Equations, Seen
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.original import Original
from libortho.isolation.targets import Target, on_prompt, record_targets
from libortho.lm.model import LanguageModel
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded
from libortho.training.edit import EditLinear
from libortho.training.gauss_newton import GaussNewton

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Share of the way to where all equations of a step hold that it goes."""
RECORDS, NEIGHBOURS, RETAIN_TOKENS = 64, 8, 128
"""Most records of one step, its neighbours (or a fourth as many as records), and its tokens of text to keep."""
KEPT_TEXTS = 24
"""Texts to keep from which these are drawn; the metric knows more."""
CONTROLS_EVERY = 3
"""Steps after which the controls are read again."""
DECAY = 0.03
"""Share of the edit that every step takes back as it begins, so that what no equation asks for fades."""
TOTAL = 1.0
HELD = 4.0
"""Weight of texts to keep beside records."""
LANDING, LONGEST_LANDING = 3, 12
"""Steps in which nothing is taken back, from the first on at which no record is recited: so many, and at most so many
until the criteria hold."""


def training_finished(store: RunCache) -> bool:
    """True if the store holds a training that came to its end, so that only measuring is left."""
    stored = store.get("training")
    return stored is not None and bool(stored.data["finished"])


class Turns:
    """Endless batches of indices in which every index comes once before any comes again.

    Attributes:
        pool: Indices still to come before the next shuffle; with the state of ``rng``, all that is to be remembered.
    """

    def __init__(self, count: int, size: int, rng: random.Random) -> None:
        self.count, self.size, self.rng = count, min(size, count), rng
        self.pool: list[int] = []

    def __next__(self) -> list[int]:
        while len(self.pool) < self.size:
            fresh = list(range(self.count))
            self.rng.shuffle(fresh)
            self.pool += fresh
        batch, self.pool = self.pool[: self.size], self.pool[self.size :]
        return batch


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
        # A model that says a record to strangers too is not held to that.
        held = [i for i, r in enumerate(forget) if r.held]
        self.around = [(i, n) for n, i in enumerate(held) if not original.leaks[i]]
        self.neighbours = Turns(len(self.around), max(NEIGHBOURS, self.records.size // 4), self.rng)
        size = sum(len(t.ids) for t in retain) / len(retain)
        self.retain = Turns(len(retain), max(1, round(RETAIN_TOKENS / size)), self.rng)
        self.step, self.landing, self.finished = 0, 0, False
        self.seen: dict[int, Seen] = {}
        self.checks: list[Criteria] = []

    def part(self) -> Entry:
        """The present state."""
        tensors = {f"values.{n}": v.detach() for n, v in self.optimiser.values.items()}
        for i, s in self.seen.items():
            tensors |= {f"surprise.{i}": s.surprise, f"wanted.{i}": s.wanted}
        data = {
            "step": self.step,
            "landing": self.landing,
            "finished": self.finished,
            "checks": [asdict(c) for c in self.checks],
            "greedy": [[i, s.greedy] for i, s in self.seen.items()],
            "turns": [self.records.pool, self.neighbours.pool, self.retain.pool],
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
        self.records.pool, self.neighbours.pool, self.retain.pool = data["turns"]
        self.seen = {
            i: Seen(part.tensors[f"surprise.{i}"], part.tensors[f"wanted.{i}"], greedy) for i, greedy in data["greedy"]
        }
        version, words, gauss = data["rng"]
        self.rng.setstate((version, tuple(words), gauss))


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
    """Move the supports; returns the criteria before every step since all records were seen, and the number of steps.

    A step sees the records as it begins, so that a look costs nothing. Training ends after a landing. The state goes
    to the store whenever the controls are to be read, and training begins at a stored one.
    """
    retain = retain[: len(original.retain)]
    state = Training(layers, metrics, forget, retain, original, config.seed)
    if (stored := store.get("training")) is not None:
        state.take_up(stored)
    targets: list[Target] = []
    while not state.finished:
        if state.step % CONTROLS_EVERY == 0:
            with watch.phase("controls"):
                targets = record_targets(lm, forget, original)
        with watch.phase("steps"):
            _step(lm, layers, forget, retain, targets, original, state)
        if len(state.seen) == len(forget):
            seen = [state.seen[i] for i in range(len(forget))]
            state.checks.append(check_criteria(seen, original, state.step))
            logger.info("%s", state.checks[-1])
            state.landing += state.checks[-1].extracted == 0 or state.landing > 0
        state.step += 1
        landed = state.landing > (LANDING if state.checks and state.checks[-1].holds else LONGEST_LANDING)
        state.finished = landed or state.step >= config.max_steps
        if state.finished or state.step % CONTROLS_EVERY == 0:  # where the controls are to be read
            store.put("training", state.part())
        tell(progress, "isolate", state.step, state.step if state.finished else config.max_steps)
    return state.checks, state.step


def _step(
    lm: LanguageModel,
    layers: Mapping[str, EditLinear],
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    targets: Sequence[Target],
    original: Original,
    state: Training,
) -> None:
    """One step on the next records, and on some neighbours. Of a record that leaks, every other step takes another
    prompt."""
    chosen = next(state.records)
    asked = [targets[i] for i in chosen]
    elsewhere = {}
    for slot, i in enumerate(chosen):
        swapped = [c for c in forget[i].swapped_prompt if c.completion == forget[i].secret.completion]
        if swapped and original.leaks[i] and state.seen and state.rng.random() < 0.5:
            elsewhere[slot] = on_prompt(targets[i], state.rng.choice(swapped))
    gone = bool(state.seen) and not any(s.greedy for s in state.seen.values())
    if not state.landing:
        state.optimiser.decay(DECAY)
    equations = Equations(lm, layers, state.optimiser)
    found = equations.add([elsewhere.get(s, t) for s, t in enumerate(asked)], records=True, surprise=gone)
    for slot, (i, seen) in enumerate(zip(chosen, found, strict=True)):
        if slot not in elsewhere:
            state.seen[i] = seen
    kept = [Target.kept(retain[n], original.retain[n]) for n in next(state.retain)]
    equations.add(kept, records=False, surprise=False, weight=HELD)
    if state.around:
        around = [
            Target.kept(forget[i].held[0], original.neighbours[n])
            for i, n in (state.around[t] for t in next(state.neighbours))
        ]
        equations.add(around, records=False, surprise=False, total=TOTAL, weight=HELD)
    equations.solve(SHARE)
