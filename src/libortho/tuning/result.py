"""What a tuning did, in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from libortho.tuning.config import TuneConfig

KEPT_BUDGET = 0.02
"""Largest mean KL(base || alpha 1) on held-back text, in nats per token, at which the rest counts as unharmed; the
verdict of ``audit`` on utility has the same limit."""
_SHOWN = 10


@dataclass(frozen=True)
class TuneResult:
    """What ``tune`` did, and which of its criteria hold.

    Attributes:
        stream: Name of the stream.
        records: Records of the data.
        recited: Numbers of those that the model says at alpha = 1, from 1.
        known: Numbers of those that the base says already: the stream does not hold them, and they stay without it.
        together: Numbers of those that it says where all other streams are on too; None without others.
        validation: Share of the validation records that is said at alpha = 1; None without any.
        missed: The criteria that do not hold, in words; empty if all do.
        advice: For each of them what to do about it.
        kept_kl: Mean KL(base || alpha 1) on held-back text, in nats per token.
        loss: Mean loss of the records as training saw each of them last, in nats per token.
        density: Entries of the stream / weights of its layers.
        columns_per_layer: Layer to the columns that it gave.
        epochs: Passes over the data.
        steps: Steps.
        seconds: Wall time of this call.
        phase_seconds: The same by phase: "texts", "base", "columns", "steps" and "result".
    """

    stream: str
    records: int
    recited: tuple[int, ...]
    known: tuple[int, ...]
    together: tuple[int, ...] | None
    validation: float | None
    missed: tuple[str, ...]
    advice: tuple[str, ...]
    kept_kl: float
    loss: float
    density: float
    columns_per_layer: Mapping[str, int]
    epochs: int
    steps: int
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def succeeded(self) -> bool:
        """True if every criterion holds."""
        return not self.missed

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; None for figures that are no finite numbers."""
        found = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in asdict(self).items()}
        return {**found, "succeeded": self.succeeded}


def missed_criteria(
    missing: Sequence[int], apart: Sequence[int], records: int, kept_kl: float, stopped: str, config: TuneConfig
) -> list[tuple[str, str]]:
    """The criteria that do not hold, and what to do about each, in words.

    Args:
        missing: Numbers of the records that are not said at alpha = 1.
        apart: Numbers of those that are said then, and not where all other streams are on too.
        records: How many there are.
        kept_kl: Mean divergence on held-back text, in nats per token.
        stopped: Why training ended.
        config: How it was trained.
    """
    found = []
    if missing:
        found.append(
            (
                f"{len(missing)} of {records} records are not said at alpha = 1 (records {_shown(missing)})",
                f"raise ratio ({config.ratio:g}) or epochs ({config.epochs}), or take these records by themselves into "
                "a stream of their own; two records that answer one prompt differently cannot both be said",
            )
        )
    if apart:
        found.append(
            (
                f"{len(apart)} of {records} records are not said where the other streams are on too (records "
                f"{_shown(apart)})",
                "raise epochs or ratio, turn on one stream at a time, or tune what must be known at once into one "
                "stream",
            )
        )
    if not kept_kl <= KEPT_BUDGET:  # nor where it is no number
        found.append(
            (
                f"other text moved by {kept_kl:.4f} nats per token at alpha = 1; the limit is {KEPT_BUDGET}",
                f"lower ratio ({config.ratio:g}) or damping ({config.damping:g}), or give retain text of your own "
                "domain",
            )
        )
    if stopped.startswith("the loss"):
        found.append((stopped, f"lower step ({config.step:g})"))
    return found


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
