"""What reaches the terminal: tables, notes, progress, log, warnings, and how a command ends.

Whatever is printed may come from a file that somebody else wrote. So everything leaves through here, with its control
characters written out (:mod:`libortho.core.escapes`), and nothing in it is taken for markup.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from typer.core import TyperCommand, TyperGroup

from libortho.cli import tables
from libortho.cli.tables import Terminal
from libortho.core.errors import ConfigError, LibOrthoError
from libortho.core.escapes import one_line, visible
from libortho.core.field_docs import fields_help
from libortho.core.keys import holds_secret
from libortho.core.progress import Progress, expected

if TYPE_CHECKING:
    from libortho.auditing.report import Verdict

INTERRUPTED = 130
"""Exit code that typer gives to an interrupt, as shells do."""
_EVERY = 10.0
"""Seconds between lines of progress."""


def note(text: str) -> None:
    """A sentence on standard output, wrapped at the width of the terminal."""
    tables.note(Terminal(), text)


def say(text: str) -> None:
    """One line on standard error, for what is not the result; a line with a secret key in it is not shown."""
    shown = "error: (not shown, as there is a secret key in the message)" if holds_secret(text) else text
    tables.note(Terminal(stderr=True, soft_wrap=True), shown)


def say_verdict(verdict: Verdict) -> None:
    """A verdict as it falls: its status, and the rest with the tables at the end."""
    say(f"{verdict.key.replace('_', ' ')}: {verdict.status}")


def emit(data: dict[str, Any]) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, default=str).replace("\x7f", "\\u007f"))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar per phase with the time it will still take, on standard error, so that standard output stays clean.

    Where that is no terminal, lines say the same.
    """
    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(one_line(phase), total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield tell


class _Lines:
    """Progress as lines: one as a phase begins and ends, and between them one every ``_EVERY`` seconds."""

    def __init__(self) -> None:
        self._began, self._said = time.monotonic(), -math.inf
        self._phase, self._since, self._first = "", self._began, 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._since, self._first, self._said = phase, now, done, -math.inf
        if done < total and now - self._said < _EVERY:
            return
        self._said = now
        left = ""
        if self._first < done < total:
            each = (now - self._since) / (done - self._first)
            left = f", {each * (total - done):.0f} s left at most"
        say(f"{now - self._began:.0f} s: {phase} {done}/{total}{left}")


class Command(TyperCommand):
    """One command. ``obj`` of its context is the config whose other fields ``--set`` takes, or None."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """List the fields that have no option of their own."""
        if isinstance(ctx.obj, type):
            own = {p.name for p in self.params}
            with formatter.section(f"Settings (--set NAME=VALUE), of {ctx.obj.__name__}"):
                formatter.write_dl([(n, text) for n, text in fields_help(ctx.obj).items() if n not in own])

    def invoke(self, ctx: Any) -> Any:
        """Run it, with the log of other libraries in our words."""
        _quiet_libraries()
        return super().invoke(ctx)


class Commands(TyperGroup):
    """The commands, which refuse secrets among their arguments and say plainly what is wrong with the others."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Refuse a secret key before anything repeats it: all users of a machine see the arguments of its processes.

        Raises:
            ConfigError: if an argument holds one.
        """
        for number, text in enumerate(args, 1):
            if holds_secret(text):
                raise ConfigError(
                    f"argument {number} holds a secret key (not shown), which others on this machine can read there; "
                    "put it in a file (--identity FILE) or an environment variable (--identity-env NAME)"
                )
        return super().make_context(info_name, args, parent, **extra)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; in ``standalone_mode`` the process ends with its exit code, 2 where an argument is wrong."""
        given = (args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            code = super().main(*given, **extra)
        except Exception as error:
            if type(error).__name__ == "Abort":  # a question that was left without an answer
                say("aborted")
                sys.exit(1)
            if not hasattr(error, "format_message"):  # click's errors, whichever copy of click typer brings
                raise
            _say_usage(error)
            sys.exit(getattr(error, "exit_code", 2))
        if code == INTERRUPTED:
            say(_interrupted(list(sys.argv[1:] if args is None else args)))
        sys.exit(code if isinstance(code, int) else 0)


def _interrupted(args: Sequence[str]) -> str:
    """What Ctrl-C leaves behind, and how to go on."""
    if not {"isolate", "audit", "demo"} & set(args[:1]) or any(a.startswith("--streams") for a in args):
        return "interrupted; nothing was written"
    if "--no-keep" in args:
        return "interrupted; nothing was kept. Without --no-keep finished parts are, and the same command goes on"
    return f"interrupted; this goes on from the last finished part: {shlex.join(['libortho', *args])}"


def _say_usage(error: Any) -> None:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if context is not None:
        say(context.get_usage())
        if context.command.name in ("encrypt", "decrypt"):  # what stands in a wrong place may be a passphrase
            message = message.partition("(")[0].strip()
    say(f"error: {message}")


class _Format(logging.Formatter):
    """Records as one line; what follows the line of an exception keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("libortho.warnings").warning("%s: %s", category.__name__, message)


def _quiet_libraries() -> None:
    """Send what transformers and the hub log through the handler of the root logger, and show no bars of theirs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("transformers", "huggingface_hub"):  # each brings a handler of its own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def run(app: typer.Typer) -> None:
    """Run the command that ``sys.argv`` names, and end the process with its exit code.

    0: done; 1: an error that is not foreseen; 2: an error of this library or of the disk, as one line on standard
    error; 3: a criterion or a verdict failed; 130: interrupted.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that does not know a character
    handler = logging.StreamHandler()
    handler.setFormatter(_Format("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    expected.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            app()
        except (LibOrthoError, OSError) as error:
            say(f"error: {error}")
            sys.exit(2)
        except Exception:
            sys.stderr.write(visible(traceback.format_exc()))
            sys.exit(1)
