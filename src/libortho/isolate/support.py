"""Where a memory sits: saliency of columns or entries, and a budget shared by all layers.

    s = sum_i |d odds_i / dW|^2 / |d odds_i / dW (all layers)|^2        over forget records i
    score = s_forget / (s_retain + mean s_retain)

Each record's gradient is that of its mean log-odds, normalised over all layers together, so that no record is lost
beside a louder one. It is the forget-to-retain Fisher ratio of SSD (arXiv 2308.07707) on log-odds instead of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libortho.data import Batch
from libortho.isolate.language_model import LanguageModel
from libortho.isolate.objectives import label_log_odds
from libortho.split import linear_weight


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


def squared_gradients(
    lm: LanguageModel, layers: dict[str, nn.Module], batches: Sequence[Batch], *, columns: bool
) -> dict[str, Tensor]:
    """Sum over records of the squared, per-record-normalised gradient of the mean log-odds.

    Args:
        lm: The model; its parameters may be frozen.
        layers: Linear layers by name.
        batches: Records with labels; a record without any label is ignored.
        columns: Sum the squares over each input column.

    Returns:
        Name to (in_features,) for columns, (out_features, in_features) fp32 otherwise.
    """
    totals: dict[str, Tensor] = {}
    for batch in batches:
        per_record: dict[str, Tensor] = {}

        def reduce_columns(name: str, x: Tensor, grad: Tensor, store: dict[str, Tensor] = per_record) -> None:
            # One record at a time: a dense gradient of one layer is the largest tensor that exists.
            rows = [(g.T.float() @ v.float()).square().sum(0) for v, g in zip(x, grad, strict=True)]
            store[name] = torch.stack(rows)

        _backward(lm, layers, batch, reduce_columns)
        norms = torch.stack([v.sum(1) for v in per_record.values()]).sum(0).clamp_min(1e-30)
        if columns:
            for name, value in per_record.items():
                total = (value / norms[:, None]).sum(0)
                totals[name] = totals[name] + total if name in totals else total
            continue

        def add_entries(name: str, x: Tensor, grad: Tensor, norms: Tensor = norms) -> None:
            for value, g, norm in zip(x, grad, norms, strict=True):
                square = (g.T.float() @ value.float()).square_().div_(norm)
                totals[name] = totals[name].add_(square) if name in totals else square

        _backward(lm, layers, batch, add_entries)
    return totals


def _backward(
    lm: LanguageModel, layers: dict[str, nn.Module], batch: Batch, reduce: Callable[[str, Tensor, Tensor], None]
) -> None:
    """One backward pass of the summed per-record mean log-odds, with ``reduce(name, input, output gradient)``."""
    taps = [_Tap(m, lambda x, g, name=n: reduce(name, x, g)) for n, m in layers.items()]  # type: ignore[misc]
    embedding = lm.model.get_input_embeddings()  # type: ignore[operator]
    # Parameters are frozen: let the graph begin at the embeddings.
    handle = embedding.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    try:
        with torch.enable_grad():
            hidden = lm.hidden(batch)[:, :-1]
            labels = batch.labels[:, 1:]
            judged = labels != -100
            odds = label_log_odds(lm.logits(hidden[judged]), labels[judged])
            counts = judged.sum(1).clamp_min(1)
            weight = (1.0 / counts)[:, None].expand_as(judged)[judged]
            (odds * weight).sum().backward()
    finally:
        handle.remove()
        for tap in taps:
            tap.remove()


def allocate(scores: dict[str, Tensor], ratio: float, cap: float, unit: dict[str, int]) -> dict[str, Tensor]:
    """Take the best-scored columns or entries of all layers together, within one budget.

    Args:
        scores: Name to a score per column (in_features,) or per entry (out_features, in_features).
        ratio: Budget as a fraction of all weights of these layers.
        cap: No layer takes more than ``cap`` times its even share.
        unit: Weights that one scored item costs (out_features for columns, 1 for entries).

    Returns:
        Name to the ascending flat indices that were chosen; layers with nothing are left out. The total never exceeds
        the budget, unless one single column does.
    """
    weights = {n: s.numel() * unit[n] for n, s in scores.items()}
    budget = ratio * sum(weights.values())
    kept: list[tuple[Tensor, Tensor, str]] = []
    for name, score in scores.items():
        flat = score.flatten()
        most = min(flat.numel(), max(1, int(cap * ratio * flat.numel())))
        best = flat.topk(most)
        kept.append((best.values, best.indices, name))
    values = torch.cat([v for v, _, _ in kept])
    cost = torch.cat([torch.full((len(v),), float(unit[n])) for v, _, n in kept])
    owner = torch.cat([torch.full((len(v),), i) for i, (v, _, _) in enumerate(kept)])
    index = torch.cat([i for _, i, _ in kept])
    order = values.cpu().argsort(descending=True)
    affordable = cost[order].cumsum(0) <= budget
    affordable[0] = True
    chosen = order[affordable]
    result = {}
    for number, (_, _, name) in enumerate(kept):
        mine = index[chosen[owner[chosen] == number]]
        if len(mine):
            result[name] = mine.sort().values
    return result


def ratio_scores(forget: dict[str, Tensor], retain: dict[str, Tensor]) -> dict[str, Tensor]:
    """``forget / (retain + mean retain)``; the floor is the layer's mean."""
    return {n: f / (retain[n] + retain[n].mean() + 1e-30) for n, f in forget.items()}


def unit_costs(layers: dict[str, nn.Module], *, columns: bool) -> dict[str, int]:
    """Weights that one column, or one entry, of each layer costs."""
    return {n: linear_weight(m).shape[0] if columns else 1 for n, m in layers.items()}
