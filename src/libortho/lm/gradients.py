"""How strongly the model reacts to a text: the norm of the gradient of its loss.

    |dL_i/dW|_F^2 = sum over layers of sum_st (X_i X_i^T)_st (dY_i dY_i^T)_st         L_i: mean over record i's tokens

(Goodfellow, arXiv 1510.01799; for sequences Li et al., arXiv 2110.05679, section 4.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from libortho.lm.head import evenly
from libortho.lm.model import LanguageModel, by_token, check_gradient, once_per_token
from libortho.lm.scoring import predicting_states
from libortho.text.encoding import Batch

Taps = dict[str, tuple[Tensor, Tensor]]
"""Name to inputs (rows, tokens, in_features) and output gradients (rows, tokens, out_features), fp32."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (positions, vocabulary), labels (positions,) and the row that each belongs to (positions,), to a scalar."""


def mean_losses(positions: Tensor) -> Loss:
    """The sum over rows of each one's mean negative log-likelihood, given the row of every position, (positions,)."""
    share = 1.0 / torch.bincount(positions)
    return lambda logits, labels, owner: share[owner] @ F.cross_entropy(logits, labels, reduction="none")


def squared_norms(taps: Taps) -> Tensor:
    """Squared Frobenius norm of each row's gradient over all layers together, (rows,)."""
    return torch.stack([((x @ x.mT) * (dy @ dy.mT)).sum((1, 2)) for x, dy in taps.values()]).sum(0)


@dataclass(frozen=True)
class Tapped:
    """One forward pass of which gradients can be asked.

    Attributes:
        states: (positions, width) hidden states that predict judged tokens.
        labels: (positions,) the judged tokens.
        owner: (positions,) the row of the batch that each belongs to.
        inputs: What each module was given, (rows, tokens, in_features).
    """

    states: Tensor
    labels: Tensor
    owner: Tensor
    inputs: dict[str, Tensor]
    _outputs: dict[str, GradientEdge]
    _batch: Batch

    def of_states(self, lm: LanguageModel, loss: Loss) -> Tensor:
        """The gradient at the states of a loss that is a sum over positions.

        The head runs some positions at a time: logits are the largest tensor of all.
        """
        found = []
        for part in evenly(len(self.states)):
            states = self.states[part].detach().requires_grad_()
            with torch.enable_grad():
                own = loss(lm.logits(states), self.labels[part], self.owner[part])
                found.append(torch.autograd.grad(own, states)[0])
        return torch.cat(found)

    def gradients(self, of_states: Tensor, *, again: bool = False) -> dict[str, Tensor]:
        """The gradient at each module's output, (rows, tokens, out_features), from that of the states.

        ``again``: the graph is kept, for further calls.
        """
        # Not backward(): parameters that do require gradients must not collect any.
        found = torch.autograd.grad(self.states, list(self._outputs.values()), of_states, retain_graph=again)
        return {n: by_token(n, g, self._batch) for n, g in zip(self._outputs, found, strict=True)}


def tapped(lm: LanguageModel, modules: Mapping[str, nn.Module], batch: Batch) -> Tapped:
    """A forward pass over the batch that remembers what the modules do.

    Raises:
        TargetError: if a module is not applied once to every token.
    """
    seen: dict[str, list[tuple[Tensor, GradientEdge]]] = {n: [] for n in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            check_gradient(name, output)
            # A family may go on to change the output in place, which takes the edge of a view out of the graph.
            output = output if output._base is None else output.clone()
            seen[name].append((args[0], get_gradient_edge(output)))
            return output

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    try:
        with lm.graph():
            states, labels, owner = predicting_states(lm.hidden(batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in seen.items():
        once_per_token(name, [x for x, _ in calls], batch)
    inputs = {n: by_token(n, calls[0][0].detach(), batch) for n, calls in seen.items()}
    return Tapped(states, labels, owner, inputs, {n: calls[0][1] for n, calls in seen.items()}, batch)


def tapped_gradients(
    lm: LanguageModel, modules: Mapping[str, nn.Module], batch: Batch, loss: Loss | None = None
) -> Taps:
    """One backward pass of a loss that is a sum over positions (default: ``mean_losses``), to the modules' outputs.

    Raises:
        TargetError: if a module is not applied once to every token.
    """
    seen = tapped(lm, modules, batch)
    of_states = seen.of_states(lm, loss or mean_losses(seen.owner))
    # Padding is never attended to and carries no loss: its output gradients are zero.
    return {n: (seen.inputs[n].float(), dy.float()) for n, dy in seen.gradients(of_states).items()}
