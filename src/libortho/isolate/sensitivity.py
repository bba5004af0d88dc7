"""How strongly the model reacts to a text: the norm of the gradient of its loss, which can itself be trained.

    |dL_i/dW|_F^2 = sum over layers of sum_st (X_i X_i^T)_st (dY_i dY_i^T)_st         L_i: mean over record i's tokens

(Goodfellow, arXiv 1510.01799; for sequences Li et al., arXiv 2110.05679, section 4.) An edit that only cancels what a
memory says leaves the machinery of both in place: every token is as likely as a stranger's, but the loss hangs on the
record as on no stranger's text. A membership test that looks at the gradient sees it. Pulling the mean of the log norm
to that of strangers' texts makes the edit weaken the memory instead. (A second derivative: Drucker and LeCun, 1992,
called it double backpropagation.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from libortho.data import IGNORE, Encoded, collate
from libortho.isolate.edit import EditLinear
from libortho.isolate.language_model import LanguageModel


def log_gradient_norms(
    lm: LanguageModel, layers: Mapping[str, EditLinear], items: Sequence[Encoded], *, differentiable: bool
) -> Tensor:
    """Logarithm of the norm of each text's gradient over the whole weights of these layers together, (items,).

    Args:
        lm: The model.
        layers: Layers under edit; the norm is that of the dense weight that each applies now.
        items: Texts with labels; the loss of one is the mean over its completion's tokens, in nats.
        differentiable: With a gradient for the values of the layers. The model's attention must then be one that torch
            can differentiate twice (the default of transformers can).
    """
    with _read(lm, layers) as seen, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        batch = collate(items).to(lm.device)
        labels = batch.labels[:, 1:]
        judged = labels != IGNORE
        nll = F.cross_entropy(lm.logits(lm.hidden(batch)[:, :-1][judged]), labels[judged], reduction="none")
        share = (1.0 / judged.sum(1))[:, None].expand_as(judged)[judged]
        inputs, outputs = zip(*(seen[n] for n in layers), strict=True)
        gradients = torch.autograd.grad((nll * share).sum(), outputs, create_graph=differentiable)
        square = torch.stack([
            ((x.float() @ x.float().mT) * (dy.float() @ dy.float().mT)).sum((1, 2))
            for x, dy in zip(inputs, gradients, strict=True)
        ]).sum(0)  # fmt: skip
        found = 0.5 * square.clamp_min(1e-20).log()
    return found if differentiable else found.detach()


@contextmanager
def _read(lm: LanguageModel, layers: Mapping[str, EditLinear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, layers can be differentiated twice, and inputs and outputs of the last pass stand in the dictionary."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, (args[0], output))

    embedding = lm.model.get_input_embeddings()  # type: ignore[operator]
    # Parameters are frozen: let the graph begin at the embeddings.
    handles = [embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())]
    handles += [m.register_forward_hook(keep(n)) for n, m in layers.items()]
    for layer in layers.values():
        layer.twice = True
    checkpointing, lm.checkpointing = lm.checkpointing, False  # a layer that runs again would be read again
    try:
        yield seen
    finally:
        lm.checkpointing = checkpointing
        for layer in layers.values():
            layer.twice = False
        for handle in handles:
            handle.remove()
