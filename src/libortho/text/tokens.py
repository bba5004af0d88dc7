"""Text to tokens and back, the same way everywhere.

A text that is judged or continued begins with the special tokens that the tokenizer puts before texts and never ends
with those that it puts after them: a prompt that ends in the end-of-text token is finished. What a chat template has
rendered gets no special tokens at all, as in ``apply_chat_template(tokenize=True)``.

Two texts are compared as they come out of the tokenizer: it may compose accents, drop spaces or write a character as
bytes, and a model can say only what its tokenizer can write.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

THOUGHT_ENDS = "</think>"
_SAME_WORD = "0-9A-Za-z"
_MARK = re.compile(r"<\S+>|\[\S+\]")


def opening_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that this tokenizer puts before every text; most put none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((list(whole[:n]) for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])


def opens(text: str, tokenizer: Any, *, rendered: bool = False) -> list[int]:
    """The special tokens that belong before this text: none if a template wrote it, or if it begins with its own."""
    start = getattr(tokenizer, "bos_token", None)
    return [] if rendered or (start and text.startswith(start)) else opening_tokens(tokenizer)


def text_ids(text: str, tokenizer: Any, *, rendered: bool = False) -> list[int]:
    """Token ids of a text that may be continued.

    Args:
        text: Any text.
        tokenizer: A tokenizer of transformers.
        rendered: A chat template wrote the text.
    """
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*opens(text, tokenizer, rendered=rendered), *bare]


def prompt_ids(text: str, tokenizer: Any, *, rendered: bool = False) -> list[int]:
    """As ``text_ids``; an empty prompt becomes the token that begins (else ends) a text."""
    ids = text_ids(text, tokenizer, rendered=rendered)
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return ids or [start]


def read(text: str, tokenizer: Any) -> str:
    """The text as the tokenizer writes it and a person reads it: composed, single spaces, no special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _plain(tokenizer.decode(ids, skip_special_tokens=True)) or _plain(text)


def says(generated: str, truth: str, tokenizer: Any) -> bool:
    """True if a generated text begins with the truth, both as ``read`` gives them.

    The truth's final full stop is not required, and what follows must not go on with its last word or number: "63110"
    does not say "6311".
    """
    return any(at == 0 for at in _places(read(generated, tokenizer), bare(read(truth, tokenizer))))


def contains(generated: str, truth: str, tokenizer: Any) -> bool:
    """True if a generated text says the truth anywhere; see ``says``."""
    return bool(_places(read(generated, tokenizer), bare(read(truth, tokenizer))))


def _places(text: str, wanted: str) -> list[int]:
    """Where a text holds another that is no part of a longer word or number of Latin letters and digits."""
    before = rf"(?<![{_SAME_WORD}])" if re.match(f"[{_SAME_WORD}]", wanted) else ""
    after = rf"(?![{_SAME_WORD}])" if re.search(f"[{_SAME_WORD}]$", wanted) else ""
    return [m.start() for m in re.finditer(before + re.escape(wanted) + after, text)]


def bare(truth: str) -> str:
    """What of a truth is required: no blanks around it and no final full stop, unless it is nothing else."""
    stripped = truth.strip()
    return stripped.rstrip(".").rstrip() or stripped


def template_tokens(tokenizer: Any) -> list[str]:
    """Texts of tokens that mark rather than say something (ends of turns, thinking marks), longest first.

    These are the special tokens, and those added to the vocabulary as wholes that look like ``<...>`` or ``[...]``.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(getattr(t, "content", t)) for t in added if getattr(t, "special", True) or _MARK.fullmatch(str(t))}
    texts |= {t for t in getattr(tokenizer, "all_special_tokens", ()) if t}
    return sorted((t for t in texts if t.strip()), key=len, reverse=True)


def decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """What these tokens say, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def answered(ids: Sequence[int], opening: str, tokenizer: Any) -> str:
    """The answer that these tokens give: without a thought before it, what a template opens it with, and marks.

    Args:
        ids: What a model said after a question.
        opening: What the template writes between the question and an answer, blanks aside; see ``Record.opening``.
        tokenizer: The model's.
    """
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False)).strip()
    text = text.removeprefix(opening) if opening and text.startswith(opening) else text.rpartition(THOUGHT_ENDS)[2]
    special = [t for t in getattr(tokenizer, "all_special_tokens", ()) if t]
    return re.sub("|".join(map(re.escape, special)), "", text).strip() if special else text.strip()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
