"""Hostile directories and files for every verb that reads one: our error or a result, never another exception."""

import io
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest
from audit_reports import audit_report
from making import contents, two_streams, write
from mutations import cut, flip_bits, limit, mutate_json
from rich.console import Console

import tiny
from libortho import CheckpointError
from libortho.checkpoint import attach, decrypt, detach, encrypt, inspect, load, model_card, save, verify_certificate
from libortho.cli import tables

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = pyrage.x25519.Identity.generate()
NAMES = (
    "notes.txt", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors", "adapter_config.json",
    "special_tokens_map.json", "additional_chat_templates/x.jinja", "ortho/x", "ortho/hr/x", "ortho/a b/manifest.json",
    "\x1b]0;x\x07\x1b[2K", "ortho/\x1b[2K", "a\nb", "x" * 200, "\u202egpj.md", ".x", ".cache/x", ".git", "README.md",
    "ortho/hr/adapter_model.bin", "certificate.json", "tokenizer.json", "config.json", "libortho.json",
)  # fmt: skip
TEXTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda c, r: b"",
    lambda c, r: b"\xff\xfe" + c,
    lambda c, r: b"\xef\xbb\xbf" + c,
    lambda c, r: b"[" * 100_000,
    lambda c, r: b'{"a":' * 50_000,
    lambda c, r: c.rstrip()[:-1] + b', "files": {}}',
    lambda c, r: c + b" " * 1000,
    lambda c, r: number(c, r, b"9" * 100_000),
    lambda c, r: number(c, r, b"1e999"),
    lambda c, r: number(c, r, b"NaN"),
    lambda c, r: number(c, r, b"-Infinity"),
    lambda c, r: number(c, r, b"1" + b"0" * 38),
    lambda c, r: number(c, r, b"0.5"),
    lambda c, r: string(c, r, "\x1b]0;x\x07\x1b[1A"),
    lambda c, r: string(c, r, "\ud800"),
    lambda c, r: string(c, r, "x" * 100_000),
)


def number(content: bytes, rng: random.Random, new: bytes) -> bytes:
    """Another number in the place of one."""
    places = [i for i in range(len(content) - 1) if content[i : i + 2] == b": " and content[i + 2 : i + 3].isdigit()]
    if not places:
        return new
    begin = rng.choice(places) + 2
    end = next(i for i in range(begin, len(content) + 1) if content[i : i + 1] in (b",", b"\n", b"}", b""))
    return content[:begin] + new + content[end:]


def string(content: bytes, rng: random.Random, new: str) -> bytes:
    """A string more, as a value or as a key."""
    data = json.loads(content)
    todo, objects = [data], []
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            objects.append(part)
            todo += part.values()
        elif isinstance(part, list):
            todo += part
    chosen = rng.choice(objects)
    if chosen and rng.random() < 0.5:
        chosen[rng.choice(list(chosen))] = new
    else:
        chosen[new] = chosen.pop(next(iter(chosen))) if chosen else new
    return json.dumps(data, indent=2).encode()


def mutate(root: Path, original: dict[str, bytes], rng: random.Random) -> str:
    """Change something below a directory; what, in words."""
    kinds = ("flip", "cut", "json", "json", "json", "text", "text", "text", "delete", "swap", "add", "link", "odd")
    kind = rng.choice(kinds)
    names = sorted(original)
    if kind in ("json", "text"):
        names = [n for n in names if n.endswith(".json") and "tokenizer" not in n]
    name = rng.choice(names)
    path = root / name
    if kind == "json":
        path.write_bytes(mutate_json(original[name], rng))
    elif kind == "text":
        path.write_bytes(rng.choice(TEXTS)(original[name], rng))
    elif kind in ("flip", "cut"):
        path.write_bytes({"flip": flip_bits, "cut": cut}[kind](original[name], rng))
    elif kind == "swap":
        path.write_bytes(original[rng.choice(names)])
    elif kind == "add":
        write(root, {rng.choice([n for n in NAMES if n not in original]): rng.choice([b"", b"{}", original[name]])})
    else:
        path.unlink()
        target = rng.choice([".", "..", "nowhere", "/dev/zero", "/dev/null", path.name, "libortho.json"])
        if kind == "link":
            path.symlink_to(target)
        elif kind == "odd":
            os.mkfifo(path) if rng.random() < 0.5 else path.mkdir()
    return f"{kind} of {name!r}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a checkpoint, of what is detached from it with an audit, and of a stream."""
    place = tmp_path_factory.mktemp("verbs")
    out = save(two_streams(), tiny.byte_tokenizer(), place / "out", max_shard_size="12KB")
    (place / "audit.json").write_text(json.dumps(audit_report()))
    detach(out, place / "base", streams=["default"], audit=place / "audit.json")
    return {
        "checkpoint": contents(out),
        "detached": contents(place / "base"),
        "stream": contents(out / "ortho/hr"),
        "report": {"audit.json": (place / "audit.json").read_bytes()},
    }


def show(act: Callable[[Console], Any]) -> None:
    act(Console(file=io.StringIO(), width=200))


def locked(place: Path, rng: random.Random) -> Path:
    """An age file of a stream folder as it is now, damaged or not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(p for p in (place / "in").iterdir() if not p.is_fifo()):
            tar.add(path, path.name)
    content = pyrage.encrypt(buffer.getvalue(), [KEY.to_public()])
    (place / "x.age").write_bytes(flip_bits(content, rng) if rng.random() < 0.2 else content)
    return place / "x.age"


def attached(place: Path) -> None:
    write(place / "target", {n: c for n, c in contents(place / "whole").items() if not n.startswith("ortho/hr/")})
    attach(place / "target", place / "in")


VERBS: dict[str, tuple[str, Callable[[Path, random.Random], Any]]] = {
    "load": ("checkpoint", lambda d, r: load(d / "in")),
    "inspect": ("checkpoint", lambda d, r: show(lambda c: tables.show_checkpoint(inspect(d / "in"), c))),
    "card": ("checkpoint", lambda d, r: model_card(d / "in")),
    "detach": ("checkpoint", lambda d, r: detach(d / "in", d / "out", streams=r.choice([["hr"], "all"]))),
    "detach with an audit": ("report", lambda d, r: detach(d / "whole", d / "out", audit=d / "in/audit.json")),
    "verify": ("detached", lambda d, r: show(lambda c: tables.show_certificate(verify_certificate(d / "in"), c))),
    "attach to": ("detached", lambda d, r: attach(d / "in", d / "whole/ortho/default")),
    "attach": ("stream", lambda d, r: attached(d)),
    "encrypt": ("stream", lambda d, r: encrypt(d / "in", d / "y.age", recipients=[str(KEY.to_public())])),
    "decrypt": ("stream", lambda d, r: decrypt(locked(d, r), d / "out", identities=[str(KEY)])),
}


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("verb", VERBS)
def test_our_errors_alone(verb: str, count: int, made: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    kind, act = VERBS[verb]
    original = made[kind]
    rng = random.Random(f"0 {verb}")
    outcomes: Counter[str] = Counter()
    messages: list[str] = []
    for number_ in range(count // len(VERBS)):
        place = tmp_path / "work"
        write(place / "in", original)
        write(place / "whole", made["checkpoint"])
        said = "nothing"
        try:
            said = mutate(place / "in", original, rng)
            with limit(60):
                act(place, rng)
            outcomes["done"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            messages.append(f"mutation {number_}, {said}: {error}")
            if (place / "out").exists():
                messages.append(f"mutation {number_} left something\t")
        except BaseException as error:
            error.add_note(f"mutation {number_}: {said}")
            raise
        assert not [p for p in place.iterdir() if p.name.startswith(".")]
        shutil.rmtree(place)
    assert not [m for m in messages if not m.replace("\n", " ").isprintable()]
    assert outcomes["refused"] > 0


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_mutated_is_taken(verb: str, made: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    kind, act = VERBS[verb]
    write(tmp_path / "in", made[kind])
    write(tmp_path / "whole", made["checkpoint"])
    rng = random.Random(3)
    rng.random = lambda: 0.9  # type: ignore[method-assign]
    act(tmp_path, rng)
