"""The settings of ``isolate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.core.config import StreamConfig, flag, fraction, is_number, positive, positive_int, whole
from libortho.core.errors import ConfigError
from libortho.core.field_docs import documented


@documented
@dataclass(frozen=True, kw_only=True)
class IsolateConfig(StreamConfig):
    """How ``isolate`` finds, moves and checks a memory."""

    ratio: float | Literal["auto"] = 0.005
    """Budget of the ortho stream, as a fraction of the weights of the layers that are split. In (0, 1]; "auto" tries
    0.05, 0.1, 0.25 and 0.5 % in turn, and takes the first at which every criterion holds."""
    seed: int = 0
    """Seed of everything drawn: alternates, neighbours, batches."""
    max_steps: int = 120
    """Upper bound on optimiser steps; training ends earlier when the criteria hold."""
    learning_rate: float | None = None
    """Peak Adam step on the fp32 values of the support, in units of the weights; None takes 8 % of the root mean square
    of each layer's own values, and less for fewer than 12 records in a step."""
    damping: float = 0.01
    """Share of the mean curvature of retain text that is added to every direction's. The smaller it is, the more steps
    avoid what such text would notice; far above 1, all directions are alike."""
    decay: float = 0.01
    """Share of the edit that a step at the peak rate takes back, so that what no record asks for fades. 0 suits
    requests that need all that the budget can hold, as hundreds of long sentences do."""
    retain_weight: float = 1.0
    """Weight of the KL divergence to the original model on retain text."""
    allow_unknown: bool = False
    """Go on where the model knows none of the records, so that there is nothing to forget; by default that is an
    error."""
    gradient_checkpointing: bool = False
    """Run each decoder layer once more in the backward pass instead of keeping what it computed: less memory, more
    time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("seed", self.seed)
        if self.ratio != "auto":
            fraction("ratio", self.ratio)
        positive_int("max_steps", self.max_steps)
        positive("damping", self.damping)
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate)
        for name in ("retain_weight", "decay"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of at least 0")
        if self.decay >= 1:
            raise ConfigError(f"decay is {self.decay!r}; expected a share of less than 1")
        for name in ("gradient_checkpointing", "allow_unknown"):
            flag(name, getattr(self, name))
