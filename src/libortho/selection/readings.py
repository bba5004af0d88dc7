"""One pass over the records and over text to keep: what every layer is given, and how strongly it is asked to change.

    s_ic  = |d odds_i / dW_c|^2 / |d odds_i / dW|^2          record i, column c of any layer
    r_jc  : the same of log p(drawn labels) of text j to keep

Each text's gradient is normalised over all layers together, so that no record is lost beside a louder one. The odds of
a memorised token have a gradient of 1 whatever its probability is; of text to keep the labels are drawn from the model
itself, so that its gradients are those of the Fisher matrix (K-FAC, arXiv 1503.05671, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from libortho.lm.gradients import Loss, tapped
from libortho.lm.logits import drawn, label_log_odds
from libortho.lm.model import LanguageModel
from libortho.lm.scoring import log_probability, training_tokens
from libortho.text.encoding import Encoded, batches, collate


@dataclass(frozen=True)
class Readings:
    """What the layers do on some texts. All by layer.

    Attributes:
        saliency: (texts, in_features), the rows of all layers together summing to 1.
        inputs: (tokens, in_features), bf16.
        gradients: (tokens, out_features) at the layer's output, bf16.
    """

    saliency: dict[str, Tensor]
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def summed_odds(logits: Tensor, labels: Tensor, owner: Tensor) -> Tensor:
    """The log-odds of the labels."""
    return label_log_odds(logits, labels).sum()


def drawn_labels(seed: int) -> Loss:
    """The log-likelihood of labels that are drawn from the model, in place of those that are given."""
    rng = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, labels: Tensor, owner: Tensor) -> Tensor:
        return log_probability(logits, drawn(logits.detach(), rng)).sum()

    return loss


def read_layers(lm: LanguageModel, layers: Mapping[str, nn.Module], items: Sequence[Encoded], loss: Loss) -> Readings:
    """Read all items in one forward and backward pass each; the loss is a sum over positions.

    Raises:
        TargetError: if a layer is not applied once to every token.
    """
    saliency = {n: torch.zeros(len(items), 0) for n in layers}
    inputs: dict[str, list[Tensor]] = {n: [] for n in layers}
    gradients: dict[str, list[Tensor]] = {n: [] for n in layers}
    for rows in batches(items, training_tokens(lm.device)):
        batch = collate([items[i] for i in rows]).to(lm.device)
        there, seen = batch.attention_mask.bool(), tapped(lm, layers, batch)
        for name, of_output in seen.gradients(seen.of_states(lm, loss)).items():
            x, g = seen.inputs[name].float(), of_output.float()
            # |G^T v|^2 = v^T (G G^T) v for each column (the Gram identity of arXiv 1510.01799).
            if not saliency[name].shape[1]:
                saliency[name] = torch.zeros(len(items), x.shape[-1], device=x.device)
            saliency[name][rows] = (x * (g @ g.mT @ x)).sum(1).clamp_min(0.0)
            inputs[name].append(x[there].bfloat16())
            gradients[name].append(g[there].bfloat16())
    norms = torch.stack([s.sum(1) for s in saliency.values()]).sum(0).clamp_min(1e-30)
    return Readings(
        {n: s / norms[:, None] for n, s in saliency.items()},
        {n: torch.cat(inputs.pop(n)) for n in layers},  # the parts go as they are joined
        {n: torch.cat(gradients.pop(n)) for n in layers},
    )
