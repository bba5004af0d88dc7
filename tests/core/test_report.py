"""The table of what a split did."""

import json

import pytest
import torch

import libortho
from libortho.core.layer import ortho_layers

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_report_totals(tiny_llama):
    libortho.replace_linear_layers(tiny_llama, ["down_proj", "q_proj"], ratio=0.01)
    reports = libortho.layer_report(tiny_llama)
    totals = reports.totals()
    assert [r.name for r in reports] == list(ortho_layers(tiny_llama))
    assert totals["layers"] == totals["low_rank_layers"] == 4
    assert totals["max_base_error"] == max(r.base_error for r in reports)
    assert totals["final_error"] == pytest.approx(sum(r.final_error for r in reports) / 4)
    entries = sum(m.streams["default"].support_size for m in ortho_layers(tiny_llama).values())
    tail = sum(m.streams["default"].tail_size for m in ortho_layers(tiny_llama).values())
    weights = 2 * (64 * 128 + 64 * 64)
    assert totals["ortho_density"] == pytest.approx(entries / weights)
    assert totals["tail_density"] == pytest.approx(tail / weights)
    assert totals["ortho_bytes"] == sum(m.streams["default"].nbytes for m in ortho_layers(tiny_llama).values())


def test_report_prints_both_densities(tiny_llama):
    tiny_llama.model.layers[1].mlp.down_proj.weight.data.copy_(torch.eye(64, 128))
    libortho.replace_linear_layers(tiny_llama, max_low_rank_error=0.1)
    lines = str(libortho.layer_report(tiny_llama)).splitlines()
    assert len(lines) == 3
    assert "density" in lines[0]
    assert "tail" in lines[0]
    assert DOWN[0] in lines[1]
    assert "(direct)" not in lines[1]
    assert "60 (direct)" not in lines[2]
    assert "64 (direct)" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_report_is_json(tiny_llama):
    libortho.replace_linear_layers(tiny_llama)
    reports = libortho.layer_report(tiny_llama)
    back = json.loads(json.dumps(reports.to_dict()))
    assert set(back) == {"totals", "layers"}
    assert back["layers"][0]["name"] == DOWN[0]
    assert back["layers"][0]["shape"] == [64, 128]
    assert back["totals"]["base_bytes"] == sum(r.base_bytes for r in reports)


def test_report_of_a_model_that_is_not_split(tiny_llama):
    with pytest.raises(libortho.TargetError, match="no layer of this model is split"):
        libortho.layer_report(tiny_llama)
