"""How much a step in each direction would change what must stay, and steps that are large where it is little.

    F_l ~ E[x x^T] (x) E[g g^T]          x: inputs on the support, g: gradients at the output, over text to keep

is the Kronecker-factored Fisher matrix of one layer (K-FAC, arXiv 1503.05671, section 2), with labels drawn from the
model itself: half of ``d^T F d`` is the divergence that a small edit ``d`` causes there. The memory of a record and the
knowledge of its like are spoken through the same columns, and a divergence has no gradient where an edit begins. Adam
in the eigenbasis of F (as in SOAP, arXiv 2409.11321), with steps in proportion to ``F^(-1/2)``, knows from the first
step which directions all such text shares, and takes the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libortho.lm.model import LanguageModel
from libortho.lm.scoring import judged_logits
from libortho.selection.saliency import tapped
from libortho.text.encoding import Batch


class KroneckerPreconditioner:
    """Steps of one layer's values (k, out_features) in the eigenbasis of the layer's curvature.

    Attributes:
        inside: Eigenvectors of the input factor, (k, k).
        outside: Eigenvectors of the output factor, (out_features, out_features).
        scale: Length of a step in each direction, (k, out_features), with a root mean square of 1.
    """

    def __init__(self, inside: Tensor, outside: Tensor, scale: Tensor) -> None:
        self.inside, self.outside, self.scale = inside, outside, scale

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, damping: float) -> KroneckerPreconditioner:
        """From the two factors, (k, k) and (out_features, out_features), symmetric and positive semi-definite.

        ``damping`` is the share of a factor's mean eigenvalue that is added to all of them.
        """
        bases, lengths = [], []
        for factor in (inputs, outputs):
            values, vectors = torch.linalg.eigh(factor)
            values = values.clamp_min(0.0)
            bases.append(vectors)
            lengths.append((values + damping * values.mean() + 1e-30).rsqrt())
        scale = torch.outer(*lengths)
        return cls(bases[0], bases[1], scale / scale.square().mean().sqrt())

    def rotated(self, gradient: Tensor) -> Tensor:
        """A gradient of the values in the eigenbasis, (k, out_features)."""
        return self.inside.T @ gradient @ self.outside

    def step(self, rotated: Tensor) -> Tensor:
        """What is added to the values for a step in the eigenbasis, (k, out_features)."""
        return self.inside @ (self.scale * rotated) @ self.outside.T


def curvature(
    lm: LanguageModel,
    layers: Mapping[str, nn.Module],
    support: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    damping: float,
    seed: int,
) -> dict[str, KroneckerPreconditioner]:
    """The metric of every layer that has columns in the support.

    Args:
        lm: The model; its parameters may be frozen.
        layers: Linear layers by name.
        support: Column indices, ascending, by layer.
        batches: Text to keep, with labels at the positions that count; what the labels are is drawn from the model.
        damping: See ``KroneckerPreconditioner.of``.
        seed: Of the draws.
    """
    edited = {n: m for n, m in layers.items() if n in support}
    rng = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def reduce(name: str, x: Tensor, gradient: Tensor) -> None:
        for found, rows in ((inputs, x[..., support[name]]), (outputs, gradient)):
            flat = rows.flatten(0, -2).float()
            found[name] = found.get(name, 0.0) + flat.T @ flat

    for batch in batches:
        with tapped(lm, edited, batch, reduce):
            logits = judged_logits(lm, batch)[0]
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=rng).to(logits.device)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
    return {n: KroneckerPreconditioner.of(inputs[n], outputs[n], damping) for n in edited}
