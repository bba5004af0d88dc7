"""Keys of age and SSH: how they are read, and how secret ones are kept out of every message.

A secret key is given as text or in a file, and easily lands in the wrong place: with a blank before it, as a path, as a
recipient, as the name of a variable. No message repeats what may be one.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from libortho.core.errors import CheckpointError

_SECRET = re.compile(r"secretkey(?:pq)?(?:1[0-9a-z]{16,}|[02-9ac-hj-np-z]{20,})|begin[0-9a-z]{0,20}privatekey")
"""A secret key of age (bech32 has no b, i, o), or the first line of one of SSH: letters and digits alone."""
_PREFIX = re.compile("secretkey|privatekey")
_LONG = re.compile("[0-9A-Za-z+]{30,}")
"""Longer than words and file names are: perhaps a key that lost its first letters."""


def holds_secret(text: str) -> bool:
    """True if an age secret key or a private SSH key is in the text, in whatever case, quotes, blanks or lines."""
    return _SECRET.search(_squeezed(text)) is not None


def shown(text: Any) -> str:
    """The text for a message, at most 80 characters and in quotes, unless it may be a secret."""
    given = str(text)
    if _PREFIX.search(_squeezed(given)) or _LONG.search(given):
        return "(not shown, as it may be a secret)"
    return repr(given)[:80]


def check_no_secret(**given: Any) -> None:
    """Refuse a secret key where a path is expected, before any message repeats it.

    Raises:
        CheckpointError: if one is there.
    """
    for name, value in given.items():
        if holds_secret(str(value)):
            raise CheckpointError(
                f"{name} is a secret key (not shown); expected a path. Give the key as an identity, in a file"
            )


def recipient(pyrage: Any, text: str) -> Any:
    """A public key, ``age1...`` or ``ssh-...``.

    Raises:
        CheckpointError: if it is none; a secret key is not repeated.
    """
    given = str(text).strip()
    kind = pyrage.ssh if given.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(given)
    except (pyrage.RecipientError, TypeError, ValueError):
        public = given.casefold().startswith(("age1", "ssh-")) and not _PREFIX.search(_squeezed(given))
        told = repr(given)[:80] if public else shown(given)
        raise CheckpointError(f"the recipient is {told}; expected a public key, age1... or ssh-...") from None


def identities(pyrage: Any, given: str | Path) -> list[Any]:
    """Secret keys from text (with comments and blank lines, as in a file) or from a file.

    Raises:
        CheckpointError: if there are none, or the file cannot be read; no message repeats a key.
    """
    text, where = str(given), "the identity"
    cut = _squeezed(text).startswith("agesecretkey") and not os.path.exists(text)
    if not holds_secret(text) and not cut:
        where = f"the identity file {shown(given)}"
        try:
            text = Path(given).read_text("utf-8")
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise CheckpointError(f"cannot read {where}: {reason}") from None
    try:
        if text.lstrip().startswith("-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(text.lstrip().encode())]
        lines = [line.strip() for line in text.splitlines()]
        keys = [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except (pyrage.IdentityError, TypeError, ValueError):
        keys = []
    if not keys:
        raise CheckpointError(f"{where} holds no age or SSH secret key (an SSH key must have no passphrase)")
    return keys


def _squeezed(text: str) -> str:
    """Letters and digits alone, in lower case."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in plain if c.isascii() and c.isalnum())


__all__ = ["check_no_secret", "holds_secret", "identities", "recipient", "shown"]
