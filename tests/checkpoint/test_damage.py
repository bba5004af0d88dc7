"""Damage of each kind is named, and nothing damaged is half loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import LAYER, Tensors, forge_base, forge_json, forge_stream, rewrite, set_to
from making import (
    edit,
    flip,
    truncate,
)

from libortho import CheckpointError
from libortho.checkpoint import load

A = f"base_model.model.{LAYER}.lora_A.weight"
B = f"base_model.model.{LAYER}.lora_B.weight"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / "libortho.json").unlink(), "libortho.json is missing"),
    "manifest is no JSON": (lambda d: (d / "libortho.json").write_text("{"), "cannot read"),
    "manifest is a list": (lambda d: (d / "libortho.json").write_text("[]"), "expected a JSON object"),
    "newer format": (lambda d: edit(d / "libortho.json", lambda m: m.update(libortho_format=2)), "update libortho"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot read"),
    "truncated weights": (lambda d: truncate(d / "model.safetensors"), "complete safetensors"),
    "flipped code": (
        lambda d: rewrite(d / "model.safetensors", set_to(f"{LAYER}.weight_packed", (0, 0), 5)),
        "split layers of .* have the hash",
    ),
    "flipped embedding": (
        lambda d: rewrite(d / "model.safetensors", set_to("model.embed_tokens.weight", (0, 0), 5)),
        "other tensors of .* have the hash",
    ),
    "scale is NaN": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_scale", (0, 0), float("nan"))),
        "weight_scale holds NaN",
    ),
    "scale is negative": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_scale", (0, 0), -1.0)),
        "not positive",
    ),
    "scale has another shape": (
        lambda d: forge_base(d, lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(64, 2)})),
        r"weight_scale is torch.float32 \(64, 2\), expected",
    ),
    "codes of another dtype": (
        lambda d: forge_base(d, lambda t: t.update({f"{LAYER}.weight_packed": torch.ones(64, 32)})),
        r"weight_packed is torch.float32",
    ),
    "shape tensor disagrees": (
        lambda d: forge_base(d, set_to(f"{LAYER}.weight_shape", 1, 124)),
        r"weight_shape says \[64, 124\]",
    ),
    "tensor is missing": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t.pop(f"{LAYER}.weight_scale")),
        "weight_scale is missing",
    ),
    "config.json was changed": (
        lambda d: edit(d / "config.json", lambda c: c.update(rms_norm_eps=1e-4)),
        "config.json does not have the hash",
    ),
    "file list with a path": (
        lambda d: edit(d / "libortho.json", lambda m: m["files"].update({"../x": None})),
        "expected a path inside the directory",
    ),
    "status was removed": (
        lambda d: forge_json(d, "config.json", lambda c: c["quantization_config"].pop("quantization_status")),
        "quantization_config does not describe",
    ),
    "another model in config.json": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(intermediate_size=64)),
        "no linear layer",
    ),
    "more layers in config.json": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(num_hidden_layers=3)),
        "do not fit the model",
    ),
    "unknown model type": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(model_type="../x")),
        "cannot build the model",
    ),
    "config of wrong types": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(hidden_size="64")),
        "cannot build the model",
    ),
    "a million layers in config.json": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(num_hidden_layers=10**6)),
        "num_hidden_layers is 1000000",
    ),
    "a giant vocabulary in config.json": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(vocab_size=10**12)),
        "describes a model of 1280",
    ),
    "no heads in config.json": (
        lambda d: forge_json(d, "config.json", lambda c: c.update(num_attention_heads=0)),
        "cannot build the model",
    ),
    "no stream manifest": (lambda d: (d / "ortho/default/manifest.json").unlink(), "manifest.json is missing"),
    "stream of another base": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(base_sha256="0" * 64)),
        "made for the base 000000000000",
    ),
    "hash is no hash": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(base_sha256="x")),
        "expected 64 hexadecimal digits",
    ),
    "stream renamed": (lambda d: (d / "ortho/default").rename(d / "ortho/other"), "belongs to stream 'default'"),
    "folder with an impossible name": (lambda d: (d / "ortho/a b").mkdir(), "stream name 'a b'"),
    "stream file is missing": (lambda d: (d / "ortho/default/adapter_model.safetensors").unlink(), "cannot read"),
    "stream file truncated": (lambda d: truncate(d / "ortho/default/adapter_model.safetensors"), "the hash that"),
    "stream value flipped": (lambda d: flip(d / "ortho/default/adapter_model.safetensors", -1), "the hash that"),
    "A is not one-hot": (lambda d: forge_stream(d, set_to(A, (0, slice(0, 2)), 1.0)), "not one-hot"),
    "A is scaled": (lambda d: forge_stream(d, lambda t: t[A].mul_(2)), "not one-hot"),
    "A names nothing": (lambda d: forge_stream(d, set_to(A, 0, 0.0)), "not one-hot"),
    "A has another width": (
        lambda d: forge_stream(d, lambda t: t.update({A: t[A][:, :64].clone()})),
        r"lora_A.weight is",
    ),
    "B is infinite": (lambda d: forge_stream(d, set_to(B, (0, 0), float("inf"))), "NaN or infinite"),
    "B in another dtype": (
        lambda d: forge_stream(d, lambda t: t.update({B: t[B].double()})),
        "lora_B.weight is torch.float64",
    ),
    "B is missing": (lambda d: forge_stream(d, lambda t: t.pop(B)), "lora_B.weight is missing"),
    "foreign tensor": (lambda d: forge_stream(d, lambda t: t.update(x=torch.ones(1))), "unknown tensor 'x'"),
    "adapter scale doubled": (
        lambda d: edit(d / "ortho/default/adapter_config.json", lambda c: c.update(lora_alpha=1000)),
        "does not describe the adapter",
    ),
    "rank forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER].update(columns=1)),
        "lora_A.weight is",
    ),
    "negative rank": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER].update(columns=-1)),
        "at least 0",
    ),
    "kind forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m.update(needs_libortho=True)),
        "needs_libortho is True",
    ),
    "report forged": (
        lambda d: edit(d / "ortho/default/manifest.json", lambda m: m["layers"][LAYER]["report"].update(rank="x")),
        "'rank' is 'x', expected a int",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, saved: Path) -> None:
    act, message = DAMAGE[damage]
    act(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_forging_helpers_alone_do_no_damage(saved: Path, tokens: torch.Tensor) -> None:
    forge_stream(saved, lambda t: None)
    forge_base(saved, lambda t: None)
    load(saved)


def set_rows(tensors: Tensors) -> None:
    tensors[f"{LAYER}.rows"][1] = -1


ENTRY_DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "column out of range": (set_to(f"{LAYER}.columns", 0, 128), "lie outside"),
    "negative column": (set_to(f"{LAYER}.columns", 0, -1), "lie outside"),
    "rows run backwards": (set_rows, "lie outside"),
    "rows promise more": (set_to(f"{LAYER}.rows", -1, 10**6), "lie outside"),
    "entry repeated": (lambda t: t[f"{LAYER}.columns"].fill_(3), "repeated or out of order"),
    "value is NaN": (set_to(f"{LAYER}.values", 0, float("nan")), "NaN"),
    "tail of another rank": (lambda t: t.update({f"{LAYER}.up": t[f"{LAYER}.up"][:, :1].clone()}), "up is"),
}


@pytest.mark.parametrize("damage", ENTRY_DAMAGE)
def test_damaged_entries_are_named(damage: str, saved_entries: Path) -> None:
    change, message = ENTRY_DAMAGE[damage]
    forge_stream(saved_entries, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved_entries)
