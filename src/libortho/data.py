"""Records in, batches out.

Conventions that people already use, in a list, a ``datasets.Dataset``, or a JSONL, JSON or text file:

    {"prompt": ..., "completion": ...}      loss on the completion
    {"messages": [{"role", "content"}]}     chat template applied; loss on the last message
    {"question": ..., "answer": ...}        loss on the answer; chat template applied where the tokenizer has one
    {"text": ...}                           loss on the whole text

A text file holds one text per line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from libortho.errors import DataError

logger = logging.getLogger(__name__)

IGNORE = -100
_SHAPES = ("prompt+completion", "messages", "question+answer", "text")


@dataclass(frozen=True)
class Record:
    """One record: what is given, and what is judged.

    Attributes:
        prompt: Context; carries no loss. Empty for plain text.
        completion: What must be known or forgotten.
        number: Position in the source, from 1, for messages to the user.
    """

    prompt: str
    completion: str
    number: int = 0

    @property
    def text(self) -> str:
        """Prompt and completion together."""
        return self.prompt + self.completion


Source = str | Path | Iterable[Mapping[str, Any] | Record]
"""Records: a list of dicts, a ``datasets.Dataset``, or a path to JSONL, JSON or txt."""


def load_records(source: Source, tokenizer: Any = None, *, name: str = "data") -> list[Record]:
    """Read and check records.

    Args:
        source: See the module's text.
        tokenizer: Needed for chat templates ("messages", and "question"/"answer" where a template exists).
        name: What the records are called in errors, for example "forget".

    Raises:
        DataError: if the source is missing, malformed or empty; the message gives the record's number.
    """
    rows = read_rows(source, name)
    records = [_parse(row, i, name, tokenizer) for i, row in enumerate(rows, 1)]
    if not records:
        raise DataError(f"{name} holds no record; expected at least one of the shapes {', '.join(_SHAPES)}")
    return records


def read_rows(source: Source, name: str = "data") -> list[Any]:
    """The rows of a source as they stand there, unchecked.

    Raises:
        DataError: if the source is missing or malformed.
    """
    return _read(Path(source), name) if isinstance(source, str | Path) else _iterate(source, name)


def _read(path: Path, name: str) -> list[Any]:
    if not path.is_file():
        raise DataError(f"{name}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror})") from error
    lines = text.split("\n")  # splitlines would also cut at U+2028 and others, which JSON strings may hold
    if path.suffix == ".txt":
        return [{"text": line} for line in lines if line.strip()]
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: {path} is not JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{name}: {path} holds a {type(rows).__name__}; expected a list of records")
        return rows
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{name}: line {number} of {path} is not JSON ({error})") from error
        return rows
    raise DataError(f"{name}: {path} ends in {path.suffix!r}; expected .jsonl, .json or .txt")


def _iterate(source: Any, name: str) -> list[Any]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"{name} is a {type(source).__name__}; expected a list of dicts, a Dataset or a path")
    return list(source)


def _parse(row: Any, number: int, name: str, tokenizer: Any) -> Record:
    where = f"{name} record {number}"
    if isinstance(row, Record):
        if not row.completion.strip():
            raise DataError(f"{where}: 'completion' is empty")
        return row if row.number else replace(row, number=number)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected a dict of shape {', '.join(_SHAPES)}")
    if "prompt" in row and "completion" in row:
        prompt, completion = _text(row, "prompt", where, empty=True), _text(row, "completion", where)
    elif "messages" in row:
        prompt, completion = _chat(row["messages"], where, tokenizer)
    elif "question" in row and "answer" in row:
        prompt, completion = _question(_text(row, "question", where), _text(row, "answer", where), tokenizer)
    elif "text" in row:
        prompt, completion = "", _text(row, "text", where)
    else:
        raise DataError(
            f"{where} has the keys {sorted(map(str, row))}; expected one of the shapes {', '.join(_SHAPES)}"
        )
    return Record(prompt, completion, number)


def _text(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}; expected a string")
    if not empty and not value.strip():
        raise DataError(f"{where}: {key!r} is empty")
    return value


def _chat(messages: Any, where: str, tokenizer: Any) -> tuple[str, str]:
    good = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list of {{'role': str, 'content': str}}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: 'messages' needs a tokenizer with a chat template; use prompt and completion")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message must be a non-empty one by the assistant (it carries the loss)")
    if len(messages) == 1:
        raise DataError(f"{where}: 'messages' has nothing before the assistant's; use text, or add the user's message")
    try:
        prompt = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses 'messages' ({error})") from error
    if not whole.startswith(prompt):
        raise DataError(f"{where}: the chat template does not continue its own prompt; use prompt and completion")
    return prompt, whole[len(prompt) :]


def _question(question: str, answer: str, tokenizer: Any) -> tuple[str, str]:
    if getattr(tokenizer, "chat_template", None) is None:
        return f"Question: {question}\nAnswer:", f" {answer}"
    user = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True), answer


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record; labels are -100 where there is no loss."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def completion(self) -> tuple[int, ...]:
        """Ids that carry loss."""
        return tuple(i for i in self.labels if i != IGNORE)


def adds_special_tokens(text: str, tokenizer: Any) -> bool:
    """False if a chat template has already written the beginning-of-text token, which must not come twice."""
    start = getattr(tokenizer, "bos_token", None)
    return not (start and text.startswith(start))


def encode(record: Record, tokenizer: Any, max_length: int | None = None, *, name: str = "data") -> Encoded:
    """Tokenise prompt and completion as one text and mask the prompt.

    A token that straddles the border belongs to the completion, as it does when the model reads the text. A record
    longer than ``max_length`` loses the end of its completion, with a warning that names it.

    Raises:
        DataError: if nothing of the completion is left to judge.
    """
    special = adds_special_tokens(record.text, tokenizer)
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(record.text, return_offsets_mapping=True, add_special_tokens=special)
        ids, border = encoding["input_ids"], len(record.prompt)
        # Special tokens have offsets (0, 0). Some tokenizers trim blanks from offsets: a blank token then ends early.
        labels = [
            i if max(start, end) > border else IGNORE
            for i, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
    else:
        ids = tokenizer(record.text, add_special_tokens=special)["input_ids"]
        given = tokenizer(record.prompt, add_special_tokens=special)["input_ids"]
        common = next(
            (n for n, (a, b) in enumerate(zip(ids, given, strict=False)) if a != b), min(len(ids), len(given))
        )
        labels = [IGNORE] * common + ids[common:]
    if max_length is not None and len(ids) > max_length:
        logger.warning(
            "%s record %d has %d tokens, the limit is %d; its end is cut off", name, record.number, len(ids), max_length
        )
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels[1:]):
        raise DataError(
            f"{name} record {record.number}: no token of the completion can be judged (the prompt fills the limit of "
            f"{max_length} tokens, or the text is a single token)"
        )
    return Encoded(tuple(ids), tuple(labels))


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors, each (sequences, tokens); labels are -100 where there is no loss."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(items: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """Pad to the longest; the value of ``pad_id`` does not matter, padding is masked."""
    length = max(len(e.ids) for e in items)
    ids = torch.full((len(items), length), pad_id)
    labels = torch.full((len(items), length), IGNORE)
    mask = torch.zeros((len(items), length), dtype=torch.long)
    for row, item in enumerate(items):
        size = len(item.ids)
        ids[row, :size] = torch.tensor(item.ids)
        labels[row, :size] = torch.tensor(item.labels)
        mask[row, :size] = 1
    labels[:, 0] = IGNORE  # nothing predicts the first token
    return Batch(ids, mask, labels)
