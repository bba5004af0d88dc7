"""The model card of a checkpoint, from measured numbers only: manifests, and an audit report if there is one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from libortho.checkpoint.audit_figures import read_audit
from libortho.checkpoint.info import CheckpointInfo, StreamInfo, inspect

_METHOD = (
    "verb",
    "objective",
    "structure",
    "ratio",
    "records",
    "steps",
    "density",
    "retain_kl",
    "quantised_kl",
    "seed",
)
_UNSAFE = re.compile(r"[\\`*_{}\[\]<>()#+!|~]")


def model_card(
    directory: str | Path, audit: str | Path | None = None, *, streams: Collection[str] | None = None
) -> str:
    """Markdown for the ``README.md`` of a checkpoint. Nothing in it is estimated or promised.

    Args:
        directory: What :func:`~libortho.save` or :func:`~libortho.detach` wrote.
        audit: JSON of an audit of this checkpoint.
        streams: Streams to describe; None for all of them.

    Raises:
        CheckpointError: if the checkpoint or the audit report cannot be read.
    """
    info = inspect(directory)
    if streams is not None:
        info = replace(info, streams=tuple(s for s in info.streams if s.name in streams))
    parts = [_HEAD, _base(info), *(_stream(s) for s in info.streams), _use(info)]
    if audit is not None:
        parts.insert(-1, _audit(read_audit(Path(audit))))
    return "\n\n".join(parts) + "\n"


_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- libortho
- compressed-tensors
---

# A split language model

y = W_base x + alpha * W_ortho x: this repository holds the base, which stock `transformers` loads (alpha = 0), and each
ortho stream that it names below (alpha = 1)."""


def _base(info: CheckpointInfo) -> str:
    width = "dense" if info.bits is None else f"INT{info.bits}"
    group = "" if info.bits is None else (", one scale per output channel" if info.group_size == -1 else
                                          f", groups of {info.group_size}")  # fmt: skip
    return (
        "## Base\n\n"
        f"{info.layers} split layers with {info.weights / 1e6:.2f} M weights: {width}{group}, "
        f"{info.bits_per_weight:.2f} bits per weight, {info.base_bytes / 1e6:.2f} MB.\n\n"
        + ("Ortho streams: " + ", ".join(f"`{s.name}`" for s in info.streams) if info.streams else "No ortho stream.")
    )


def _stream(stream: StreamInfo) -> str:
    lines = [
        f"## Stream `{stream.name}`",
        "",
        f"{' and '.join(stream.kinds)} in {stream.layers} layers, density {stream.density:.3%}, tail density "
        f"{stream.tail_density:.2%}, {stream.bytes_on_disk / 1e6:.2f} MB. "
        + ("Needs LibOrtho." if stream.needs_libortho else "A PEFT LoRA adapter.")
        + f" LibOrtho loads it at alpha = {stream.alpha:g}."
        + ("" if stream.base_matches else " **It was made for another base than the one here.**"),
    ]
    method = stream.method or {}
    rows = [f"| {k} | {_plain(method[k])} |" for k in _METHOD if method.get(k) is not None]
    if rows:
        lines += ["", "| made by | |", "|---|---|", *rows]
    if stream.missed is not None:
        lines += ["", *([f"- missed: {_plain(m)}" for m in stream.missed] or ["All criteria of `isolate` were met."])]
    if method.get("verb") == "split":
        lines += ["", "A split by weights alone: it compresses and claims no forgetting."]
    return "\n".join(lines)


def _audit(figures: dict[str, Any]) -> str:
    lines = [
        "## Audit at alpha = 0",
        "",
        f"Profile {_plain(figures['profile'])}, seed {figures['seed']}, {figures['records']} records.",
        "",
        "| verdict | |",
        "|---|---|",
        *(f"| {_plain(v['key'])} | {_plain(v['status'])} |" for v in figures["verdicts"]),
        "",
        "| check | value | target | met |",
        "|---|---|---|---|",
    ]
    met = {True: "yes", False: "no"}
    for verdict in figures["verdicts"]:
        for c in verdict["checks"]:
            cells = (_plain(c["name"]), _plain(c["value"]), _plain(c["target"]), met.get(c["ok"], "withheld"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _use(info: CheckpointInfo) -> str:
    lines = ["## Use", "", "```python", "from transformers import AutoModelForCausalLM", ""]
    lines += ["model = AutoModelForCausalLM.from_pretrained(directory)  # alpha = 0"]
    adapters = [s.name for s in info.streams if not s.needs_libortho]
    if adapters:
        lines += ["", "from peft import PeftModel", ""]
        lines += [f'model = PeftModel.from_pretrained(model, directory + "/ortho/{adapters[0]}")  # alpha = 1']
    lines += ["", "import libortho", "", "model, tokenizer = libortho.load(directory)  # both, behind a switch", "```"]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A value of a manifest as text that stays within its cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _UNSAFE.sub(r"\\\g<0>", " ".join(text.split()))[:300]
