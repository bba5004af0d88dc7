"""The commands by name, in the order of the help text."""

from __future__ import annotations

import typer

from libortho.cli import keeping, looking, making
from libortho.cli.terminal import Commands

app = typer.Typer(
    help="Put what a language model memorised behind a switch.", no_args_is_help=True, pretty_exceptions_enable=False,
    cls=Commands,
)  # fmt: skip
for verb in (
    making.demo, making.split, making.isolate, looking.audit, looking.evaluate, looking.generate, looking.inspect,
    keeping.detach, keeping.verify, keeping.attach, keeping.encrypt, keeping.decrypt, keeping.kernels, keeping.card,
):  # fmt: skip
    app.command("eval" if verb is looking.evaluate else None)(verb)
