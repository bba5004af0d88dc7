r"""A linear layer drawn as two streams.

              +-- base   dense INT8 / INT4 codes * scales --+
        x ----+                                             +--(+)--> y  (+ bias)
              +-- ortho  a few columns or entries --alpha---+

    y = W_base x + sum_s alpha_s W_ortho,s x + bias

At ``alpha = 0`` the second line of the drawing does not run: a branch, not a product with zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from libortho.core.arguments import check_model
from libortho.core.errors import ConfigError, TargetError
from libortho.core.ops import library
from libortho.core.streams import BaseStream, Columns, Entries, OrthoStream
from libortho.core.switch.alpha import AlphaState, Switch


@dataclass(frozen=True)
class LayerReport:
    """What a split did to one layer. Errors are relative Frobenius norms, of the tensors as stored.

    They compare with the weight that was split: the dense one, or, in a layer that a later request changed, the sum of
    base and streams as that request found them. Densities and bytes are those of all streams together.

    Attributes:
        name: Dotted path.
        shape: (out_features, in_features).
        rank: Singular directions in the base; the full rank if it was not truncated.
        used_low_rank: False if the weight was quantised directly, by request or by fall-back.
        low_rank_error: Error of the truncation; None if none was tried.
        base_error: Error of the base stream alone.
        final_error: Error of base + ortho.
        ortho_density: Entries of the column or sparse part / weights of the layer.
        tail_rank: Directions kept in the tail.
        tail_density: Stored tail values / weights of the layer.
        base_bytes: Bytes of codes and scales.
        ortho_bytes: Bytes of the ortho stream, indices and tail included.
        output_error: Relative error of the layer's outputs on calibration data; None without such data.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    used_low_rank: bool
    low_rank_error: float | None
    base_error: float
    final_error: float
    ortho_density: float
    tail_rank: int
    tail_density: float
    base_bytes: int
    ortho_bytes: int
    output_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


class _NoWeightError(TargetError, AttributeError):
    """Somebody reads the weight of a split layer."""


class OrthoLinear(nn.Module):
    """A linear layer over one base stream and any number of named ortho streams.

    Attributes:
        base: The base stream.
        streams: Name to ortho stream.
        bias: (out_features,) or None; the parameter of the layer that was split.
        report: What the split did.
        sorted_rows: Whether the input holds all tokens of the batch in their order; False for an expert that a router
            sends some of them, and in families that put the tokens before the sequences.
    """

    sorted_rows = True

    def __init__(
        self, base: BaseStream, bias: nn.Parameter | None, switch: Switch, report: LayerReport | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.streams = nn.ModuleDict()
        self.register_parameter("bias", bias)
        self.switch = switch
        self.report = report

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise _NoWeightError(
                "a split layer has no weight of its own, but this model family reads the weight of a layer instead of "
                f"calling it (here {self.out_features} x {self.in_features}); leave the layer out of target_modules. "
                "dense_weight() makes the weight that a layer applies"
            )
        return super().__getattr__(name)

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.base.out_features

    def add_stream(self, name: str, stream: OrthoStream) -> None:
        """Register an ortho stream under a new name."""
        if name in self.streams:
            raise ConfigError(f"stream {name!r} exists already; streams are {sorted(self.streams)}")
        self.streams[name] = stream

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features), under the switch's current alpha.

        Raises:
            AlphaError: if alpha is per sequence and the sequence of a row of the input is not known; expected
                (batch, ..., in_features) or, inside a forward pass of the model, (batch * tokens, in_features).
            AlphaContextError: if this thread cannot know its alpha.
        """
        if is_compiling():
            return self._traced(x)
        # Straight into the dictionaries and .forward: attribute searches and calls of nested modules would cost more
        # than the branch.
        state = self.switch.current()
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = self._modules["base"].forward(flat, self._parameters["bias"])  # type: ignore[union-attr]
        if not state.off:
            for name, stream in self.streams._modules.items():
                value = state.of(name)
                if isinstance(value, tuple):
                    each = state.tokens_each(name, x, self.sorted_rows)
                    y = stream.forward(y, flat, state.per_token(name, each, x.device))
                elif value != 0.0:
                    y = stream.forward(y, flat, value)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _traced(self, x: Tensor) -> Tensor:
        """The same through operators, so that one compiled graph serves every alpha."""
        flat = x.reshape(-1, x.shape[-1])
        y = self.base.traced(flat, self._parameters["bias"])
        for name, stream in self.streams.items():
            assert isinstance(stream, OrthoStream)
            y = stream.traced(y, flat, library.alpha(x.detach(), self.switch.number, name, self.sorted_rows))
        return y.view(*x.shape[:-1], y.shape[-1])

    def dense_weight(self, alpha: float | dict[str, float] = 1.0) -> Tensor:
        """The fp32 weight (out_features, in_features) that the layer applies under ``alpha``."""
        weight = self.base.dense(torch.float32)
        for name, stream in self.streams.items():
            share = alpha.get(name, 0.0) if isinstance(alpha, dict) else alpha
            if share:
                assert isinstance(stream, OrthoStream)
                part = torch.zeros_like(weight)
                stream.add_to(part)
                weight += share * part
        return weight

    def extra_repr(self) -> str:
        """Shape and streams."""
        return f"in_features={self.in_features}, out_features={self.out_features}, streams={list(self.streams)}"


def ortho_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The split layers of a model by dotted path.

    Raises:
        TargetError: if ``model`` is no model in memory.
    """
    check_model(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}


def touched(layer: OrthoLinear) -> Tensor:
    """Where any support of the layer lies, (out_features, in_features) bool."""
    device = next(layer.base.buffers()).device
    mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool, device=device)
    for stream in layer.streams.values():
        support = stream.support if isinstance(stream, OrthoStream) else None
        if isinstance(support, Columns):
            mask[:, support.index.long()] = True
        elif isinstance(support, Entries):
            rows = torch.repeat_interleave(torch.arange(len(mask), device=mask.device), support.rows.diff().long())
            mask[rows, support.columns.long()] = True
    return mask


def quantise_activations(model: nn.Module, bits: int | None = 8) -> None:
    """Round the inputs of the INT8 base streams as well (W8A8): faster where there are many tokens, and less exact.

    It takes effect where a base is INT8 with one scale per output channel, beyond the few tokens of a decode step, and
    where no gradient is wanted. It is a setting of the model in memory; checkpoints do not store it.

    Args:
        model: A model with split layers.
        bits: 8, or None to take the inputs as they are.

    Raises:
        ConfigError: for other bits, or if no layer has such a base.
    """
    if bits not in (8, None):
        raise ConfigError(f"activation bits {bits!r}; expected 8 or None")
    layers = [m for m in ortho_layers(model).values() if m.base.bits == 8 and m.base.scales.shape[1] == 1]
    if not layers:
        raise ConfigError(
            "no layer has an INT8 base with one scale per output channel; split with bits=8 and group_size=None"
        )
    for layer in layers:
        layer.base.activation_bits = bits


__all__ = ["AlphaState", "LayerReport", "OrthoLinear", "ortho_layers", "quantise_activations", "touched"]
