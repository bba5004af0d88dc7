"""What a request may hold: the fields of OpenAI's API that are served, and ``alpha``. Any other field is refused.

A field that is refused is named, so that nobody believes that it had an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_MESSAGES, MOST_STOPS, MOST_ANSWERS, MOST_LOGPROBS = 1024, 4, 16, 20
"""OpenAI's limits, but for the messages and for the answers (128)."""
MOST_CONTRASTED, USUALLY_CONTRASTED = 256, 64
"""Tokens of each side of a contrast, and how many are said where a request leaves it open."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Text(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Text]

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(_Strict):
    """What a streamed answer has beside its text."""

    include_usage: bool = False


class Asked(_Strict):
    """Fields that all requests have, and what they have in common."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @field_validator("temperature", "top_p", "presence_penalty", "frequency_penalty", mode="before", check_fields=False)
    @classmethod
    def _number(cls, value: Any) -> Any:
        """Whole numbers are numbers."""
        return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10 else value

    @property
    def turns(self) -> list[Message] | None:
        """The turns of a chat."""
        return None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All texts that are to be continued, where there is no chat."""
        return []

    @property
    def alphas(self) -> Mapping[str, Any]:
        """By the name of its field, every alpha under which the prompts are to be answered."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """Answers to each prompt under each alpha."""
        return 1

    @property
    def most(self) -> int | None:
        """The most tokens of an answer."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """Share of the probability from which tokens are drawn."""
        return 1.0

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return ()

    @property
    def told(self) -> int | None:
        """Likeliest tokens that are told with each; None where no probabilities are wanted."""
        return 0


class _Request(Asked):
    """Fields that both kinds of OpenAI's requests have."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    alpha: dict[str, Any] | None = None

    @property
    def alphas(self) -> Mapping[str, Any]:
        """The one alpha of the request."""
        return {"alpha": self.alpha}

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def share(self) -> float:
        """Share of the probability from which tokens are drawn."""
        return 1.0 if self.top_p is None else self.top_p

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_wanted(self) -> bool:
        """True if the last event of a stream is to count tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def turns(self) -> list[Message] | None:
        """The turns of the chat."""
        return self.messages

    @property
    def most(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def told(self) -> int | None:
        """Likeliest tokens that are told with each; None where no probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MOST_ANSWERS)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None

    @property
    def most(self) -> int | None:
        """The most tokens of an answer; OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def told(self) -> int | None:
        """Likeliest tokens that are told with each; None where no probabilities are wanted."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them."""
        found: Any = self.prompt
        single = isinstance(found, str) or isinstance(found[0], int)
        return [found] if single else list(found)


class ContrastRequest(Asked):
    """``POST /v1/contrast``: one prompt, answered under two alphas."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    prompt: str | None = None
    alpha_a: dict[str, Any] = Field(default_factory=dict)
    alpha_b: dict[str, Any] = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1, le=MOST_CONTRASTED)] = USUALLY_CONTRASTED

    @model_validator(mode="after")
    def _one(self) -> ContrastRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("expected either messages or prompt")
        return self

    @property
    def turns(self) -> list[Message] | None:
        """The turns of a chat."""
        return self.messages

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The text that is to be continued, where there is no chat."""
        return [] if self.prompt is None else [self.prompt]

    @property
    def alphas(self) -> Mapping[str, Any]:
        """Those of both sides."""
        return {"alpha_a": self.alpha_a, "alpha_b": self.alpha_b}

    @property
    def most(self) -> int | None:
        """The most tokens of each side."""
        return self.max_tokens
