"""Text of tokens that come one by one: whole characters only, and nothing of what an answer ends before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Tokens of one answer to text, of which no part is taken back.

    Args:
        tokenizer: The model's.
        stop: Texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._read = 0
        self._known = ""
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token; sets ``stopped`` if the answer ends here."""
        self._ids.append(token)
        text = self._decoded(self._ids[self._read :])
        if text.endswith(_UNFINISHED):  # the rest of a character follows
            return ""
        fresh = text[len(self._known) :]
        # What a token adds hangs on the one before it (blanks), on nothing earlier.
        self._read = len(self._ids) - 1
        self._known = self._decoded(self._ids[self._read :])
        return self._certain(fresh)

    def rest(self) -> str:
        """What is left when the answer ends without a stop."""
        text = self._decoded(self._ids[self._read :])[len(self._known) :]
        found = self._certain(text)
        left, self._held = self._held, ""
        return found if self.stopped else found + left

    def _certain(self, fresh: str) -> str:
        text = self._held + fresh
        found = min((i for i in (text.find(s) for s in self._stop) if i >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_begun(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
