"""attach takes only a stream that belongs to the base, and changes nothing when it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import contents, edit, flip, logits, two_streams

from disk import Disk, fails_cleanly_everywhere
from libortho import CheckpointError
from libortho.checkpoint import attach, detach, load, save, verify_certificate
from libortho.checkpoint.json_files import read_json
from libortho.core.layer import ortho_layers


def test_detach_and_attach_give_the_original_back(source: Path, out: Path) -> None:
    detach(source, out, certificate=False)
    for name in ("hr", "default"):
        assert attach(out, source / "ortho" / name) == name
    assert contents(out) == contents(source)
    assert torch.equal(logits(load(out, alpha=1.0)[0]), logits(load(source, alpha=1.0)[0]))


def test_attach_under_another_name(source: Path, out: Path) -> None:
    detach(source, out)
    assert attach(out, source / "ortho/hr/manifest.json", name="legal") == "legal"
    model, _ = load(out, streams=["legal"], alpha=1.0)
    assert torch.equal(logits(model), logits(load(source, streams=["hr"], alpha=1.0)[0]))
    with pytest.raises(CheckpointError, match=r"ortho/legal/.* is not named by certificate\.json"):
        verify_certificate(out)


ATTACH: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "name is taken": (lambda f: None, {"name": "default"}, "has a stream 'default' already"),
    "name is a path": (lambda f: None, {"name": "../x"}, r"stream name '\.\./x'"),
    "manifest names a path": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(stream="../../x")), {"name": None}, "stream name"),
    "another base": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(base_sha256="1" * 64)), {}, "for the base 1111"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), {}, r"manifest\.json is missing"),
    "no weights": (lambda f: (f / "ortho.safetensors").unlink(), {}, r"ortho\.safetensors is missing"),
    "weights changed": (lambda f: flip(f / "ortho.safetensors"), {}, "the hash that"),
    "other layers": (
        lambda f: edit(f / "manifest.json", lambda m: m["layers"].popitem()), {}, "names other layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACH)
def test_attach_refuses_and_changes_nothing(case: str, source: Path, tmp_path: Path) -> None:
    act, options, message = ATTACH[case]
    shutil.copytree(source / "ortho/hr", tmp_path / "stream")
    act(tmp_path / "stream")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        attach(source, tmp_path / "stream", **{"name": "new", **options})
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "stream"]


def test_attach_names_both_bases(source: Path, tmp_path: Path) -> None:
    other = two_streams()
    with torch.no_grad():
        next(iter(ortho_layers(other).values())).base.scales.mul_(2)
    save(other, None, tmp_path / "other")
    mine = read_json(source / "libortho.json")["base_sha256"]
    theirs = read_json(tmp_path / "other/libortho.json")["base_sha256"]
    with pytest.raises(CheckpointError, match=f"{theirs}, .* holds {mine}"):
        attach(source, tmp_path / "other/ortho/hr", name="new")


def test_attach_takes_a_folder(source: Path) -> None:
    with pytest.raises(CheckpointError, match="decrypt it first"):
        attach(source, source / "model.safetensors")


def test_attach_on_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    act = lambda: attach(source, source / "ortho/default", name="again")  # noqa: E731
    assert fails_cleanly_everywhere(act, tmp_path, disk) > 8
    load(source)
