"""A description of a checkpoint in numbers that its files hold."""

import json
from pathlib import Path

import pytest
from making import (
    add_stream,
    edit,
    make,
)
from transformers import (
    PreTrainedModel,
)

import libortho
from libortho.checkpoint import inspect, save


@pytest.mark.parametrize("bits", [8, None])
def test_inspect(bits: int | None, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = make(tiny_llama, bits=bits)
    add_stream(model, "hr", 1)
    save(model, None, tmp_path / "out")
    info = inspect(tmp_path / "out")
    totals = libortho.layer_report(model).totals()
    assert (info.bits, info.group_size, info.layers) == (bits, -1, 2)
    assert info.base_bytes == totals["base_bytes"]
    assert info.bits_per_weight == (32 if bits is None else 8.25)  # 32 bits of scale per 128 codes
    default, hr = info.streams
    assert (default.name, default.kinds, default.layers) == ("default", ("columns", "tail"), 2)
    assert default.density == pytest.approx(totals["ortho_density"])
    assert default.tail_density == pytest.approx(totals["tail_density"])
    assert default.bytes_on_disk == sum(p.stat().st_size for p in (tmp_path / "out/ortho/default").iterdir())
    assert default.method is not None
    assert default.base_matches
    assert (hr.kinds, hr.layers, hr.tail_density, hr.method) == (("columns",), 1, 0.0, None)
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()
    assert (default.alpha, hr.alpha) == (1.0, 0.0)
    edit(tmp_path / "out/ortho/hr/manifest.json", lambda m: m.update(base_sha256="0" * 64))
    assert [s.base_matches for s in inspect(tmp_path / "out").streams] == [True, False]
    edit(tmp_path / "out/ortho/default/manifest.json", lambda m: m.update(rest_sha256="0" * 64))
    assert [s.base_matches for s in inspect(tmp_path / "out").streams] == [False, False]
