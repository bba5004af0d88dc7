"""What detach writes holds the base byte for byte and nothing of a removed stream."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_reports import audit_report
from forging import EMBEDDING, Tensors, forge_base
from making import contents, edit, flip, logits, two_streams, write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import libortho
from disk import Disk, fails_cleanly_everywhere
from libortho import CheckpointError, cli
from libortho.checkpoint import attach, detach, inspect, load, model_card, save, verify_certificate
from libortho.checkpoint.json_files import file_sha256
from libortho.core.layer import ortho_layers


def test_the_base_alone_is_alpha_0_in_stock_tools_and_here(source: Path, out: Path) -> None:
    before = contents(source)
    detach(source, out)
    assert contents(source) == before
    model, tokenizer = load(source)
    with libortho.alpha(model, 0.0):
        expected = logits(model)
    assert not torch.equal(expected, logits(model))
    again, same = load(out)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    assert same.get_vocab() == tokenizer.get_vocab()
    assert not (out / "ortho").exists()
    assert all(contents(out)[name] == content for name, content in before.items() if not name.startswith("ortho/"))
    assert all(not p.stat().st_nlink > 1 for p in out.rglob("*") if p.is_file())


def test_the_certificate_says_what_is_gone(source: Path, out: Path) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    result = detach(source, out, when=when)
    data = json.loads((out / "certificate.json").read_text())
    assert data == json.loads(json.dumps(result.to_dict()))
    assert data["when"] == "2026-01-02T01:04:05Z"
    assert data["base_sha256"] == json.loads((source / "libortho.json").read_text())["base_sha256"]
    assert data["kept"] == []
    infos = {s.name: s for s in inspect(source).streams}
    assert [r["name"] for r in data["removed"]] == ["default", "hr"]
    for r in data["removed"]:
        folder = source / "ortho" / r["name"]
        assert r["manifest_sha256"] == file_sha256(folder / "manifest.json")
        weights = next(folder.glob("*.safetensors"))
        assert r["weights_sha256"] == file_sha256(weights)
        assert r["density"] == infos[r["name"]].density > 0
        assert r["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert data["files"] == {n: file_sha256(out / n) for n in contents(out) if n != "certificate.json"}
    assert data["compared"] > 100
    assert verify_certificate(out) == result


def test_now_is_the_time_if_none_is_given(source: Path, out: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    assert before <= datetime.fromisoformat(detach(source, out).when) <= datetime.now(UTC)


def test_one_stream_goes_and_the_other_stays(source: Path, out: Path) -> None:
    result = detach(source, out, streams=["hr"])
    assert result.kept == ("default",)
    some, _ = load(source, streams=["default"], alpha=1.0)
    assert torch.equal(logits(load(out, alpha=1.0)[0]), logits(some))
    assert verify_certificate(out) == result


def test_files_that_save_did_not_write_are_not_copied(source: Path, out: Path) -> None:
    (source / "NOTES.md").write_text("the secret is 6311")
    (source / "ortho/default/NOTES.md").write_text("the secret is 6311")
    detach(source, out, streams=["hr"])
    assert not [n for n in contents(out) if "NOTES" in n]


@pytest.mark.parametrize("place", ["notes.txt", "ortho/default/notes.txt", "ortho/notes.txt"])
def test_files_that_a_loader_could_read_are_refused(place: str, source: Path, out: Path) -> None:
    (source / place).write_text("the secret is 6311")
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt', a file.* Delete it or move it elsewhere"):
        detach(source, out, streams=["hr"])
    assert not out.exists()


def test_without_a_certificate(source: Path, out: Path) -> None:
    detach(source, out, certificate=False)
    load(out)
    with pytest.raises(CheckpointError, match=r"detached without one; libortho detach SOURCE --out DIR"):
        verify_certificate(out)


# -- the tensor diff ---------------------------------------------------------------------------------------------------


def base_from(model: Any, tmp_path: Path, change: Callable[[Tensors], Any]) -> Path:
    """A checkpoint whose base somebody prepared and whose hashes fit."""
    place = save(model, None, tmp_path / "in")
    forge_base(place, change)
    load(place)
    return place


def stream_values(model: Any) -> torch.Tensor:
    layer = next(iter(ortho_layers(model).values()))
    return layer.streams["default"].support.values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the base is float32
@pytest.mark.parametrize("where", ["row", "column"])
def test_an_ortho_value_in_the_base_is_found(where: str, dtype: str, tmp_path: Path, out: Path) -> None:
    model = two_streams(dtype)
    column = stream_values(model)[0].float()

    def hide(tensors: Tensors) -> None:
        if where == "column":
            tensors["model.layers.1.self_attn.q_proj.weight"][:, 5] = column
        else:
            tensors[EMBEDDING][7] = column

    place = base_from(model, tmp_path, hide)
    with pytest.raises(CheckpointError, match="holds values of stream 'default', which was to be removed"):
        detach(place, out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    detach(place, out, streams=["hr"])


def test_a_direction_of_the_tail_is_found(tmp_path: Path, out: Path) -> None:
    model = two_streams()
    part = next(iter(ortho_layers(model).values())).streams["default"]
    place = base_from(model, tmp_path, lambda t: t["model.layers.0.mlp.gate_proj.weight"].__setitem__(
        (slice(None), 1), part.tail.down[0]))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight of model\.safetensors holds values"):
        detach(place, out)


def test_a_stream_that_stays_may_not_share_the_values(source: Path, out: Path) -> None:
    attach(source, source / "ortho/default", name="copy")
    with pytest.raises(CheckpointError, match=r"copy of a file of stream 'default'"):
        detach(source, out, streams=["default"])
    detach(source, out, streams=["default", "copy"])
    assert verify_certificate(out).kept == ("hr",)


def test_zeros_and_ones_are_nobodys_secret(tmp_path: Path, out: Path) -> None:
    model = two_streams()
    stream_values(model)[0] = 0
    stream_values(model)[1] = 1
    place = base_from(model, tmp_path, lambda t: t[EMBEDDING].__setitem__(slice(0, 1), 0.0))  # the norms hold ones
    detach(place, out)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Path, Path], Any], dict[str, Any], str]] = {
    "target exists": (lambda s, o: o.mkdir(), {}, "exists"),
    "target is a dangling link": (lambda s, o: o.symlink_to("nowhere"), {}, "exists"),
    "no such stream": (lambda s, o: None, {"streams": ["x"]}, "no stream 'x'"),
    "path for a name": (lambda s, o: None, {"streams": ["../in"]}, r"stream name '\.\./in'"),
    "one string": (lambda s, o: None, {"streams": "hr"}, r"a list such as \['hr'\]"),
    "nothing to do": (lambda s, o: shutil.rmtree(s / "ortho"), {}, "no stream to detach"),
    "empty list": (lambda s, o: None, {"streams": []}, "no stream to detach"),
    "no checkpoint": (lambda s, o: (s / "libortho.json").unlink(), {}, r"libortho\.json is missing"),
    "base changed": (lambda s, o: flip(s / "model.safetensors"), {}, "has the hash"),
    "config changed": (lambda s, o: (s / "config.json").write_text("{}"), {}, "does not have the hash"),
    "stream damaged": (lambda s, o: flip(s / "ortho/hr/ortho.safetensors"), {}, "the hash that"),
    "kept stream damaged": (
        lambda s, o: flip(s / "ortho/hr/ortho.safetensors"), {"streams": ["default"]}, "the hash that",
    ),
    "weights are missing": (lambda s, o: (s / "model.safetensors").unlink(), {}, "cannot read"),
    "a listed file is a path": (
        lambda s, o: edit(s / "libortho.json", lambda m: m["files"].update({"../x": None})), {}, "inside the directory",
    ),
    "a listed file is of a stream": (
        lambda s, o: edit(s / "libortho.json", lambda m: m["files"].update({"ortho/hr/ortho.safetensors": None})), {},
        "inside the directory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_nothing(case: str, source: Path, out: Path, tmp_path: Path) -> None:
    act, options, message = REFUSED[case]
    act(source, out)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        detach(source, out, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_place_inside_the_checkpoint_is_refused(source: Path) -> None:
    with pytest.raises(CheckpointError, match="lies inside"):
        detach(source, source / "ortho/x")


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.nightly)])
def test_full_disk(step: int, made_bare: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", contents(made_bare))
    disk = Disk(monkeypatch)
    assert fails_cleanly_everywhere(lambda: detach(source, out, streams=["hr"]), tmp_path, disk, step) > 15 // step
    verify_certificate(out)


# -- command line ------------------------------------------------------------------------------------------------------


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_verify_says_what_to_do_where_nothing_was_detached(source: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\['default', 'hr'\], so it was never detached, or without one") as told:
        verify_certificate(source)
    assert f"libortho detach {source} --out DIR writes a base with its certificate" in str(told.value)


def test_the_command_line(source: Path, out: Path) -> None:
    result = call("detach", source, "--out", out, "--stream", "hr", "--json")
    assert json.loads(result.stdout)["kept"] == ["default"], result.output
    assert json.loads(call("verify", out, "--json").stdout)["kept"] == ["default"]
    assert "holds what the certificate says" in " ".join(call("verify", out).stdout.split())
    assert json.loads(call("attach", out, source / "ortho/hr", "--name", "hr2", "--json").stdout)["stream"] == "hr2"
    assert isinstance(call("verify", out).exception, CheckpointError)
    assert call("card", out).exit_code == 0
    assert (out / "README.md").read_text() == model_card(out)
    assert isinstance(call("card", out).exception, CheckpointError)
    assert json.loads(call("card", out, "--force", "--json").stdout)["card"] == model_card(out)
    (out.parent / "audit.json").write_text(json.dumps(audit_report()))
    told = call("detach", source, "--out", out.parent / "audited", "--audit", out.parent / "audit.json").stdout
    assert "audit.json names no base" in " ".join(told.split())
    result = call("detach", source, "--out", out.parent / "bare", "--no-certificate")
    assert "gone: stream default" in result.stdout
    assert not (out.parent / "bare/certificate.json").exists()
    load(out)
