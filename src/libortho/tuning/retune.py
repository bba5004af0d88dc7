"""``retune``: a stream for a new version of its base, from its data or from the old model.

A stream belongs to the base that it was trained on. Where the data is at hand, it is trained again on the new base;
where only questions are, the old model answers them with the stream on, and its answers are the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.errors import ConfigError, DataError
from libortho.core.layer import ortho_layers
from libortho.core.models import unwrapped
from libortho.core.progress import Progress
from libortho.core.report import methods
from libortho.core.surgery import frozen, stream_names
from libortho.core.switch.alpha import alpha
from libortho.lm.asking import answers
from libortho.text.records import Source, load_records
from libortho.text.sources import read_rows
from libortho.tuning.config import TuneConfig
from libortho.tuning.result import TuneResult
from libortho.tuning.tune import tune

ANSWER_TOKENS = 128
"""Most tokens of an answer of the old model."""
_AT_ONCE = 16
_PENDING = "?"
"""In the place of an answer that is still to be given."""


def retune(
    model: nn.Module,
    tokenizer: Any,
    old: nn.Module,
    data: Source,
    stream: str,
    config: TuneConfig | None = None,
    *,
    old_tokenizer: Any = None,
    retain: Source | None = None,
    validation: Source | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Train a stream of an old model anew, on a new base, in place.

    Args:
        model: The new base; see :func:`~libortho.tuning.tune.tune`.
        tokenizer: Its tokenizer.
        old: A model that has the stream.
        data: Records; those without an answer (a prompt alone, or a chat that ends with a question) are answered by the
            old model, greedily, with the stream and those that it is over on, and all others off; of what it says after
            a plain prompt the first line is taken.
        stream: Name of the stream, in both.
        config: By default, what the stream of the old model was trained with.
        old_tokenizer: That of the old model; by default ``tokenizer``.
        retain: As in ``tune``.
        validation: As in ``tune``.
        resume: As in ``tune``.
        progress: As in ``tune``.

    Returns:
        As ``tune`` does.

    Raises:
        ConfigError: if the old model has no such stream, or ``config`` is not given and the stream was not tuned.
        DataError: if a row is no record and no question, or the old model gives an empty answer.
    """
    check_model(model)
    check_model(old)
    check_tokenizer(tokenizer)
    config = _earlier_config(old, stream) if config is None else config
    rows = answered_rows(unwrapped(old), old_tokenizer or tokenizer, read_rows(data, "data"), stream)
    return tune(
        model, tokenizer, rows, stream, config,
        retain=retain, validation=validation, resume=resume, progress=progress,
    )  # fmt: skip


def _earlier_config(old: nn.Module, stream: str) -> TuneConfig:
    method = methods(old).get(stream, {})
    if method.get("verb") != "tune":
        raise ConfigError(
            f"the stream {stream!r} was made by {method.get('verb', 'nothing that is known')}, not by tune, so that it "
            "has no settings to take over; give config"
        )
    return TuneConfig(**{n: v for n, v in method.items() if n in TuneConfig.__dataclass_fields__})


@torch.no_grad()
def answered_rows(old: nn.Module, tokenizer: Any, rows: list[Any], stream: str) -> list[Any]:
    """The rows, each that has no answer with the old model's.

    Raises:
        ConfigError: if the old model has no such stream.
        DataError: if a row is no question, or an answer is empty.
    """
    if not ortho_layers(old) or stream not in stream_names(old):
        raise ConfigError(f"the old model has no stream {stream!r}; it has {stream_names(old) or 'none'}")
    pending = {i: _with_answer(row, _PENDING, i) for i, row in enumerate(rows) if _is_question(row)}
    found, places = list(rows), list(pending)
    needed = {stream, *methods(old).get(stream, {}).get("over", ())}
    with frozen(old, None), alpha(old, {n: float(n in needed) for n in stream_names(old)}):
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            records = load_records([pending[i] for i in some], tokenizer)
            for i, text in zip(some, answers(old, tokenizer, records, ANSWER_TOKENS), strict=True):
                if not text.strip():
                    raise DataError(f"data record {i + 1}: the old model answers nothing; give the record an answer")
                found[i] = _with_answer(rows[i], text, i)
    return found


def _is_question(row: Any) -> bool:
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list) and row["messages"]:
        last = row["messages"][-1]
        return isinstance(last, Mapping) and last.get("role") == "user"
    if isinstance(row, Mapping):
        return ("prompt" in row or "question" in row) and not {"completion", "answer"} & row.keys()
    return isinstance(row, str)


def _with_answer(row: Any, text: str, place: int) -> Any:
    if isinstance(row, str):
        row = {"prompt": row}
    if "messages" in row:
        return {**row, "messages": [*row["messages"], {"role": "assistant", "content": text.strip()}]}
    if "question" in row:
        return {**row, "answer": text.strip()}
    if not isinstance(row["prompt"], str):
        raise DataError(f"data record {place + 1}: 'prompt' is a {type(row['prompt']).__name__}; expected a string")
    line = text.strip().splitlines()[0]  # nothing else ends an answer to plain text
    return {**row, "completion": line if row["prompt"][-1:].isspace() else f" {line}"}
