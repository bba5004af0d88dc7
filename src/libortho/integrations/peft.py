"""PEFT and TRL: streams trained by other trainers, LoRAs of other people as streams, and streams for other engines.

column_lora       a stream that is trained yet to be, as a PeftModel: lora_A names columns and is frozen
freeze_columns    freeze it again, after PeftModel.from_pretrained(..., is_trainable=True)
from_peft         a LoRA, that one or any other, as a stream behind the switch
export_adapter    a stream as a LoRA with one rank, for engines that read no rank_pattern
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, variants
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from libortho.checkpoint.directories import check_new_place, publish, staging
from libortho.checkpoint.json_files import write_json
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.stream_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, choose_streams, read_stream
from libortho.checkpoint.stream_tensors import adapter_config, check_stream, encode_lora, sizes
from libortho.core.arguments import check_model, check_tokenizer
from libortho.core.config import check_stream_name
from libortho.core.errors import CheckpointError, ConfigError, TargetError
from libortho.core.layer import OrthoLinear, ortho_layers
from libortho.core.models import denormals_flushed, plain_torch, unwrapped
from libortho.core.progress import Progress
from libortho.core.report import record_method
from libortho.core.run_cache import RunCache
from libortho.core.streams import BaseStream, Entries, OrthoStream
from libortho.core.streams.ortho import MAX_RANK
from libortho.core.surgery import (
    earlier_switch,
    frozen,
    install,
    linear_shape,
    linear_weight,
    stream_names,
    swap,
    with_stream,
)
from libortho.core.switch.alpha import Switch
from libortho.core.targets import find_targets
from libortho.integrations.peft_adapters import Lora, read_adapter
from libortho.isolation.retain import given_pieces
from libortho.lm.checks import check_causal, check_tokens
from libortho.lm.generation import token_limit
from libortho.lm.model import LanguageModel
from libortho.lm.reading_progress import reading
from libortho.text.corpus import shipped_text
from libortho.text.records import Source
from libortho.tuning.config import TuneConfig
from libortho.tuning.reading import about_others, chosen_columns, encoded, held_apart, retain_length, texts_to_keep

KEEP_FROZEN = getattr(variants, "_register_frozen_peft_weight", None)
"""Keeps a factor frozen through ``set_adapter``; private, and absent before PEFT 0.21."""


@plain_torch()
@denormals_flushed()
def column_lora(
    model: nn.Module,
    tokenizer: Any,
    data: Source,
    config: TuneConfig | None = None,
    *,
    retain: Source | None = None,
    progress: Progress | None = None,
) -> PeftModel:
    """Choose the columns that ``tune`` would take, and return the model with a LoRA on just these.

    lora_A (k, in_features) is one-hot, names the columns and is frozen; lora_B (out_features, k) is zero and trained;
    lora_alpha is k. So any trainer of PEFT models trains a stream over a base that does not move.

    Args:
        model: A transformers causal LM with dense weights; the adapter is put into it.
        tokenizer: Its tokenizer.
        data: What is to be known; see :mod:`libortho.text.records`.
        config: ``target_modules``, ``ratio``, ``score`` and ``seed`` count here, what belongs to training does not.
        retain: Text on which the model must stay what it is; by default as in ``tune``.
        progress: Called with (phase, done, total).

    Raises:
        DataError: if a record is malformed, empty or longer than the model reads.
        TargetError: if the model is no decoder-only language model, is split, carries adapters, or no layer matches.
        ConfigError: if the configuration asks for a base of integers or for streams below this one.
    """
    config = config or TuneConfig()
    if config.bits is not None or config.over:
        raise ConfigError(
            f"bits is {config.bits!r} and over is {config.over!r}; PEFT trains over dense weights and knows no "
            "streams: leave both out, or train with libortho.tune"
        )
    if config.epsilon is not None:
        raise ConfigError(
            "epsilon is given; expected none: columns and text are chosen by the data here, and the noise is the "
            "trainer's to add. Train with libortho.tune"
        )
    check_model(model)
    check_causal(model)
    check_tokenizer(tokenizer)
    targets = find_targets(model, config.target_modules)
    limit = token_limit(model, None)
    records, items = encoded(data, model, tokenizer, limit, "data")
    check_tokens(model, tokenizer, ((f"general text {i}", t) for i, t in enumerate(shipped_text(), 1)))
    with frozen(model, None):
        lm = LanguageModel(model)
        lm.check_layers(targets)
        length, store = retain_length(limit), RunCache()
        given = None if retain is None else given_pieces(retain, records, tokenizer, length, config.seed)
        with reading(model, progress, "texts", 16 * 64):
            _, kept = held_apart(texts_to_keep(model, tokenizer, items, given, length, config, store))
        beside = about_others(records, tokenizer, limit, config)
        with reading(model, progress, "columns", sum(len(e.ids) for e in (*kept, *beside, *items))):
            columns, _ = chosen_columns(lm, targets, items, kept, beside, config, store)
    return _with_lora(model, {n: i for n, i in columns.items() if len(i)})


def _with_lora(model: nn.Module, columns: Mapping[str, Tensor]) -> PeftModel:
    """The model with a LoRA that reads these columns, (k,) by layer."""
    described = adapter_config({n: len(i) for n, i in columns.items()}) | {
        "inference_mode": False,
        "fan_in_fan_out": all(isinstance(model.get_submodule(n), Conv1D) for n in columns),
    }
    del described["peft_type"]
    wrapped = get_peft_model(model, LoraConfig(**described))
    assert isinstance(wrapped, PeftModel)
    for name, index in columns.items():
        weight = wrapped.get_base_model().get_submodule(name).lora_A["default"].weight  # type: ignore[union-attr,index]
        with torch.no_grad():
            weight.zero_()
            weight[torch.arange(len(index), device=weight.device), index.long().to(weight.device)] = 1
    freeze_columns(wrapped)
    return wrapped


def freeze_columns(model: nn.Module) -> None:
    """Freeze every lora_A that names columns (one 1 in each row), so that training moves lora_B alone.

    PEFT does not store what is frozen: call it after ``PeftModel.from_pretrained(..., is_trainable=True)``. Before PEFT
    0.21, call it after every ``set_adapter`` as well.

    Args:
        model: A PeftModel.

    Raises:
        ConfigError: if no lora_A of the model names columns.
    """
    check_model(model)
    found = False
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, down in module.lora_A.items():
            weight: Tensor = down.get_parameter("weight").detach()
            if bool(((weight != 0).sum(1) == 1).all()) and bool((weight.sum(1) == 1).all()):
                found = True
                down.requires_grad_(False)
                if KEEP_FROZEN is not None:
                    KEEP_FROZEN(module, adapter, "lora_A")
    if not found:
        raise ConfigError("no lora_A of this model has one 1 in each row; expected a model of column_lora")


@plain_torch()
def from_peft(model: nn.Module, adapter: PeftModel | str | Path, stream: str = "default") -> nn.Module:
    """Make a LoRA a stream of the model, in place.

    Rows of lora_A that read one input become columns, all others a tail of low rank. At alpha = 1 the model computes
    what PEFT computes; the stream stands at alpha = 0 afterwards, where the model is what it was, bit for bit. After an
    error the model is what it was.

    Args:
        model: The model that the adapter was trained on, dense or split; or the PeftModel itself, or what it wraps. The
            adapter then moves out of it into the stream, and the PeftModel is used up.
        adapter: A folder that ``save_pretrained`` wrote, or the model in memory. Its values are stored in its dtype.
        stream: Name of the stream, such as "hr".

    Returns:
        The model, without a wrapper.

    Raises:
        ConfigError: if the adapter is no plain LoRA (DoRA, a trained bias, modules_to_save, another PEFT method, ...),
            adds nothing, has a rank over 512, or the name of the stream is taken or impossible.
        CheckpointError: if the folder is incomplete or damaged, or holds a pickle.
        TargetError: if the model lacks a layer of the adapter, or has it in another shape.
    """
    check_stream_name(stream)
    check_model(model)
    loras = read_adapter(adapter)
    inner = model
    wrapped: dict[str, nn.Module] = {}
    if isinstance(adapter, PeftModel) and unwrapped(model) is adapter.get_base_model():
        inner = adapter.get_base_model()
        found = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer)}
        wrapped = {n: m for n, m in found.items() if isinstance(m, nn.Module)}
        swap(inner, {n: m.get_base_layer() for n, m in found.items()})
    try:
        parts = _parts(inner, loras)
        layers, switch = _layers(inner, parts, {n: lora.shape for n, lora in loras.items()}, stream)
    except BaseException:
        swap(inner, wrapped)
        raise
    inner.__dict__.pop("peft_config", None)
    install(inner, layers, switch)
    columns, _, rank = (sum(each) for each in zip(*map(sizes, parts.values()), strict=True))
    record_method(inner, stream, {"verb": "from_peft", "layers": len(parts), "columns": columns, "directions": rank})
    return inner


def _parts(model: nn.Module, loras: Mapping[str, Lora]) -> dict[str, OrthoStream]:
    """What each layer of the model gets; layers to which the adapter adds nothing are left out."""
    modules, parts = dict(model.named_modules()), {}
    for name, lora in loras.items():
        if name not in modules:
            raise TargetError(
                f"the adapter is for the layer {name}, which this {type(model).__name__} has not; expected the model "
                "that it was trained on"
            )
        part = lora.stream() if bool(lora.up.any()) else OrthoStream()
        columns, _, rank = sizes(part)
        if columns + rank > MAX_RANK:
            raise ConfigError(
                f"the adapter has {columns} columns and {rank} directions in {name}; a stream holds at most {MAX_RANK} "
                "of both in a layer. Train a LoRA of a lower rank"
            )
        if columns + rank:
            parts[name] = part
    return parts


@torch.no_grad()
def _layers(
    model: nn.Module, parts: Mapping[str, OrthoStream], shapes: Mapping[str, tuple[int, int]], stream: str
) -> tuple[dict[str, OrthoLinear], Switch]:
    """The layers that callers get, and the switch of the stream, which stands at 0."""
    earlier_switch(model, stream)
    targets = find_targets(model, tuple(f"re:{re.escape(n)}" for n in parts), again=True, tails=True)
    switch = Switch()
    switch.add_stream(stream)
    layers = {}
    for name, module in targets.items():
        if shapes[name] != (shape := linear_shape(module)):
            raise TargetError(
                f"the adapter is for {name} with (outputs, inputs) {shapes[name]}, and the model has {shape}; expected "
                "the model that it was trained on"
            )
        base = module.base if isinstance(module, OrthoLinear) else BaseStream(None, weight=linear_weight(module))
        device = next(base.buffers()).device
        layers[name] = with_stream(name, module, base, parts[name].to(device), switch, stream)
    return layers, switch


def export_adapter(source: nn.Module | str | Path, stream: str, out: str | Path, *, uniform_rank: bool = True) -> Path:
    """Write a stream as a plain PEFT LoRA, which stock PEFT and other engines load over the alpha = 0 model.

    With one rank for all layers, lora_alpha is that rank and there are no patterns: empty rows of lora_A and columns of
    lora_B fill it up, and add nothing. So engines and converters that read no rank_pattern scale every layer by 1.

    Args:
        source: A model with streams, or the directory of a checkpoint.
        stream: Name of the stream.
        out: Folder to make.
        uniform_rank: One rank for all layers. False: each layer its own, with patterns, as in a checkpoint.

    Returns:
        ``out``.

    Raises:
        CheckpointError: if there is no such stream, it has free entries, which no LoRA holds, its rank exceeds 512,
            ``out`` exists or cannot be written, or the checkpoint is damaged.
    """
    layers, shapes = _held(source, stream)
    check_stream(stream, layers)
    if any(isinstance(part.support, Entries) for part in layers.values()):
        raise CheckpointError(
            f"stream {stream!r} has free entries, which no LoRA holds; make it with structure='columns'"
        )
    target = check_new_place(out)
    ranks = {n: sum(sizes(part)) for n, part in layers.items()}
    if uniform_rank:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    tensors: dict[str, Tensor] = {}
    for name, part in layers.items():
        more = ranks[name] - sum(sizes(part))
        for key, tensor in encode_lora(name, part, shapes[name]).items():
            filled = F.pad(tensor, (0, 0, 0, more) if key.endswith("lora_A.weight") else (0, more))
            tensors[key] = filled.detach().cpu().contiguous()
    with staging(target) as staged:
        try:
            save_file(tensors, staged / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            write_json(staged / ADAPTER_CONFIG, adapter_config(ranks))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot write {target}: {error}; is there room on the disk?") from error
        publish(staged, target)
    return Path(out)


def _held(source: nn.Module | str | Path, stream: str) -> tuple[dict[str, OrthoStream], Mapping[str, tuple[int, int]]]:
    """The parts of a stream and the shapes of the layers, from a model or from a checkpoint."""
    if not isinstance(source, nn.Module):
        directory = Path(source)
        base = BaseManifest.read(directory)
        [name] = choose_streams(directory, [stream])
        return read_stream(directory, name, base).layers, base.shapes
    split = ortho_layers(source)
    if stream not in (present := stream_names(source)):
        raise CheckpointError(f"the model has no stream {stream!r}; it has {present or 'none'}")
    held = {n: m.streams[stream] for n, m in split.items() if stream in m.streams}
    layers = {n: s for n, s in held.items() if isinstance(s, OrthoStream) and any(sizes(s))}
    return layers, {n: linear_shape(m) for n, m in split.items()}
