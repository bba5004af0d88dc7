"""The report as JSON, from what the steps have found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from libortho.auditing import measure as measuring
from libortho.auditing import prompts
from libortho.auditing import summary as summaries
from libortho.auditing.config import AuditConfig
from libortho.auditing.inputs import SHOWN, Inputs
from libortho.auditing.measures.fillings import is_prose
from libortho.auditing.measures.privacy import template_of
from libortho.auditing.plan import Findings
from libortho.auditing.report import json_ready
from libortho.auditing.schema import REFERENCE, SCHEMA, LayerData, ReportData, SubjectData, baseline_key
from libortho.auditing.subjects import Subject, base_sha256
from libortho.core.layer import OrthoLinear, ortho_layers, touched
from libortho.core.streams import OrthoStream
from libortho.core.version import __version__
from libortho.text.records import Record


def report_data(
    model: nn.Module,
    subjects: Sequence[Subject],
    m: Inputs,
    config: AuditConfig,
    found: Findings,
    name: str | None,
    known: Mapping[str, SubjectData],
) -> ReportData:
    """The report's JSON, verdicts aside; ``known``: rows of subjects, by key, that are there already."""
    context = _context(m, config, found)
    codes = [r.completion.strip() for r in m.forget if not is_prose(r.completion)]

    def hide(text: str, own: Record) -> str:
        """Without the record's own secret, and without anybody else's code."""
        if not config.reveal:
            for secret in dict.fromkeys([own.completion.strip(), *codes]):
                text = prompts.mask(text, secret)
        return text

    layers = ortho_layers(model)
    rows = {**known, **subject_rows([s for s in subjects if s.key not in known], m, config, found)}
    shown = m.probed[:SHOWN]
    depths = {} if found.depth is None else {subjects[0].key: found.depth["uds"], **found.depth["others"]}
    scores = {s.key: summaries.composite_summary(found.measured[s.key], context, depths.get(s.key)) for s in subjects}
    data: ReportData = {
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
            "unigram_perplexity": unigram_perplexity(m),
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
        "subjects": [rows[s.key] for s in subjects],
        "curve": found.curve,
        "goldilocks": summaries.goldilocks(found.curve, context),
        "attacks": found.attacks,
        "depth": found.depth,
        "layer_map": layer_map(layers),
        "generations": [
            {
                "number": m.forget[i].number,
                "prompt": m.forget[i].prompt,
                "texts": {
                    s.key: hide(texts[place], m.forget[i])
                    for s in subjects
                    if (texts := found.measured[s.key].get("generated")) is not None
                },
            }
            for place, i in enumerate(shown)
        ],
        "composite": scores if any(scores.values()) else None,
    }
    return cast(ReportData, json_ready(data))


def subject_rows(
    subjects: Sequence[Subject], m: Inputs, config: AuditConfig, found: Findings
) -> dict[str, SubjectData]:
    """What the report says of each of these subjects, by key; they and those they are compared with are measured."""
    context = _context(m, config, found)
    return {
        s.key: {
            "key": s.key,
            "label": s.label,
            "role": s.role,
            "memory": summaries.memory_summary(measured, context),
            "unseen": summaries.unseen_summary(measured, context),
            "per_record": summaries.record_figures(measured, m),
            "prefixes": summaries.prefix_rows(measured),
            "variants": summaries.variant_rows(measured),
            "privacy": summaries.privacy_summary(measured, context),
            "utility": summaries.utility_summary(measured, context),
        }
        for s in subjects
        for measured in (found.measured[s.key],)
    }


def unigram_perplexity(m: Inputs) -> float:
    """Perplexity of the general text by counting its words."""
    return measuring.unigram_perplexity([e.ids for e in m.general])


def _context(m: Inputs, config: AuditConfig, found: Findings) -> summaries.Context:
    baseline = baseline_key(found.measured)
    return summaries.Context(
        inputs=m,
        reference=found.measured.get(REFERENCE),
        baseline=None if baseline is None else found.measured[baseline],
        seed=config.seed,
    )


def density(layers: Iterable[OrthoLinear]) -> float | None:
    """Entries of all supports / weights of the split layers."""
    stored = weights = 0
    for layer in layers:
        weights += layer.in_features * layer.out_features
        stored += sum(s.support_size for s in layer.streams.values() if isinstance(s, OrthoStream))
    return stored / weights if weights else None


def layer_map(layers: Mapping[str, OrthoLinear]) -> list[LayerData]:
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
