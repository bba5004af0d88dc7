"""A detached directory that somebody changed, and its certificate with it: refused, or named as not checked.

Hashes are made to fit where that could help. What is prepared before ``detach`` is in test_smuggling.py.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import EMBEDDING, STREAM, described, header, listed, manifest, raw, replaced, tensors, text
from making import edit, flip, write

from libortho import CheckpointError
from libortho.checkpoint import verify_certificate
from libortho.checkpoint.json_files import file_sha256, read_json

NOT_WORDS = "what these files say"
REFUSED = None


def certified(d: Path) -> None:
    """Make the certificate fit what the directory holds."""
    both = {k: read_json(d / "libortho.json")[k] for k in ("base_sha256", "rest_sha256")}
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
        lambda d, s: replaced("certificate.json", "{", '{"when": "x", ')(d), REFUSED,
    ),
    "blanks in the certificate": (
        lambda d, s: (d / "certificate.json").open("a").write("\n" * 999), REFUSED,
    ),
    "words of the certificate": (in_certificate(lambda c: c["checked"].append("eHh4eHh4")), REFUSED),
    "words left out": (in_certificate(lambda c: c["not_checked"].pop()), REFUSED),
    "the time": (in_certificate(lambda c: c.update(when="eHh4eHh4")), REFUSED),
    "a time that is none": (in_certificate(lambda c: c.update(when="2026-13-01T00:00:00Z")), REFUSED),
    "the version": (in_certificate(lambda c: c.update(libortho="eHh4/" * 99)), REFUSED),
    "a hash that is none": (in_certificate(lambda c: c["removed"][0].update(weights_sha256="eHh4")), REFUSED),
    "a number of many digits": (in_certificate(lambda c: c.update(compared=10**39)), REFUSED),
    "a number beyond all": (
        lambda d, s: replaced("certificate.json", '"compared": ', '"compared": ' + "9" * 100_000)(d), REFUSED,
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
        then_certified(lambda d: (d / "libortho.json").open("a").write(" " * 9)), REFUSED,
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
def test_after_detach(way: str, made: Path, source: Path, detached: Path) -> None:
    act, named = AFTER[way]
    act(detached, raw(made))
    if named is REFUSED:
        with pytest.raises(CheckpointError):
            verify_certificate(detached)
    else:
        assert [w for w in verify_certificate(detached).not_checked if named in w]


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda d: flip(d / "model.safetensors"), "was changed"),
    "configuration": (lambda d: (d / "config.json").write_text("{}"), "was changed"),
    "a file is gone": (lambda d: (d / "config.json").unlink(), "is missing, but named"),
    "a stream came back": (lambda d: write(d / "ortho/default", {"ortho.safetensors": b""}), "is not named by"),
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
def test_a_changed_directory_is_not_certified(case: str, detached: Path) -> None:
    act, message = TAMPERED[case]
    act(detached)
    with pytest.raises(CheckpointError, match=message):
        verify_certificate(detached)


def test_a_card_does_not_void_the_certificate(detached: Path) -> None:
    (detached / "README.md").write_text("card")
    verify_certificate(detached)


def test_what_lies_beside_is_named(detached: Path) -> None:
    before = verify_certificate(detached)
    write(detached, {"README.md": b"x", ".cache/huggingface/x": b"x"})
    found = verify_certificate(detached)
    assert found.not_checked == (
        *before.not_checked, "in the directory, and not covered: .cache/huggingface/, README.md",
    )  # fmt: skip
    assert found.checked == before.checked


def test_a_certificate_of_an_earlier_version_asks_for_a_new_one(detached: Path) -> None:
    edit(detached / "certificate.json", lambda c: c.update(schema="libortho-certificate/1"))
    with pytest.raises(CheckpointError, match=r"earlier version .* detach the streams again"):
        verify_certificate(detached)
