"""What people write as tokens, and how the tokens of an answer are drawn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from libortho.serving.engine import Sampling
from libortho.serving.errors import invalid
from libortho.serving.schemas import Asked

COLD = 1e-4
"""Temperature below which the likeliest token is taken: logits over it would overflow."""


class Prompts:
    """Makes tokens of prompts.

    Args:
        tokenizer: The model's.
        vocabulary: Rows of its embedding; a larger id is no token.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()  # tokenizers share their state

    def read(self, asked: Asked) -> list[list[int]]:
        """The prompts of a request.

        Raises:
            ApiError: 400 if the model has no chat template or it refuses the turns, or a token does not exist.
        """
        field = "prompt" if asked.turns is None else "messages"
        with self._lock:
            if asked.turns is not None:
                found = [self._chat([{"role": m.role, "content": m.text} for m in asked.turns])]
            else:
                found = [p if isinstance(p, list) else self._tokenizer(p)["input_ids"] for p in asked.prompts]
        for ids in found:
            if not ids:
                raise invalid(field, "a prompt is empty")
            if max(ids) >= self._vocabulary:
                raise invalid(field, f"token {max(ids)} does not exist; the model has {self._vocabulary}")
        return found

    def _chat(self, turns: Sequence[dict[str, str]]) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise invalid(
                "messages", "the model has no chat template; send a prompt instead of messages (/v1/completions)"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise invalid("messages", f"the model's chat template refuses these turns: {error}") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        with self._lock:
            return str(self._tokenizer.decode(ids))

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        with self._lock:
            return list(self._tokenizer(text)["input_ids"])


def sampling_of(asked: Asked, prompt: Sequence[int], place: int, context: int | None, most: int) -> Sampling:
    """How the tokens of the answer in this place are drawn.

    Raises:
        ApiError: 400 if prompt and answer do not fit the context, or the answer may be longer than the server allows.
    """
    left = most if context is None else context - len(prompt)
    if left < 1:
        raise invalid(None, f"the prompt has {len(prompt)} tokens and the model reads {context}",
                      "context_length_exceeded")  # fmt: skip
    wanted = asked.most
    if wanted is not None and wanted > most:
        raise invalid("max_tokens", f"max_tokens is {wanted}; this server gives at most {most}")
    if wanted is not None and wanted > left:
        raise invalid("max_tokens", f"the prompt has {len(prompt)} tokens and max_tokens is {wanted}; the model reads "
                      f"{context} in all", "context_length_exceeded")  # fmt: skip
    return Sampling(
        max_tokens=min(left, most) if wanted is None else wanted,
        temperature=1.0 if asked.temperature is None else asked.temperature if asked.temperature >= COLD else 0.0,
        top_p=asked.share,
        seed=None if asked.seed is None else asked.seed + place,
        stop=asked.stops,
        logprobs=asked.told,
    )
