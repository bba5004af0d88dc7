"""The mutable state of the training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from libortho.core.run_cache import Entry
from libortho.isolation.config import IsolateConfig
from libortho.isolation.criteria import Criteria
from libortho.isolation.original import Original
from libortho.selection.curvature import KroneckerPreconditioner
from libortho.text.encoding import Encoded
from libortho.training.optimiser import PreconditionedAdam

RELATIVE_STEP, RELATIVE_TO = 0.08, 12
"""Peak step of Adam as a share of the root mean square of the values that it moves, and records in a step for which it
is right."""
RECORDS_PER_STEP, RETAIN_TOKENS_PER_STEP = 12, 256
"""Forget records, and retain tokens, in one optimiser step."""


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
    """Mutable training state; saved and restored for resuming."""

    def __init__(
        self,
        values: Sequence[nn.Parameter],
        records: int,
        texts: Sequence[Encoded],
        config: IsolateConfig,
        metrics: Sequence[KroneckerPreconditioner | None],
    ) -> None:
        # The values stand at the original weights here, which say how large a step is.
        share = step_share(min(records, RECORDS_PER_STEP))
        rates = [config.learning_rate or share * RELATIVE_STEP * _root_mean_square(v) for v in values]
        self.optimiser = PreconditionedAdam(values, rates, metrics, config.decay)
        self.rng = random.Random(config.seed)
        self.records = Epochs(records, RECORDS_PER_STEP, self.rng)
        self.texts = Epochs(len(texts), _texts_per_step(texts), self.rng)
        self.step, self.last = 0, config.max_steps
        self.finished = False
        self.checks: list[Criteria] = []
        self.profiles: tuple[Tensor, ...] = ()
        self.expected: tuple[Tensor, ...] = ()
        self.target_offset, self.residual = torch.zeros(3), torch.zeros(3)

    def targets(self, original: Original) -> tuple[Tensor, Tensor]:
        """Surprise that each record should have, and its deviation, with the controls as they are now; (records,)."""
        if not self.profiles:
            return original.target, original.spread
        now = torch.stack([p[:, 0].mean() for p in self.profiles])
        wider = float(now.std() / original.target.std().clamp_min(1e-6)) if len(now) > 2 else 1.0
        return now, original.spread * max(1.0, wider)

    def part(self) -> Entry:
        """The present state."""
        tensors = {"target_offset": self.target_offset, "residual": self.residual}
        tensors |= {f"profiles.{i}": p for i, p in enumerate(self.profiles)}
        tensors |= {f"expected.{i}": e for i, e in enumerate(self.expected)}
        tensors |= self.optimiser.tensors()
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

    def take_up(self, part: Entry) -> None:
        """Restore the state that ``part`` holds."""

        def listed(name: str) -> tuple[Tensor, ...]:
            count = sum(n.startswith(f"{name}.") for n in part.tensors)
            return tuple(part.tensors[f"{name}.{i}"] for i in range(count))

        self.profiles, self.expected = listed("profiles"), listed("expected")
        self.target_offset, self.residual = part.tensors["target_offset"], part.tensors["residual"]
        self.optimiser.load(part.tensors)
        data = part.data
        self.step, self.last, self.finished = data["step"], data["last"], data["finished"]
        self.checks = [Criteria(**c) for c in data["checks"]]
        self.records.pool, self.texts.pool = data["records"], data["texts"]
        version, words, gauss = data["rng"]
        self.rng.setstate((version, tuple(words), gauss))


def step_share(records: int) -> float:
    """Share of the peak step that suits so few records in a step: Adam's step scales with the square root of the batch
    (arXiv 2205.10287).
    """
    return min(1.0, records / RELATIVE_TO) ** 0.5


def _root_mean_square(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt().clamp_min(1e-8))


def _texts_per_step(texts: Sequence[Encoded]) -> int:
    """As many retain sequences as have the tokens of a step together."""
    mean = sum(len(t.ids) for t in texts) / max(1, len(texts))
    return max(1, round(RETAIN_TOKENS_PER_STEP / max(1.0, mean)))
