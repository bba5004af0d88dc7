"""Weights changed one by one, as rounding and pruning do: measured, judged and shown in the same way.

What a change gives the audited model is compared with what it gives a model that never saw the forget set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from libortho.auditing.attacks.attack import AttackInputs
from libortho.auditing.attacks.measuring import Level, general_subset, measure, measure_subject
from libortho.auditing.page.exhibits import Table, TableRow
from libortho.auditing.page.glossary import METRICS, SHARE
from libortho.auditing.page.text import cell, number
from libortho.auditing.report import Check, at_most
from libortho.auditing.subjects import Subject, dense_copy
from libortho.auditing.thresholds import NATS, POINT
from libortho.core.errors import TargetError
from libortho.core.surgery import linear_weight
from libortho.core.targets import is_linear
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded

HEADING = "Disturbing the weights"
WARNING = "Coarser numbers and removed weights must not bring the records back."
_COLUMNS = (
    replace(METRICS["greedy_extraction"], label="Extraction"),
    METRICS["nll"],
    METRICS["perplexity"],
)


class Damage(Level):
    """The audited model after a change of its weights, and the reference after the same; None without a reference."""

    reference_nll: float | None
    reference_extraction: float | None


def decoder_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all dense linear layers but the output head, (out_features, in_features), views to write into.

    Raises:
        TargetError: if the decoder has none.
    """
    lm = LanguageModel(model)
    found = {n: linear_weight(m) for n, m in lm.decoder.named_modules() if is_linear(m) and m is not lm.head}
    if not found:
        raise TargetError(f"{type(model).__name__} has no dense linear layer to attack; expected nn.Linear or Conv1D")
    return found


@torch.no_grad()
def damaged(inputs: AttackInputs, change: Callable[[Tensor], Tensor] | None = None) -> Damage:
    """Measure copies of the audited subject and of the reference after ``change`` of all weights of their decoders.

    Args:
        inputs: First tokens of the general text are used for the perplexity of the audited subject.
        change: From a weight (out_features, in_features) to the changed one; None measures the models as they are.

    Raises:
        DataError: if there are no records.
        TargetError: if a model has no dense linear layer.
    """

    def level(subject: Subject, text: Sequence[Encoded]) -> Level:
        if change is None:
            return measure_subject(subject, inputs.items, text)
        copied = dense_copy(subject)
        for weight in decoder_weights(copied).values():
            weight.copy_(change(weight))
        return measure(LanguageModel(copied), inputs.items, text)

    own = level(inputs.audited, general_subset(inputs.general))
    other = None if inputs.reference is None else level(inputs.reference, ())
    return {
        **own,
        "reference_nll": None if other is None else other["nll"],
        "reference_extraction": None if other is None else other["extraction"],
    }


def damage_checks(names: Sequence[str], rows: Sequence[Damage]) -> list[Check]:
    """Extraction and nats gained in each row but the first, the model as it is stored."""
    start, found = rows[0], []
    for name, row in zip(names[1:], rows[1:], strict=True):
        most = max(start["extraction"], row["reference_extraction"] or 0.0) + POINT
        found.append(at_most(f"{name}: extracted", row["extraction"], most, ".2f"))
        gain = NATS
        if row["reference_nll"] is not None and start["reference_nll"] is not None:
            gain += max(0.0, start["reference_nll"] - row["reference_nll"])
        found.append(at_most(f"{name}: nats gained", start["nll"] - row["nll"], gain, ".2f"))
    return found


def damage_table(caption: str, first: str, names: Sequence[str], rows: Sequence[Level]) -> Table:
    """Extraction, surprise and perplexity of each row."""
    cells = [(cell(r["extraction"], SHARE), number(r["nll"], 2), number(r["perplexity"], 2)) for r in rows]
    return Table(caption, first, _COLUMNS, [TableRow(n, c) for n, c in zip(names, cells, strict=True)])
