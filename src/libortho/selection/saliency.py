"""Where a memory sits: saliency of columns, and a budget shared by all layers.

    s_ic  = |d odds_i / dW_c|^2 / |d odds_i / dW|^2            record i, column c of any layer
    score = sum_i w_i s_ic / (r_c + mean r)                    r: the same, summed over retain text

Each record's gradient is that of its mean log-odds, normalised over all layers together, so that no record is lost
beside a louder one; the weights w_i do the same for a record whose kind is rare: they rise until every record has about
the same share of what it could have from this budget. It is the forget-to-retain Fisher ratio of SSD (arXiv 2308.07707)
on log-odds instead of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from libortho.lm.logits import label_log_odds
from libortho.lm.model import LanguageModel, by_token
from libortho.lm.scoring import judged_logits
from libortho.text.encoding import Batch


class _Tap:
    """Reads the input and the output gradient of one linear layer, and reduces them record by record."""

    def __init__(self, module: nn.Module, reduce: Callable[[Tensor, Tensor], None]) -> None:
        self._reduce = reduce
        self._handles = [module.register_forward_hook(self._forward)]

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda grad: self._reduce(x, grad))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def column_saliency(lm: LanguageModel, layers: dict[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Squared gradients of each record's mean log-odds, summed over each input column and normalised over all layers.

    Args:
        lm: The model; its parameters may be frozen.
        layers: Linear layers by name.
        batches: Records with labels.

    Returns:
        Name to (records, in_features), the rows of all layers together summing to 1.
    """
    parts: dict[str, list[Tensor]] = {n: [] for n in layers}

    def reduce(name: str, x: Tensor, grad: Tensor) -> None:
        # |G^T v|^2 = v^T (G G^T) v for each column (the Gram identity of arXiv 1510.01799): no dense gradient is made.
        x, grad = x.float(), grad.float()
        parts[name].append((x * (grad @ grad.mT @ x)).sum(1).clamp_min(0.0))

    for batch in batches:
        _backward(lm, layers, batch, reduce)
    found = {n: torch.cat(p) for n, p in parts.items()}
    norms = torch.stack([v.sum(1) for v in found.values()]).sum(0).clamp_min(1e-30)
    return {n: v / norms[:, None] for n, v in found.items()}


@contextmanager
def tapped(
    lm: LanguageModel,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    reduce: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """Within, a backward pass over the batch calls ``reduce(name, input, output gradient)`` for every layer.

    Both are (sequences, tokens, features).

    Raises:
        TargetError: if a layer does not see one row for each token.
    """

    def pass_on(name: str, x: Tensor, gradient: Tensor) -> None:
        reduce(name, by_token(name, x, batch), by_token(name, gradient, batch))

    taps = [_Tap(m, partial(pass_on, n)) for n, m in layers.items()]
    try:
        with lm.graph():
            yield
    finally:
        for tap in taps:
            tap.remove()


def _backward(
    lm: LanguageModel, layers: dict[str, nn.Module], batch: Batch, reduce: Callable[[str, Tensor, Tensor], None]
) -> None:
    """One backward pass of the summed per-record mean log-odds."""
    with tapped(lm, layers, batch, reduce):
        logits, labels, owner = judged_logits(lm, batch)
        weight = (1.0 / torch.bincount(owner))[owner]
        (label_log_odds(logits, labels) * weight).sum().backward()
