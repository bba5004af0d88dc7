"""What a certificate and a card repeat of an audit: verdicts and figures of this very base, and no secret."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_reports import audit_report
from transformers import PreTrainedModel

import libortho
import tiny
from libortho import AuditConfig, CheckpointError, SplitConfig
from libortho.auditing.subjects import base_sha256
from libortho.checkpoint import detach, load, save, verify_certificate
from libortho.checkpoint.json_files import file_sha256
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream


def test_audit_figures_without_secrets(source: Path, out: Path, tmp_path: Path) -> None:
    report = tmp_path / "audit.json"
    report.write_text(json.dumps(audit_report()))
    result = detach(source, out, audit=report)
    assert "SECRET" not in (out / "certificate.json").read_text()
    assert result.audit is not None
    assert result.audit["verdicts"][0]["status"] == "fail"
    assert result.audit["verdicts"][0]["checks"][0]["value"] == 0.25
    assert result.audit["membership_auc"]["loss"]["value"] == 0.25
    assert result.audit["sha256"] == file_sha256(report)
    assert result.audit["base_checked"] is False  # this report names no base
    assert verify_certificate(out) == result


def test_an_audit_names_its_base(tokenizer: Any, tmp_path: Path) -> None:
    """One real audit, taken by the checkpoint that it is of, and refused by another of the same form."""
    dense = tiny.small_llama(len(tokenizer))
    for name, rank in (("mine", 0.9), ("other", 0.8)):
        model = libortho.split(copy.deepcopy(dense), SplitConfig(ratio=0.02, rank_ratio=rank, max_low_rank_error=1.0))
        save(model, tokenizer, tmp_path / name)
    model, _ = load(tmp_path / "mine")
    config = AuditConfig(samples=1, fillings=4, general_sequences=2, alphas=(0.0, 1.0), max_new_tokens=4)
    libortho.audit(model, tokenizer, tiny.FORGET, config=config).to_json(tmp_path / "audit.json")
    result = detach(tmp_path / "mine", tmp_path / "base", audit=tmp_path / "audit.json")
    assert result.audit is not None
    assert result.audit["base_checked"] is True
    assert result.audit["model"]["base_sha256"] == result.base_sha256
    assert verify_certificate(tmp_path / "base") == result
    theirs = json.loads((tmp_path / "other/libortho.json").read_text())["base_sha256"]
    assert theirs != result.base_sha256
    with pytest.raises(CheckpointError, match=f"{result.base_sha256}, this checkpoint has {theirs}; audit this"):
        detach(tmp_path / "other", tmp_path / "out", audit=tmp_path / "audit.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 8, "group_size": 32}, {"bits": None}], ids=str)
def test_the_hash_of_a_base_in_memory_is_that_on_disk(
    options: dict[str, Any], tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    targets = ("down_proj", "q_proj")
    libortho.split(tiny_llama, SplitConfig(ratio=0.02, use_low_rank=False, target_modules=targets, **options))
    save(tiny_llama, None, tmp_path / "in")
    written = json.loads((tmp_path / "in/libortho.json").read_text())["base_sha256"]
    assert base_sha256(ortho_layers(tiny_llama)) == written
    for dtype in (None, torch.bfloat16):
        if dtype is None or "bits" not in options or options["bits"] is not None:  # a dense base is itself rounded
            assert base_sha256(ortho_layers(load(tmp_path / "in", dtype=dtype)[0])) == written


def test_what_no_checkpoint_can_hold_has_no_hash(tiny_llama: PreTrainedModel) -> None:
    assert base_sha256(ortho_layers(tiny_llama)) is None
    libortho.split(tiny_llama, SplitConfig(ratio=0.02, use_low_rank=False))
    layers = ortho_layers(tiny_llama)
    next(iter(layers.values())).base = BaseStream(None, weight=torch.zeros(64, 128))  # two schemes
    assert base_sha256(layers) is None


AUDITS = {
    "no report": ({"schema": "x"}, "schema is 'x'"),
    "another model": ({"model": {**audit_report()["model"], "layers": 30}}, "with 30 split layers"),
    "another base": ({"model": {**audit_report()["model"], "base_sha256": "0" * 64}}, "with the base 0000"),
    "another stream": ({"model": {**audit_report()["model"], "streams": ["default"]}}, "removes"),
    "no subjects": ({"subjects": []}, "not a complete audit report"),
    "subjects of a wrong type": ({"subjects": 3}, "not a complete audit report"),
}


@pytest.mark.parametrize("case", AUDITS)
def test_an_audit_of_something_else_is_refused(case: str, source: Path, out: Path, tmp_path: Path) -> None:
    changes, message = AUDITS[case]
    (tmp_path / "audit.json").write_text(json.dumps(audit_report(**changes)))
    with pytest.raises(CheckpointError, match=message):
        detach(source, out, audit=tmp_path / "audit.json")
    assert not out.exists()
