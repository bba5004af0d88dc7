"""The quantised weights that an isolation starts from, and the layers that it ends with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from libortho.core.dtypes import DTYPES
from libortho.core.layer import OrthoLinear
from libortho.core.progress import Progress
from libortho.core.run_cache import Entry, RunCache
from libortho.core.streams import BaseStream, OrthoStream
from libortho.core.surgery import linear_weight, with_stream
from libortho.core.switch.alpha import Switch
from libortho.isolation.config import IsolateConfig
from libortho.isolation.support import RequestReadings
from libortho.training.edit import EditLinear
from libortho.training.rounding import gptq_bases


def quantised_bases(
    readings: RequestReadings,
    support: Mapping[str, torch.Tensor],
    config: IsolateConfig,
    store: RunCache,
    progress: Progress | None = None,
) -> dict[str, BaseStream]:
    """The quantised weights of layers that are dense so far, exact where it matters on text to keep and the records."""
    bits = config.bits
    if bits is None:
        return {}
    dense = {n: m for n, m in readings.targets.items() if not isinstance(m, OrthoLinear)}

    def make() -> Entry:
        made = gptq_bases(dense, support, readings.inputs, bits, config.resolved_group_size, progress)
        return Entry({f"{n}.{field}": getattr(b, field) for n, b in made.items() for field in ("codes", "scales")})

    found = store.get_or_compute("bases", make).tensors
    device = {n: linear_weight(m).device for n, m in dense.items()}
    return {
        n: BaseStream(bits, codes=found[f"{n}.codes"].to(device[n]), scales=found[f"{n}.scales"].to(device[n]))
        for n in dense
    }


def edited_from(module: nn.Module) -> torch.Tensor | BaseStream:
    """What a layer is edited from."""
    return module.base if isinstance(module, OrthoLinear) else linear_weight(module)


def finished_layer(
    name: str, module: nn.Module, edited: EditLinear, config: IsolateConfig, switch: Switch
) -> OrthoLinear:
    """The split layer that an edited one becomes: its base, its new stream and those that it had."""
    base, support = edited.finish(DTYPES[config.value_dtype])
    return with_stream(name, module, base, OrthoStream(support), switch, config.stream)
