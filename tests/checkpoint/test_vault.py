"""A stream under lock comes back as it was, to its owner alone, and a file that is no stream never reaches the disk."""

import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from making import contents, edit, logits
from typer.testing import CliRunner

from disk import Disk, fails_cleanly_everywhere
from libortho import CheckpointError, ConfigError, LibOrthoError, cli
from libortho.checkpoint import attach, decrypt, detach, encrypt, load

pyrage = pytest.importorskip("pyrage")
PHRASE = "correct horse battery staple"


@pytest.fixture(scope="module")
def phrase_locked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stream "hr" under a passphrase, by the command line; making and opening one takes long on purpose."""
    path = tmp_path_factory.mktemp("phrase") / "hr.age"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HR_PHRASE", PHRASE)
        result = call("encrypt", made / "ortho/hr", "--out", path, "--passphrase-env", "HR_PHRASE")
    assert result.exit_code == 0, result.output
    return path


def put(files: dict[str, bytes] | bytes, key: Any, path: Path) -> Path:
    """An age file with anything in it."""
    content = files if isinstance(files, bytes) else tar(files)
    path.write_bytes(pyrage.encrypt(content, [key.to_public()]))
    return path


def tar(files: dict[str, bytes], times: int = 1, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in [*files.items()] * times:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# -- round trip --------------------------------------------------------------------------------------------------------


def test_recipients_get_the_stream_back(source: Path, locked: Path, key: Any, out: Path, tmp_path: Path) -> None:
    assert decrypt(locked, out, identities=[str(key)]) == out
    assert contents(out) == contents(source / "ortho/default")
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o600}
    detach(source, tmp_path / "base")
    attach(tmp_path / "base", out)
    assert torch.equal(logits(load(tmp_path / "base")[0]), logits(load(source, streams=["default"])[0]))


def test_each_of_several_recipients(source: Path, tmp_path: Path, key: Any) -> None:
    other = pyrage.x25519.Identity.generate()
    path = encrypt(source / "ortho/hr", tmp_path / "x", recipients=[str(key.to_public()), str(other.to_public())])
    for number, identity in enumerate((key, other)):
        decrypt(path, tmp_path / f"out{number}", identities=[str(identity)])


def test_identity_files(locked: Path, key: Any, tmp_path: Path) -> None:
    other = pyrage.x25519.Identity.generate()
    (tmp_path / "keys.txt").write_text(f"# created: today\n# public key: x\n{other}\n{key}\n")
    decrypt(locked, tmp_path / "out", identities=[tmp_path / "keys.txt"])


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keys(source: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    public = (tmp_path / "id.pub").read_text().strip()
    path = encrypt(source / "ortho/hr", tmp_path / "hr.age", recipients=[public])
    decrypt(path, tmp_path / "out", identities=[tmp_path / "id"])
    assert contents(tmp_path / "out") == contents(source / "ortho/hr")


def test_the_plaintext_depends_on_the_content_alone(source: Path, locked: Path, key: Any, tmp_path: Path) -> None:
    shutil.copytree(source / "ortho/default", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (tmp_path / "elsewhere/notes.txt").write_text("not part of the stream")
    os.utime(tmp_path / "elsewhere/manifest.json", (1, 1))
    again = encrypt(tmp_path / "elsewhere", tmp_path / "again.age", recipients=[str(key.to_public())])
    plain = [pyrage.decrypt(p.read_bytes(), [key]) for p in (locked, again)]
    assert plain[0] == plain[1]
    with tarfile.open(fileobj=io.BytesIO(plain[0])) as archive:
        assert [(m.name, m.mtime, m.uid, m.uname, m.mode) for m in archive] == [
            (n, 0, 0, "", 0o600) for n in sorted(p.name for p in (source / "ortho/default").iterdir())
        ]


def test_nothing_of_the_stream_is_readable(source: Path, locked: Path) -> None:
    content = locked.read_bytes()
    assert content.startswith(b"age-encryption.org/v1")
    assert b"down_proj" not in content
    assert stat.S_IMODE(locked.stat().st_mode) == 0o600


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_keys_and_phrases(locked: Path, phrase_locked: Path, key: Any, out: Path, tmp_path: Path) -> None:
    other = str(pyrage.x25519.Identity.generate())
    for file, options in (
        (locked, {"identities": [other]}),
        (locked, {"passphrase": PHRASE}),
        (phrase_locked, {"passphrase": "incorrect donkey"}),
        (phrase_locked, {"identities": [str(key)]}),
    ):
        with pytest.raises(
            CheckpointError, match=r"cannot decrypt .* is another one than it was encrypted for"
        ) as error:
            decrypt(file, out, **options)
        assert "AGE-SECRET" not in str(error.value)
        assert "donkey" not in str(error.value)
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_keys_that_are_none(source: Path, locked: Path, key: Any, out: Path, tmp_path: Path) -> None:
    folder = source / "ortho/hr"
    for recipient in ("age1x", "ssh-ed25519 x", "", str(key)):
        with pytest.raises(CheckpointError, match="expected a public key") as error:
            encrypt(folder, out, recipients=[recipient])
        assert "AGE-SECRET-KEY-1" not in str(error.value)
    (tmp_path / "keys").write_text("# nothing\n")
    for identity in ("AGE-SECRET-KEY-1XYZ", tmp_path / "keys"):
        with pytest.raises(CheckpointError, match="holds no age or SSH secret key") as error:
            decrypt(locked, out, identities=[identity])
        assert "1XYZ" not in str(error.value)
    with pytest.raises(CheckpointError, match="cannot read the identity file"):
        decrypt(locked, out, identities=[tmp_path / "none"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either recipients or a passphrase"),
        ({"recipients": ["a"], "passphrase": "b"}, "either recipients or a passphrase"),
        ({"recipients": []}, "recipients is empty"),
        ({"recipients": "age1x"}, "one string; expected a list"),
        ({"passphrase": ""}, "the passphrase is empty"),
    ],
)
def test_no_key_or_two(options: dict[str, Any], message: str, source: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        encrypt(source / "ortho/hr", out, **options)
    assert not out.exists()


def test_what_is_there_is_not_replaced(source: Path, locked: Path, key: Any, out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        encrypt(source / "ortho/hr", out, passphrase=PHRASE)
    with pytest.raises(CheckpointError, match="exists"):
        decrypt(locked, out, identities=[str(key)])
    assert out.read_text() == "mine"


@pytest.mark.parametrize("damage", ["no manifest", "no weights", "weights changed", "a path for a name"])
def test_only_a_whole_stream_is_encrypted(damage: str, source: Path, out: Path) -> None:
    folder = source / "ortho/hr"
    manifest = folder / "manifest.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no weights":
        (folder / "ortho.safetensors").unlink()
    elif damage == "weights changed":
        (folder / "ortho.safetensors").write_bytes(b"x")
    else:
        edit(manifest, lambda m: m.update(stream="../x"))
    with pytest.raises(CheckpointError):
        encrypt(folder, out, passphrase=PHRASE)
    assert not out.exists()


def test_contents_that_are_no_stream(source: Path, key: Any, out: Path, tmp_path: Path) -> None:
    files = contents(source / "ortho/hr")
    hostile: dict[str, bytes | dict[str, bytes]] = {
        "no tar": b"x" * 2000,
        "empty": b"",
        "parent": {**files, "../evil": b"x"},
        "absolute": {**files, "/tmp/evil": b"x"},
        "folder inside": {"x/manifest.json": b"{}"},
        "another file": {**files, "run.py": b"x"},
        "link": tar(files, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": tar(files, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "device": tar(files, type=tarfile.CHRTYPE),
        "folder": tar({"manifest.json": b""}, type=tarfile.DIRTYPE),
        "twice": tar(files, times=2),
        "cut": tar(files)[:1000],
        "manifest is no JSON": {**files, "manifest.json": b"{"},
        "path in the manifest": {
            **files, "manifest.json": json.dumps(json.loads(files["manifest.json"]) | {"stream": "../x"}).encode()},
        "other values": {**files, "ortho.safetensors": b"x"},
        "values are missing": {"manifest.json": files["manifest.json"]},
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for name, content in hostile.items():
        path = put(content, key, tmp_path / "hostile.age")
        with pytest.raises(CheckpointError):
            decrypt(path, out, identities=[str(key)])
        path.unlink()
        assert sorted(tmp_path.rglob("*")) == before, name
    decrypt(put(files, key, tmp_path / "fine.age"), out, identities=[str(key)])


def test_a_member_that_claims_more_than_there_is(source: Path, key: Any, out: Path, tmp_path: Path) -> None:
    content = bytearray(tar(contents(source / "ortho/hr")))
    content[124:136] = b"77777777777\0"  # 8 GiB
    content[148:156] = b"        "
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    with pytest.raises(CheckpointError, match="claims 8589934591 bytes"):
        decrypt(put(bytes(content), key, tmp_path / "x.age"), out, identities=[str(key)])


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.nightly)])
def test_mutated_files_open_to_the_same_stream_or_not_at_all(
    count: int, source: Path, locked: Path, key: Any, out: Path, tmp_path: Path
) -> None:
    rng, original = random.Random(0), locked.read_bytes()
    plain = tar(contents(source / "ortho/hr"))
    opened = 0
    for number in range(count):
        content = bytearray(original if number % 2 else plain)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        else:
            header = rng.random() < 0.5
            content[rng.randrange(min(512, len(content)) if header else len(content))] ^= 1 << rng.randrange(8)
        locked.write_bytes(content if number % 2 else pyrage.encrypt(bytes(content), [key.to_public()]))
        try:
            decrypt(locked, out, identities=[str(key)])
        except LibOrthoError:
            assert not out.exists()
        else:
            opened += 1
            stream = "default" if number % 2 else "hr"
            weights = next((source / "ortho" / stream).glob("*.safetensors"))
            assert (out / weights.name).read_bytes() == weights.read_bytes()
            shutil.rmtree(out)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert opened < 0.375 * count  # padding of the tar, and what attach compares


def test_no_age_file_and_none_at_all(out: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="is not an age file"):
        decrypt(tmp_path / "x", out, passphrase=PHRASE)
    with pytest.raises(CheckpointError, match="cannot read"):
        decrypt(tmp_path / "none", out, passphrase=PHRASE)


def test_without_pyrage(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(CheckpointError, match=r"pip install 'libortho\[vault\]'"):
        encrypt(source / "ortho/hr", out, passphrase=PHRASE)


def test_full_disk(source: Path, locked: Path, key: Any, out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    disk = Disk(monkeypatch)
    recipients = [str(key.to_public())]
    act = lambda: encrypt(source / "ortho/hr", tmp_path / "hr.age", recipients=recipients)  # noqa: E731
    assert fails_cleanly_everywhere(act, tmp_path, disk) >= 2
    assert fails_cleanly_everywhere(lambda: decrypt(locked, out, identities=[str(key)]), tmp_path, disk) >= 5


# -- command line ------------------------------------------------------------------------------------------------------


def call(*arguments: Any, typed: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=typed)


def test_the_command_line_with_keys(source: Path, key: Any, out: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(str(key))
    result = call("encrypt", source / "ortho/hr", "--out", tmp_path / "hr.age", "-r", key.to_public(), "--json")
    assert json.loads(result.stdout)["bytes"] == (tmp_path / "hr.age").stat().st_size
    result = call("decrypt", tmp_path / "hr.age", "--out", out, "--identity", tmp_path / "key", "--json")
    assert json.loads(result.stdout) == {"out": str(out)}
    assert contents(out) == contents(source / "ortho/hr")


def test_the_command_line_with_a_passphrase(made: Path, phrase_locked: Path, out: Path) -> None:
    result = call("decrypt", phrase_locked, "--out", out, typed=f"{PHRASE}\n")
    assert result.exit_code == 0, result.output
    assert PHRASE not in result.output
    assert contents(out) == contents(made / "ortho/hr")
    given = ("--out", out, "--passphrase-env", "NONE")
    assert isinstance(call("decrypt", phrase_locked, *given).exception, ConfigError)


def test_without_a_terminal_and_a_passphrase_the_command_line_names_the_options(
    source: Path, phrase_locked: Path, out: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("libortho.cli.checkpoints._terminal", lambda: False)
    for command, keys in (
        (["encrypt", source / "ortho/hr", "--out", tmp_path / "hr.age"], "--recipient KEY"),
        (["decrypt", phrase_locked, "--out", out], "--identity FILE"),
    ):
        for typed in ("", "\n"):
            refused = call(*command, typed=typed).exception
            assert isinstance(refused, ConfigError)
            assert str(refused).endswith(f"none on standard input; give --passphrase-env NAME, or {keys}")
    assert call("decrypt", phrase_locked, "--out", out, typed=f"{PHRASE}\n").exit_code == 0
    assert not (tmp_path / "hr.age").exists()


def test_the_command_line_takes_a_key_from_the_environment(
    source: Path, locked: Path, key: Any, out: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HR_KEY", f"# mine\n{key}\n")
    assert call("decrypt", locked, "--out", out, "--identity-env", "HR_KEY").exit_code == 0
    assert contents(out) == contents(source / "ortho/default")
    for value in ("", "hunter2", "/etc/passwd"):
        monkeypatch.setenv("HR_KEY", value)
        refused = call("decrypt", locked, "--out", out.with_name("two"), "--identity-env", "HR_KEY").exception
        assert isinstance(refused, ConfigError)
        assert "--identity-env names" in str(refused)
        assert not value or value not in str(refused)
