"""What a certificate and a card repeat of an audit report: verdicts and figures, no record, prompt or completion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libortho.checkpoint.json_files import DAMAGE, Fields, file_sha256, read_json
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
    keys = (
        "sha256",
        "libortho",
        "profile",
        "seed",
        "model",
        "records",
        "verdicts",
        "memory",
        "membership_auc",
        "utility",
    )
    found = Fields.of(figures, where, (*keys, *optional), what="the audit")
    for key in optional:
        found.value(key, bool)
    found.sha256("sha256")
    found.text("libortho", VERSION_TEXT)
    found.text("profile", _WORD)
    found.count("records")
    if abs(found.value("seed", int)) > 2**64:
        raise CheckpointError(f"{where}: 'seed' is {figures['seed']}, expected at most 64 bits; {DAMAGE}")
    _check_model(figures["model"], where)
    for verdict in _rows(found, "verdicts", _MOST_VERDICTS):
        _check_verdict(verdict, where)
    memory = Fields.of(figures["memory"], where, _MEMORY, what="memory")
    utility = Fields.of(figures["utility"], where, ("perplexity", "kl"), what="utility")
    attacks = found.value("membership_auc", dict)
    if len(attacks) > _MOST_ATTACKS or not all(_WORD.fullmatch(k) for k in attacks):
        raise CheckpointError(f"{where}: 'membership_auc' names no attacks; {DAMAGE}")
    for estimate in (*memory.data.values(), *attacks.values(), utility.data["perplexity"]):
        _check_estimate(estimate, where)
    _check_optional_number(utility, "kl")


def _check_model(data: Any, where: Path) -> None:
    model = Fields.of(data, where, ("streams", "layers", "bits", "density", "base_sha256"), what="the audited model")
    for name in model.value("streams", list):
        checked_name(name)
    model.count("layers")
    if data["bits"] is not None:
        model.count("bits", most=64)
    _check_optional_number(model, "density")
    if data["base_sha256"] is not None:
        model.sha256("base_sha256")


def _check_verdict(data: Any, where: Path) -> None:
    verdict = Fields.of(data, where, ("key", "status", "checks"), what="a verdict")
    verdict.text("key", _WORD)
    verdict.text("status", _STATUS)
    for row in _rows(verdict, "checks", _MOST_CHECKS):
        check = Fields.of(row, where, ("name", "value", "target", "ok"), what="a check")
        for key in ("name", "target"):
            text = check.value(key, str)
            if len(text) > _MOST_TEXT or not text.isprintable():
                raise CheckpointError(f"{where}: {key!r} is {text!r:.80}, expected one printable line; {DAMAGE}")
        _check_optional_number(check, "value")
        if row["ok"] is not None:
            check.value("ok", bool)


def _check_estimate(data: Any, where: Path) -> None:
    if data is not None:
        estimate = Fields.of(data, where, ("value", "low", "high", "n"), what="an estimate")
        for key in data:
            _check_optional_number(estimate, key)


def _check_optional_number(found: Fields, key: str) -> None:
    if found.data[key] is not None:
        found.number(key, -_LARGEST, _LARGEST)


def _rows(found: Fields, key: str, most: int) -> list[Any]:
    rows: list[Any] = found.value(key, list)
    if len(rows) > most:
        raise CheckpointError(f"{found.where}: {key!r} has {len(rows)} entries, expected at most {most}; {DAMAGE}")
    return rows
