"""The rows that a model answers at the moment, and one step of all of them.

Rows with different alphas go through one forward pass; the alpha travels with its row. Keys and values of a row are
computed for that row alone: there is no cache across requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from libortho.core.errors import TargetError
from libortho.core.switch.alpha import alpha
from libortho.core.switch.rows import RowCache
from libortho.lm.generation import cache_name, end_tokens, pad_token
from libortho.serving.engine import Piece, Row, TokenLogprob
from libortho.serving.sampling import Drawer, next_tokens, told
from libortho.serving.text import Decoder


@dataclass
class Answer:
    """A row that is being answered.

    Attributes:
        row: What was asked for.
        drawer: Draws its tokens.
        decoder: Makes text of them.
        said: Tokens so far.
    """

    row: Row
    drawer: Drawer
    decoder: Decoder
    said: list[int] = field(default_factory=list)


class Batch:
    """Rows of one model. Not for several threads.

    Args:
        model: A model with a switch.
        tokenizer: Its tokenizer.
        fixed: Alpha of streams that no row names.

    Raises:
        TargetError: if the model keeps something else from token to token than keys and values.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, fixed: Mapping[str, float] | None = None) -> None:
        self._model, self._tokenizer, self._fixed = model, tokenizer, {} if fixed is None else fixed
        self._takes = inspect.signature(model.forward).parameters
        self._cache_name = cache_name(model)
        self._ends = frozenset(end_tokens(model, tokenizer))
        self._pad = pad_token(tokenizer)
        self._device = next(model.parameters()).device
        self.answers: list[Answer] = []
        self._cache = RowCache()
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Read two tokens, and see what the model keeps of them."""
        cache, ids = DynamicCache(), torch.ones(1, 2, dtype=torch.long, device=self._device)
        try:
            with alpha(self._model, {}):
                self._model(input_ids=ids, use_cache=True, **{self._cache_name: cache})
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            raise TargetError(
                f"{type(self._model).__name__} does not take a cache of keys and values ({type(error).__name__}), "
                "without which rows of several requests cannot be put together"
            ) from error
        RowCache().change([], cache, {0: 2})

    def answer(self, row: Row) -> Answer:
        """What ``admit`` takes."""
        return Answer(row, Drawer(row.sampling), Decoder(self._tokenizer, row.sampling.stop))

    def drop(self, gone: Sequence[Answer]) -> None:
        """Leave these out from now on."""
        if gone:
            self._settle([i for i, a in enumerate(self.answers) if not any(a is g for g in gone)])

    def clear(self) -> None:
        """Leave all of them out, whatever state they are in."""
        self.answers, self._cache = [], RowCache()

    @torch.no_grad()
    def admit(self, coming: Sequence[Answer]) -> list[tuple[Answer, Piece]]:
        """Read the prompts of new rows in one pass, and say the first token of each."""
        prompts = [a.row.prompt for a in coming]
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(p)) + list(p) for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        cache = DynamicCache()
        logits = self._run(coming, ids, mask, cache)
        pieces = self._say(coming, logits)
        stay = [i for i, (_, p) in enumerate(pieces) if p.finish is None]
        self._cache.change(range(len(self.answers)), cache, {i: len(prompts[i]) for i in stay})
        self.answers += [coming[i] for i in stay]
        return pieces

    @torch.no_grad()
    def step(self) -> list[tuple[Answer, Piece]]:
        """Say one more token of every row; rows that end leave."""
        self._cache.ensure()
        ids = torch.tensor([[a.said[-1]] for a in self.answers], device=self._device)
        logits = self._run(self.answers, ids, self._cache.mask(), self._cache)
        self._cache.grew()
        pieces = self._say(self.answers, logits)
        if any(p.finish is not None for _, p in pieces):
            self._settle([i for i, (_, p) in enumerate(pieces) if p.finish is None])
        return pieces

    def _settle(self, kept: list[int]) -> None:
        self.answers = [self.answers[i] for i in kept]
        self._cache.change(kept)

    def _run(self, answers: Sequence[Answer], ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits after the last token of every row, (rows, vocabulary) fp32."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        given = {n: v for n, v in optional.items() if n in self._takes}
        alphas = {n: [a.row.alpha[n] for a in answers] for n in answers[0].row.alpha}
        with alpha(self._model, {**{n: [v] * len(answers) for n, v in self._fixed.items()}, **alphas}):
            output = self._model(
                input_ids=ids, attention_mask=mask, use_cache=True, **{self._cache_name: cache}, **given
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _say(self, answers: Sequence[Answer], logits: Tensor) -> list[tuple[Answer, Piece]]:
        tokens = next_tokens(logits, [a.drawer for a in answers])
        return [(a, self._piece(a, t, logits[i])) for i, (a, t) in enumerate(zip(answers, tokens, strict=True))]

    def _piece(self, answer: Answer, token: int, logits: Tensor) -> Piece:
        sampling, decoder = answer.row.sampling, answer.decoder
        answer.said.append(token)
        if token in self._ends and len(answer.said) > len(sampling.forced):
            return Piece(decoder.rest(), 1, (), "stop")
        text = decoder.add(token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            own, top = told(logits, token, sampling.logprobs)
            logprobs = (TokenLogprob(self._text(token), own, tuple((self._text(t), p) for t, p in top)),)
        if decoder.stopped:
            return Piece(text, 1, logprobs, "stop", (token,))
        if len(answer.said) >= sampling.max_tokens:
            text += decoder.rest()
            return Piece(text, 1, logprobs, "stop" if decoder.stopped else "length", (token,))
        return Piece(text, 1, logprobs, None, (token,))

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
