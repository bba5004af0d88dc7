"""Write the generated parts of the reference from the source.

    docs/reference/cli.md       every command, its arguments and options, in the words of --help
    docs/reference/config.md    every field of every config, in the words below the field
    docs/reference/audit.md     the table of thresholds, between its two marks

``python scripts/reference.py`` writes them; with ``--check`` it writes nothing and ends with 1 if one is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from libortho.auditing import thresholds
from libortho.auditing.config import AuditConfig
from libortho.cli.commands import app
from libortho.core.field_docs import fields_help
from libortho.isolation.config import IsolateConfig
from libortho.splitting.config import SplitConfig
from libortho.tuning.config import TuneConfig

PAGES = Path(__file__).parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by scripts/reference.py. Change the source, then run it again. -->"
BEGIN, END = "<!-- thresholds: scripts/reference.py -->", "<!-- end of thresholds -->"
VALUES = {Path: "PATH", str: "TEXT", int: "N", float: "NUMBER"}
CONFIGS = {"isolate": IsolateConfig, "tune": TuneConfig, "split": SplitConfig, "audit": AuditConfig}


def main() -> None:
    """Write or check every page."""
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit("usage: python scripts/reference.py [--check]")
    stale = []
    for name, text in pages().items():
        path = PAGES / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/reference.py")


def pages() -> dict[str, str]:
    """File name in docs/reference to its text."""
    audit = (PAGES / "audit.md").read_text(encoding="utf-8")
    before, _, rest = audit.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        "cli.md": command_line(),
        "config.md": configs(),
        "audit.md": f"{before}{BEGIN}\n\n{threshold_table()}\n\n{END}{after}",
    }


def command_line() -> str:
    """All commands, in the order of ``libortho --help``."""
    group: Any = typer.main.get_command(app)
    functions = {c.name: c.callback for c in app.registered_commands}
    parts = [
        GENERATED,
        "# Command line",
        "`libortho COMMAND --help` prints the same. Each command ends with one of four exit codes:",
        table(
            ("exit code", "meaning"),
            [
                ("0", "The command did what it was asked."),
                ("1", "Somebody interrupted it, or an error occurred that the library does not foresee."),
                ("2", "An argument, a record, a model or a file is refused; standard error says why in one line."),
                ("3", "`isolate` missed a criterion, or `audit` gave the verdict fail. The output is written."),
            ],
        ),
        table(
            ("command", "what it does"), [(f"[{n}](#{n})", c.help.split("\n")[0]) for n, c in group.commands.items()]
        ),
    ]
    for name, command in group.commands.items():
        parts += command_part(name, command, get_type_hints(functions[name]))
    return "\n\n".join(parts) + "\n"


def command_part(name: str, command: Any, kinds: Mapping[str, Any]) -> list[str]:
    """Heading, description, usage, arguments and options of one command whose parameters have these types."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name in kinds]
    usage = " ".join(["libortho", name, *(p.name.upper() for p in arguments), "[OPTIONS]"])
    parts = [f"## {name}", " ".join(command.help.split()), f"```text\n{usage}\n```"]
    if arguments:
        parts.append(table(("argument", "meaning"), [(f"`{p.name.upper()}`", words(p.help)) for p in arguments]))
    if options:
        parts.append(table(("option", "meaning"), [(names(p, kinds[p.name]), option_words(p)) for p in options]))
    if name in CONFIGS:
        own = {p.name for p in command.params}
        rest = [f"`{n}`" for n in fields_help(CONFIGS[name]) if n not in own]
        config = CONFIGS[name].__name__
        parts.append(f"`--set NAME=VALUE` takes {', '.join(rest)}: see [{config}](config.md#{config.lower()}).")
    return parts


def names(option: Any, kind: Any) -> str:
    """All spellings of an option, and what it takes."""
    inner = [a for a in get_args(kind) if a is not type(None)]
    while inner:
        kind, inner = inner[0], list(get_args(inner[0]))
    value = "" if option.is_flag else f" {option.metavar or VALUES[kind]}".replace("|", "\\|")
    return ", ".join(f"`{o}{value}`" for o in (*option.opts, *option.secondary_opts))


def option_words(option: Any) -> str:
    """The help of an option, with what must or may be left out."""
    default, text = option.default, words(option.help)
    if option.required:
        return f"{text} Required.".strip()
    if option.is_flag or default is None or callable(default) or not option.show_default:
        return text
    return f"{text} Default: {default}.".strip()


def configs() -> str:
    """All configs, field by field."""
    parts = [
        GENERATED,
        "# Settings",
        "Each verb takes one frozen dataclass. A field outside its domain raises `ConfigError`. On the command line a "
        "field has an option of its own, or is given as `--set NAME=VALUE`; see [the command line](cli.md).",
    ]
    for verb, config in CONFIGS.items():
        kinds = get_type_hints(config)
        rows = [
            (f"`{f.name}`", kind_words(kinds[f.name]), f"`{f.default!r}`", words(without_default(config, f.name)))
            for f in fields(config)
        ]
        about = f"For `{verb}`. {words(first_line(config.__doc__))}"
        parts += [f"## {config.__name__}", about, table(("field", "type", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def kind_words(kind: Any) -> str:
    """A type as a table cell, aliases spelled out; the same for every version of Python."""
    return f"`{spelled(kind)}`".replace("|", "\\|")


def spelled(kind: Any) -> str:
    """A type as the source spells it."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is None:
        return "None" if kind is type(None) else "..." if kind is ... else kind.__name__
    if origin in (Union, UnionType):
        return " | ".join(map(spelled, parts))
    inner = ", ".join(map(repr if origin is Literal else spelled, parts))
    return f"{getattr(origin, '__name__', None) or 'Literal'}[{inner}]"


def without_default(config: type[Any], name: str) -> str:
    """The words of a field; the default has a column of its own."""
    return fields_help(config)[name].partition(" Default: ")[0]


def threshold_table() -> str:
    """Every number that a verdict of the audit depends on, in the words below it."""
    body = ast.parse(Path(thresholds.__file__).read_text(encoding="utf-8")).body
    rows = []
    for statement, below in pairwise(body):
        if isinstance(statement, ast.Assign) and isinstance(below, ast.Expr):
            [target] = statement.targets
            assert isinstance(target, ast.Name)
            rows.append((f"`{target.id}`", f"{getattr(thresholds, target.id):g}", words(ast.literal_eval(below.value))))
    return table(("name", "value", "what it bounds"), rows)


def first_line(text: str | None) -> str:
    """What a docstring says first."""
    return (text or "").partition("\n")[0]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def words(text: str | None) -> str:
    """Text as one table cell."""
    return " ".join((text or "").split()).replace("``", "`").replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    main()
