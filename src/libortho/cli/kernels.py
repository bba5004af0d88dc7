"""The command that builds the C++ kernels."""

from __future__ import annotations

from libortho.cli import tables
from libortho.cli.options import Json
from libortho.cli.tables import Terminal
from libortho.cli.terminal import emit, note


def kernels(as_json: Json = False) -> None:
    """Build the optional C++ kernels for few tokens on a CPU.

    They need a C++ compiler.
    """
    from libortho.core.ops import native

    path = native.build()
    module = native.kernels()
    assert module is not None
    data = {
        "path": str(path), "instructions": module.level(), "available": list(module.levels()),
        "int8_linear": native.int8_linear is not None, "add_columns": native.add_columns is not None,
    }  # fmt: skip
    if as_json:
        emit(data)
    else:
        tables.note(Terminal(soft_wrap=True), f"{path}: {module.level()}, of {', '.join(module.levels())}")
        if native.int8_linear is None:
            note("the INT8 product stays torch's: without these instructions it is faster")
