"""Streams that come into a model in memory, and go."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.packing import encode_base
from libortho.checkpoint.stream_files import choose_streams, read_stream
from libortho.checkpoint.tensor_files import sha256_of
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.layer import ortho_layers
from libortho.core.report import forget_method, record_method
from libortho.core.surgery import earlier_switch, stream_names


def add_stream(model: nn.Module, directory: str | Path, name: str) -> None:
    """Read one stream of a checkpoint into a model that has the checkpoint's base; it is off until somebody asks.

    Args:
        model: What :func:`~libortho.load` read, or a model that was saved there.
        directory: The checkpoint.
        name: The stream, a folder of its ``ortho``.

    Raises:
        CheckpointError: if the checkpoint has no such stream, it is damaged, or the model has another base.
        ConfigError: if the model has a stream of this name.
        TargetError: if ``model`` is no model in memory, or parts of it were split apart.
    """
    root = Path(directory)
    layers = ortho_layers(model)
    if not layers:
        raise ConfigError("no layer of this model is split; load the checkpoint with libortho.load")
    switch = earlier_switch(model, name)
    assert switch is not None
    base = BaseManifest.read(root)
    [name] = choose_streams(root, [name])
    stream = read_stream(root, name, base)
    found = _base_hash(model, base)
    if found != base.base_sha256:
        raise CheckpointError(
            f"the model has the base {found[:12]}..., {root} holds {base.base_sha256[:12]}...; load the model from "
            "that checkpoint, in its own dtype"
        )
    device = next(iter(layers[next(iter(base.shapes))].base.buffers())).device
    first = not switch.streams
    for layer, ortho in stream.layers.items():
        layers[layer].add_stream(name, ortho.to(device))
    switch.add_stream(name, 0.0)
    if first:
        switch.attach(model)
    if stream.method is not None:
        record_method(model, name, stream.method)


def remove_stream(model: nn.Module, name: str) -> None:
    """Take a stream out of a model in memory, and write zeros over its values.

    The model is then the base with the streams that are left. A KV cache that was computed with the stream is refused.

    Raises:
        ConfigError: if the model has no such stream.
        TargetError: if ``model`` is no model in memory.
    """
    if name not in (known := stream_names(model)):
        raise ConfigError(f"the model has no stream {name!r}; its streams are {known}")
    for layer in ortho_layers(model).values():
        layer.switch.drop_stream(name)
        if name in layer.streams:
            with torch.no_grad():
                for tensor in layer.streams.pop(name).buffers():
                    tensor.zero_()
    forget_method(model, name)


def _base_hash(model: nn.Module, base: BaseManifest) -> str:
    """Hash of the split layers, as the manifest counts it."""
    layers = ortho_layers(model)
    if set(layers) != set(base.shapes):
        return "of other layers"
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= encode_base(name, layer.base)
    return sha256_of((n, tensors[n]) for n in sorted(base.scheme.hashed_names(base.shapes)))
