"""Codes of the base that answer for each other's rounding, where inputs are large.

Rounding a weight to the nearest code changes an output by the error times the input, and a few inputs of a language
model are hundreds of times larger than the others (massive activations, arXiv 2402.17762): of the divergence that INT8
causes in SmolLM2-135M, two fifths came from one layer. Columns are rounded one after another, and what the rounding of
one did to the outputs, those still to come make up for (GPTQ, arXiv 2210.17323):

    q_j = round(w_j / s_j),    w_k <- w_k - (w_j - s_j q_j) U_jk / U_jj  for k > j

with U^T U = (X^T X / m + damping I)^-1, U upper triangular, m the mean of the diagonal of X^T X, and the largest inputs
first. The scales stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from libortho.core.ops.quantisation import choose_scales, quantise
from libortho.core.progress import Progress, tell
from libortho.core.streams.base import BaseStream
from libortho.core.surgery import linear_weight

DAMPING = 0.3
"""Share of the mean squared input that is added to every input's, where some thousand tokens are read."""
_BLOCK = 64
"""Columns after whose rounding the columns beyond are changed together."""


@torch.no_grad()
def gptq_bases(
    layers: Mapping[str, nn.Module],
    exact: Mapping[str, Tensor],
    inputs: Callable[[str], Tensor],
    bits: int,
    group_size: int,
    progress: Progress | None = None,
) -> dict[str, BaseStream]:
    """A base for every layer, with codes that make up for each other's rounding on this text.

    Args:
        layers: Dense linear layers by name.
        exact: Columns, by layer, that other values will stand in for; see ``gptq_codes``.
        inputs: Name to what a layer is given on text to be exact on, (tokens, in_features); asked for one layer at a
            time, for those of all would be the largest thing in memory.
        bits: 8 or 4.
        group_size: Inputs per scale; -1 for one scale per output channel.
        progress: Called with ("rounding", layers done, layers).
    """
    bases: dict[str, BaseStream] = {}
    for name, module in layers.items():
        tell(progress, "rounding", len(bases), len(layers))
        weight = linear_weight(module)
        scales = choose_scales(weight, bits, group_size, weight.dtype)
        codes = gptq_codes(weight, scales, bits, inputs(name), exact.get(name))
        bases[name] = BaseStream.from_codes(codes, scales, bits)
    tell(progress, "rounding", len(bases), len(layers))
    return bases


def gptq_codes(
    weight: Tensor, scales: Tensor, bits: int, inputs: Tensor, exact: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """INT8 codes (out_features, in_features) under these scales.

    Args:
        weight: (out_features, in_features).
        scales: (out_features, groups).
        bits: 8 or 4.
        inputs: (tokens, in_features) of text to keep.
        exact: Columns that are not left to these codes: theirs are the nearest, they make up for nothing and nothing
            makes up for them.
        damping: Share of the mean squared input that is added to every input's. The smaller, the more is made of the
            sample, and of few tokens too much.
    """
    top, group = 2 ** (bits - 1) - 1, weight.shape[1] // scales.shape[1]
    codes = quantise(weight, scales, bits)
    free = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    if exact is not None:
        free[exact] = False
    x = inputs.float()
    size = x.square().sum(0)
    order = size.argsort(descending=True)
    order = order[free[order]]
    x = x[:, order]
    gram = x.T @ x / size.mean().clamp_min(1e-30)
    gram.diagonal().add_(damping)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    left = weight.float().T[order].contiguous()
    steps = scales.float().T.repeat_interleave(group, 0)[order]
    found = torch.empty_like(left)
    for begin in range(0, len(order), _BLOCK):
        end = min(begin + _BLOCK, len(order))
        errors = torch.empty(end - begin, left.shape[1], device=left.device)
        for j in range(begin, end):
            found[j] = (left[j] / steps[j]).round_().clamp_(-top, top)
            errors[j - begin] = (left[j] - found[j] * steps[j]) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    codes[:, order] = found.T.to(torch.int8)
    return codes
