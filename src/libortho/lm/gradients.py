"""How strongly the model reacts to a text: the norm of the gradient of its loss.

    |dL_i/dW|_F^2 = sum over layers of sum_st (X_i X_i^T)_st (dY_i dY_i^T)_st         L_i: mean over record i's tokens

(Goodfellow, arXiv 1510.01799; for sequences Li et al., arXiv 2110.05679, section 4.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from libortho.lm.model import LanguageModel, by_token, check_gradient, once_per_token
from libortho.lm.scoring import judged_logits
from libortho.text.encoding import Batch

Taps = dict[str, tuple[Tensor, Tensor]]
"""Name to inputs (rows, tokens, in_features) and output gradients (rows, tokens, out_features), fp32."""


def squared_norms(taps: Taps) -> Tensor:
    """Squared Frobenius norm of each row's gradient over all layers together, (rows,)."""
    return torch.stack([((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)) for x, dy in taps.values()]).sum(0)


def tapped_gradients(lm: LanguageModel, modules: Mapping[str, nn.Module], batch: Batch) -> Taps:
    """One backward pass of the summed per-record mean losses, from the logits down to the modules' outputs.

    Raises:
        TargetError: if a module is not applied once to every token.
    """
    seen: dict[str, list[tuple[Tensor, GradientEdge]]] = {n: [] for n in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            check_gradient(name, output)
            seen[name].append((args[0], get_gradient_edge(output)))  # a family may go on to change the output in place

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    try:
        with lm.graph():
            logits, labels, owner = judged_logits(lm, batch)
            share = (1.0 / torch.bincount(owner))[owner]
            loss = share @ F.cross_entropy(logits, labels, reduction="none")
            for name, calls in seen.items():
                once_per_token(name, [x for x, _ in calls], batch)
            # Not backward(): parameters that do require gradients must not collect any.
            outputs = [seen[n][0][1] for n in modules]
            grads = torch.autograd.grad(loss, outputs)
    finally:
        for handle in handles:
            handle.remove()
    inputs = [seen[n][0][0].detach() for n in modules]
    # Padding is never attended to and carries no loss: its output gradients are zero.
    return {
        n: (by_token(n, x, batch).float(), by_token(n, dy, batch).float())
        for n, x, dy in zip(modules, inputs, grads, strict=True)
    }
