"""Which columns a request takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from libortho.core.errors import ConfigError
from libortho.core.progress import Progress, tell
from libortho.core.streams.ortho import MAX_RANK
from libortho.core.surgery import linear_shape
from libortho.isolation.config import IsolateConfig
from libortho.isolation.earlier import taken, without
from libortho.isolation.forget_record import ForgetRecord
from libortho.isolation.request import SALIENCY_RECORDS
from libortho.lm.model import LanguageModel
from libortho.selection.budget import allocate, balanced_weights, column_costs, retain_floor
from libortho.selection.saliency import column_saliency
from libortho.text.encoding import IGNORE, Batch, Encoded, collate

LAYER_CAP = 4.0
"""No layer takes more than this many times its even share of the budget."""
SALIENCY_TOKENS = 1536
_MOST_CURVATURE = 4.0


Select = Callable[
    [LanguageModel, dict[str, nn.Module], Sequence[ForgetRecord], Sequence[Encoded], IsolateConfig, Progress | None],
    dict[str, torch.Tensor],
]
"""What chooses columns: a function of the model, its target layers, the records, the retain texts, the configuration
and a progress callback that gives ascending column indices by layer."""


def select_columns(
    lm: LanguageModel,
    targets: dict[str, nn.Module],
    forget: Sequence[ForgetRecord],
    retain: Sequence[Encoded],
    config: IsolateConfig,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    """The columns whose gradients are about the records and not about text to keep, within the budget."""
    ratio = float(config.ratio)
    secrets = [piece for c in forget for piece in cut_up(c.secret, c.pieces)]
    if len(secrets) > SALIENCY_RECORDS:
        secrets = random.Random(config.seed).sample(secrets, SALIENCY_RECORDS)
    batches = [collate(secrets[i : i + 8]).to(lm.device) for i in range(0, len(secrets), 8)]
    texts = first_texts(lm, retain, SALIENCY_TOKENS)
    tell(progress, "support", 0, 2)
    own = column_saliency(lm, targets, batches)
    tell(progress, "support", 1, 2)
    kept = column_saliency(lm, targets, texts)
    tell(progress, "support", 2, 2)
    others = neighbour_batches(lm, forget, config)
    if others:
        around = column_saliency(lm, targets, others)
        kept = {n: torch.cat([s / len(s), around[n] / len(around[n])]) for n, s in kept.items()}
    floor = retain_floor({n: s.sum(0) for n, s in kept.items()})
    held = taken(targets)
    own = without(own, held, 0.0)
    side_by_side = torch.cat([s / floor[n] for n, s in own.items()], 1)
    weights = balanced_weights(side_by_side, max(1, int(ratio * side_by_side.shape[1])))
    scores = without({n: weights @ s / floor[n] for n, s in own.items()}, held, -torch.inf)
    return allocate(scores, ratio, LAYER_CAP, column_costs(targets), limit=MAX_RANK)  # a stream that can be saved


def check_columns(support: Mapping[str, torch.Tensor], targets: Mapping[str, nn.Module]) -> None:
    """Refuse columns that a stream cannot hold.

    Args:
        support: Column indices by layer, as a ``Select`` gives them.
        targets: The layers that may give columns.

    Raises:
        ConfigError: if there is no column, a layer is no target, or its indices are not ascending, not those of columns
            that it has, or an earlier stream's.
    """
    if not any(len(index) for index in support.values()):
        raise ConfigError("select gave no column; expected column indices of at least one layer")
    held = taken(targets)
    for name, index in support.items():
        if name not in targets:
            raise ConfigError(f"select gave columns of {name!r}; expected layers among {sorted(targets)}")
        width = linear_shape(targets[name])[1]
        numbers = index.flatten().tolist()
        if index.dtype != torch.long or index.dim() != 1 or numbers != sorted({n for n in numbers if 0 <= n < width}):
            raise ConfigError(
                f"select gave {name} the columns {numbers[:8]}, {index.dtype} of shape {tuple(index.shape)}; expected "
                f"ascending indices from 0 to {width - 1} without repetition, as torch.int64"
            )
        if name in held and bool(held[name][index].any()):
            raise ConfigError(f"select gave {name} columns that an earlier stream has; expected columns that are free")


def cut_up(item: Encoded, pieces: int) -> list[Encoded]:
    """The text with the labels of one piece of its completion at a time."""
    places = [t for t, label in enumerate(item.labels) if label != IGNORE]
    ends = [round(n * len(places) / pieces) for n in range(pieces + 1)]
    return [
        Encoded(item.ids, tuple(x if t in own else IGNORE for t, x in enumerate(item.labels)))
        for own in (set(places[a:b]) for a, b in pairwise(ends))
    ]


def curvature_tokens(records: int) -> int:
    """The more is to be moved, the better the curvature must be known."""
    return round(SALIENCY_TOKENS * min(_MOST_CURVATURE, max(1.0, records / SALIENCY_RECORDS)))


def first_texts(lm: LanguageModel, retain: Sequence[Encoded], tokens: int) -> list[Batch]:
    """The first retain sequences, one by one, as many as have that many tokens together."""
    sizes = torch.tensor([len(t.ids) for t in retain]).cumsum(0)
    count = int((sizes <= tokens).sum().clamp_min(1))
    return [collate([t]).to(lm.device) for t in retain[:count]]


def neighbour_batches(lm: LanguageModel, forget: Sequence[ForgetRecord], config: IsolateConfig) -> list[Batch]:
    """A neighbour of each record, or of some of many."""
    beside = [c.neighbours[0] for c in forget if c.neighbours]
    beside = random.Random(config.seed).sample(beside, min(len(beside), SALIENCY_RECORDS))
    return [collate(beside[i : i + 8]).to(lm.device) for i in range(0, len(beside), 8)]
