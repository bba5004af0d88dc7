"""``libortho``: the same verbs on the command line. Everything that is printed is printed here.

making      demo, split, isolate
looking     audit, eval, generate, inspect
keeping     detach, verify, attach, encrypt, decrypt, card, kernels
options     what several commands take, and how it is read
terminal    what is printed, logged and warned of, and how a command ends
"""

from __future__ import annotations

from libortho.cli.commands import app
from libortho.cli.terminal import run


def main() -> None:
    """Entry point: errors of this library and of the disk become one line on standard error and exit code 2."""
    run(app)


__all__ = ["app", "main"]
