"""Ways to keep a removed stream in a detached directory: each is refused, or named as not checked.

"before" prepares the source, with all hashes made to fit, as somebody does who knows the format; "after" changes what
``detach`` wrote, with the hashes of the certificate made to fit where that could help.
"""

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz import contents, two_streams, write

import tiny
from libortho import CheckpointError
from libortho.checkpoint import attach, detach, save, verify_certificate
from libortho.checkpoint.json_files import file_sha256
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.tensor_files import TensorFiles

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LAYER = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"
STREAM = "ortho/default/adapter_model.safetensors"


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), tiny.byte_tokenizer(), tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def source(_made: Path, tmp_path: Path) -> Path:
    write(tmp_path / "in", contents(_made))
    return tmp_path / "in"


# -- what somebody does who knows the format ---------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], Any], indent: int | None = 2) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=indent) + "\n")


def stream(d: Path) -> dict[str, torch.Tensor]:
    return load_file(d / STREAM)


def values(d: Path) -> torch.Tensor:
    """A column of the removed stream, (32,)."""
    return stream(d)[f"base_model.model.{LAYER}.lora_B.weight"][:, 0]


def blob(d: Path) -> str:
    return base64.b64encode((d / STREAM).read_bytes()).decode()


def fit(d: Path) -> None:
    """Make all hashes of a source fit what it holds."""
    base = BaseManifest.read(d)
    both = dict(zip(("base_sha256", "rest_sha256"), base.scheme.hashes(base.shapes, TensorFiles(d)), strict=True))
    listed = {f: None if h is None else file_sha256(d / f) for f, h in base.files.items()}
    edit(d / "libortho.json", lambda m: m.update(both, files=listed))
    for manifest in d.glob("ortho/*/manifest.json"):
        edit(manifest, lambda m: m.update(both))


def tensors(change: Callable[[dict[str, torch.Tensor], Path], Any]) -> Callable[[Path], None]:
    """Change tensors of the base."""

    def act(d: Path) -> None:
        found = load_file(d / WEIGHTS)
        change(found, d)
        rewrite(d, found, {"format": "pt"})
        fit(d)

    return act


def rewrite(d: Path, found: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file({k: v.contiguous() for k, v in found.items()}, d / WEIGHTS, metadata=metadata)


def described(**metadata: str) -> Callable[[Path], None]:
    """The same tensors under other metadata."""
    return lambda d: rewrite(d, load_file(d / WEIGHTS), metadata)


def put(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A changed column of the stream as a row of the embeddings."""
    return tensors(lambda t, d: t[EMBEDDING].__setitem__(9, change(values(d)).to(t[EMBEDDING].dtype)))


def header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the text of the header of the base's weights."""

    def act(d: Path) -> None:
        content = (d / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        (d / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return act


def text(name: str, say: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A key of a file of the tokenizer or the model."""

    def act(d: Path) -> None:
        edit(d / name, lambda c: c.update(note=say(d)))
        fit(d)

    return act


def manifest(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    return lambda d: edit(d / "libortho.json", lambda m: change(m, d))


def listed(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """A file more, named by ``libortho.json``."""

    def act(d: Path) -> None:
        write(d, {name: content(d)})
        edit(d / "libortho.json", lambda m: m["files"].update({name: file_sha256(d / name)}))

    return act


def kept(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    return lambda d: edit(d / "ortho/hr/manifest.json", lambda m: change(m, d))


def raw(d: Path) -> bytes:
    return (d / STREAM).read_bytes()


def as_codes(t: dict[str, torch.Tensor], d: Path) -> None:
    """The bytes of a column in the packed codes."""
    t[f"{LAYER}.weight_packed"].view(torch.uint8)[:2] = values(d).contiguous().view(torch.uint8).reshape(2, 64)


def doubled_key(d: Path) -> None:
    path = d / "libortho.json"
    path.write_text(path.read_text().replace('"bits"', f'"base_sha256": "{blob(d)}", "bits"', 1))


def shards(d: Path) -> None:
    """An index and its shard beside the weights."""
    found = load_file(d / WEIGHTS)
    found[EMBEDDING][9] = values(d)
    save_file(found, d / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "model-00001-of-00001.safetensors")}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(d / "libortho.json", lambda m: m["files"].update(
        {"model-00001-of-00001.safetensors": None, "model.safetensors.index.json": None}))  # fmt: skip


def scattered(t: dict[str, torch.Tensor], d: Path) -> None:
    t[EMBEDDING][:32, 3] = values(d)[torch.randperm(32)]


def in_halves(t: dict[str, torch.Tensor], d: Path) -> None:
    t[EMBEDDING][5] = torch.randn(32)
    t[EMBEDDING][6] = values(d) - t[EMBEDDING][5]


NOT_WORDS = "what these files say"
OTHERWISE = "values that were encoded in another way"
REFUSED = None
BEFORE: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "unknown key in libortho.json": (manifest(lambda m, d: m.update(note=blob(d))), REFUSED),
    "unknown key of a layer": (manifest(lambda m, d: m["layers"][LAYER].update(note=blob(d))), REFUSED),
    "unknown key of a report": (manifest(lambda m, d: m["layers"][LAYER]["report"].update(note=1.5)), REFUSED),
    "the same key twice": (doubled_key, REFUSED),
    "a version": (manifest(lambda m, d: m["libraries"].update(torch=blob(d))), REFUSED),
    "a further library": (manifest(lambda m, d: m["libraries"].update(note=blob(d))), REFUSED),
    "a number of very many digits": (
        manifest(lambda m, d: m["layers"][LAYER]["report"].update(base_bytes=int.from_bytes(raw(d)[:1000]))), REFUSED,
    ),
    "digits that no number has": (
        lambda d: (d / "libortho.json").write_text(
            (d / "libortho.json").read_text().replace('"base_bytes": ', '"base_bytes": 1e0, "low_rank_error": 0.5', 1)),
        REFUSED,
    ),
    "blanks in libortho.json": (
        lambda d: (d / "libortho.json").write_text((d / "libortho.json").read_text() + " \t" * 4000), REFUSED,
    ),
    "escapes in libortho.json": (
        lambda d: (d / "libortho.json").write_text(
            (d / "libortho.json").read_text().replace('"files"', '"\\u0066iles"')), REFUSED,
    ),
    "the size of a stream in the report of the base": (
        manifest(lambda m, d: m["layers"][LAYER]["report"].update(ortho_density=0.125)), REFUSED,
    ),
    "metadata of the weights": (
        described(format="pt", note="MTIzNDU2Nzg5" * 99), REFUSED,
    ),
    "another format in the metadata": (described(format="bm90IGEgc2VjcmV0"), REFUSED),
    "blanks behind the header": (header(lambda h: h + " " * 800), REFUSED),
    "blanks inside the header": (header(lambda h: h.replace(":", ": ")), REFUSED),
    "a further key in the header": (header(lambda h: h.replace('"dtype"', '"note":"MTIz","dtype"', 1)), REFUSED),
    "bytes behind the tensors": (lambda d: (d / WEIGHTS).open("ab").write(raw(d)), REFUSED),
    "a tensor that the model has not": (tensors(lambda t, d: t.update(note=values(d) * 1.1)), REFUSED),
    "a tensor that transformers ignores": (
        tensors(lambda t, d: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": values(d) * 1.1})), REFUSED,
    ),
    "a larger tensor": (
        tensors(lambda t, d: t.update({NORM: torch.cat([t[NORM], values(d) * 1.1])})), REFUSED,
    ),
    "a tensor in float64": (tensors(lambda t, d: t.update({NORM: t[NORM].double()})), REFUSED),
    "a tensor of bytes": (tensors(lambda t, d: t.update({NORM: t[NORM].view(torch.int32)})), REFUSED),
    "NaN that carry bits": (tensors(lambda t, d: t[NORM].view(torch.int32).fill_(0x7FC12345)), REFUSED),
    "another weight_shape": (tensors(lambda t, d: t[f"{LAYER}.weight_shape"].fill_(9)), REFUSED),
    "a row of the embeddings": (put(lambda v: v), REFUSED),
    "negated": (put(lambda v: -v), REFUSED),
    "doubled": (put(lambda v: 2 * v), REFUSED),
    "an eighth, negated": (put(lambda v: -v / 8), REFUSED),
    "rounded to bf16": (put(lambda v: v.bfloat16()), REFUSED),
    "rounded to fp16": (put(lambda v: v.half()), REFUSED),
    "rounded to fp16 and scaled": (put(lambda v: -4 * v.half().float()), REFUSED),
    "half a column": (put(lambda v: torch.cat([v[:16], torch.randn(16)])), REFUSED),
    "a column at another place": (
        tensors(lambda t, d: t[EMBEDDING].view(-1)[77 : 77 + 32].copy_(values(d))), REFUSED,
    ),
    "a column down the embeddings": (tensors(lambda t, d: t[EMBEDDING][3:35, 7].copy_(values(d))), REFUSED),
    "a column between zeros": (
        tensors(lambda t, d: t[EMBEDDING].view(-1)[:64].copy_(torch.stack([values(d), 0 * values(d)], 1).view(-1))),
        REFUSED,
    ),
    "bytes as integer codes": (tensors(as_codes), REFUSED),
    "an unlisted file": (lambda d: (d / "notes.bin").write_bytes(raw(d)), REFUSED),
    "a listed file, one byte before the stream": (listed("notes.bin", lambda d: b"x" + raw(d)), REFUSED),
    "a listed vocabulary, one byte before the stream": (listed("vocab.txt", lambda d: b"x" + raw(d)), REFUSED),
    "a listed adapter": (listed("adapter_model.safetensors", raw), REFUSED),
    "other weights with their index": (shards, REFUSED),
    "pytorch_model.bin": (listed("pytorch_model.bin", raw), REFUSED),
    "a link to the stream": (
        lambda d: (os.symlink(d / STREAM, d / "merges.txt"), listed("merges.txt", raw)(d)), REFUSED,
    ),
    "a folder link": (lambda d: os.symlink(d / "ortho", d / "additional_chat_templates"), REFUSED),
    "base64 in tokenizer_config.json": (text("tokenizer_config.json", blob), REFUSED),
    "base64 of a part": (
        text("tokenizer_config.json", lambda d: base64.b64encode(raw(d)[-999:-900]).decode()), REFUSED,
    ),
    "base64 in lines": (
        text("config.json", lambda d: base64.encodebytes(raw(d)[-999:]).decode()), REFUSED,
    ),
    "base64 for addresses": (
        text("config.json", lambda d: base64.urlsafe_b64encode(raw(d)[-2999:]).decode()), REFUSED,
    ),
    "hexadecimal": (text("generation_config.json", lambda d: raw(d)[-999:].hex()), REFUSED),
    "hexadecimal in capitals": (text("tokenizer.json", lambda d: "a" + raw(d)[-999:].hex().upper()), REFUSED),
    "numbers": (text("config.json", lambda d: values(d).tolist()), REFUSED),
    "a list of bytes": (text("config.json", lambda d: list(raw(d)[-999:])), REFUSED),
    "a kept stream that shares the values": (lambda d: attach(d, d / "ortho/default", name="copy"), REFUSED),
    "the method of a kept stream": (kept(lambda m, d: m.update(method={"verb": "tune", "note": blob(d)})), REFUSED),
    "a key of the manifest of a kept stream": (kept(lambda m, d: m.update(note=blob(d))), REFUSED),
    "a file in the folder of a kept stream": (
        lambda d: (d / "ortho/hr/adapter_model.safetensors").write_bytes(raw(d)), REFUSED,
    ),
    "a folder that is no stream": (lambda d: write(d / "ortho/.git", {"x": raw(d)}), REFUSED),
    "a file among the streams": (lambda d: (d / "ortho/x").write_bytes(raw(d)), REFUSED),
    "compressed text": (
        text("config.json", lambda d: base64.b64encode(zlib.compress(raw(d), 9)).decode()), NOT_WORDS,
    ),
    "the sum of two tensors": (tensors(in_halves), OTHERWISE),
    "a permutation": (tensors(scattered), OTHERWISE),
    "scaled by a third": (put(lambda v: v / 3), OTHERWISE),
    "compressed, in the method of a kept stream": (
        kept(lambda m, d: m.update(method={"verb": base64.b64encode(zlib.compress(raw(d))).decode()})),
        "of the manifests of kept streams",
    ),
}  # fmt: skip


def test_more_than_thirty_ways() -> None:
    assert len(BEFORE) > 30
    assert len(AFTER) > 30


@pytest.mark.parametrize("way", BEFORE)
def test_before_detach(way: str, source: Path, tmp_path: Path) -> None:
    act, named = BEFORE[way]
    act(source)
    if named is REFUSED:
        with pytest.raises(CheckpointError):
            detach(source, tmp_path / "out", streams=["default"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
        return
    result = detach(source, tmp_path / "out", streams=["default"])
    assert [w for w in result.not_checked if named in w]
    assert [w for w in verify_certificate(tmp_path / "out").not_checked if named in w]


def test_the_helpers_alone_are_no_reason_to_refuse(source: Path, tmp_path: Path) -> None:
    tensors(lambda t, d: None)(source)
    put(lambda v: v + torch.randn(32))(source)
    text("config.json", lambda d: "a note")(source)
    header(lambda h: h)(source)
    kept(lambda m, d: m.update(method={"verb": "tune", "note": "ok"}))(source)
    listed("vocab.txt", lambda d: b"a\nb")(source)
    result = detach(source, tmp_path / "out", streams=["default"])
    assert verify_certificate(tmp_path / "out") == result


# -- after detach ------------------------------------------------------------------------------------------------------


def certified(d: Path) -> None:
    """Make the certificate fit what the directory holds."""
    both = {k: json.loads((d / "libortho.json").read_text())[k] for k in ("base_sha256", "rest_sha256")}
    edit(d / "certificate.json", lambda c: c.update(both, files={f: file_sha256(d / f) for f in c["files"]}))


def in_certificate(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, bytes], None]:
    return lambda d, secret: edit(d / "certificate.json", change)


def added(name: str) -> Callable[[Path, bytes], None]:
    return lambda d, secret: write(d, {name: secret})


def added_and_named(name: str) -> Callable[[Path, bytes], None]:
    def act(d: Path, secret: bytes) -> None:
        write(d, {name: secret})
        edit(d / "certificate.json", lambda c: c["files"].update({name: file_sha256(d / name)}))

    return act


def listed_and_named(name: str) -> Callable[[Path, bytes], None]:
    def act(d: Path, secret: bytes) -> None:
        listed(name, lambda _: secret)(d)
        edit(d / "certificate.json", lambda c: c["files"].update({name: "0" * 64}))
        certified(d)

    return act


def then_certified(act: Callable[[Path], Any]) -> Callable[[Path, bytes], None]:
    return lambda d, secret: (act(d), certified(d))


def fake_audit(**changes: Any) -> dict[str, Any]:
    check = {"name": "extracted", "value": 0.0, "target": "<= 0", "ok": True}
    verdict = {"key": "memory", "status": "pass", "checks": [check | changes.pop("check", {})]}
    return {
        "sha256": "0" * 64, "libortho": "0.1.0", "profile": "quick", "seed": 0, "records": 3,
        "model": {"streams": ["hr"], "layers": 2, "bits": 8, "density": 0.1, "base_sha256": None},
        "verdicts": [verdict], "memory": dict.fromkeys(("greedy_extraction", "sampled_extraction", "nll")),
        "membership_auc": {}, "utility": {"perplexity": None, "kl": None}, "base_checked": False, **changes,
    }  # fmt: skip


AFTER: dict[str, tuple[Callable[[Path, bytes], Any], str | None]] = {
    "a file": (added("notes.bin"), REFUSED),
    "a file that the certificate names": (added_and_named("notes.bin"), REFUSED),
    "a vocabulary that the certificate names": (added_and_named("vocab.txt"), REFUSED),
    "a file that all name": (listed_and_named("notes.bin"), REFUSED),
    "weights for older tools": (listed_and_named("pytorch_model.bin"), REFUSED),
    "other weights": (listed_and_named("model-00001-of-00001.safetensors"), REFUSED),
    "a hidden file": (added(".notes"), REFUSED),
    "a license": (added("LICENSE"), REFUSED),
    "a picture": (added("plot.png"), REFUSED),
    "a folder": (lambda d, s: (d / "notes").mkdir(), REFUSED),
    "a folder of git": (added(".git/objects/x"), REFUSED),
    "another cache": (added(".cache/notes/x"), REFUSED),
    "a cache that is a link": (lambda d, s: (d / ".cache").symlink_to(d.parent), REFUSED),
    "the hub's cache as a link": (
        lambda d, s: ((d / ".cache").mkdir(), (d / ".cache/huggingface").symlink_to(d.parent)), REFUSED,
    ),
    "a link to a folder": (lambda d, s: (d / "more").symlink_to(d.parent / "in/ortho"), REFUSED),
    "streams as a link": (
        lambda d, s: (shutil.rmtree(d / "ortho"), (d / "ortho").symlink_to(d.parent / "in/ortho")), REFUSED,
    ),
    "a link to a file": (lambda d, s: (d / "more").symlink_to(d.parent / "in" / STREAM), REFUSED),
    "a link to nothing": (lambda d, s: (d / "more").symlink_to("/proc/nowhere"), REFUSED),
    "a README that is a link to a folder": (lambda d, s: (d / "README.md").symlink_to(d.parent), REFUSED),
    "a README that is a folder": (added("README.md/x"), REFUSED),
    "a pipe": (lambda d, s: os.mkfifo(d / "more"), REFUSED),
    "a README that is a pipe": (lambda d, s: os.mkfifo(d / "README.md"), REFUSED),
    "a stream that came back": (
        lambda d, s: shutil.copytree(d.parent / "in/ortho/default", d / "ortho/default"), REFUSED,
    ),
    "a file beside a kept stream": (added("ortho/hr/notes.bin"), REFUSED),
    "a README beside a kept stream": (added("ortho/hr/README.md"), REFUSED),
    "an unfinished folder": (added("ortho/.hr.0123abcd.tmp/x"), REFUSED),
    "an unknown key of the certificate": (in_certificate(lambda c: c.update(note="x" * 99)), REFUSED),
    "the same key twice in the certificate": (
        lambda d, s: (d / "certificate.json").write_text(
            (d / "certificate.json").read_text().replace("{", '{"when": "x", ', 1)), REFUSED,
    ),
    "blanks in the certificate": (
        lambda d, s: (d / "certificate.json").write_text((d / "certificate.json").read_text() + "\n" * 999), REFUSED,
    ),
    "words of the certificate": (in_certificate(lambda c: c["checked"].append("eHh4eHh4")), REFUSED),
    "words left out": (in_certificate(lambda c: c["not_checked"].pop()), REFUSED),
    "the time": (in_certificate(lambda c: c.update(when="eHh4eHh4")), REFUSED),
    "a time that is none": (in_certificate(lambda c: c.update(when="2026-13-01T00:00:00Z")), REFUSED),
    "the version": (in_certificate(lambda c: c.update(libortho="eHh4/" * 99)), REFUSED),
    "a hash that is none": (in_certificate(lambda c: c["removed"][0].update(weights_sha256="eHh4")), REFUSED),
    "a number of many digits": (in_certificate(lambda c: c.update(compared=10**39)), REFUSED),
    "a number beyond all": (
        lambda d, s: (d / "certificate.json").write_text(
            (d / "certificate.json").read_text().replace('"compared": ', '"compared": ' + "9" * 100_000)), REFUSED,
    ),
    "a density": (in_certificate(lambda c: c["removed"][0].update(density=1e300)), REFUSED),
    "a density that is text": (in_certificate(lambda c: c["removed"][0].update(density="x")), REFUSED),
    "a key of an audit": (in_certificate(lambda c: c.update(audit=fake_audit(note="x"))), REFUSED),
    "a long name in an audit": (
        in_certificate(lambda c: c.update(audit=fake_audit(check={"name": "eHh4" * 60}))), REFUSED,
    ),
    "a name that steers a terminal": (
        in_certificate(lambda c: c.update(audit=fake_audit(check={"name": "\x1b]0;x\x07"}))), REFUSED,
    ),
    "many verdicts": (
        in_certificate(lambda c: c.update(audit=fake_audit(verdicts=fake_audit()["verdicts"] * 99))), REFUSED,
    ),
    "metadata of the weights": (
        then_certified(described(format="pt", note="x")), REFUSED,
    ),
    "blanks in the header": (then_certified(header(lambda h: h + " " * 80)), REFUSED),
    "a tensor more": (then_certified(tensors(lambda t, d: t.update(note=torch.randn(99)))), REFUSED),
    "a key of libortho.json": (then_certified(manifest(lambda m, d: m.update(note="x"))), REFUSED),
    "blanks in libortho.json": (
        then_certified(lambda d: (d / "libortho.json").write_text((d / "libortho.json").read_text() + " " * 9)),
        REFUSED,
    ),
    "a README": (added("README.md"), "README.md"),
    "attributes of git": (added(".gitattributes"), ".gitattributes"),
    "the hub's cache": (added(".cache/huggingface/download/x.bin"), ".cache/huggingface"),
    "text of the configuration": (
        then_certified(text("config.json", lambda d: "eHh4" * 999)), NOT_WORDS,
    ),
    "an audit that nobody made": (in_certificate(lambda c: c.update(audit=fake_audit())), "the figures of an audit"),
    "other embeddings and a new certificate": (
        then_certified(tensors(lambda t, d: t[EMBEDDING].copy_(torch.randn(64, 32)))), "that its author compared",
    ),
    "a file attribute": (lambda d, s: os.utime(d / "config.json", (1, 6311)), "times, modes"),
}  # fmt: skip


@pytest.mark.parametrize("way", AFTER)
def test_after_detach(way: str, source: Path, tmp_path: Path) -> None:
    secret = raw(source)
    detach(source, tmp_path / "out", streams=["default"])
    act, named = AFTER[way]
    act(tmp_path / "out", secret)
    if named is REFUSED:
        with pytest.raises(CheckpointError):
            verify_certificate(tmp_path / "out")
    else:
        assert [w for w in verify_certificate(tmp_path / "out").not_checked if named in w]


def test_what_lies_beside_is_named(source: Path, tmp_path: Path) -> None:
    result = detach(source, tmp_path / "out")
    for name in ("README.md", ".cache/huggingface/x"):
        write(tmp_path / "out", {name: b"x"})
    found = verify_certificate(tmp_path / "out")
    assert found.not_checked[-1] == "in the directory, and not covered: .cache/huggingface/, README.md"
    assert found.not_checked[:-1] == result.not_checked
    assert found.checked == result.checked


def test_a_certificate_of_an_earlier_version_asks_for_a_new_one(source: Path, tmp_path: Path) -> None:
    detach(source, tmp_path / "out")
    edit(tmp_path / "out/certificate.json", lambda c: c.update(schema="libortho-certificate/1"))
    with pytest.raises(CheckpointError, match=r"earlier version .* detach the streams again"):
        verify_certificate(tmp_path / "out")


def test_a_folder_link_inside_a_checkpoint_leads_nowhere(source: Path, tmp_path: Path) -> None:
    shutil.move(source / "ortho", tmp_path / "elsewhere")
    (source / "ortho").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link to a folder"):
        detach(source, tmp_path / "out")
