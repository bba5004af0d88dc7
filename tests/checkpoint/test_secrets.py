"""No message and no output repeats a secret key or a passphrase, in whatever writing and wherever it is given."""

import shutil
import sys
import traceback
import unicodedata
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from libortho import CheckpointError, cli
from libortho.checkpoint import decrypt, encrypt

pytest.importorskip("pyrage")
PHRASE = "correct horse battery staple"
WRITINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "a blank before": lambda k: f" {k}",
    "blanks around": lambda k: f"\t {k} \n",
    "a line break before": lambda k: f"\r\n{k}",
    "a line break within": lambda k: f"{k[:30]}\n{k[30:]}",
    "blanks within": lambda k: " ".join(k[i : i + 4] for i in range(0, len(k), 4)),
    "lower case": str.lower,
    "mixed case": lambda k: "".join(c.lower() if i % 2 else c for i, c in enumerate(k)),
    "quotes": lambda k: f'"{k}"',
    "other quotes": lambda k: f"\u201c{k}\u201d",
    "a comment before": lambda k: f"# created: today\n# public key: age1x\n{k}\n",
    "a name before": lambda k: f"key={k}",
    "as a path": lambda k: f"/home/me/{k}",
    "a file of it": lambda k: f"{k}.txt",
    "as bytes": lambda k: repr(k.encode()),
    "one letter more": lambda k: f"{k}Q",
    "cut": lambda k: k[:50],
    "the first letter lost": lambda k: k[1:],
    "without its name": lambda k: k.removeprefix("AGE-SECRET-KEY-1"),
    "other dashes": lambda k: k.replace("-", "\u2011"),
    "wide letters": lambda k: "".join(chr(ord(c) + 0xFEE0) if c != "-" else c for c in k),
    "an escape sequence": lambda k: f"\x1b[1m{k[:20]}\x1b[0m{k[20:]}",
}


def holds(text: str, key: str) -> bool:
    """Whether a good part of a key can be read in a text, in whatever case and with whatever between."""
    plain = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    secret = key.removeprefix("AGE-SECRET-KEY-1").casefold()
    return any(secret[i : i + 8] in plain for i in range(len(secret) - 8))


@pytest.mark.parametrize("writing", WRITINGS)
def test_no_message_repeats_a_key(writing: str, made: Path, made_locked: Path, key: Any, tmp_path: Path) -> None:
    text = WRITINGS[writing](str(key))
    stream, out = made / "ortho/hr", tmp_path / "out"
    calls: list[Callable[[], Any]] = [
        lambda: decrypt(made_locked, out, identities=[text]),
        lambda: decrypt(made_locked, out, identities=[Path(text.replace("\0", ""))]),
        lambda: encrypt(stream, out, recipients=[text]),
    ]
    if "AGE-SECRET-KEY" in text or "age-secret-key" in text:
        calls += [
            lambda: decrypt(text, out, passphrase=PHRASE),
            lambda: decrypt(made_locked, text, identities=[str(key)]),
            lambda: encrypt(text, out, passphrase=PHRASE),
            lambda: encrypt(stream, text, passphrase=PHRASE),
        ]
    refusals = 0
    for call in calls:
        try:
            call()
        except CheckpointError as error:
            refusals += 1
            shown = "".join(traceback.format_exception_only(error)) + repr(error.__cause__) + repr(error.__context__)
            assert not holds(shown.replace(str(tmp_path), ""), str(key)), shown
        else:
            shutil.rmtree(out)
    assert refusals >= len(calls) - 2
    assert not any(holds(p.name, str(key)) for p in tmp_path.rglob("*"))


PLACES = (
    "decrypt FILE --out OUT --identity KEY", "decrypt FILE --out OUT -iKEY", "decrypt KEY --out OUT",
    "decrypt FILE --out OUT KEY", "decrypt FILE --out OUT --passphrase-env KEY",
    "decrypt FILE --out OUT --identity-env KEY", "decrypt FILE --out OUT --KEY",
    "encrypt STREAM --out OUT --recipient=KEY", "encrypt STREAM --out KEY", "KEY",
)  # fmt: skip
KNOWN = [w for w in WRITINGS if w not in ("the first letter lost", "without its name")]
CASES = [
    pytest.param(place, writing, marks=[pytest.mark.nightly] if (i + j) % 4 else [])
    for i, place in enumerate(PLACES)
    for j, writing in enumerate(KNOWN)
]


@pytest.mark.parametrize(("place", "writing"), CASES)
def test_the_command_line_refuses_a_key_and_does_not_print_it(
    place: str, writing: str, made: Path, made_locked: Path, key: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    given = {
        "FILE": made_locked,
        "OUT": tmp_path / "out",
        "STREAM": made / "ortho/hr",
        "KEY": WRITINGS[writing](str(key)),
    }
    arguments = [reduce(lambda a, n: a.replace(n, str(given[n])), given, a) for a in place.split()]
    monkeypatch.setattr(sys, "argv", ["libortho", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = "".join(capsys.readouterr())
    assert not holds(shown.replace(str(tmp_path), ""), str(key)), shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [["--passphrase-env", "PHRASE"], ["PHRASE"], ["--passphrase=PHRASE"]], ids=" ".join)
@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_the_command_line_does_not_print_a_passphrase(
    place: list[str], command: str, made: Path, made_locked: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    of = str(made_locked if command == "decrypt" else made / "ortho/hr")
    given = [a.replace("PHRASE", "hunter2") for a in place]
    monkeypatch.setattr(sys, "argv", ["libortho", command, of, "--out", str(tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "hunter2" not in "".join(capsys.readouterr())
