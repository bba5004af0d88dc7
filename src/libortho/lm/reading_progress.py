"""How far a long piece of reading is, by the tokens that models have been given, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from libortho.core.progress import Progress, tell
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_states
from libortho.text.encoding import Encoded

SLOWER = 1.4
"""How much slower short texts, generation and single steps are than reading texts in a row, for guesses of time."""


@contextmanager
def watched(models: Iterable[nn.Module], count: Callable[[int], None]) -> Iterator[None]:
    """Within, ``count`` is called with the tokens of every forward pass, padding included.

    The input embeddings are watched, which generation and plain reading both go through.
    """
    embeddings: dict[int, Any] = {}
    for model in models:
        found = model.get_input_embeddings()  # type: ignore[operator]
        embeddings[id(found)] = found

    def read(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        count(output.shape[:-1].numel())

    handles = [e.register_forward_hook(read) for e in embeddings.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading(model: nn.Module, progress: Progress | None, phase: str, tokens: int) -> Iterator[None]:
    """Within, every forward pass of the model reports its tokens; as the block ends, all are reported.

    Args:
        model: A causal LM.
        progress: Called with (phase, tokens so far, tokens).
        phase: Its name.
        tokens: About as many as the block reads, padding included. A wrong number makes the last report a jump.
    """
    total, seen = max(1, tokens), 0

    def count(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        tell(progress, phase, min(seen, total - 1), total)

    tell(progress, phase, 0, total)
    with watched([model], count):
        yield
    tell(progress, phase, total, total)


def tokens_per_second(lm: LanguageModel, texts: Sequence[Encoded]) -> float:
    """How fast the model reads, of one pass through these texts after one through the first of them."""
    judged_states(lm, texts[:1])
    began = time.monotonic()
    judged_states(lm, texts)
    return sum(len(t.ids) for t in texts) / max(1e-9, time.monotonic() - began)
