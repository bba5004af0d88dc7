"""Commands around a checkpoint: inspect, detach, verify, attach, encrypt, decrypt, card."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.cli import tables
from libortho.cli.options import Checkpoint, Json, PassphraseEnv
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note
from libortho.core.errors import CheckpointError, ConfigError
from libortho.core.extras import require
from libortho.core.files import check_report, write_atomically
from libortho.core.keys import holds_secret


def inspect(directory: Checkpoint, as_json: Json = False) -> None:
    """Show what a checkpoint holds.

    Sizes, bits per weight, streams, and whether each belongs to the base beside it.
    """
    from libortho.checkpoint import inspect as inspect_checkpoint

    info = inspect_checkpoint(directory)
    if as_json:
        emit(info.to_dict())
    else:
        tables.show_checkpoint(info, Terminal())


def detach(
    directory: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Directory to write; it must not exist.")],
    stream: Annotated[list[str] | None, typer.Option("--stream", help="Take only this one away. Repeatable.")] = None,
    report: Annotated[Path | None, typer.Option("--audit", help="JSON of libortho audit, for the certificate.")] = None,
    certificate: Annotated[bool, typer.Option(help="Write certificate.json.")] = True,
    as_json: Json = False,
) -> None:
    """Write the checkpoint without its streams, and a certificate.

    The source stays as it is.
    """
    from libortho.checkpoint import detach as detach_streams

    result = detach_streams(directory, out, streams=stream or "all", audit=report, certificate=certificate)
    if as_json:
        emit({"out": str(out), **result.to_dict()})
    else:
        tables.show_certificate(result, Terminal())
        if result.audit is not None and not result.audit["base_checked"]:
            note(f"{report} names no base: that it is the audit of this one is not checked. Audit it again.")
        note(f"Written to {out}. {directory} still holds the streams: delete it if they must be gone.")


def verify(directory: Checkpoint, as_json: Json = False) -> None:
    """Check a detached checkpoint against its certificate.

    Every file, and every tensor of the base.
    """
    from libortho.checkpoint import verify_certificate

    result = verify_certificate(directory)
    if as_json:
        emit(result.to_dict())
    else:
        note("What the certificate says, of what is gone in its author's words:")
        tables.show_certificate(result, Terminal())
        note(f"{directory} holds what the certificate says.")


def attach(
    directory: Checkpoint,
    stream: Annotated[Path, typer.Argument(help="Folder of the stream.")],
    name: Annotated[str | None, typer.Option(help="What it is called from now on; by default its name.")] = None,
    as_json: Json = False,
) -> None:
    """Put a stream into a checkpoint, if it was made for that base."""
    from libortho.checkpoint import attach as attach_stream

    name = attach_stream(directory, stream, name=name)
    if as_json:
        emit({"directory": str(directory), "stream": name})
    else:
        note(f"{directory} now holds the stream {name}.")


def encrypt(
    stream: Annotated[Path, typer.Argument(help="Folder of a stream, such as DIR/ortho/NAME.")],
    out: Annotated[Path, typer.Option("--out", help="File to write; it must not exist.")],
    recipient: Annotated[
        list[str] | None, typer.Option("--recipient", "-r", help="Public key, age1... or ssh-... Repeatable.")
    ] = None,
    passphrase_env: PassphraseEnv = None,
    as_json: Json = False,
) -> None:
    """Lock a stream into one age file.

    For recipients, or by a passphrase, which is asked for.
    """
    from libortho.checkpoint import encrypt as encrypt_stream

    require("vault", "encryption")
    phrase = _passphrase(out, passphrase_env, confirm=True, keys=recipient)
    encrypt_stream(stream, out, recipients=recipient or None, passphrase=phrase)
    if as_json:
        emit({"out": str(out), "bytes": out.stat().st_size})
    else:
        note(f"Written to {out}. {stream} still holds the plain values: delete it when they may go.")


def decrypt(
    file: Annotated[Path, typer.Argument(help="What encrypt wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    identity: Annotated[
        list[Path] | None, typer.Option("--identity", "-i", help="File with an age or SSH secret key. Repeatable.")
    ] = None,
    identity_env: Annotated[
        str | None, typer.Option("--identity-env", metavar="NAME", help="Environment variable with the secret key.")
    ] = None,
    passphrase_env: PassphraseEnv = None,
    as_json: Json = False,
) -> None:
    """Unlock an age file into the folder of a stream, for attach."""
    from libortho.checkpoint import decrypt as decrypt_stream

    require("vault", "decryption")
    keys: list[str | Path] = [*(identity or ()), *([] if identity_env is None else [_secret_key(identity_env)])]
    phrase = _passphrase(out, passphrase_env, confirm=False, keys=keys)
    decrypt_stream(file, out, identities=keys or None, passphrase=phrase)
    if as_json:
        emit({"out": str(out)})
    else:
        note(f"Written to {out}. Add it to its checkpoint with: libortho attach DIR {out}")


def card(
    directory: Checkpoint,
    report: Annotated[Path | None, typer.Option("--audit", help="JSON of libortho audit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card from the numbers in the manifests."""
    from libortho.checkpoint import model_card

    path = directory / "README.md"
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; --force replaces it")
    text = model_card(directory, report)
    check_report(path, "the model card")
    write_atomically(path, text)
    if as_json:
        emit({"out": str(path), "card": text})
    else:
        note(f"Written to {path}.")


def _passphrase(out: Path, variable: str | None, *, confirm: bool, keys: Sequence[Any] | None) -> str | None:
    """From an environment variable, or asked for; None where there are keys instead.

    It is never an argument, which every process of the machine can read. The place is checked before anybody types.
    """
    from libortho.checkpoint.directories import check_new_place

    if variable is not None:
        return _from_environment("--passphrase-env", variable, "passphrase")
    check_new_place(out)
    return None if keys else _asked(confirm)


def _asked(confirm: bool) -> str:
    """A passphrase that somebody types; where there is no terminal, the line on standard input."""
    if _terminal():
        return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
    phrase = sys.stdin.readline().rstrip("\r\n")
    if not phrase:
        raise ConfigError(
            "there is no terminal on which a passphrase could be asked for, and none on standard input; give "
            f"--passphrase-env NAME, or {'--recipient KEY' if confirm else '--identity FILE'}"
        )
    return phrase


def _terminal() -> bool:
    """True if there is one to ask on, wherever standard input comes from."""
    if sys.stdin.isatty() or sys.platform == "win32":
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _secret_key(variable: str) -> str:
    """The text of an identity from an environment variable."""
    text = _from_environment("--identity-env", variable, "secret key")
    if not holds_secret(text):
        raise ConfigError("--identity-env names a variable that holds no age or SSH secret key; for a file: --identity")
    return text


def _from_environment(option: str, variable: str, what: str) -> str:
    """The value of a variable. Its name is not repeated, as it may be the secret itself."""
    try:
        value = os.environ.get(variable)
    except ValueError:  # an impossible name
        value = None
    if not value:
        raise ConfigError(
            f"{option} names an environment variable that is not set, or empty; expected the name of one that holds "
            f"the {what}, not the {what} itself"
        )
    return value
