"""The settings of ``isolate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.core.config import (
    StreamConfig,
    Structure,
    flag,
    fraction,
    is_number,
    one_of,
    positive,
    positive_int,
    whole,
)
from libortho.core.errors import ConfigError
from libortho.core.field_docs import documented

Objective = Literal["profile", "log_odds", "npo", "simnpo", "altpo", "grad_diff"]


@documented
@dataclass(frozen=True, kw_only=True)
class IsolateConfig(StreamConfig):
    """How ``isolate`` finds, moves and checks a memory."""

    ratio: float | Literal["auto"] = 0.005
    """Budget of the ortho stream, as a fraction of the weights of the layers that are split. In (0, 1]; "auto" tries
    0.05, 0.1, 0.25 and 0.5 % in turn, and takes the first at which every criterion holds."""
    structure: Structure = "columns"
    """Whole input columns (a LoRA with a one-hot A: every engine can serve it), or free entries."""
    objective: Objective = "profile"
    """Loss on the forget set; see :mod:`libortho.isolation.losses`."""
    seed: int = 0
    """Seed of everything drawn: alternates, neighbours, batches."""
    max_steps: int = 120
    """Upper bound on optimiser steps; training ends earlier when the criteria hold."""
    learning_rate: float | None = None
    """Peak Adam step on the fp32 values of the support, in units of the weights; None takes 8 % of the root mean square
    of each layer's own values, and less for fewer than 12 records in a step."""
    damping: float = 0.01
    """Share of the mean curvature of text to keep that is added to every direction's. The smaller, the more steps avoid
    what such text would notice; far above 1, all directions are alike. Free entries have no such metric."""
    decay: float = 0.01
    """Share of the edit that a step at the peak rate takes back: what no record asks for again fades. 0 for requests
    that need all that the budget can hold, as hundreds of long sentences do."""
    retain_weight: float = 1.0
    """Weight of the KL divergence to the original model on retain text."""
    neighbour_weight: float = 1.0
    """Weight of the KL divergence to the original model on neighbours."""
    gradient_weight: float = 0.0
    """Weight of the difference between the norm of the loss's gradient on codes and that on strangers' codes (the
    mean of its logarithm). 5 hides half of what a test that looks at gradients sees, for 1.7 times the time and
    strangers' codes that move more (docs/isolation.md). Takes a second derivative, which the model's attention must
    have."""
    retain_budget: float = 0.02
    """Largest mean KL divergence from the original (nats per token) on held-back retain text, beyond that of the
    quantised base alone, at which the result counts as unharmed."""
    records_per_step: int = 12
    """Forget records in one optimiser step."""
    retain_tokens_per_step: int = 256
    """Retain tokens in one optimiser step."""
    retain_length: int = 128
    """Tokens of one retain sequence."""
    compensate: bool = True
    """Let the base's codes make up for each other's rounding on text to keep and on the records, as GPTQ does: the
    model at alpha = 1 is nearer to the original, in INT4 much nearer (docs/isolation.md). False takes the nearest."""
    alternates_per_record: int = 8
    """Made alternates for a record that brings none; from 50 records on fewer, 400 for all of them, but at least 2."""
    neighbours_per_record: int = 8
    """Made neighbours for a record that brings none; as many as alternates at most."""
    layer_cap: float = 4.0
    """No layer takes more than this many times its even share of the budget."""
    project_retain: bool = False
    """Drop the part of a forget step that opposes the retain gradient."""
    check_every: int = 5
    """Optimiser steps between two looks at the criteria."""
    max_length: int | None = None
    """Longest forget record in tokens; None takes the model's context."""
    allow_unknown: bool = False
    """Go on where the model knows none of the records, so that there is nothing to forget; by default that is an
    error."""
    gradient_checkpointing: bool = False
    """Run each decoder layer once more in the backward pass instead of keeping what it computed: less memory, more
    time. Not where gradients are differentiated again, which takes few tokens at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("seed", self.seed)
        if self.ratio != "auto":
            fraction("ratio", self.ratio)
        one_of("structure", self.structure, ("unstructured", "columns"))
        one_of("objective", self.objective, ("profile", "log_odds", "npo", "simnpo", "altpo", "grad_diff"))
        for name in ("max_steps", "records_per_step", "retain_tokens_per_step", "retain_length", "check_every"):
            positive_int(name, getattr(self, name))
        for name in ("alternates_per_record", "neighbours_per_record"):
            positive_int(name, getattr(self, name))
        for name in ("retain_budget", "layer_cap", "damping"):
            positive(name, getattr(self, name))
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate)
        for name in ("retain_weight", "neighbour_weight", "gradient_weight", "decay"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of at least 0")
        if self.decay >= 1:
            raise ConfigError(f"decay is {self.decay!r}; expected a share of less than 1")
        if self.max_length is not None:
            positive_int("max_length", self.max_length)
        for name in ("compensate", "project_retain", "gradient_checkpointing", "allow_unknown"):
            flag(name, getattr(self, name))
