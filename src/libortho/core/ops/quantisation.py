"""Integer codes to weights and back, in plain torch: what every faster path is compared with.

    w[n, k] = code[n, k] * scale[n, k // group]        symmetric, codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1]

INT4 codes are stored two to a byte, offset by 8, the even column in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Clipping a group can pay at 4 bits, where rounding hurts more than a shortened largest weight; these are the shares
# of the largest weight that are tried. 1.0 comes first, so that a tie keeps every weight in range.
_INT4_SHRINK = tuple(1.0 - 0.02 * i for i in range(16))


def choose_scales(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Scales for ``quantise``, rounded to the dtype in which they are stored.

    INT8 takes the largest weight of each group: no weight is clamped. INT4 takes, for each group, the share of the
    largest weight with the least squared error.

    Args:
        weight: (out_features, in_features), any float dtype.
        bits: 8 or 4.
        group_size: Inputs per scale; -1 for one scale per output channel.
        dtype: Storage dtype of the scales.

    Returns:
        (out_features, groups), strictly positive.
    """
    groups = _grouped(weight.float(), group_size)
    top = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1, keepdim=True)
    full = (largest / top).to(dtype).float()
    smallest = torch.finfo(dtype).tiny
    best = full.clamp_min(smallest)
    if bits == 4:
        best_error = _rounding_error(groups, best, top)
        for share in _INT4_SHRINK[1:]:
            scale = (largest * share / top).to(dtype).float().clamp_min(smallest)
            error = _rounding_error(groups, scale, top)
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best.squeeze(-1).to(dtype)


def quantise(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Nearest codes, (out_features, in_features) int8, under scales of shape (out_features, groups)."""
    top = 2 ** (bits - 1) - 1
    groups = _grouped(weight.float(), weight.shape[1] // scales.shape[1])
    return torch.round(groups / scales.float().unsqueeze(-1)).clamp_(-top, top).to(torch.int8).view(weight.shape)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scales``, (out_features, in_features), rounded once to ``dtype``.

    A code times a 16-bit scale is exact in fp32, so a product in the scales' own dtype rounds once too, and is cheaper.
    """
    groups = _grouped(codes, codes.shape[1] // scales.shape[1])
    if scales.dtype != dtype:
        scales = scales.float()
    return groups.to(scales.dtype).mul_(scales.unsqueeze(-1)).to(dtype).view(codes.shape)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes in [-8, 7], (out_features, in_features), to bytes (out_features, in_features / 2)."""
    nibbles = (codes + 8).to(torch.uint8).view(codes.shape[0], -1, 2)
    return nibbles[..., 0] | (nibbles[..., 1] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_int4`."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1)
    return nibbles.flatten(1).to(torch.int8) - 8


def _grouped(tensor: Tensor, group_size: int) -> Tensor:
    rows, columns = tensor.shape
    return tensor.reshape(rows, -1, columns if group_size == -1 else group_size)


def _rounding_error(groups: Tensor, scale: Tensor, top: int) -> Tensor:
    return ((groups / scale).round().clamp(-top, top) * scale - groups).square().sum(-1, keepdim=True)
