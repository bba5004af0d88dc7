"""The card holds measured numbers only."""

import json
from pathlib import Path

from audit_reports import audit_report
from making import edit

from libortho.checkpoint import inspect, model_card


def test_the_card_holds_measured_numbers_only(source: Path, tmp_path: Path) -> None:
    hostile = "1 of 4 | <script>\n# x"
    method = {"verb": "isolate", "records": 4, "missed": [hostile], "retain_kl": 0.0125, "other": "unlisted"}
    edit(source / "ortho/default/manifest.json", lambda m: m.update(method=method))
    (tmp_path / "audit.json").write_text(json.dumps(audit_report()))
    card = model_card(source, tmp_path / "audit.json")
    info = inspect(source)
    assert f"{info.streams[0].density:.3%}" in card
    assert "0.0125" in card
    assert "missed: 1 of 4 \\| \\<script\\> \\# x" in card
    assert "| extracted greedily | 0.25 | \\<= 0.01 | no |" in card
    assert "SECRET" not in card
    assert "unlisted" not in card
    assert "default" not in model_card(source, streams=["hr"])
    edit(source / "ortho/default/manifest.json", lambda m: m.update(method={**method, "missed": []}))
    assert "All criteria of `isolate` were met" in model_card(source)
