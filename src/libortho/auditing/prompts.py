"""Other ways to ask for the same secret: longer prefixes, other formats, other words, all made by rule.

    prefix sweep    the first share of the completion is given, the rest is judged   (after Carlini et al. 2023,
                    "Quantifying memorization across neural language models", section 3: longer prefixes extract more)
    format shift    the prompt as a question, in a chat, in a dialogue, in a list, quoted, in lower case
    paraphrase      fixed words before it, a statement turned into a question, or the user's own paraphrases

A secret that was only hidden from its own prompt shows here. ``mask`` hides a secret in text that people will read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from libortho.core.errors import ConfigError, DataError
from libortho.text.chat import has_template, replaced_question
from libortho.text.records import Record, load_records

HIDDEN = "•"
_LEAST_LEFT = 4
"""Letters and digits of a completion that must be left to judge when its beginning is given."""
_SHOWN = 2
"""Letters and digits that are shown at the beginning of each hidden run."""
_SHARED = 4
"""Characters in a row that a text must share with a secret before they are hidden."""
_QUESTION = re.compile(r"Question:\s*(?P<inner>.*\S)\s*\nAnswer:\s*", re.DOTALL)
_STATEMENT = re.compile(
    r"(?P<subject>(?:[Tt]he|[Mm]y|[Oo]ur|[Hh]is|[Hh]er|[Tt]heir) [^.!?:;,\n]+) (?P<verb>is|are|was|were)"
)
_FUNCTION_WORDS = frozenset(
    """
    a about after all although an and any as at because before both but by during each every for from he her here his
    how if in it its my no of on one or our over please she since some that the their there these they this those to
    under until we what when where which while who why with you your
    """.split()  # noqa: SIM905
)


# ---- prefixes ----


def prefixes(record: Record, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> dict[float, Record]:
    """The record with the first part of its completion moved to the prompt, by the share that is given.

    Cuts are at characters, not at tokens; blanks before a cut stay with the rest, where tokenizers want them. A share
    is left out if fewer than four letters and digits would remain, or if the cut gives nothing new.

    Args:
        record: A forget record.
        shares: Fractions of the completion's characters.

    Raises:
        ConfigError: if a share is not between 0 and 1.
    """
    bad = [s for s in shares if not 0 < s < 1]
    if bad:
        raise ConfigError(f"a share of the completion to give is {bad[0]}; expected between 0 and 1, both excluded")
    answer = record.completion.rstrip()
    start = len(answer) - len(answer.lstrip())
    found: dict[float, Record] = {}
    last = start
    for share in sorted(shares):
        cut = len(answer[: math.ceil(share * len(answer))].rstrip())
        if cut > last and sum(c.isalnum() for c in answer[cut:]) >= _LEAST_LEFT:
            given = replace(record, prompt=record.prompt + answer[:cut], completion=record.completion[cut:], asked=None)
            found[share] = given
            last = cut
    return found


# ---- variants ----


def variants(record: Record, tokenizer: Any) -> dict[str, Record]:
    """The record asked for in other formats and words, by name; deterministic, and none equal to the original.

    Which there are depends on the prompt (a plain beginning, "Question: ... Answer:", a chat) and on whether the
    tokenizer has a chat template. In a chat it is the user's last message that is reworded, or taken out of the chat.
    The answer stays the same but for its leading space, which each format needs its own way, and what closes a turn,
    which plain text does not have. A record without prompt has no variants.
    """
    if not record.prompt.strip():
        return {}
    before, inner, after, asks = _taken_apart(record)
    answer = record.completion.strip()
    in_chat = asks and _QUESTION.fullmatch(record.prompt) is None
    text = inner.strip()
    plain = f" {answer}"
    made: dict[str, Record] = {}

    def bare(name: str, prompt: str) -> None:
        made[name] = Record(prompt, plain, record.number)

    def reworded(name: str, prompt: str) -> None:
        made[name] = replace(record, prompt=before + prompt + after, asked=None, spans=None)

    if not asks:
        bare("question", f"Question: Complete the sentence. {text}\nAnswer:")
    elif in_chat:
        bare("question", f"Question: {text}\nAnswer:")
    if not in_chat and (chat := _as_chat(text if asks else f"Complete the sentence: {text}", answer, tokenizer)):
        made["chat"] = replace(chat, number=record.number)
    if asks:
        bare("unwrapped", text)
        bare("dialogue", f"Q: {text}\nA:")
    reworded("lowercase", inner.lower())
    reworded("preamble", f"{'Please answer this' if asks else 'For the record'}: {inner}")
    reworded("quoted", f'"{text}"' if asks else f'"{inner}')
    reworded("list", f"- {inner}")
    if asks:
        reworded("reminder", f"You told me this before. {inner}")
    else:
        reworded("reminder", f"As you know, {_continued(inner)}")
    statement = None if asks else _STATEMENT.fullmatch(text)
    if statement:
        subject = _continued(statement["subject"])
        bare("inverted", f"Question: What {statement['verb']} {subject}?\nAnswer:")
    seen = {record.prompt}
    found: dict[str, Record] = {}
    for name, other in made.items():
        if other.prompt not in seen:
            seen.add(other.prompt)
            found[name] = replace(other, alternates=(), neighbours=())
    return found


def user_variants(row: Mapping[str, Any], tokenizer: Any, number: int = 0) -> dict[str, Record]:
    """Paraphrases that the user's row brings along, by name; empty where it brings none.

    A row of question and answer, or of messages, may have "paraphrased_question" (TOFU's key; of a chat the user's
    last message), one of prompt and completion "paraphrased_prompt": a string, or a list of strings.

    Raises:
        DataError: if a paraphrase is not a non-empty string, or its row has no answer or completion.
    """
    found: dict[str, Record] = {}
    for key, base, wanted in (
        ("paraphrased_question", "question", "answer"),
        ("paraphrased_prompt", "prompt", "completion"),
    ):
        given = row.get(key)
        if given is None:
            continue
        texts = [given] if isinstance(given, str) else given
        good = isinstance(texts, Sequence) and texts and all(isinstance(t, str) and t.strip() for t in texts)
        if not good:
            raise DataError(f"forget record {number}: {key!r} is {given!r}; expected a string or a list of strings")
        in_chat = base == "question" and "messages" in row
        if wanted not in row and not in_chat:
            raise DataError(f"forget record {number} has {key!r} but no {wanted!r}; expected both")
        for text in texts:
            if in_chat:
                kept = {k: row[k] for k in ("tools", "chat_template_kwargs") if k in row}
                other = {**kept, "messages": replaced_question(row["messages"], text)}
            else:
                other = {base: text, wanted: row[wanted]}
            record = load_records([other], tokenizer, name="forget")[0]
            if text != row.get(base):
                name = f"paraphrase {len(found) + 1}" if len(texts) > 1 else "paraphrase"
                found[name] = replace(record, number=number)
    return found


def _taken_apart(record: Record) -> tuple[str, str, str, bool]:
    """Prompt as (before, inner, after, whether the inner is a question put in a frame)."""
    prompt = record.prompt
    if record.spans:
        start, end = record.spans[-1]
        return prompt[:start], prompt[start:end], prompt[end:], True
    match = _QUESTION.fullmatch(prompt)
    if match:
        return prompt[: match.start("inner")], match["inner"], prompt[match.end("inner") :], True
    return "", prompt, "", False


def _as_chat(question: str, answer: str, tokenizer: Any) -> Record | None:
    """The question asked in a chat; None where the tokenizer has no template, or one that refuses such a chat."""
    if not has_template(tokenizer):
        return None
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return load_records([{"messages": messages}], tokenizer)[0]
    except DataError:
        return None


def _continued(text: str) -> str:
    """The text as it stands within a sentence: its first letter small if a function word begins it (a name may not)."""
    match = re.match(r"[A-Z][a-z]*\b", text)
    return text[0].lower() + text[1:] if match and match.group().lower() in _FUNCTION_WORDS else text


# ---- what people may read ----


def mask(text: str, secret: str) -> str:
    """The text with the secret hidden: how much of it leaks can be seen, what it is cannot.

    Wherever the text shares four or more characters in a row with the secret, whatever their case, letters and digits
    after the first two, or after half of the secret's if that is less, become "•"; separators stay. A secret of
    fewer than four characters is looked for as a whole word.

    Args:
        text: Anything that will be printed.
        secret: What must not be read; blanks around it do not count.
    """
    wanted = [c.casefold() for c in secret.strip()]  # one entry a character: folding a whole text may change its length
    if not wanted:
        return text
    keep = min(_SHOWN, sum(c.isalnum() for c in secret) // 2)
    size = min(_SHARED, len(wanted))
    windows = {tuple(wanted[i : i + size]) for i in range(len(wanted) - size + 1)}
    folded = [c.casefold() for c in text]
    covered = [False] * len(text)
    for i in range(len(text) - size + 1):
        if tuple(folded[i : i + size]) in windows and (size == _SHARED or _is_word(text, i, i + size)):
            covered[i : i + size] = [True] * size
    out, shown = [], 0
    for character, inside in zip(text, covered, strict=True):
        shown = shown + character.isalnum() if inside else 0
        out.append(HIDDEN if inside and character.isalnum() and shown > keep else character)
    return "".join(out)


def _is_word(text: str, start: int, end: int) -> bool:
    return not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())
