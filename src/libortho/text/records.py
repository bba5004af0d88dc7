"""Records in, batches out.

Conventions that people already use, in a list, a ``datasets.Dataset``, or a JSONL, JSON, CSV or text file:

    {"prompt": ..., "completion": ...}      both texts, or both lists of messages
    {"messages": [{"role", "content"}]}     chat template applied; "tools" and "chat_template_kwargs" reach it
    {"question": ..., "answer": ...}        chat template applied where the tokenizer has one
    {"text": ...}                           the whole text is judged

What is judged is the answer as a person would read it: the completion, the content of a chat's *last* message, the
answer, the text. What a template or a tokenizer adds (ends of turns, an empty thinking block, special tokens) is
context, and so are all earlier messages, the assistant's too: a secret in each of two answers takes two records.

Rows may also have "alternates" (other completions of the same shape) and "neighbours" (other prompts, or the last
question of other chats): lists of texts, in a CSV cell JSON or texts with ``|`` between them. A text file holds one
text per line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from libortho.core.errors import DataError
from libortho.text import chat, sources
from libortho.text.tokens import template_tokens

logger = logging.getLogger(__name__)

_SHAPES = ("prompt+completion", "messages", "question+answer", "text")
_WRITTEN_MARK = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_(?:turn|text|role)>|</?think>|</s>|<<?/?SYS>>?|\[/?INST\]|"
    r"\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|^###? (?:Instruction|Input|Response|Question)s?:|"
    r"^(?:USER|ASSISTANT|SYSTEM|Human|Assistant|User|System):",
    re.MULTILINE,
)
"""Marks of well-known templates, for texts that somebody rendered for a tokenizer to which they are no tokens."""
_ROLE_LINE = re.compile(r"\s*(system|developer|user|assistant|model|tool|human)\b\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """One record: what is given, and what is judged.

    Attributes:
        prompt: Context; carries no loss. Empty for plain text.
        completion: What must be known or forgotten, as a person reads it.
        number: Position in the source, from 1, for messages to the user.
        closing: What a chat template writes after the completion.
        asked: The prompt that ``generate`` is given, where some template does not open an answer as in ``prompt``.
        spans: Ranges of characters of ``prompt`` that people wrote; None means all of it.
        rendered: A chat template wrote prompt and closing, special tokens included.
        alternates: Other completions of the same shape, given by the user.
        neighbours: Other prompts of the same shape, given by the user.
    """

    prompt: str
    completion: str
    number: int = 0
    closing: str = ""
    asked: str | None = None
    spans: tuple[chat.Span, ...] | None = None
    rendered: bool = False
    alternates: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Prompt, completion and closing together."""
        return self.prompt + self.completion + self.closing

    @property
    def question(self) -> str:
        """The prompt that ``generate`` is given."""
        return self.prompt if self.asked is None else self.asked

    @property
    def opening(self) -> str:
        """What a template writes between the question and the answer, blanks aside; mostly nothing."""
        more = self.prompt.removeprefix(self.question)
        return more.strip() if more != self.prompt else ""

    @property
    def thinks(self) -> bool:
        """True if the template has a place for thoughts before the answer."""
        return "<think>" in self.opening or self.question.rstrip().endswith("<think>")

    def answered(self, completion: str) -> Record:
        """The same prompt with another completion."""
        return replace(self, completion=completion, alternates=(), neighbours=())

    def beside(self, prompt: str, completion: str) -> Record:
        """Another prompt of the same form with this completion."""
        return replace(self, prompt=prompt, completion=completion, asked=None, spans=None, alternates=(), neighbours=())


Source = sources.Source
"""Records: a list of dicts, a ``datasets.Dataset``, or a path to JSONL, JSON, CSV or txt."""


def load_records(source: Source, tokenizer: Any = None, *, name: str = "data") -> list[Record]:
    """Read and check records.

    Args:
        source: See the module's text.
        tokenizer: Needed for chat templates ("messages", and "question"/"answer" where a template exists).
        name: What the records are called in errors, for example "forget".

    Raises:
        DataError: if the source is missing, malformed or empty; the message gives the record's number.
    """
    rows = sources.read_rows(source, name)
    records = [_parse(row, i, name, tokenizer) for i, row in enumerate(rows, 1)]
    if name == "forget" and (several := sum(map(_answers_before, rows))):
        logger.warning(
            "%d forget records hold earlier answers of the assistant: these are context, and only the last message is "
            "judged; a secret in an earlier answer takes a record of its own",
            several,
        )
    if not records:
        raise DataError(f"{name} holds no record; expected at least one of the shapes {', '.join(_SHAPES)}")
    return records


def _parse(row: Any, number: int, name: str, tokenizer: Any) -> Record:
    where = f"{name} record {number}"
    if isinstance(row, Record):
        if not row.completion.strip():
            raise DataError(f"{where}: 'completion' is empty")
        return row if row.number else replace(row, number=number)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; expected a dict of shape {', '.join(_SHAPES)}")
    given, row = row, {k: v for k, v in row.items() if v is not None}  # a Dataset has every column in every row
    messages = _messages(row, where, tokenizer)
    if messages is not None:
        record = _chat(row, messages, where, tokenizer)
    elif "prompt" in row and "completion" in row:
        record = _plain(_text(row, "prompt", where, empty=True), _text(row, "completion", where), tokenizer, where)
    elif "question" in row and "answer" in row:
        question, answer = _text(row, "question", where), _text(row, "answer", where)
        record = Record(f"Question: {question}\nAnswer:", f" {answer}")
    elif "text" in row:
        record = _plain("", _text(row, "text", where), tokenizer, where)
    else:
        empty = sorted(str(k) for k in given if k not in row)
        without = f" (and {empty} without a value)" if empty else ""
        raise DataError(
            f"{where} has the keys {sorted(map(str, row))}{without}; expected one of the shapes "
            f"{', '.join(_SHAPES)}, or patterns that make records of other columns: --prompt and --completion "
            "(libortho.read_records in Python)"
        )
    alternates, neighbours = _counterfactuals(row, record, messages, where, tokenizer)
    return replace(record, number=number, alternates=alternates, neighbours=neighbours)


def _messages(row: Mapping[str, Any], where: str, tokenizer: Any) -> Any:
    """The row as a chat, or None if it is not one."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    if "prompt" in row and "completion" in row:
        return None
    if "messages" in row:
        return row["messages"]
    if "question" in row and "answer" in row and chat.has_template(tokenizer):
        return [
            {"role": "user", "content": _text(row, "question", where)},
            {"role": "assistant", "content": _text(row, "answer", where)},
        ]
    return None


def _answers_before(row: Any) -> bool:
    """True if a chat has an answer before its last message."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    return isinstance(messages, Sequence) and any(
        isinstance(m, Mapping) and m.get("role") == "assistant" for m in messages[:-1]
    )


def _chat(row: Mapping[str, Any], messages: Any, where: str, tokenizer: Any) -> Record:
    found = chat.render(messages, tokenizer, where, row.get("tools"), row.get("chat_template_kwargs"))
    return Record(
        found.prompt,
        found.answer,
        closing=found.closing,
        asked=None if found.asked == found.prompt else found.asked,
        spans=found.spans or written_spans(found.prompt, tokenizer),
        rendered=True,
    )


def _plain(prompt: str, completion: str, tokenizer: Any, where: str) -> Record:
    """A record of texts; marks around the completion, which a template wrote elsewhere, are not part of it."""
    mark = _marks(prompt + completion, tokenizer)
    if mark is None:
        return Record(prompt, completion)
    opening = re.match(rf"(\s*(?:{mark}))+\s*", completion) if prompt else None
    closing = re.search(rf"\s*(?:(?:{mark})\s*)+$", completion)
    start = max(opening.end() if opening else 0, chat.thought(completion) if prompt else 0)
    end = closing.start() if closing else len(completion)
    if not completion[start:end].strip():
        raise DataError(f"{where}: the completion holds nothing but marks of a template")
    inner = Record(prompt + completion[:start], completion[start:end], closing=completion[end:])
    return replace(
        inner,
        asked=prompt if start else None,
        spans=_between(inner.prompt, mark),
    )


def written_spans(text: str, tokenizer: Any) -> tuple[chat.Span, ...]:
    """Ranges of characters of a text that are no marks of a template: all of it where there are none."""
    mark = _marks(text, tokenizer)
    return ((0, len(text)),) if mark is None else _between(text, mark)


def _marks(text: str, tokenizer: Any) -> str | None:
    """A pattern of the marks of a template in a text, tokens or written out; None where there is none."""
    tokens = [] if tokenizer is None else [re.escape(m) for m in template_tokens(tokenizer) if m in text]
    written = {re.escape(m.group()) for m in _WRITTEN_MARK.finditer(text)}
    found = sorted({*tokens, *written}, key=len, reverse=True)
    return "|".join(found) or None


def _between(text: str, mark: str) -> tuple[chat.Span, ...]:
    """What stands between the marks of a template, without the name of a role that begins it."""
    ends = [0, *(i for m in re.finditer(mark, text) for i in m.span()), len(text)]
    spans = []
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        role = _ROLE_LINE.match(text, start, end) if start else None
        first = role.end() if role else start
        if text[first:end].strip():
            spans.append((first, end))
    return tuple(spans)


def _counterfactuals(
    row: Mapping[str, Any], record: Record, messages: Any, where: str, tokenizer: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Alternates and neighbours that the row brings, in the form of the record."""
    alternates, neighbours = (_texts(row, key, where) for key in ("alternates", "neighbours"))
    lead = record.completion[: len(record.completion) - len(record.completion.lstrip())]
    alternates = tuple(a if a[:1].isspace() else lead + a for a in alternates)
    if messages is not None:
        prompts = []
        for text in neighbours:
            other = chat.replaced_question(messages, text)
            prompts.append(_chat(row, other, where, tokenizer).prompt)
        neighbours = tuple(prompts)
    elif "question" in row and "answer" in row and "prompt" not in row:
        neighbours = tuple(f"Question: {n}\nAnswer:" for n in neighbours)
    if any(a.strip() == record.completion.strip() for a in alternates):
        raise DataError(f"{where}: 'alternates' holds the answer itself; give other answers only")
    if record.prompt in neighbours:
        raise DataError(f"{where}: 'neighbours' holds the record's own prompt; give other prompts only")
    return alternates, neighbours


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    given = row.get(key)
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(t, str) for t in given):
        raise DataError(f"{where}: {key!r} is {given!r}; expected a list of texts")
    texts = tuple(t for t in given if t.strip())
    for text in texts:
        chat.encodable(text, f"{where}: {key!r}")
    return texts


def _text(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}; expected a string")
    if not empty and not value.strip():
        raise DataError(f"{where}: {key!r} is empty")
    chat.encodable(value, f"{where}: {key!r}")
    return value


def with_field(row: Any, name: str, texts: list[str]) -> Any:
    """A row, or a finished record, with these alternates or neighbours."""
    if not isinstance(row, Record):
        return {**row, name: texts} if isinstance(row, Mapping) else row
    if name == "neighbours" and row.spans:
        start, end = row.spans[-1]
        texts = [row.prompt[:start] + t + row.prompt[end:] for t in texts]
    return replace(row, neighbours=tuple(texts)) if name == "neighbours" else replace(row, alternates=tuple(texts))
