"""What a certificate and a card repeat of an audit report: verdicts and figures, no record, prompt or completion."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from libortho.checkpoint.json_files import (
    DAMAGE,
    check_keys,
    count,
    field,
    file_sha256,
    number,
    read_json,
    sha256_field,
    text_field,
)
from libortho.checkpoint.manifest import VERSION_TEXT, BaseManifest
from libortho.checkpoint.stream_files import checked_name
from libortho.core.errors import CheckpointError

_SCHEMA = "libortho-audit/1"
_MEMORY = ("greedy_extraction", "sampled_extraction", "nll")
_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_STATUS = re.compile("pass|fail|withheld")
_MOST_TEXT, _MOST_VERDICTS, _MOST_CHECKS, _MOST_ATTACKS = 200, 16, 200, 64
_LARGEST = 1e100


def read_audit(path: Path) -> dict[str, Any]:
    """An audit report, reduced to its verdicts and key figures: no record, prompt or completion.

    Raises:
        CheckpointError: if it is none, or a figure or word has another form than an audit writes.
    """
    data = read_json(path)
    if data.get("schema") != _SCHEMA:
        raise CheckpointError(f"{path}: schema is {data.get('schema')!r:.60}, expected {_SCHEMA!r}")
    sha256 = file_sha256(path)
    try:
        figures = _reduced(data, sha256)
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{path} is not a complete audit report: {error!r:.80}; run libortho audit again"
        ) from error
    check_figures(figures, path)
    return figures


def figures_of(path: Path, base: BaseManifest, removed: list[str]) -> dict[str, Any]:
    """The figures of an audit of this base; ``base_checked``: its report names the base (earlier versions did not).

    Raises:
        CheckpointError: if the report is none, or speaks of another model.
    """
    figures = read_audit(path)
    model = figures["model"]
    found = (model["layers"], model["bits"])
    if found != (len(base.shapes), base.scheme.bits) or not set(removed) <= set(model["streams"]):
        raise CheckpointError(
            f"{path} is the audit of a model with {found[0]} split layers, bits {found[1]} and streams "
            f"{model['streams']}; this checkpoint has {len(base.shapes)}, {base.scheme.bits} and removes {removed}"
        )
    audited = model["base_sha256"]
    if audited is not None and audited != base.base_sha256:
        raise CheckpointError(
            f"{path} is the audit of a model with the base {audited}, this checkpoint has {base.base_sha256}; audit "
            "this one"
        )
    return {**figures, "base_checked": audited is not None}


def _reduced(data: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    off = next(s for s in data["subjects"] if s["key"] == "off")
    privacy = off["privacy"] or {"attacks": {}}
    utility = off["utility"] or {}
    return {
        "sha256": sha256,
        "libortho": data["libortho"],
        "profile": data["profile"],
        "seed": data["seed"],
        "model": {
            **{k: data["model"][k] for k in ("streams", "layers", "bits", "density")},
            "base_sha256": data["model"].get("base_sha256"),
        },
        "records": data["counts"]["forget"],
        "verdicts": [
            {
                "key": v["key"],
                "status": v["status"],
                "checks": [{k: c[k] for k in ("name", "value", "target", "ok")} for c in v["checks"]],
            }
            for v in data["verdicts"]
        ],
        "memory": {k: _estimate(off["memory"][k]) for k in _MEMORY},
        "membership_auc": {k: _estimate(a["auc"]) for k, a in privacy["attacks"].items()},
        "utility": {"perplexity": _estimate(utility.get("perplexity")), "kl": utility.get("kl")},
    }


def _estimate(estimate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if estimate is None else {k: estimate[k] for k in ("value", "low", "high", "n")}


# -- form --------------------------------------------------------------------------------------------------------------


def check_figures(figures: Any, where: Path, *, optional: tuple[str, ...] = ()) -> None:
    """Refuse figures of another form than :func:`read_audit` returns.

    Args:
        figures: What was read.
        where: Its file.
        optional: Further keys that must be there, with a bool each.

    Raises:
        CheckpointError: if a key is missing or unknown, or a value has another type, range or pattern.
    """
    keys = ("sha256", "libortho", "profile", "seed", "model", "records", "verdicts", "memory", "membership_auc")
    check_keys(figures, (*keys, "utility", *optional), where, what="the audit")
    for key in optional:
        field(figures, key, bool, where)
    sha256_field(figures, "sha256", where)
    text_field(figures, "libortho", VERSION_TEXT, where)
    text_field(figures, "profile", _WORD, where)
    count(figures, "records", where)
    if abs(field(figures, "seed", int, where)) > 2**64:
        raise CheckpointError(f"{where}: 'seed' is {figures['seed']}, expected at most 64 bits; {DAMAGE}")
    _check_model(figures["model"], where)
    for verdict in _rows(figures, "verdicts", _MOST_VERDICTS, where):
        _check_verdict(verdict, where)
    check_keys(figures["memory"], _MEMORY, where, what="memory")
    check_keys(figures["utility"], ("perplexity", "kl"), where, what="utility")
    attacks = field(figures, "membership_auc", dict, where)
    if len(attacks) > _MOST_ATTACKS or not all(_WORD.fullmatch(k) for k in attacks):
        raise CheckpointError(f"{where}: 'membership_auc' names no attacks; {DAMAGE}")
    for estimate in (*figures["memory"].values(), *attacks.values(), figures["utility"]["perplexity"]):
        _check_estimate(estimate, where)
    _optional_number(figures["utility"], "kl", where)


def _check_model(model: Any, where: Path) -> None:
    check_keys(model, ("streams", "layers", "bits", "density", "base_sha256"), where, what="the audited model")
    for name in field(model, "streams", list, where):
        checked_name(name)
    count(model, "layers", where)
    if model["bits"] is not None:
        count(model, "bits", where, most=64)
    _optional_number(model, "density", where)
    if model["base_sha256"] is not None:
        sha256_field(model, "base_sha256", where)


def _check_verdict(verdict: Any, where: Path) -> None:
    check_keys(verdict, ("key", "status", "checks"), where, what="a verdict")
    text_field(verdict, "key", _WORD, where)
    text_field(verdict, "status", _STATUS, where)
    for check in _rows(verdict, "checks", _MOST_CHECKS, where):
        check_keys(check, ("name", "value", "target", "ok"), where, what="a check")
        for key in ("name", "target"):
            text = field(check, key, str, where)
            if len(text) > _MOST_TEXT or not text.isprintable():
                raise CheckpointError(f"{where}: {key!r} is {text!r:.80}, expected one printable line; {DAMAGE}")
        _optional_number(check, "value", where)
        if check["ok"] is not None:
            field(check, "ok", bool, where)


def _check_estimate(estimate: Any, where: Path) -> None:
    if estimate is None:
        return
    check_keys(estimate, ("value", "low", "high", "n"), where, what="an estimate")
    for key in estimate:
        _optional_number(estimate, key, where)


def _optional_number(data: Mapping[str, Any], key: str, where: Path) -> None:
    if data[key] is not None:
        number(data, key, where, -_LARGEST, _LARGEST)


def _rows(data: Mapping[str, Any], key: str, most: int, where: Path) -> Iterator[Any]:
    rows = field(data, key, list, where)
    if len(rows) > most:
        raise CheckpointError(f"{where}: {key!r} has {len(rows)} entries, expected at most {most}; {DAMAGE}")
    return iter(rows)
