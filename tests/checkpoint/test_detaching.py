"""What detach writes holds the base byte for byte and nothing of a removed stream; attach takes only what belongs."""

import copy
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz import Disk, contents, fails_cleanly_everywhere, output, two_streams, write
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import libortho
import tiny
from libortho import AuditConfig, CheckpointError, SplitConfig, cli
from libortho.auditing.subjects import base_sha256
from libortho.checkpoint import attach, detach, hub, inspect, load, model_card, push_to_hub, save, verify_certificate
from libortho.checkpoint.json_files import file_sha256
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.tensor_files import TensorFiles
from libortho.core.layer import ortho_layers
from libortho.core.streams import BaseStream

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), tiny.byte_tokenizer(), tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def source(_made: Path, tmp_path: Path) -> Path:
    """INT8 base, the stream "default" (columns and tail), and "hr" (free entries)."""
    write(tmp_path / "in", contents(_made))
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def audit_report(**changes: Any) -> dict[str, Any]:
    """A report of the form that ``libortho audit`` writes, with a secret in every place that could hold one."""
    interval = {"value": 0.25, "low": 0.1, "high": 0.4, "n": 4}
    off = {
        "key": "off", "label": "alpha = 0",
        "memory": dict.fromkeys(("greedy_extraction", "sampled_extraction", "nll"), interval),
        "privacy": {"attacks": {"loss": {"auc": interval, "roc": [[0, 0]]}}},
        "utility": {"perplexity": interval, "kl": 0.01},
    }  # fmt: skip
    check = {"name": "extracted greedily", "value": 0.25, "target": "<= 0.01", "ok": False}
    return {
        "schema": "libortho-audit/1", "libortho": "0.1.0", "profile": "quick", "seed": 3,
        "model": {"name": "SECRET", "split": True, "streams": ["default", "hr"], "layers": 2, "bits": 8,
                  "density": 0.05},
        "counts": {"forget": 4}, "warnings": ["SECRET"], "records": [{"completion": "SECRET"}],
        "verdicts": [{"key": "memory", "status": "fail", "text": "SECRET", "checks": [check]}], "subjects": [off],
        "generations": [{"texts": {"on": "SECRET"}}], **changes,
    }  # fmt: skip


# -- detach ------------------------------------------------------------------------------------------------------------


def test_the_base_alone_is_alpha_0_in_stock_tools_and_here(source: Path, out: Path) -> None:
    before = contents(source)
    detach(source, out)
    assert contents(source) == before
    model, tokenizer = load(source)
    with libortho.alpha(model, 0.0):
        expected = output(model)
    assert not torch.equal(expected, output(model))
    again, same = load(out)
    assert torch.equal(output(again), expected)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(out)), expected)
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
    assert torch.equal(output(load(out, alpha=1.0)[0]), output(some))
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
    with pytest.raises(CheckpointError, match=r"certificate\.json is missing"):
        verify_certificate(out)


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


def test_an_audit_names_its_base(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    """One real audit, taken by the checkpoint that it is of, and refused by another of the same form."""
    other = copy.deepcopy(planted)
    for name, model, rank in (("mine", planted, 0.9), ("other", other, 0.8)):
        libortho.split(model, SplitConfig(ratio=0.02, rank_ratio=rank, max_low_rank_error=1.0))
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
def test_the_hash_of_a_base_in_memory_is_that_on_disk(options: dict[str, Any], planted: Any, tmp_path: Path) -> None:
    targets = ("down_proj", "q_proj")
    libortho.split(planted, SplitConfig(ratio=0.02, use_low_rank=False, target_modules=targets, **options))
    save(planted, None, tmp_path / "in")
    written = json.loads((tmp_path / "in/libortho.json").read_text())["base_sha256"]
    assert base_sha256(ortho_layers(planted)) == written
    for dtype in (None, torch.bfloat16):
        if dtype is None or "bits" not in options or options["bits"] is not None:  # a dense base is itself rounded
            assert base_sha256(ortho_layers(load(tmp_path / "in", dtype=dtype)[0])) == written


def test_what_no_checkpoint_can_hold_has_no_hash(planted: Any) -> None:
    assert base_sha256(ortho_layers(planted)) is None
    libortho.split(planted, SplitConfig(ratio=0.02, use_low_rank=False))
    layers = ortho_layers(planted)
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


# -- the tensor diff ---------------------------------------------------------------------------------------------------


def base_from(model: Any, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A checkpoint whose base somebody prepared and whose hashes fit."""
    place = save(model, None, tmp_path / "in")
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    base = BaseManifest.read(place)
    both = dict(zip(("base_sha256", "rest_sha256"), base.scheme.hashes(base.shapes, TensorFiles(place)), strict=True))
    for manifest in (place / "libortho.json", *place.glob("ortho/*/manifest.json")):
        edit(manifest, lambda m: m.update(both))
    load(place)
    return place


def stream_values(model: Any) -> torch.Tensor:
    layer = next(iter(libortho.core.layer.ortho_layers(model).values()))
    return layer.streams["default"].support.values


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the base is float32
@pytest.mark.parametrize("where", ["row", "column"])
def test_an_ortho_value_in_the_base_is_found(where: str, dtype: str, tmp_path: Path, out: Path) -> None:
    model = two_streams(dtype)
    column = stream_values(model)[0].float()

    def hide(tensors: dict[str, torch.Tensor]) -> None:
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
    part = next(iter(libortho.core.layer.ortho_layers(model).values())).streams["default"]
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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


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


def test_full_disk(source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    assert fails_cleanly_everywhere(lambda: detach(source, out, streams=["hr"]), tmp_path, disk) > 15
    disk.fail_at = -1
    verify_certificate(out)


# -- the certificate, checked ------------------------------------------------------------------------------------------

TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda d: flip(d / "model.safetensors"), "was changed"),
    "configuration": (lambda d: (d / "config.json").write_text("{}"), "was changed"),
    "a file is gone": (lambda d: (d / "config.json").unlink(), "is missing, but named"),
    "a stream came back": (lambda d: write(d / "ortho/hr", {"ortho.safetensors": b""}), "is not named by"),
    "other weights": (lambda d: write(d, {"extra.bin": b""}), "is not named by"),
    "schema": (lambda d: edit(d / "certificate.json", lambda c: c.update(schema="x")), "schema is 'x'"),
    "base hash": (
        lambda d: edit(d / "certificate.json", lambda c: c.update(base_sha256="0" * 64)), "speaks of the base 0000"),
    "kept": (lambda d: edit(d / "certificate.json", lambda c: c.update(kept=["x"])), "holds the streams"),
    "files": (lambda d: edit(d / "certificate.json", lambda c: c.update(files=[])), "expected a dict"),
    "removed": (lambda d: edit(d / "certificate.json", lambda c: c.update(removed=[{"x": 1}])), "other fields"),
    "no object": (lambda d: edit(d / "certificate.json", lambda c: c.update(removed=[3])), "other fields"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_directory_is_not_certified(case: str, source: Path, out: Path) -> None:
    detach(source, out)
    act, message = TAMPERED[case]
    act(out)
    with pytest.raises(CheckpointError, match=message):
        verify_certificate(out)


def test_a_card_does_not_void_the_certificate(source: Path, out: Path) -> None:
    detach(source, out)
    (out / "README.md").write_text("card")
    verify_certificate(out)


# -- attach ------------------------------------------------------------------------------------------------------------


def test_detach_and_attach_give_the_original_back(source: Path, out: Path) -> None:
    detach(source, out, certificate=False)
    for name in ("hr", "default"):
        assert attach(out, source / "ortho" / name) == name
    assert contents(out) == contents(source)
    assert torch.equal(output(load(out, alpha=1.0)[0]), output(load(source, alpha=1.0)[0]))


def test_attach_under_another_name(source: Path, out: Path) -> None:
    detach(source, out)
    assert attach(out, source / "ortho/hr/manifest.json", name="legal") == "legal"
    model, _ = load(out, streams=["legal"], alpha=1.0)
    assert torch.equal(output(model), output(load(source, streams=["hr"], alpha=1.0)[0]))
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
    torch.manual_seed(5)
    other = two_streams()
    with torch.no_grad():
        next(iter(libortho.core.layer.ortho_layers(other).values())).base.scales.mul_(2)
    save(other, None, tmp_path / "other")
    mine = json.loads((source / "libortho.json").read_text())["base_sha256"]
    theirs = json.loads((tmp_path / "other/libortho.json").read_text())["base_sha256"]
    with pytest.raises(CheckpointError, match=f"{theirs}, .* holds {mine}"):
        attach(source, tmp_path / "other/ortho/hr", name="new")


def test_attach_takes_a_folder(source: Path) -> None:
    with pytest.raises(CheckpointError, match="decrypt it first"):
        attach(source, source / "model.safetensors")


def test_attach_on_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    act = lambda: attach(source, source / "ortho/default", name="again")  # noqa: E731
    assert fails_cleanly_everywhere(act, tmp_path, disk) > 8
    disk.fail_at = -1
    load(source)


# -- card and hub ------------------------------------------------------------------------------------------------------


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


class Hub:
    """Stands in for the hub: remembers what would be sent, by the library's own filter."""

    sent: dict[str, Any]

    def __init__(self, **_: Any) -> None:
        type(self).sent = {"files": set(), "private": None}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> Any:
        self.sent["private"] = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: Path, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        files = contents(folder_path)
        self.sent["files"] |= set(
            filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return False

    def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, **_: Any) -> Any:
        self.sent["card"] = path_or_fileobj.decode()
        return SimpleNamespace(commit_url="https://hub/commit/2")


def test_only_the_base_is_pushed_unless_a_stream_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    (source / "notes.txt").write_text("the secret is 6311")
    before = contents(source)
    assert push_to_hub(source, "me/model") == "https://hub/commit/2"
    base = {n for n in before if not n.startswith("ortho/") and n != "notes.txt"}
    assert Hub.sent["files"] == base
    assert Hub.sent["private"] is True
    assert "default" not in Hub.sent["card"]
    assert contents(source) == before
    push_to_hub(source, "me/model", streams=["hr"], private=False)
    assert Hub.sent["files"] == base | {n for n in before if n.startswith("ortho/hr/")}
    assert Hub.sent["private"] is False
    assert "`hr`" in Hub.sent["card"]
    assert "`default`" not in Hub.sent["card"]
    (source / "README.md").write_text("mine")
    push_to_hub(source, "me/model")
    assert "README.md" in Hub.sent["files"]
    assert "card" not in Hub.sent


def test_a_damaged_checkpoint_is_not_pushed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", None)
    flip(source / "model.safetensors")
    with pytest.raises(CheckpointError, match="has the hash"):
        push_to_hub(source, "me/model")
    with pytest.raises(CheckpointError, match="no stream 'x'"):
        push_to_hub(source, "me/model", streams=["x"])


# -- command line ------------------------------------------------------------------------------------------------------


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


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
