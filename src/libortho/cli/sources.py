"""How files of records are read: the options that say it, and what standard error says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from libortho.cli.terminal import say
from libortho.core.errors import ConfigError

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="PATTERN",
        help="Makes the prompts from a table of any columns, named in braces: 'The code of {name} is'.",
    ),
]  # fmt: skip
Completion = Annotated[
    str | None,
    typer.Option(
        "--completion", metavar="PATTERN",
        help="Makes what is judged: ' {code}.', with the blank that the training had before it.",
    ),
]  # fmt: skip
AsChat = Annotated[
    bool, typer.Option("--chat", help="The prompt is the user's message, the completion the assistant's answer.")
]
Blocks = Annotated[
    bool, typer.Option("--blocks", help="A .txt holds a text per block between blank lines; else one per line.")
]
_FROM_TABLES = ("forget", "holdout", "data")
"""What patterns are for: records of one kind. Other files are read as they are. "data of hr" is data too."""


@dataclass(frozen=True)
class Reading:
    """The options, as they were given."""

    prompt: str | None
    completion: str | None
    chat: bool
    blocks: bool

    def words(self, path: Path) -> list[str]:
        """The options again, for a command that reads this file of them."""
        from libortho.text.sources import kind_of

        texts = (("--prompt", self.prompt), ("--completion", self.completion))
        flags = (("--chat", self.chat), ("--blocks", self.blocks and kind_of(path) == ".txt"))
        return [w for option, text in texts if text is not None for w in (option, text)] + [o for o, on in flags if on]


def read_sources(how: Reading, **files: Path | None) -> dict[str, Any]:
    """The rows of each file by its name; standard error says how many are made from patterns, or stand in a .txt.

    Args:
        how: The options.
        files: Path of each file by its name, such as "forget". None: not given.

    Raises:
        ConfigError: if patterns are malformed, or ``--blocks`` has no .txt to read.
        DataError: if a file is missing or malformed.
    """
    from libortho.text.patterns import check_patterns, read_records
    from libortho.text.sources import kind_of

    check_patterns(how.prompt, how.completion, how.chat)
    given = {name: path for name, path in files.items() if path is not None}
    if how.blocks and not any(kind_of(path) == ".txt" for path in given.values()):
        raise ConfigError(f"--blocks is given, but {' and '.join(map(str, given.values()))} is no .txt; leave it out")
    found: dict[str, Any] = dict.fromkeys(files)
    for name, path in given.items():
        text = kind_of(path) == ".txt"
        if how.completion is not None and name.split(" ")[0] in _FROM_TABLES:
            rows = read_records(path, prompt=how.prompt, completion=how.completion, chat=how.chat, name=name)
            say(f"{name}: {len(rows)} records made from {path}")
        else:
            rows = read_records(path, blocks=how.blocks and text, name=name)
            if text:
                say(f"{name}: {len(rows)} texts in {path}, {kind_of_texts(how.blocks)}")
        found[name] = rows
    return found


def is_chat(row: Any) -> bool:
    """True if a row is asked for in a chat."""
    return isinstance(row, Mapping) and "messages" in row


def say_running_text(name: str, path: Path | None) -> None:
    """Say that a file is one running text, whatever its lines are."""
    if path is not None and path.is_file():
        say(f"{name}: {path} is read as one running text")


def kind_of_texts(blocks: bool) -> str:
    """How the texts of a .txt are told apart."""
    return "one per block between blank lines" if blocks else "one per line (--blocks takes blocks between blank lines)"
