"""How much a step in each direction would change what must stay.

    F_l ~ E[x x^T] (x) E[g g^T]          x: inputs on the support, g: gradients at the output, over text to keep

is the Kronecker-factored Fisher matrix of one layer (K-FAC, arXiv 1503.05671, section 2), with labels drawn from the
model itself: half of ``d^T F d`` is the divergence per token that a small edit ``d`` causes there. The memory of a
record and the knowledge of its like are spoken through the same columns, and a divergence has no gradient where an edit
begins; a step that is short by F leaves alone, from the first one, the directions that all such text shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from libortho.selection.readings import Readings


class KroneckerPreconditioner:
    """F of one layer's values (k, out_features) in its eigenbasis.

    Attributes:
        inside: Eigenvectors of the input factor, (k, k).
        outside: Eigenvectors of the output factor, (out_features, out_features).
        scale: ``F^(-1/2)`` in each direction, (k, out_features).
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
        return cls(bases[0], bases[1], torch.outer(*lengths))

    def whitened(self, gradients: Tensor) -> Tensor:
        """Gradients of the values, (..., k, out_features), as ``F^(-1/2)`` times each, in the eigenbasis."""
        return (self.inside.T @ gradients @ self.outside) * self.scale

    def whitened_move(self, move: Tensor) -> Tensor:
        """The whitened one that a move of the values, (k, out_features), is: the inverse of ``unwhitened``."""
        return (self.inside.T @ move @ self.outside) / self.scale

    def unwhitened(self, move: Tensor) -> Tensor:
        """The move of the values, (k, out_features), that a whitened one is."""
        return self.inside @ (self.scale * move) @ self.outside.T


def preconditioners(
    kept: Sequence[Readings], support: Mapping[str, Tensor], damping: float
) -> dict[str, KroneckerPreconditioner]:
    """F of every layer that has columns in the support, from what each kind of text to keep does there.

    Each kind counts as much as the others, by the mean over its tokens.
    """
    found = {}
    for name, index in support.items():
        inputs = torch.stack([_second_moment(r.inputs[name][:, index]) for r in kept]).sum(0)
        outputs = torch.stack([_second_moment(r.gradients[name]) for r in kept]).sum(0)
        found[name] = KroneckerPreconditioner.of(inputs, outputs, damping)
    return found


def _second_moment(rows: Tensor) -> Tensor:
    """``E[x x^T]`` over rows."""
    rows = rows.float()
    return rows.T @ rows / len(rows)
