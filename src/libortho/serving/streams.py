"""What a stream holds, as a hash that audit lines name it by."""

from __future__ import annotations

from torch import Tensor, nn

from libortho.checkpoint.tensor_files import sha256_of
from libortho.core.layer import ortho_layers
from libortho.core.surgery import stream_names


def stream_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the values of every stream, with the layers that they belong to."""
    found: dict[str, dict[str, Tensor]] = {n: {} for n in stream_names(model)}
    for layer, module in ortho_layers(model).items():
        for name, stream in module.streams.items():
            found[name] |= {f"{layer}.{key}": t for key, t in stream.state_dict().items()}
    return {n: sha256_of(sorted(tensors.items())) for n, tensors in found.items()}
