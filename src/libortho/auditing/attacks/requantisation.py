"""Rounding the weights again: an edit smaller than half a step of the new grid is rounded away, and the memory is back.

    int8    per output channel          int4, int3    groups of 32 inputs          w = scale * code
    nf4     blocks of 64                w = absmax * codebook[nearest(w / absmax)]

Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454: 4-bit rounding
returned most of what unlearning had removed. The integer grids are those of this library's own base. The NF4 codebook
is that of Dettmers et al., QLoRA, arXiv 2305.14314, appendix E: the quantiles Phi^-1 at eight points from the offset
0.9677083 down to one half for the positive side and seven for the negative, with zero, divided by the largest.
Double quantisation of the block maxima is left out. The output head stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from libortho.auditing.attacks.attack import Attack, AttackInputs
from libortho.auditing.attacks.perturbation import HEADING, WARNING, Damage, damage_checks, damage_table, damaged
from libortho.auditing.page.exhibits import Drawn, Exhibit
from libortho.auditing.report import Check
from libortho.core.errors import ConfigError
from libortho.core.ops.quantisation import choose_scales, dequantise, quantise

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of 4-bit NormalFloat (QLoRA, appendix E)."""
NF4_BLOCK = 64
"""Weights, consecutive in a row-major matrix, that share one maximum (QLoRA, section 3)."""


def integer(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """``weight`` (out_features, in_features) on a symmetric grid with ``2^bits - 1`` levels, fp32.

    A last group that ``group_size`` does not fill is a shorter one; -1 is one group per output channel.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    padded = F.pad(weight.float(), (0, -weight.shape[1] % size))
    scales = choose_scales(padded, bits, size, torch.float32)
    return dequantise(quantise(padded, scales, bits), scales, torch.float32)[:, : weight.shape[1]]


def nf4(weight: Tensor, block: int = NF4_BLOCK) -> Tensor:
    """``weight`` with every entry at the nearest codebook value times its block's largest absolute weight, fp32."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    codebook = torch.tensor(NF4, device=weight.device)
    between = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny), between)
    return (codebook[codes] * absmax).flatten()[: len(flat)].view(weight.shape)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda weight: integer(weight, 8, -1),
    "int4": lambda weight: integer(weight, 4, 32),
    "nf4": nf4,
    "int3": lambda weight: integer(weight, 3, 32),
}
"""Name to function of a weight (out_features, in_features)."""


class RequantisationRow(Damage):
    """One format, "as stored" or a name from ``FORMATS``, and what the rounded models do."""

    format: str


def run(inputs: AttackInputs, formats: Sequence[str] = tuple(FORMATS)) -> list[RequantisationRow]:
    """Round all linear layers of the decoder to each format and measure; the model as stored comes first.

    Args:
        inputs: See :func:`~.perturbation.damaged`.
        formats: Names from ``FORMATS``.

    Raises:
        DataError: if there are no records.
        TargetError: if a model has no dense linear layer.
        ConfigError: if a format is not known.
    """
    if unknown := [n for n in formats if n not in FORMATS]:
        raise ConfigError(f"formats {unknown} are not known; expected names from {', '.join(FORMATS)}")
    stored: RequantisationRow = {"format": "as stored", **damaged(inputs)}
    return [stored, *[RequantisationRow(format=n, **damaged(inputs, FORMATS[n])) for n in formats]]


def checks(rows: Sequence[RequantisationRow]) -> list[Check]:
    """What rounding may bring back in each format."""
    return damage_checks([f"rounded to {r['format']}" for r in rows], rows)


def exhibit(rows: Sequence[RequantisationRow], subjects: Sequence[Drawn]) -> Exhibit:
    """A row for each format."""
    table = damage_table("Stored in another number format", "Format", [r["format"] for r in rows], rows)
    return Exhibit(HEADING, (WARNING,), tables=(table,))


ATTACK = Attack("requantisation", 10, run, checks, exhibit)
