"""LoRA adapters as PEFT stores and holds them, read as streams; what is no plain LoRA is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from libortho.checkpoint.json_files import open_regular, read_json
from libortho.checkpoint.stream_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from libortho.core.config import is_number
from libortho.core.dtypes import DTYPES
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.streams import Columns, Factors, OrthoStream

_PLAIN = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "alpha_pattern", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "eva_config",
}  # fmt: skip
"""Settings that a plain LoRA may have; any other one that is on makes it another method."""
_BESIDE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin a LoRA that leave the weights of the base as they are."""
_FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Lora:
    """The LoRA of one layer: it adds ``up @ down @ x``.

    Attributes:
        down: (r, in_features).
        up: (out_features, r), the scale multiplied in.
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    def stream(self) -> OrthoStream:
        """Rows of ``down`` with one input are columns, all others directions of a tail; empty rows add nothing."""
        inputs = (self.down != 0).sum(1)
        support = tail = None
        if bool((single := inputs == 1).any()):
            down = self.down[single]
            index, place = down.abs().argmax(1).unique(return_inverse=True)
            values = (self.up[:, single].float() * down.float().sum(1)).T
            values = values.new_zeros(len(index), values.shape[1]).index_add_(0, place, values)
            support = Columns(index, values.to(self.up.dtype))
        if bool((several := inputs > 1).any()):
            tail = Factors(self.down[several], self.up[:, several])
        return OrthoStream(support, tail)


def read_adapter(adapter: PeftModel | str | Path) -> dict[str, Lora]:
    """Each layer's LoRA, by its dotted path in the model that the adapter was trained on.

    Args:
        adapter: A folder of ``save_pretrained``, or the model in memory.

    Raises:
        CheckpointError: if files are missing, damaged, no safetensors, or do not fit each other.
        ConfigError: if it is no plain LoRA, adds nothing, is merged, or is one of several.
    """
    if isinstance(adapter, PeftModel):
        return _from_memory(adapter)
    if not isinstance(adapter, str | Path):
        raise ConfigError(
            f"adapter is a {type(adapter).__name__}; expected the folder of a PEFT adapter, or a peft.PeftModel"
        )
    return _from_folder(Path(adapter))


def _from_memory(model: PeftModel) -> dict[str, Lora]:
    if len(model.peft_config) != 1:
        raise ConfigError(
            f"this PeftModel has the adapters {', '.join(map(repr, model.peft_config))}; expected one: save them with "
            "save_pretrained and give the folder of each"
        )
    [(name, held)] = model.peft_config.items()
    config = held.to_dict()
    _check_plain(config, f"the adapter {name!r}")
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    if any(m.merged for m in layers.values()):
        raise ConfigError(f"the adapter {name!r} is merged into the weights; call unmerge_adapter() of the model first")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    scales = {n: float(m.scaling[name]) for n, m in layers.items() if name in m.scaling}
    return _loras(tensors, config, scales, f"the adapter {name!r}")


def _from_folder(folder: Path) -> dict[str, Lora]:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_CONFIG}; expected the folder of a PEFT adapter on this disk, as "
            "save_pretrained writes it"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise CheckpointError(
            f"{folder} holds its weights as a pickle, which can run code and is not read; save the adapter again with "
            "a current PEFT"
            if pickled
            else f"{folder} holds no {ADAPTER_WEIGHTS}; copy the whole folder of the adapter"
        )
    config = read_json(folder / ADAPTER_CONFIG)
    _check_plain(config, str(folder))
    try:
        with open_regular(folder / ADAPTER_WEIGHTS) as file:
            tensors = load_bytes(file.read())
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise CheckpointError(f"cannot read {folder / ADAPTER_WEIGHTS}: {error}; copy the adapter again") from error
    return _loras(tensors, config, None, str(folder))


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    """Refuse other methods than LoRA, and everything that a LoRA can train or change besides its two factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        name = str(getattr(kind, "value", kind))
        raise ConfigError(f"{where} is of the PEFT type {name:.40}; expected LORA, whose weights a stream can hold")
    for key, value in config.items():
        if key not in _PLAIN and value and value != "none":
            raise ConfigError(
                f"{where} has {key:.60}={value!s:.60}; expected a plain LoRA of linear layers, which trains lora_A "
                "and lora_B alone: train it without this setting"
            )
    start = config.get("init_lora_weights", True)
    if start not in _BESIDE_THE_BASE:
        raise ConfigError(
            f"{where} has init_lora_weights={start!s:.40}, which changes the base that it is trained on; convert "
            "it first: save_pretrained(folder, path_initial_model_for_weight_conversion=...) of PEFT"
        )


def _loras(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], scales: Mapping[str, float] | None, where: str
) -> dict[str, Lora]:
    """Pair the factors up and multiply the scales in: those given, or those of the configuration."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        if (match := _FACTOR.fullmatch(key)) is None:
            raise ConfigError(
                f"{where} holds the tensor {key!r:.120}; expected lora_A and lora_B of linear layers and nothing else"
            )
        sides.setdefault(match["layer"], {})[match["side"]] = tensor.detach()
    found = {}
    for layer, pair in sides.items():
        if len(pair) < 2:
            raise CheckpointError(f"{where} lacks a factor of {layer}; copy the adapter again")
        down, up = pair["A"], pair["B"]
        rank, scale = _rank_and_scale(config, layer, where)
        if down.dim() != 2 or up.dim() != 2 or (down.shape[0], up.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{where}: lora_A of {layer} is {tuple(down.shape)} and lora_B {tuple(up.shape)}, and the "
                f"configuration says rank {rank}; expected (rank, inputs) and (outputs, rank)"
            )
        dtype = torch.promote_types(down.dtype, up.dtype)
        if dtype not in DTYPES.values():
            raise CheckpointError(f"{where}: {layer} is stored in {dtype}; expected one of {', '.join(DTYPES)}")
        scaled = (up.float() * (scale if scales is None else scales[layer])).to(dtype)
        if not bool(down.isfinite().all() and scaled.isfinite().all()):
            raise CheckpointError(f"{where}: {layer} holds values that are no finite numbers; train it again")
        found[layer] = Lora(down.to(dtype), scaled)
    if not any(bool(lora.up.any()) for lora in found.values()):
        raise ConfigError(f"{where} adds nothing to the model: every lora_B is zero; train it first")
    return found


def _rank_and_scale(config: Mapping[str, Any], layer: str, where: str) -> tuple[int, float]:
    """As PEFT: the first pattern that matches the end of the path, or else the common value."""
    rank = _of_layer(config, "rank_pattern", "r", layer, where)
    alpha = _of_layer(config, "alpha_pattern", "lora_alpha", layer, where)
    if rank != int(rank) or rank < 1:
        raise CheckpointError(f"{where} gives {layer} the rank {rank}; expected a whole number of at least 1")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Mapping[str, Any], patterns: str, default: str, layer: str, where: str) -> float:
    given = config.get(patterns) or {}
    try:
        key = next((k for k in given if re.match(rf"(.*\.)?({k})$", layer)), None)
    except (re.error, TypeError) as error:
        raise CheckpointError(f"{where}: {patterns} cannot be read: {error}; copy the adapter again") from error
    value = config.get(default, 8) if key is None else given[key]
    if not is_number(value):
        raise CheckpointError(f"{where}: {default} of {layer} is {value!r:.40}; expected a number")
    return float(value)
