"""The settings of ``isolate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.core.config import StreamConfig, flag, fraction, positive, positive_int, whole
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
    max_steps: int = 60
    """Upper bound on steps; training ends earlier when the criteria hold."""
    damping: float = 0.001
    """Share of the mean curvature of retain text that is added to every direction's. The smaller it is, the more steps
    avoid what such text would notice; far above 1, all directions are alike."""
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
        for name in ("gradient_checkpointing", "allow_unknown"):
            flag(name, getattr(self, name))
