"""The report as JSON, from what the steps have found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from libortho.auditing import measure as measuring
from libortho.auditing import prompts
from libortho.auditing import summary as summaries
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import SHOWN, Inputs
from libortho.auditing.measures.fillings import is_prose
from libortho.auditing.measures.privacy import template_of
from libortho.auditing.plan import State
from libortho.auditing.report import json_ready
from libortho.auditing.schema import SCHEMA, baseline_key
from libortho.auditing.subjects import Subject, base_sha256
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.streams import OrthoStream
from libortho.core.version import __version__
from libortho.text.records import Record


def report_data(
    model: nn.Module, subjects: Sequence[Subject], m: Inputs, config: AuditConfig, state: State, name: str | None
) -> dict[str, Any]:
    """The report's JSON, verdicts aside."""
    by_key = {s.key: s for s in subjects}
    baseline = baseline_key(by_key)
    context = summaries.Context(
        inputs=m,
        reference=state.measured.get("reference"),
        before=None if baseline is None else state.measured[baseline],
        seed=config.seed,
    )
    codes = [r.completion.strip() for r in m.forget if not is_prose(r.completion)]

    def hide(text: str, own: Record) -> str:
        """Without the record's own secret, and without anybody else's code."""
        if not config.reveal:
            for secret in dict.fromkeys([own.completion.strip(), *codes]):
                text = prompts.mask(text, secret)
        return text

    layers = ortho_layers(model)
    rows = [
        {
            "key": s.key,
            "label": s.label,
            "role": s.role,
            "memory": summaries.memory_summary(found, context),
            "unseen": summaries.unseen_summary(found, context),
            "per_record": summaries.record_figures(found, m),
            "prefixes": summaries.prefix_rows(found, m),
            "variants": summaries.variant_rows(found),
            "privacy": summaries.privacy_summary(found, context),
            "utility": summaries.utility_summary(found, context),
        }
        for s in subjects
        for found in (state.measured[s.key],)
    ]
    shown = m.probed[:SHOWN]
    depths = {subjects[0].key: (state.depth or {}).get("uds"), **(state.depth or {}).get("others", {})}
    scores = {s.key: summaries.composite_summary(state.measured[s.key], context, depths.get(s.key)) for s in subjects}
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "libortho": __version__,
        "profile": config.profile,
        "seed": config.seed,
        "config": config.to_dict(),
        "model": {
            "name": name,
            "split": bool(layers),
            "streams": sorted({n for layer in layers.values() for n in layer.streams}),
            "layers": len(layers),
            "bits": next((layer.base.bits for layer in layers.values()), None),
            "density": density(layers.values()),
            "base_sha256": base_sha256(layers),
        },
        "counts": {
            "forget": len(m.forget),
            "holdout": len(m.holdout),
            "retain": len(m.retain),
            "probed": len(m.probed),
            "general_tokens": sum(len(e.ids) for e in m.general),
            "unigram_perplexity": measuring.unigram_perplexity([e.ids for e in m.general]),
            "samples": config.samples,
            "fillings": config.resolved("fillings"),
        },
        "verdicts": [],
        "warnings": list(m.warnings),
        "records": [
            {
                "number": r.number,
                "prompt": r.prompt,
                "completion": hide(r.completion, r),
                "tokens": len(e.completion),
                "template": template_of(r.prompt),
            }
            for r, e in zip(m.forget, m.encode(m.forget), strict=True)
        ],
        "subjects": rows,
        "curve": state.curve,
        "goldilocks": summaries.goldilocks(state.curve, context),
        "attacks": state.attacks,
        "depth": state.depth,
        "layer_map": layer_map(layers),
        "generations": [
            {
                "number": m.forget[i].number,
                "prompt": m.forget[i].prompt,
                "texts": {
                    s.key: hide(texts[place], m.forget[i])
                    for s in subjects
                    if (texts := state.measured[s.key].generated) is not None
                },
            }
            for place, i in enumerate(shown)
        ],
        "composite": scores if any(scores.values()) else None,
    }
    return json_ready(data)


def density(layers: Iterable[OrthoLinear]) -> float | None:
    """Entries of all supports / weights of the split layers."""
    stored = weights = 0
    for layer in layers:
        weights += layer.in_features * layer.out_features
        stored += sum(s.support_size for s in layer.streams.values() if isinstance(s, OrthoStream))
    return stored / weights if weights else None


def layer_map(layers: Mapping[str, OrthoLinear]) -> list[dict[str, Any]]:
    """Where the memory sat: columns that each layer gave, and its share of the ortho stream's squared norm."""
    energy, columns = {}, {}
    for name, layer in layers.items():
        change = layer.dense_weight(1.0) - layer.base.dense(torch.float32)
        energy[name] = float(change.square().sum())
        columns[name] = int(touched(layer).any(0).sum())
    total = sum(energy.values())
    return [
        {"name": n, "index": i, "columns": columns[n], "share": energy[n] / total if total else 0.0}
        for i, n in enumerate(layers)
    ]
