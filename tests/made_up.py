"""Records of which only the sizes matter, and what an original model might have said of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from libortho.isolation.forget_record import ForgetRecord, Kind
from libortho.isolation.original import Original
from libortho.text.encoding import Encoded


def text(tokens: int) -> Encoded:
    """So many judged tokens after one that is not."""
    return Encoded((0, *range(tokens)), (-100, *range(tokens)))


def record(tokens: int, alternates: tuple[int, ...] = (), *, kind: Kind = "code") -> ForgetRecord:
    """A record without a prompt of anybody else."""
    return ForgetRecord(
        number=1,
        secret=text(tokens),
        alternates=tuple(text(n) for n in alternates),
        cut_alike=(),
        neighbours=(),
        held=(),
        controls=(),
        swapped_prompt=(),
        kind=kind,
        matched_tokens=(None,) * tokens,
    )


def original(records: int, **known: Any) -> Original:
    """Every record by heart, untrained ones with a spread of 1; ``known`` are fields that a test asks for."""
    none = (torch.zeros(0),) * records
    found = Original(
        nll=torch.full((records,), 0.1),
        recited=torch.ones(records, dtype=torch.bool),
        wanted=torch.full((records,), 4.0),
        spread=torch.ones(records),
        leaks=torch.zeros(records, dtype=torch.bool),
        states=none,
        expected=none,
        neighbours=(),
        level=torch.zeros(records),
        retain=(),
        held_back=(),
    )
    return replace(found, **known)
