"""Tools of others, taught to read our checkpoints."""

from __future__ import annotations

import sys

from libortho.core.errors import LibOrthoError
from libortho.core.escapes import one_line


def lm_eval_command() -> None:
    """The command ``libortho-lm-eval``: one line and exit code 2 where the harness is not installed."""
    try:
        from libortho.integrations.lm_eval import main
    except LibOrthoError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        sys.exit(2)
    main()
