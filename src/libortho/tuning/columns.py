"""Which input columns a stream takes.

gradient      those whose gradients are about the records and not about text to keep, as ``isolate`` chooses them
used          those that text to keep uses most; for a training that may tell nothing of its data by its columns
activation    tf_c * idf_c, as sparse memory finetuning chooses its slots (arXiv 2510.15103, section 3.2)
              tf_c    mean of |x_c| where the data's judged tokens are predicted, over the mean of its layer
              idf_c   log((1 + tokens) / (1 + tokens of text to keep at which |x_c| is above the data's mean))

Columns of an MLP's output projection are its value slots, so that a column stands for what a slot writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from libortho.lm.model import LanguageModel
from libortho.lm.scoring import scoring_tokens
from libortho.selection.columns import best_columns, contrast, taken, without
from libortho.selection.readings import Readings, read_layers, summed_odds
from libortho.text.encoding import IGNORE, Encoded, batches, collate
from libortho.tuning.config import TuneConfig

READ_RECORDS = 64
"""Records that are read to choose columns."""

Score = Callable[
    [LanguageModel, Mapping[str, nn.Module], Sequence[Encoded], Sequence[Readings], Mapping[str, Tensor], float],
    dict[str, Tensor],
]
"""Model, layers, records, what the layers do on each kind of text to keep, columns that are not free and the budget, to
a score of every column, (in_features,), by layer."""


def choose_columns(
    lm: LanguageModel,
    targets: Mapping[str, nn.Module],
    data: Sequence[Encoded],
    kept: Sequence[Readings],
    config: TuneConfig,
) -> dict[str, Tensor]:
    """Ascending column indices by layer, within the budget; columns of other streams are left alone unless shared.

    Raises:
        ConfigError: if other streams have all of them.
    """
    held = {} if config.share_columns else taken(targets)
    if config.epsilon is not None:
        scores = used(kept[0])
    else:
        some = random.Random(config.seed).sample(data, min(len(data), READ_RECORDS))
        scores = SCORES[config.score](lm, targets, some, kept, held, config.ratio)
    return best_columns(without(scores, held, -torch.inf), config.ratio, targets)


def gradient(
    lm: LanguageModel,
    targets: Mapping[str, nn.Module],
    data: Sequence[Encoded],
    kept: Sequence[Readings],
    held: Mapping[str, Tensor],
    ratio: float,
) -> dict[str, Tensor]:
    """By gradients of the records' log-odds, over those of text to keep."""
    own = read_layers(lm, targets, data, summed_odds).saliency
    return contrast(own, [k.saliency for k in kept], held, ratio)


def activation(
    lm: LanguageModel,
    targets: Mapping[str, nn.Module],
    data: Sequence[Encoded],
    kept: Sequence[Readings],
    held: Mapping[str, Tensor],
    ratio: float,
) -> dict[str, Tensor]:
    """By inputs alone: those that are large on the data and rare on text to keep."""
    found: dict[str, Tensor] = {}
    tokens = 0
    for inputs in _inputs(lm, targets, data):
        for name, x in inputs.items():
            found[name] = found.get(name, torch.zeros_like(x[0])) + x.sum(0)
        tokens += len(next(iter(inputs.values())))
    scores = {}
    for name, total in found.items():
        term, other = total / tokens, torch.cat([k.inputs[name] for k in kept])
        common = (other.abs() > term).sum(0)
        scores[name] = term / term.mean().clamp_min(1e-30) * torch.log((1 + len(other)) / (1 + common))
    return scores


def used(kept: Readings) -> dict[str, Tensor]:
    """By what text to keep uses, without a look at the data: the mean of |x_c| over that of its layer."""
    size = {n: x.float().abs().mean(0) for n, x in kept.inputs.items()}
    return {n: s / s.mean().clamp_min(1e-30) for n, s in size.items()}


SCORES: Mapping[str, Score] = {"gradient": gradient, "activation": activation}


@torch.no_grad()
def _inputs(
    lm: LanguageModel, targets: Mapping[str, nn.Module], items: Sequence[Encoded]
) -> Iterator[dict[str, Tensor]]:
    """Absolute inputs of each layer, (tokens, in_features) fp32, batch by batch, where judged tokens are predicted."""
    for rows in batches(items, scoring_tokens(lm.device)):
        batch = collate([items[i] for i in rows]).to(lm.device)
        there = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        there[:, :-1] = batch.labels[:, 1:] != IGNORE
        seen: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], seen: dict[str, Tensor] = seen) -> None:
            seen[name] = args[0]

        handles = [m.register_forward_pre_hook(partial(keep, n)) for n, m in targets.items()]
        try:
            lm.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        yield {n: (x.reshape(*there.shape, -1)[there]).float().abs() for n, x in seen.items()}
