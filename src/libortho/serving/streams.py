"""What a stream holds, as a hash that audit lines name it by."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from libortho.core.layer import ortho_layers
from libortho.core.surgery import stream_names


def stream_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the values of every stream, with the layers that they belong to."""
    found = {n: hashlib.sha256() for n in stream_names(model)}
    for layer, module in sorted(ortho_layers(model).items()):
        for name, stream in module.streams.items():
            for key, tensor in sorted(stream.state_dict().items()):
                found[name].update(f"{layer}.{key} {tuple(tensor.shape)}".encode())
                found[name].update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {n: h.hexdigest() for n, h in found.items()}
