"""The settings of ``audit``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from libortho.core.config import flag, fraction, is_number, one_of, positive_int, whole
from libortho.core.errors import ConfigError
from libortho.core.field_docs import documented

Profile = Literal["quick", "full"]


@documented
@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How thoroughly ``audit`` looks. A field left at None takes the profile's value."""

    profile: Profile = "quick"
    """"quick" measures memory, privacy, utility and the alpha curve; "full" adds attacks, the depth score and the same
    edit at other columns, and takes larger samples."""
    seed: int = 0
    """Seed of everything drawn: samples, fillings, probes, intervals."""
    samples: int = 20
    """Continuations drawn for each record at temperature 1."""
    alphas: tuple[float, ...] | None = None
    """Grid of the alpha curve (0, 0.5, 1; full also 0.25 and 0.75); empty: there is no curve."""
    min_k: float = 0.4
    """Share of the least likely tokens that the Min-K % scores look at."""
    reveal: bool = False
    """Print secrets in the report. By default all but their first two characters are masked wherever they appear."""
    probe_records: int | None = None
    """Forget records that are probed by samples, other prompts and fillings (32, full 100); a random choice beyond."""
    fillings: int | None = None
    """Other completions of the same shape that a secret is ranked among, for its exposure (10, full 64)."""
    holdout_records: int | None = None
    """Holdout records that are asked (80, full 1000); a random choice beyond."""
    general_sequences: int | None = None
    """Windows of 256 tokens of general text (6, full 32)."""
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
        whole("seed", self.seed)
        one_of("profile", self.profile, ("quick", "full"))
        for name in ("samples", "max_new_tokens"):
            positive_int(name, getattr(self, name))
        for name in (*_SAMPLE_SIZES, "max_length"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        fraction("min_k", self.min_k)
        grid = tuple(_ALPHAS[self.profile] if self.alphas is None else self.alphas)
        object.__setattr__(self, "alphas", grid)
        if not all(is_number(a) and 0 <= a <= 2 for a in grid):
            raise ConfigError(f"alphas is {self.alphas!r}; expected numbers in [0, 2]")
        flag("reveal", self.reveal)

    def resolved(self, name: str) -> int:
        """A sample size: the field's value, or the profile's."""
        value = getattr(self, name)
        return value if value is not None else _SAMPLE_SIZES[name][self.profile]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, sample sizes resolved."""
        return {**asdict(self), **{n: self.resolved(n) for n in _SAMPLE_SIZES}}


_ALPHAS = {"quick": (0.0, 0.5, 1.0), "full": (0.0, 0.25, 0.5, 0.75, 1.0)}
_SAMPLE_SIZES = {
    "probe_records": {"quick": 32, "full": 100},
    "fillings": {"quick": 10, "full": 64},
    "holdout_records": {"quick": 80, "full": 1000},
    "general_sequences": {"quick": 6, "full": 32},
    "task_rows": {"quick": 60, "full": 150},
    "attack_records": {"quick": 32, "full": 64},
    "depth_records": {"quick": 16, "full": 32},
}
