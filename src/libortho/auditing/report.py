"""The audit's result: figures with intervals, controls beside them, and verdicts that follow from them by rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libortho.auditing.schema import CheckData, ReportData, VerdictData
from libortho.core.files import write_atomically


@dataclass(frozen=True)
class Check:
    """One condition of a verdict.

    Attributes:
        name: What is compared.
        value: The figure; None where there is none.
        target: What it must be, in words.
        ok: True, False, or None where the records are too few to tell.
    """

    name: str
    value: float | None
    target: str
    ok: bool | None

    def to_dict(self) -> CheckData:
        """The fields as JSON-ready values."""
        return {"name": self.name, "value": self.value, "target": self.target, "ok": self.ok}


def at_most(name: str, value: float, most: float, form: str = "", *, possibly: bool = False) -> Check:
    """A check that holds up to ``most``.

    Args:
        name: What is compared.
        value: The figure.
        most: Its bound.
        form: How the bound is written, as in a format string; by default as it is.
        possibly: The interval holds good values, so that a figure beyond the bound leaves the check undecided.
    """
    return Check(name, value, f"<= {most:{form}}", told(value <= most, possibly))


def at_least(name: str, value: float, least: float, form: str = "", *, possibly: bool = False) -> Check:
    """A check that holds from ``least`` on; see :func:`at_most`."""
    return Check(name, value, f">= {least:{form}}", told(value >= least, possibly))


def told(good: bool, possibly: bool) -> bool | None:
    """Whether a condition holds; None where it does not, but may by its interval."""
    return True if good else None if possibly else False


@dataclass(frozen=True)
class Verdict:
    """One question, answered.

    Attributes:
        key: "something_to_remove", "memory", "privacy", "utility", "attacks" or "depth".
        status: "pass", "fail", or "withheld" where it cannot be told; the text says why.
        text: One sentence with the figures.
        checks: The conditions behind it.
    """

    key: str
    status: str
    text: str
    checks: tuple[Check, ...] = ()

    def to_dict(self) -> VerdictData:
        """The fields as JSON-ready values."""
        return {
            "key": self.key, "status": self.status, "text": self.text, "checks": [c.to_dict() for c in self.checks],
        }  # fmt: skip


@dataclass(frozen=True)
class AuditReport:
    """Everything one audit found.

    Attributes:
        data: JSON-ready figures; the layout is described in ``docs/reference/audit.md``. The same model, data and seed
            give the same figures.
        verdicts: The answers, in the order of a reader's questions.
        seconds: Wall time of each part; not part of the JSON.
    """

    data: ReportData
    verdicts: tuple[Verdict, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if no verdict is "fail" and those on memory, privacy and utility are all "pass"."""
        status = {v.key: v.status for v in self.verdicts}
        return "fail" not in status.values() and all(status.get(k) == "pass" for k in ("memory", "privacy", "utility"))

    def verdict(self, key: str) -> Verdict | None:
        """The verdict on one question, if it was asked."""
        return next((v for v in self.verdicts if v.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        return dict(self.data)

    def to_json(self, path: str | Path | None = None) -> str:
        """The figures as JSON text; written to ``path`` as well if one is given."""
        text = json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_atomically(Path(path), text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The figures as one self-contained HTML page; written to ``path`` as well if one is given."""
        from libortho.auditing.page.page import render

        text = render(self.data)
        if path is not None:
            write_atomically(Path(path), text)
        return text


def json_ready(value: Any) -> Any:
    """The same structure with text for keys, lists for tuples, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
