"""What callers choose. Frozen, validated when built, free of behaviour.

Errors: every class raises :class:`~libortho.core.errors.ConfigError` when a field is outside its domain.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from libortho.core.errors import ConfigError

Structure = Literal["unstructured", "columns"]
Score = Literal["absolute", "relative", "magnitude"]
Objective = Literal["profile", "log_odds", "npo", "simnpo", "altpo", "grad_diff"]
ValueDtype = Literal["bfloat16", "float16", "float32"]
TargetModules = str | tuple[str, ...] | list[str]

MLP_OUT = "mlp-out"
ALL_LINEAR = "all-linear"
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_stream_name(name: str) -> str:
    """Return ``name`` if it can serve as a module name and a directory name; raise ConfigError otherwise."""
    if not isinstance(name, str) or not _STREAM_NAME.fullmatch(name):
        raise ConfigError(f"stream name {name!r}: expected 1-64 letters, digits, '-' or '_', beginning with no sign")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"stream name {name!r} is taken by torch's module containers; choose another")
    return name


@dataclass(frozen=True, kw_only=True)
class _StreamConfig:
    """Fields that ``split`` and ``isolate`` share."""

    target_modules: TargetModules = MLP_OUT
    """Suffixes of dotted module paths, ``re:`` full matches, or the reserved ``"mlp-out"`` and ``"all-linear"``."""
    bits: Literal[8, 4] | None = 8
    """Integer width of the base stream; None keeps it dense, in the model's dtype."""
    group_size: int | None = None
    """Inputs per scale. None: one scale per output channel for INT8, 32 for INT4. -1: per output channel."""
    value_dtype: ValueDtype = "bfloat16"
    """Storage of the ortho values; rounding happens when the stream is built, not when it is saved."""
    stream: str = "default"
    """Name of the ortho stream."""

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        targets = self.target_modules
        if not isinstance(targets, str | tuple) or not all(isinstance(t, str) for t in targets):
            raise ConfigError(f"target_modules is {targets!r}; expected a name, a list of names, or 're:<pattern>'")
        if not targets:
            raise ConfigError("target_modules is empty; name at least one module")
        _one_of("bits", self.bits, (8, 4, None))
        size = self.group_size
        if size is not None and size != -1 and (not isinstance(size, int) or size < 1 or size % 2):
            raise ConfigError(f"group_size is {size!r}; expected an even number of inputs, -1 (per channel) or None")
        _one_of("value_dtype", self.value_dtype, tuple(DTYPES))
        check_stream_name(self.stream)

    @property
    def resolved_group_size(self) -> int:
        """Inputs per scale, with -1 for one scale per output channel."""
        if self.group_size is not None:
            return self.group_size
        return 32 if self.bits == 4 else -1

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SplitConfig(_StreamConfig):
    """How ``split`` divides a weight into base and ortho, knowing nothing but the weight."""

    ratio: float = 0.005
    """Budget of the ortho stream, as a fraction of the weights of the layers that are split. In (0, 1]."""
    rank_ratio: float | Literal["auto"] = 0.95
    """Share of the singular directions that the base keeps; "auto" keeps the fewest within ``error_budget``."""
    use_low_rank: bool = True
    """False quantises the weight itself."""
    max_low_rank_error: float = 0.20
    """A layer whose truncation loses more than this (relative Frobenius) is quantised directly instead."""
    error_budget: float = 0.05
    """Largest relative Frobenius truncation error that ``rank_ratio="auto"`` accepts."""
    score: Score = "absolute"
    """What ranks the entries of the residual: its size, its size relative to the weight, or the weight's size."""
    structure: Structure = "unstructured"
    """Free entries, or whole input columns."""
    keep_tail: bool = True
    """Keep the discarded singular directions in the ortho stream, as factors."""
    seed: int = 0
    """Seed of the randomised SVD, which serves small kept ranks when ``keep_tail=False``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("ratio", self.ratio)
        if self.rank_ratio != "auto":
            _fraction("rank_ratio", self.rank_ratio)
        _fraction("max_low_rank_error", self.max_low_rank_error)
        _fraction("error_budget", self.error_budget)
        _one_of("score", self.score, ("absolute", "relative", "magnitude"))
        _one_of("structure", self.structure, ("unstructured", "columns"))
        for name in ("use_low_rank", "keep_tail"):
            _flag(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class IsolateConfig(_StreamConfig):
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
        if self.ratio != "auto":
            _fraction("ratio", self.ratio)
        _one_of("structure", self.structure, ("unstructured", "columns"))
        _one_of("objective", self.objective, ("profile", "log_odds", "npo", "simnpo", "altpo", "grad_diff"))
        for name in ("max_steps", "records_per_step", "retain_tokens_per_step", "retain_length", "check_every"):
            _positive_int(name, getattr(self, name))
        for name in ("alternates_per_record", "neighbours_per_record"):
            _positive_int(name, getattr(self, name))
        for name in ("retain_budget", "layer_cap", "damping"):
            _positive(name, getattr(self, name))
        if self.learning_rate is not None:
            _positive("learning_rate", self.learning_rate)
        for name in ("retain_weight", "neighbour_weight", "gradient_weight", "decay"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"{name} is {value!r}; expected a number of at least 0")
        if self.decay >= 1:
            raise ConfigError(f"decay is {self.decay!r}; expected a share of less than 1")
        if self.max_length is not None:
            _positive_int("max_length", self.max_length)
        for name in ("compensate", "project_retain", "gradient_checkpointing", "allow_unknown"):
            _flag(name, getattr(self, name))


Profile = Literal["quick", "full"]


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How thoroughly ``audit`` looks. A field left at None takes the profile's value."""

    profile: Profile = "quick"
    """"quick" measures memory, privacy, utility and the alpha curve; "full" adds attacks and the depth score, and
    takes larger samples."""
    seed: int = 0
    """Seed of everything drawn: samples, fillings, probes, intervals."""
    samples: int = 20
    """Continuations drawn for each record at temperature 1."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Grid of the alpha curve."""
    min_k: float = 0.4
    """Share of the least likely tokens that the Min-K % scores look at."""
    reveal: bool = False
    """Print secrets in the report. By default all but their first two characters are masked wherever they appear."""
    probe_records: int | None = None
    """Forget records that are probed by samples, other prompts and fillings (32, full 100); a random choice beyond."""
    fillings: int | None = None
    """Other completions of the same shape that a secret is ranked among, for its exposure (32, full 64)."""
    general_sequences: int | None = None
    """Windows of 256 tokens of general text (12, full 32)."""
    task_rows: int | None = None
    """Rows of each task (60, full 150)."""
    attack_records: int | None = None
    """Forget records under attack (full 64); a random choice beyond."""
    depth_records: int | None = None
    """Forget records whose hidden states are patched (full 32); a random choice beyond."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    max_length: int | None = None
    """Longest record in tokens; None takes the model's context."""

    def __post_init__(self) -> None:
        _one_of("profile", self.profile, ("quick", "full"))
        for name in ("samples", "max_new_tokens"):
            _positive_int(name, getattr(self, name))
        for name in ("probe_records", "fillings", "general_sequences", "task_rows", "attack_records", "depth_records",
                     "max_length"):  # fmt: skip
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))
        _fraction("min_k", self.min_k)
        object.__setattr__(self, "alphas", tuple(self.alphas))
        if not self.alphas or not all(_is_number(a) and 0 <= a <= 2 for a in self.alphas):
            raise ConfigError(f"alphas is {self.alphas!r}; expected numbers in [0, 2]")
        _flag("reveal", self.reveal)

    def resolved(self, name: str) -> int:
        """A sample size: the field's value, or the profile's."""
        value = getattr(self, name)
        return value if value is not None else _SAMPLE_SIZES[name][self.profile]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, sample sizes resolved."""
        return {**asdict(self), **{n: self.resolved(n) for n in _SAMPLE_SIZES}}


_SAMPLE_SIZES = {
    "probe_records": {"quick": 32, "full": 100},
    "fillings": {"quick": 32, "full": 64},
    "general_sequences": {"quick": 12, "full": 32},
    "task_rows": {"quick": 60, "full": 150},
    "attack_records": {"quick": 32, "full": 64},
    "depth_records": {"quick": 16, "full": 32},
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} is {value!r}; expected a number in (0, 1]")


def _positive(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; expected a positive number")


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected True or False")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
