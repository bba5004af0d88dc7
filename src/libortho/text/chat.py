"""A chat as its template writes it, taken apart into what people wrote and what the template added.

    <|im_start|>user\\nPIN of Ada Lum?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n6311<|im_end|>\\n
    \\_______ prompt: all before the answer _____________________________________________/\\__/\\_ closing _/
                     \\_____________/ span: a person wrote it                            answer

The answer is the content of the last message, as the template renders it. Where templates open an answer (an empty
thinking block), the opening belongs to the prompt. ``asked`` is the prompt that ``apply_chat_template`` with
``add_generation_prompt=True`` gives to ``generate``; some templates write less there, or more, than before an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libortho.core.errors import DataError

Span = tuple[int, int]
_LISTED = re.compile(r"[\"']type[\"']")
"""What a template writes that takes a list of parts for text."""
_NAMED = re.compile(r"\d|(?<=[^\W_] )[^\W\d_a-z][^\W\d_A-Z]")
"""A digit, or a capitalised word within a sentence."""
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """One chat, rendered.

    Attributes:
        prompt: Everything before the answer.
        answer: The content of the last message, with the spaces that the template puts before it.
        closing: What the template writes after the answer.
        asked: The prompt for ``generate``.
        spans: Ranges of characters of ``prompt`` that hold the contents of messages; the system's only where nobody is
            named in the others.
    """

    prompt: str
    answer: str
    closing: str
    asked: str
    spans: tuple[Span, ...]


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer can render chats."""
    return getattr(tokenizer, "chat_template", None) is not None


def render(messages: Any, tokenizer: Any, where: str, tools: Any = None, options: Any = None) -> Rendered:
    """Render a chat whose last message is the assistant's answer.

    Args:
        messages: Dicts of "role" and "content"; contents are strings or lists of text parts. Messages before the last
            may have tool calls instead.
        tokenizer: A tokenizer with a chat template.
        where: What the record is called in errors, for example "forget record 3".
        tools: Schemas for the template: a list, or JSON text.
        options: Further variables of the template, as ``chat_template_kwargs`` in TRL.

    Raises:
        DataError: if the messages are malformed, there is no template, or it refuses or changes them.
    """
    cleaned = _checked(messages, where)
    if not has_template(tokenizer):
        raise DataError(f"{where}: 'messages' needs a tokenizer with a chat template; use prompt and completion")
    variables = {**_options(options, where), **({} if tools is None else {"tools": _tools(tools, where)})}
    cleaned, whole = _rendered(tokenizer, cleaned, where, variables)
    spans = _spans(tokenizer, cleaned, whole, where, variables) or _searched(cleaned, whole, where)
    *given, (start, end) = spans
    start += thought(whole[start:end])
    while start and whole[start - 1] in " \t":  # tokenizers write a blank together with the word after it
        start -= 1
    asked = _apply(tokenizer, cleaned[:-1], where, add_generation_prompt=True, **variables)
    written = _written(cleaned[:-1], given)
    return Rendered(whole[:start], whole[start:end], whole[end:], asked, written)


def _rendered(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, variables: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """The chat as the template writes it, and the messages as it takes them: lists of parts, or else one text each."""
    plain = [{**m, "content": "".join(_texts(m["content"]))} if m["content"] is not None else m for m in messages]
    if plain == messages:
        return plain, _apply(tokenizer, plain, where, **variables)
    try:
        whole = _apply(tokenizer, messages, where, **variables)
    except DataError:
        whole = ""
    taken = whole and all(t.strip() in whole for m in messages for t in _texts(m["content"]))
    if taken and not _LISTED.search(whole):
        return messages, whole
    return plain, _apply(tokenizer, plain, where, **variables)


def _texts(content: Any) -> list[str]:
    """The text parts of a content."""
    return [] if content is None else [content] if isinstance(content, str) else [p["text"] for p in content]


def question(text: str, tokenizer: Any, where: str) -> str:
    """The prompt for ``generate`` of a chat with this one question.

    Raises:
        DataError: if the template refuses it.
    """
    return _apply(tokenizer, [{"role": "user", "content": text}], where, add_generation_prompt=True)


def thought(text: str) -> int:
    """Characters that a thinking block at the beginning of an answer takes, with the blanks around it."""
    match = _THOUGHT.match(text)
    return match.end() if match else 0


def replaced_question(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The same chat with ``text`` as its last message by the user."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    return [{**m, "content": text} if i == last else dict(m) for i, m in enumerate(messages)]


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    good = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not good or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise DataError(f"{where}: 'messages' must be a non-empty list of {{'role': str, 'content': str}}")
    cleaned = [_message(m, n, where) for n, m in enumerate(messages, 1)]
    last = cleaned[-1]
    if last.get("tool_calls"):
        raise DataError(
            f"{where}: the last message calls a tool, and what is in a call is not judged; end the record with the "
            "assistant's text, or pass the rendered text as prompt and completion"
        )
    if last["role"] != "assistant" or not "".join(_texts(last["content"])).strip():
        raise DataError(f"{where}: the last message must be a non-empty one by the assistant (it carries the loss)")
    if len(cleaned) == 1:
        raise DataError(f"{where}: 'messages' has nothing before the assistant's; use text, or add the user's message")
    return cleaned


def _message(message: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """One message, its content a text or a list of text parts; what has no value, as a Dataset adds, is left out."""
    message = _valued(message)
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": None}
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [p if isinstance(p, str) else _part(p) for p in content]
        if any(p is None for p in parts):
            raise DataError(f"{where}: message {number} has a part that is not text; only text can be judged")
        content = [{"type": "text", "text": p} for p in parts]
    elif not isinstance(content, str):
        raise DataError(
            f"{where}: the content of message {number} is a {type(content).__name__}; 'messages' must be a list of "
            "{'role': str, 'content': str or a list of text parts}"
        )
    for text in _texts(content):
        encodable(text, f"{where}: message {number}")
    return {**message, "content": content}


def _valued(value: Any) -> Any:
    """The same without keys that have no value, at any depth."""
    if isinstance(value, Mapping):
        return {k: _valued(v) for k, v in value.items() if v is not None}
    return [_valued(v) for v in value] if isinstance(value, list) else value


def _part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    return text if isinstance(text, str) else None


def encodable(text: str, what: str) -> None:
    """Refuse text that is not Unicode.

    Raises:
        DataError: if it holds half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half a surrogate pair at character {error.start + 1}, which is no text; mend the record"
        ) from error


def _tools(tools: Any, where: str) -> Any:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: 'tools' is a string, but not JSON ({error})") from error
    if not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"{where}: 'tools' is a {type(tools).__name__}; expected a list of tool schemas")
    return list(tools)


def _options(options: Any, where: str) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise DataError(f"{where}: 'chat_template_kwargs' is a {type(options).__name__}; expected a dict")
    reserved = {"tokenize", "add_generation_prompt", "return_dict", "return_tensors", "continue_final_message"}
    if taken := sorted(reserved & set(options)):
        raise DataError(f"{where}: 'chat_template_kwargs' sets {taken[0]!r}, which is set here; leave it out")
    return {str(k): v for k, v in options.items() if v is not None}


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, **variables: Any) -> str:
    try:
        text = str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **variables))
    except Exception as error:  # a template is somebody else's code: whatever it raises, it refuses
        raise DataError(f"{where}: the chat template refuses 'messages' ({type(error).__name__}: {error})") from error
    encodable(text, f"{where}: what the chat template writes")
    return text


def _spans(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], whole: str, where: str, variables: Mapping[str, Any]
) -> list[Span] | None:
    """Where each content stands in the rendered chat, in the order of the messages; None if that cannot be told.

    The chat is rendered once more with a mark in place of each content: what stands between the marks is the
    template's. A template that writes other things around marks than around contents gives None.
    """
    stem = "qcontent"
    if any(isinstance(m["content"], list) for m in messages):
        return None
    while any(stem in (m["content"] or "") for m in messages) or stem in whole:
        stem += "q"
    marks = {f"{stem}{i}z": i for i, m in enumerate(messages) if (m["content"] or "").strip()}
    mark_of = {i: mark for mark, i in marks.items()}
    thoughts = [m["content"][: thought(m["content"] or "")] if m["content"] else "" for m in messages]
    marked = [
        {**m, "content": thoughts[i] + mark_of[i] if i in mark_of else m["content"]} for i, m in enumerate(messages)
    ]
    try:
        pieces = re.split(f"({stem}[0-9]+z)", _apply(tokenizer, marked, where, **variables))
    except DataError:
        return None
    order = [marks.get(p) for p in pieces[1::2]]
    if len(set(order)) != len(order) or None in order or (len(messages) - 1) not in order:
        return None
    pattern = re.escape(pieces[0])
    for number, literal in zip(order, pieces[2::2], strict=True):
        assert number is not None
        content = messages[number]["content"][len(thoughts[number]) :]
        forms = dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n")))
        pattern += f"({'|'.join(map(re.escape, forms))}){re.escape(literal)}"
    match = re.fullmatch(pattern, whole)
    if match is None or order[-1] != len(messages) - 1:
        return None
    found = {number: match.span(group) for group, number in enumerate(order, 1)}
    return [found.get(i, (0, 0)) for i in range(len(messages))]


def _searched(messages: Sequence[Mapping[str, Any]], whole: str, where: str) -> list[Span]:
    """The same by searching for each content in turn, where a template treats contents in a way of its own."""
    spans: list[Span] = []
    begin = 0
    for message in messages[:-1]:
        span = (0, 0)
        for text in map(str.strip, _texts(message["content"])):
            at = whole.find(text, begin) if text else -1
            if at >= 0:
                begin = at + len(text)
                span = (span[0] if span[1] else at, begin)
        spans.append(span)
    answer = "".join(_texts(messages[-1]["content"]))
    for text in dict.fromkeys((answer, answer.strip(), answer[thought(answer) :].strip())):
        at = whole.rfind(text, begin) if text else -1
        if at >= 0:
            return [*spans, (at, at + len(text))]
    raise DataError(f"{where}: the chat template changes or drops the last message; use prompt and completion")


def _written(messages: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> tuple[Span, ...]:
    """Ranges that hold contents, in the order of the text; the system's only where nobody is named in the others."""
    pairs = [(m, s) for m, s in zip(messages, spans, strict=True) if s[1] > s[0]]
    chosen = [(m, s) for m, s in pairs if m["role"] not in ("system", "developer")]
    if not any(_NAMED.search(t) for m, _ in chosen for t in _texts(m["content"])):
        chosen = pairs
    return tuple(sorted(s for _, s in chosen))
