"""White box: how a forget set still pulls at the weights. What is not known has a large gradient; what is, a small one.

For a linear layer y = W x, over the tokens t of a record i whose loss is L_i = mean_t -log p(y_t):

    dL_i/dW = sum_t dy_t x_t^T = dY_i^T X_i
    |dL_i/dW|_F^2 = sum_st (X_i X_i^T)_st (dY_i dY_i^T)_st      per record, without forming the gradient

The second line is the Gram identity behind per-example gradient norms (Goodfellow, arXiv 1510.01799; for sequences Li
et al., arXiv 2110.05679, section 4); the norm, compared between members and non-members, is the GradNorm attack.
Weights may be integer codes or frozen: inputs and output gradients are all that is needed, and no ``.grad`` changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from libortho.auditing.subjects import Subject
from libortho.core.errors import DataError, TargetError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.targets import MLP_OUTPUT
from libortho.lm.gradients import Taps, squared_norms, tapped_gradients
from libortho.lm.scoring import PASS_TOKENS
from libortho.text.encoding import Encoded, batches, collate


def gradient_layers(subject: Subject) -> list[str]:
    """The layers whose gradients are compared: the split ones; of a dense model, the output projections of its MLPs.

    Where a family has neither, or applies them to some tokens only (experts), all its linear layers but the head.
    """
    with subject.enter():
        lm = subject.language_model()
        linear = {n: m for n, m in lm.model.named_modules() if m is not lm.head and _is_layer(m)}
        adapted = tuple(f"{n}." for n, m in linear.items() if hasattr(m, "base_layer"))
        linear = {n: m for n, m in linear.items() if not n.startswith(adapted)}
        outputs = {n: m for n, m in linear.items() if MLP_OUTPUT.fullmatch(n)}
        found = (lm.once_per_token(chosen) for chosen in (ortho_layers(lm.model), outputs, linear))
        return next(filter(None, found), [])


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | OrthoLinear) or hasattr(module, "base_layer")


def forget_gradient(subject: Subject, items: Sequence[Encoded], targets: Sequence[str]) -> dict[str, Tensor]:
    """Gradient of the mean completion loss with respect to the weights that the targets apply.

    Args:
        subject: The model and its setting.
        items: Records with labels; each counts the same, whatever its length.
        targets: Dotted paths of split layers, or of the linear layers of a dense model.

    Returns:
        Name to (out_features, in_features) fp32, in nats per unit of weight.

    Raises:
        DataError: if there is no record.
        TargetError: if a target does not exist, or is not applied once to every token.
    """
    total: dict[str, Tensor] = {}
    for _, taps in _passes(subject, items, targets):
        for name, (x, dy) in taps.items():
            part = dy.flatten(0, 1).T @ x.flatten(0, 1) / len(items)
            total[name] = total[name].add_(part) if name in total else part
    return total


def gradient_norms(subject: Subject, items: Sequence[Encoded], targets: Sequence[str]) -> Tensor:
    """Frobenius norm of every record's own gradient over all targets together, (records,) fp32 on the CPU.

    Args:
        subject: The model and its setting.
        items: Records with labels; the loss of one is the mean over its completion's tokens, in nats.
        targets: As in :func:`forget_gradient`.

    Raises:
        DataError: if there is no record.
        TargetError: as :func:`forget_gradient`.
    """
    norms = torch.zeros(len(items))
    for rows, taps in _passes(subject, items, targets):
        norms[rows] = squared_norms(taps).cpu().clamp_min(0).sqrt()
    return norms


def gradient_norm(gradient: dict[str, Tensor]) -> float:
    """Frobenius norm over all layers together."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def gradient_cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Cosine of two gradients over all layers together; 0 if one of them is zero.

    Raises:
        TargetError: if they are not of the same layers.
    """
    if {n: g.shape for n, g in a.items()} != {n: g.shape for n, g in b.items()}:
        raise TargetError(
            f"cosine of gradients of different layers, {sorted(a)[:3]} and {sorted(b)[:3]} ..; take both with the same "
            "targets, from models of the same shape"
        )
    size = gradient_norm(a) * gradient_norm(b)
    product = sum(float((g.double() * b[n].to(g.device).double()).sum()) for n, g in a.items())
    return max(-1.0, min(1.0, product / size)) if size else 0.0


def _passes(subject: Subject, items: Sequence[Encoded], targets: Sequence[str]) -> Iterator[tuple[list[int], Taps]]:
    if not items:
        raise DataError("no record to take a gradient of; expected at least one")
    modules = _modules(subject.model, targets)
    for rows in batches(items, PASS_TOKENS):
        with subject.enter():
            lm = subject.language_model()
            taps = tapped_gradients(lm, modules, collate([items[i] for i in rows]).to(lm.device))
        yield rows, taps  # outside: a context must not stay entered while the caller runs


def _modules(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules())
    if not targets:
        raise TargetError("no target layer was named; expected the dotted paths of split or linear layers")
    missing = [n for n in targets if n not in known]
    if missing:
        raise TargetError(
            f"{type(model).__name__} has no module {missing[0]!r}; a reference model needs the names of the audited one"
        )
    return {n: known[n] for n in targets}
