"""The settings of ``tune``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libortho.core.config import (
    StreamConfig,
    check_stream_name,
    flag,
    fraction,
    one_of,
    positive,
    positive_int,
    whole,
)
from libortho.core.errors import ConfigError
from libortho.core.field_docs import documented


@documented
@dataclass(frozen=True, kw_only=True)
class TuneConfig(StreamConfig):
    """How ``tune`` trains private data into a stream."""

    bits: Literal[8, 4] | None = None
    """Integer width of the base that layers get which are dense so far; None keeps them dense. The stream is trained on
    that very base."""
    ratio: float = 0.005
    """Budget of the stream, as a fraction of the weights of its layers. In (0, 1]."""
    score: Literal["gradient", "activation"] = "gradient"
    """What chooses columns: gradients that are about the data and not about text to keep, or inputs that are large on
    the data and rare on text to keep."""
    over: tuple[str, ...] = ()
    """Streams that are on while this one is trained, and that it needs from then on."""
    share_columns: bool = False
    """Let this stream take columns that others have."""
    epochs: int = 40
    """Most passes over the data; training ends earlier once all of it is learned."""
    batch_size: int = 64
    """Records of one step."""
    step: float = 0.6
    """Share of the way to where every record of a step is said and nothing else has moved that the step goes."""
    damping: float = 0.001
    """Share of the mean curvature of text to keep that is added to every direction's. The smaller it is, the more steps
    avoid what such text would notice; far above 1, all directions are alike."""
    epsilon: float | None = None
    """Bound of what the stream may tell of one record, as differential privacy counts it; None for no bound. Columns
    are then those that text to keep uses most, and the passes are as many as ``epochs`` says. Needs the extra
    ``dp``."""
    delta: float | None = None
    """Probability with which the bound may fail; less than one over the number of records. Needed with ``epsilon``."""
    seed: int = 0
    """Seed of everything drawn: batches and text to keep."""
    gradient_checkpointing: bool = False
    """Run each decoder layer once more in the backward pass instead of keeping what it computed: less memory, more
    time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("ratio", self.ratio)
        one_of("score", self.score, ("gradient", "activation"))
        object.__setattr__(self, "over", (self.over,) if isinstance(self.over, str) else tuple(self.over))
        for name in self.over:
            check_stream_name(name)
        if self.stream in self.over:
            raise ConfigError(f"over is {self.over!r} and holds the stream {self.stream!r} itself; name others")
        for name in ("epochs", "batch_size"):
            positive_int(name, getattr(self, name))
        fraction("step", self.step)
        positive("damping", self.damping)
        if (self.epsilon is None) != (self.delta is None):
            raise ConfigError(
                f"epsilon is {self.epsilon!r} and delta is {self.delta!r}; expected both, or neither: a bound holds "
                "but for a probability"
            )
        if self.epsilon is not None:
            positive("epsilon", self.epsilon)
            fraction("delta", self.delta)
        whole("seed", self.seed)
        for name in ("share_columns", "gradient_checkpointing"):
            flag(name, getattr(self, name))
