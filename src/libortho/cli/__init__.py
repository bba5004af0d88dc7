"""``libortho``: the same verbs on the command line. Everything that is printed is printed here.

models        demo, split, isolate, generate
measuring     audit, eval
checkpoints   inspect, detach, verify, attach, encrypt, decrypt, card
kernels       kernels
records       records
options       what several commands take, and how it is read
sources       how files of records are read
settings      configs from options and --set
tables        results
terminal      what is printed, logged and warned of, and how a command ends

Modules here import torch and transformers in the functions that need them, so that --help does not wait for them.
"""

from __future__ import annotations

from libortho.cli.commands import app
from libortho.cli.terminal import run


def main() -> None:
    """Entry point: errors of this library and of the disk become one line on standard error and exit code 2."""
    run(app)


__all__ = ["app", "main"]
