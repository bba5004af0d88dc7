"""The base stream on disk: compressed-tensors ``pack-quantized`` files that stock transformers and vLLM read.

    X.weight_packed   int32 (out_features, ceil(in_features * bits / 32))   code + 2^(bits - 1), low bits first
    X.weight_scale    model dtype (out_features, groups)                    w = code * scale
    X.weight_shape    int64 (2,)                                            (out_features, in_features)

On little-endian machines the lanes of an int32 are the bytes that :class:`~libortho.core.streams.BaseStream` holds
(INT8: sign bit flipped; INT4: as they are), so that writing and reading move bytes and never touch a code. With
``bits=None`` a layer is a plain ``X.weight``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.checkpoint.json_files import DAMAGE
from libortho.checkpoint.tensor_files import TensorFiles
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError
from libortho.core.layer import OrthoLinear
from libortho.core.streams import BaseStream

T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """How the base of every split layer is stored; stock loaders know one scheme per checkpoint.

    Attributes:
        bits: 8, 4, or None for dense weights.
        group_size: Inputs per scale; -1 for one scale per output channel (and for dense weights).
    """

    bits: int | None
    group_size: int

    def quantization_config(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config.json`` under which transformers and vLLM load the base."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True}
        if self.group_size == -1:
            weights["strategy"] = "channel"
        else:
            weights |= {"strategy": "group", "group_size": self.group_size}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "dequantize": True,  # without it PEFT meets packed layers that have no weight
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": targets, "weights": weights}},
        }

    def tensor_names(self, layer: str) -> list[str]:
        """Names of the tensors that hold one layer's base."""
        kinds = ("weight",) if self.bits is None else ("weight_packed", "weight_scale", "weight_shape")
        return [f"{layer}.{kind}" for kind in kinds]

    def hashed_names(self, layers: Iterable[str]) -> list[str]:
        """Names of the tensors that identify the base: integers and scales, or dense weights."""
        return [n for layer in layers for n in self.tensor_names(layer) if not n.endswith(".weight_shape")]

    def hashes(self, layers: Collection[str], files: TensorFiles) -> tuple[str, str]:
        """``base_sha256``, of integers and scales (or dense weights), and ``rest_sha256``, of what no layer owns."""
        held = [n for layer in layers for n in self.tensor_names(layer)]
        return files.sha256(self.hashed_names(layers)), files.sha256(set(files.names()) - set(held))


def scheme_of(layers: Mapping[str, OrthoLinear]) -> Scheme:
    """The one scheme of all layers.

    Raises:
        CheckpointError: if they differ.
    """
    bits = _only("bits", {layer.base.bits for layer in layers.values()})
    if bits is None or all(layer.base.scales.shape[1] == 1 for layer in layers.values()):
        return Scheme(bits, -1)
    return Scheme(bits, _only("group_size", {layer.base.group_size for layer in layers.values()}))


def _only(name: str, found: set[T]) -> T:
    if len(found) > 1:
        raise CheckpointError(
            f"the layers have {name} {sorted(map(str, found))}; stock loaders take one scheme per checkpoint: split "
            f"all layers with the same {name} to save them"
        )
    return found.pop()


def encode_base(name: str, base: BaseStream) -> dict[str, Tensor]:
    """The tensors of one layer's base, as written."""
    if base.bits is None:
        return {f"{name}.weight": base.weight}
    rows = base.codes.view(torch.uint8) ^ 0x80 if base.bits == 8 else base.codes
    rows = F.pad(rows, (0, -rows.shape[1] % 4)).contiguous()
    return {
        f"{name}.weight_packed": rows.view(torch.int32),
        f"{name}.weight_scale": base.scales,
        f"{name}.weight_shape": torch.tensor([base.out_features, base.in_features], dtype=torch.int64),
    }


def decode_base(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], scheme: Scheme) -> BaseStream:
    """The base of one layer from its tensors, which it takes over: their memory becomes the base's.

    Raises:
        CheckpointError: if a tensor is missing, or has another dtype, shape or a value that cannot be right.
    """
    rows, columns = shape
    if scheme.bits is None:
        weight = expect(tensors, f"{name}.weight", shape, tuple(DTYPES.values()))
        return BaseStream(None, weight=weight)
    stored = expect(tensors, f"{name}.weight_shape", (2,), (torch.int64,)).tolist()
    if stored != [rows, columns]:
        raise CheckpointError(f"{name}.weight_shape says {stored}, expected {[rows, columns]}; {DAMAGE}")
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    packed = expect(tensors, f"{name}.weight_packed", (rows, -(-columns * scheme.bits // 32)), (torch.int32,))
    scales = expect(tensors, f"{name}.weight_scale", (rows, groups), tuple(DTYPES.values()))
    if not bool((scales > 0).all()):
        raise CheckpointError(f"{name}.weight_scale holds values that are not positive; {DAMAGE}")
    if bool(packed.view(torch.uint8)[:, columns * scheme.bits // 8 :].any()):
        raise CheckpointError(f"{name}.weight_packed holds bits behind the last column of a row; {DAMAGE}")
    codes = packed.view(torch.uint8)[:, : columns * scheme.bits // 8]
    codes = codes.bitwise_xor_(0x80).view(torch.int8) if scheme.bits == 8 else codes
    return BaseStream(scheme.bits, codes=codes.contiguous(), scales=scales)


def expect(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor ``name``, checked.

    Raises:
        CheckpointError: if it is missing, has another shape or dtype, or holds NaN or infinite values.
    """
    if name not in tensors:
        raise CheckpointError(f"the tensor {name} is missing; {DAMAGE}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise CheckpointError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted} {shape}; {DAMAGE}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinite values; {DAMAGE}")
    return tensor
