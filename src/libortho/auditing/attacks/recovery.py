"""Stream recovery: somebody has the base and not the stream. Can the stream be found, and can it be made again?

    location   one score per column of the base tells support columns from the others: its AUC in a layer that had
               no part in choosing the score
    values     ortho column ~ c * base column + ridge on (base column, its norm, 1), fitted on half of the support
               columns and judged on the other half, both ways:  R^2 = 1 - ||Y - Y^||^2 / ||Y||^2
    use        predicted columns added to the base at the true locations: does the memory come back?

R^2 is against predicting nothing, so 0 or less is no recovery. The attacker of ``values`` knows the true locations and
half of the stream's own columns: far more than one who has the base only. The ridge parameter is the one of the least
leave-one-out error on the known half (the closed form e_i / (1 - H_ii); Golub, Heath and Wahba 1979), among them none
(prediction 0).

Scores of a column w with codes q (for a dense base, w over its row's largest absolute weight, times 127):

    norm             ||w||                              size           mean |q|
    kurtosis         mean z^4 of w                      clipped        share of |q| at the end of the grid
    mean             |mean q|                           oddness        | ||w|| - median ||w|| |
    remainder        share of w's energy outside the layer's leading quarter of singular directions
    alikeness        largest |cosine| with another column
    shared           ||w|| after removal of the mean column, over ||w||

Free entries (unstructured supports) have scores of their own: |w|, |q|, ||column||, ||row||, |w| over its column's
mean, and the rank-r remainder of the entry; their values are not predicted.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from libortho.auditing.attacks.attack import Attack, AttackInputs
from libortho.auditing.attacks.measuring import edited_layers, measure, measure_subject, support_weight
from libortho.auditing.page.exhibits import Drawn, Exhibit, Table, TableRow
from libortho.auditing.page.glossary import SHARE, Metric
from libortho.auditing.page.text import cell, number
from libortho.auditing.report import Check, at_most
from libortho.auditing.roc import auc
from libortho.auditing.schema import ON
from libortho.auditing.subjects import dense_copy
from libortho.auditing.thresholds import NATS, POINT
from libortho.core.layer import OrthoLinear, touched
from libortho.core.streams import BaseStream, Columns, OrthoStream
from libortho.lm.model import LanguageModel

_LEADING = 4
"""One in so many singular directions counts as leading."""
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridge parameters, as multiples of the mean squared length of the inputs."""
_FEWEST = 4
"""Support columns of one height without which nothing is fitted."""


class Recovery(TypedDict):
    """What the base gives away about the stream.

    Attributes:
        location_auc: Mean AUC over left-out layers; None with a support in fewer than two layers.
        features: Score to its mean AUC over all layers, none left out; below one half, supports score lower.
        value_r2: R^2 of the predicted values; None for free entries or too few columns.
        columns: Support columns whose values were predicted.
        nll_before: Of the records at alpha = 0, in nats per token.
        extraction_before: Share of the records extracted there.
        nll_after: With the predicted values added; None where none were predicted.
        extraction: The same for the share extracted.
    """

    location_auc: float | None
    features: dict[str, float]
    value_r2: float | None
    columns: int
    nll_before: float
    extraction_before: float
    nll_after: float | None
    extraction: float | None


@torch.no_grad()
def run(inputs: AttackInputs) -> Recovery:
    """Attack a split model that has lost its stream.

    Args:
        inputs: The audited subject is a split model at alpha = 0, the records are those that the stream holds.

    Raises:
        TargetError: if no layer has a support.
        DataError: if there are no records.
    """
    layers = edited_layers(inputs.audited.model)
    before = measure_subject(inputs.audited, inputs.items)
    whole = all(_in_columns(m) for m in layers.values())
    aucs = []
    for layer in layers.values():
        mask = touched(layer)
        scores = column_scores(layer.base) if whole else entry_scores(layer.base)
        members = mask.any(0) if whole else mask.flatten()
        if not bool(members.all()):
            aucs.append({n: auc(s[members], s[~members]) for n, s in scores.items()})
    predicted, r2 = predict_columns(layers, random.Random(inputs.seed)) if whole else ({}, None)
    after = None
    if r2 is not None:
        copied = dense_copy(inputs.audited)
        for name, change in predicted.items():
            weight = copied.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight.float() + change)
        after = measure(LanguageModel(copied), inputs.items)
    return {
        "location_auc": left_out_auc(aucs),
        "features": {n: sum(a[n] for a in aucs) / len(aucs) for n in aucs[0]} if aucs else {},
        "value_r2": r2,
        "columns": sum(int(touched(layers[n]).any(0).sum()) for n in predicted),
        "nll_before": before["nll"],
        "extraction_before": before["extraction"],
        "nll_after": None if after is None else after["nll"],
        "extraction": None if after is None else after["extraction"],
    }


def _in_columns(layer: OrthoLinear) -> bool:
    supports = [s.support for s in layer.streams.values() if isinstance(s, OrthoStream) and s.support is not None]
    return all(isinstance(s, Columns) for s in supports)


def checks(found: Recovery) -> list[Check]:
    """Extraction and nats gained with the predicted values; none where no values were predicted."""
    if found["extraction"] is None or found["nll_after"] is None:
        return []
    return [
        at_most("stream guessed: extracted", found["extraction"], found["extraction_before"] + POINT, ".2f"),
        at_most("stream guessed: nats gained", found["nll_before"] - found["nll_after"], NATS),
    ]


def exhibit(found: Recovery, subjects: Sequence[Drawn]) -> Exhibit:
    """Location, values and use of the predicted stream."""
    before = number(found["nll_before"], 2), number(found["extraction_before"])
    rows = (
        ("Finding the moved columns", "AUC, 0.5 is a coin toss", number(found["location_auc"])),
        ("Predicting their values", "R\u00b2, 0 or less is no recovery", number(found["value_r2"], 3, True)),
        ("NLL with the rebuilt stream", f"nats per token; without: {before[0]}", number(found["nll_after"], 2)),
        (
            "Extraction with the rebuilt stream",
            f"share of records; without: {before[1]}",
            cell(found["extraction"], SHARE),
        ),
    )
    table = Table(
        "Stream recovery", "What is tried", (Metric(label="Result"),), [TableRow(n, (c,), note) for n, note, c in rows]
    )
    text = "Does the base that is handed out betray what was taken from it?"
    return Exhibit("Rebuilding the ortho stream from the base", (text,), tables=(table,))


ATTACK = Attack("recovery", 4, run, checks, exhibit, lambda inputs: inputs.subject(ON) is not None)


# -- location ---------------------------------------------------------------------------------------------------------


def column_scores(base: BaseStream) -> dict[str, Tensor]:
    """Scores of every column of a base, each (in_features,); see the module's text."""
    weight, codes = base.dense(), _codes(base)
    norm = weight.norm(dim=0).clamp_min(1e-12)
    centred = weight - weight.mean(0)
    variance = centred.square().mean(0).clamp_min(1e-24)
    cosine = (weight / norm).T @ (weight / norm)
    return {
        "norm": norm,
        "size": codes.abs().mean(0),
        "kurtosis": centred.pow(4).mean(0) / variance.square(),
        "clipped": (codes.abs() >= codes.abs().max()).float().mean(0),
        "mean": codes.mean(0).abs(),
        "oddness": (norm - norm.median()).abs(),
        "remainder": _remainder(weight).norm(dim=0) / norm,
        "alikeness": cosine.fill_diagonal_(0).abs().amax(0),
        "shared": (weight - weight.mean(1, keepdim=True)).norm(dim=0) / norm,
    }


def entry_scores(base: BaseStream) -> dict[str, Tensor]:
    """Scores of every entry of a base, each (out_features * in_features,); see the module's text."""
    weight = base.dense()
    size, column = weight.abs(), weight.norm(dim=0, keepdim=True)
    scores = {
        "magnitude": size,
        "size": _codes(base).abs(),
        "column": column.expand_as(weight),
        "row": weight.norm(dim=1, keepdim=True).expand_as(weight),
        "relative": size / size.mean(0).clamp_min(1e-12),
        "remainder": _remainder(weight).abs(),
    }
    return {n: s.flatten() for n, s in scores.items()}


def _codes(base: BaseStream) -> Tensor:
    if base.bits is not None:
        return base.unpacked_codes().float()
    weight = base.dense()
    return weight / weight.abs().amax(1, keepdim=True).clamp_min(1e-12) * 127


def _remainder(weight: Tensor) -> Tensor:
    """``weight`` without its leading quarter of singular directions, by the eigenvectors of the smaller Gram matrix."""
    rank = max(1, min(weight.shape) // _LEADING)
    if weight.shape[0] <= weight.shape[1]:
        leading = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -rank:]
        return weight - leading @ (leading.T @ weight)
    leading = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -rank:]
    return weight - (weight @ leading) @ leading.T


def left_out_auc(aucs: Sequence[Mapping[str, float]]) -> float | None:
    """Mean over layers of the AUC there of the score, and direction, that is best on all the other layers.

    Args:
        aucs: For each layer, score to AUC.

    Returns:
        None for fewer than two layers: nothing is left to choose on.
    """
    if len(aucs) < 2:
        return None
    found = []
    for left_out, own in enumerate(aucs):
        rest = [a for i, a in enumerate(aucs) if i != left_out]
        lean = {n: sum(a[n] for a in rest) / len(rest) - 0.5 for n in own}
        best = max(lean, key=lambda n: abs(lean[n]))
        found.append(own[best] if lean[best] >= 0 else 1 - own[best])
    return sum(found) / len(found)


# -- values -----------------------------------------------------------------------------------------------------------


def predict_columns(layers: Mapping[str, OrthoLinear], rng: random.Random) -> tuple[dict[str, Tensor], float | None]:
    """Predict each support column from the base, by a rule learned from the half that it is not in.

    Returns:
        Layer to predicted change, (out_features, in_features) fp32, for layers of heights with enough columns; and
        R^2 over all of these columns, None if there are none.
    """
    heights: defaultdict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        heights[layer.out_features].append(name)
    predicted: dict[str, Tensor] = {}
    error, total = 0.0, 0.0
    for names in heights.values():
        where = {n: touched(layers[n]).any(0) for n in names}
        inputs = torch.cat([layers[n].base.dense()[:, where[n]].T for n in names])
        outputs = torch.cat([support_weight(layers[n])[:, where[n]].T for n in names])
        if len(inputs) < _FEWEST:
            continue
        order = list(range(len(inputs)))
        rng.shuffle(order)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        guess = torch.zeros_like(outputs)
        for known, asked in ((first, second), (second, first)):
            guess[asked] = fit_ridge(inputs[known], outputs[known])(inputs[asked])
        error += float((outputs - guess).square().sum())
        total += float(outputs.square().sum())
        for name, part in zip(names, guess.split([int(where[n].sum()) for n in names]), strict=True):
            predicted[name] = torch.zeros(layers[name].out_features, layers[name].in_features, device=part.device)
            predicted[name][:, where[name]] = part.T
    return predicted, 1 - error / total if total else None


def fit_ridge(inputs: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of base columns (m, height) that predicts ortho columns, learned from (n, height) pairs.

    ``c * x`` with the least-squares scalar c, and kernel ridge on (x, ||x||, 1) for what that leaves; the penalty, and
    whether to use c, the ridge, both or neither, by leave-one-out error.
    """
    scale = inputs.square().sum(1).mean().sqrt().clamp_min(1e-12)

    def described(x: Tensor) -> Tensor:
        return torch.cat([x / scale, x.norm(dim=1, keepdim=True) / scale, torch.ones(len(x), 1, device=x.device)], 1)

    own = described(inputs).double()
    gram = own @ own.T
    dot, square = (inputs * outputs).sum(1), inputs.square().sum(1)
    multiple = float(dot.sum() / square.sum().clamp_min(1e-12))
    without = (dot.sum() - dot) / (square.sum() - square).clamp_min(1e-12)  # c of all pairs but one, (n,)
    best: tuple[float, float, Tensor | None] = (float(outputs.square().sum()), 0.0, None)
    for c, left_out in ((0.0, torch.zeros_like(without)), (multiple, without)):
        rest = (outputs - c * inputs).double()
        loss = float((outputs - left_out.unsqueeze(1) * inputs).square().sum())
        if loss < best[0]:
            best = (loss, c, None)
        for penalty in _PENALTIES:
            damped = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
            weights = torch.linalg.solve(damped, rest)
            hat = torch.linalg.solve(damped, gram)
            loss = float(((rest - gram @ weights) / (1 - hat.diagonal()).unsqueeze(1)).square().sum())
            if loss < best[0]:
                best = (loss, c, weights)
    _, chosen, dual = best

    def predict(x: Tensor) -> Tensor:
        linear = chosen * x
        return linear if dual is None else linear + (described(x).double() @ own.T @ dual).float()

    return predict
