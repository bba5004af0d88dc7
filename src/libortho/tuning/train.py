"""Training a stream: steps that make every record said and leave other text alone, until all of them are.

Only the stream's values move. The base is its own teacher: what it says on text to keep is read once, before.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from libortho.core.progress import Progress, tell
from libortho.core.run_cache import Entry, RunCache
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import score
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded
from libortho.training.gauss_newton import DAMPING, GaussNewton
from libortho.training.system import HELD
from libortho.training.turns import Turns
from libortho.tuning.config import TuneConfig
from libortho.tuning.equations import Look, TuneEquations
from libortho.tuning.layers import TunedLinear

logger = logging.getLogger(__name__)

KEPT_TOKENS = 256
"""Tokens of text to keep of one step."""
STOP_LOSS = 0.1
"""Mean loss of the records, in nats per token, below which training ends if every one is said."""
SHORTER, LONGER, MOST_DAMPING = 4.0, 2.0, 100.0
"""Factors by which damping rises where records became less likely, and falls where they did not, and its bound
(Levenberg-Marquardt; Nocedal and Wright, Numerical Optimization, 10.3)."""
PULL = 0.01
"""What of the damping weighs the whole way from the base, in a step that sees all records; of one that sees a part of
them the same part, for such a step takes back what others need."""
BESIDE, FEWEST_BESIDE, ASIDE = 0.25, 4, 1.0
"""Texts about others of one step: a share of its records, and at least so many; and their weight beside records."""
VALIDATED_EVERY, PATIENCE = 4, 3
"""Passes over the data from one look at the validation records to the next, and looks without a better recall after
which training ends."""


@dataclass(frozen=True)
class Context:
    """Which other streams are on, and what the model says of texts to keep then.

    Attributes:
        enter: Turns these streams on for a block.
        taught: (tokens, width) states with which the model reads each text, without the new stream.
    """

    enter: Callable[[], AbstractContextManager[Any]]
    taught: Sequence[Tensor]


@dataclass
class State:
    """What a training is at: everything that a resumed one needs beside the values.

    Attributes:
        step: Steps taken.
        damping: Of the next step; see :data:`~libortho.training.gauss_newton.DAMPING`.
        looks: Each record as it was seen last, in each context in turn.
        best: Best recall of the validation records so far; -1 before the first.
        waited: Looks at them since.
        stopped: Why training ended; empty while it goes on.
    """

    step: int = 0
    damping: float = DAMPING
    looks: dict[int, Look] = field(default_factory=dict)
    best: float = -1.0
    waited: int = 0
    stopped: str = ""

    @property
    def loss(self) -> float:
        """Mean loss of the records, in nats per token; infinite before any was seen."""
        return sum(s.loss for s in self.looks.values()) / len(self.looks) if self.looks else math.inf


class Training:
    """Values, what moves them, and the state.

    Args:
        lm: The model, with the layers in place.
        layers: Those that have columns.
        data: The records.
        retain: Texts to keep.
        beside: Texts about others than the data's, which the base must go on to answer; none if there are none.
        contexts: Where the stream must work, the first of which training ends and begins in.
        metrics: The curvature of text to keep, by layer.
        config: How it is trained.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layers: Mapping[str, TunedLinear],
        data: Sequence[Encoded],
        retain: Sequence[Encoded],
        beside: Sequence[Encoded],
        contexts: Sequence[Context],
        metrics: Mapping[str, KroneckerPreconditioner],
        config: TuneConfig,
    ) -> None:
        self.lm, self.layers, self.data, self.contexts = lm, layers, data, contexts
        self.texts = [*retain, *beside]
        self.config, self.state = config, State()
        self.optimiser = GaussNewton({n: m.values for n, m in layers.items()}, metrics)
        self.rng = random.Random(config.seed)
        self.records = Turns(len(data), config.batch_size, self.rng)
        size = sum(len(t.ids) for t in retain) / len(retain)
        self.kept = Turns(len(retain), max(1, round(KEPT_TOKENS / size)), self.rng)
        size = max(FEWEST_BESIDE, round(BESIDE * self.records.size))
        self.beside = Turns(len(beside), size, self.rng) if beside else None
        self.chosen: list[int] = []
        self.best: dict[str, Tensor] = {}
        self.sound: dict[str, Tensor] = {}

    @property
    def steps_each(self) -> int:
        """Steps of one pass over the data, in every context."""
        return len(self.contexts) * math.ceil(len(self.data) / self.records.size)

    @property
    def most_steps(self) -> int:
        """Steps of all passes."""
        return self.config.epochs * self.steps_each

    def advance(self, recall: Callable[[], float] | None) -> None:
        """Look at the next records, and take a step unless that ends the training."""
        with self.contexts[self.state.step % len(self.contexts)].enter():
            self._advance(recall)

    def _advance(self, recall: Callable[[], float] | None) -> None:
        state, number = self.state, self.state.step % len(self.contexts)
        equations = TuneEquations(self.lm, self.layers, {n: m.index for n, m in self.layers.items()}, self.optimiser)
        records = next(self.records) if number == 0 else self.chosen
        self.chosen, chosen = records, [number * len(self.data) + i for i in records]
        found = equations.records([self.data[i] for i in records])
        if not all(math.isfinite(s.loss) for s in found):
            self.fall_back()
            return
        if all(i in state.looks for i in chosen):
            rose = sum(s.loss - state.looks[i].loss for i, s in zip(chosen, found, strict=True)) > 0
            state.damping = min(MOST_DAMPING, state.damping * SHORTER) if rose else max(DAMPING, state.damping / LONGER)
        state.looks |= dict(zip(chosen, found, strict=True))
        said = sum(s.said for s in state.looks.values())
        wanted = len(self.data) * len(self.contexts)
        logger.info("step %d: loss %.3f, %d of %d said", state.step, state.loss, said, wanted)
        if recall is not None and state.step and state.step % (VALIDATED_EVERY * self.steps_each) == 0:
            self.validate(recall())
        elif recall is None and said == wanted and state.loss < STOP_LOSS and self._all_said():
            state.stopped = "learned"
        if state.stopped:
            return
        for texts, weight in self.next_kept():
            taught = self.contexts[number].taught
            equations.kept([self.texts[i] for i in texts], [taught[i] for i in texts], weight)
        self.sound = self._copies()
        equations.solve(self.config.step, state.damping, PULL * len(records) / len(self.data))
        state.step += 1
        if state.step >= self.most_steps:
            state.stopped = "epochs"
            if not self.finite():
                self.fall_back()
            elif recall is not None:
                self.validate(recall())

    def fall_back(self) -> None:
        """End the training with the best values, or the last at which the loss was a finite number."""
        self._restore(self.best or self.sound)
        self.state.stopped = "the loss is no finite number any more; the last values at which it was are kept"

    def finite(self) -> bool:
        """True if the model as it is gives every record a finite loss, in the first context."""
        with self.contexts[0].enter():
            return bool(score(self.lm, self.data)[0].nll.isfinite().all())

    def _all_said(self) -> bool:
        """True if every record is said as the model is now; what was seen of some may be some steps old."""
        if self.steps_each == 1:
            return True
        for context in self.contexts:
            with context.enter():
                if not bool(score(self.lm, self.data)[1].all()):
                    return False
        return True

    def next_kept(self) -> list[tuple[list[int], float]]:
        """Places of the texts whose turn it is, and their weight: texts to keep, and texts about others."""
        found = [(next(self.kept), HELD)]
        if self.beside is not None:
            found.append(([self.kept.count + i for i in next(self.beside)], ASIDE))
        return found

    def validate(self, recall: float) -> None:
        """Remember the best values; stop if all records are recalled, or no more than some looks ago."""
        state = self.state
        logger.info("step %d: %.0f %% of the validation records are said", state.step, 100 * recall)
        state.waited = 0 if recall > state.best else state.waited + 1
        if recall > state.best:
            state.best, self.best = recall, self._copies()
        if recall == 1.0 or state.waited >= PATIENCE or state.stopped:
            self._restore(self.best)
            state.stopped = state.stopped or "validation"

    def _copies(self) -> dict[str, Tensor]:
        return {n: v.clone() for n, v in self.optimiser.values.items()}

    @torch.no_grad()
    def _restore(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.optimiser.values[name].copy_(value)

    def entry(self) -> Entry:
        """All of it, to be stored."""
        kinds = {"values": self.optimiser.values, "best": self.best, "sound": self.sound}
        tensors = {f"{kind}.{n}": v for kind, of in kinds.items() for n, v in of.items()}
        looks = [(i, s.loss, s.said) for i, s in self.state.looks.items()]
        turns = [self.records.pool, self.kept.pool, [] if self.beside is None else self.beside.pool]
        return Entry(
            tensors,
            {**vars(self.state), "looks": looks, "turns": turns, "chosen": self.chosen, "rng": self.rng.getstate()},
        )

    def take_up(self, entry: Entry) -> None:
        """Restore what ``entry`` stored."""

        def stored(kind: str) -> dict[str, Tensor]:
            device = self.lm.device
            named = ((n, f"{kind}.{n}") for n in self.layers)
            return {n: entry.tensors[key].to(device) for n, key in named if key in entry.tensors}

        self._restore(stored("values"))
        self.best, self.sound = stored("best"), stored("sound")
        data = dict(entry.data)
        self.records.pool, self.kept.pool, beside = data.pop("turns")
        if self.beside is not None:
            self.beside.pool = beside
        self.chosen = data.pop("chosen")
        version, words, gauss = data.pop("rng")
        self.rng.setstate((version, tuple(words), gauss))
        self.state = State(**{**data, "looks": {i: Look(loss, said) for i, loss, said in data["looks"]}})


def train(training: Training, recall: Callable[[], float] | None, store: RunCache, progress: Progress | None) -> State:
    """Train until all is learned, validation gets no better, or the passes are over.

    Args:
        training: What is trained.
        recall: Share of the validation records that the model says, (0 to 1); None without such records.
        store: Where the state is kept, after every step.
        progress: Called with ("steps", done, most).
    """
    if (kept := store.get("tuning")) is not None:
        training.take_up(kept)
    while not training.state.stopped:
        training.advance(recall)
        store.put("tuning", training.entry())
        step = training.state.step
        tell(progress, "steps", step, step if training.state.stopped else training.most_steps)
    return training.state
