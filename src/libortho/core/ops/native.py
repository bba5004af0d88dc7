"""Kernels in C++ for few bf16 tokens on a CPU (``native.cpp``): optional, built once on demand, loaded if built.

:func:`build` compiles them, with the user's compiler, into the library's cache directory; nothing else does. A build is
loaded when this module is imported, if there is one for this very source, this torch, this Python and this machine, and
nobody but this user or root can have put it there (:func:`libortho.core.cache.private_path`). The callers ask
:data:`int8_linear` and :data:`add_columns`, and where these are None they take torch's own kernels. What they compute
is the same to rounding. One build runs on every processor of an architecture: it chooses its instructions when it is
loaded.

``LIBORTHO_KERNELS=torch`` in the environment leaves a build alone.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from libortho.core.cache import cache_directory, make_private, private_path
from libortho.core.errors import ConfigError, KernelError

SOURCE = Path(__file__).with_name("native.cpp")

int8_linear: Callable[..., Tensor | None] | None = None
"""``(x, codes, scales) -> y`` for INT8 codes with one scale per output channel; None for what it does not take."""

add_columns: Callable[..., Tensor | None] | None = None
"""``(y, x, index, values, alpha) -> y``, in place; None, with ``y`` as it was, for what it does not take."""

_module: ModuleType | None = None


def kernels() -> ModuleType | None:
    """The kernels in use, or None where torch's are."""
    return _module


def build_directory() -> Path:
    """Where the build for this source, torch, Python and machine is, or would be.

    Raises:
        ConfigError: if the cache has no place of its own; see :func:`libortho.core.cache.cache_directory`.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    tags = (f"torch{torch.__version__}", sys.implementation.cache_tag or "python", sysconfig.get_platform(), digest)
    return cache_directory() / "kernels" / "-".join(tags)


def build() -> Path:
    """Compile the kernels, unless this version is built, and use them from now on.

    Returns:
        The library's file.

    Raises:
        KernelError: if there is no compiler or no ninja, the compiler fails, or somebody else can write where the build
            is kept.
    """
    try:
        folder = build_directory()
        if _built(folder) is None:
            _compile(folder)
        found = _private_build(folder)
    except (ConfigError, OSError) as error:
        raise KernelError(f"no place for the C++ kernels: {error}") from error
    assert found is not None
    try:
        use(_load(found))
    except ImportError as error:
        raise KernelError(f"{found} does not load ({error}); delete it and build again") from error
    return found


def use(module: ModuleType | None) -> None:
    """Use these kernels from now on, or torch's (None).

    Without the vector instructions of an x86 processor torch's own INT8 product is the faster one, and stays.
    """
    global _module, int8_linear, add_columns
    _module = module
    add_columns = None if module is None else module.add_columns_
    int8_linear = None if module is None or module.level() == "portable" else module.int8_linear


def load() -> ModuleType | None:
    """Load what :func:`build` made for this version and use it; None, and torch's kernels, if there is nothing.

    A build that does not load, or that somebody else may have put there, is left alone with a warning.
    """
    module = None
    wanted = os.environ.get("LIBORTHO_KERNELS", "native")
    if wanted not in ("native", "torch"):
        raise KernelError(f"LIBORTHO_KERNELS is {wanted!r}; expected native or torch")
    if wanted == "native":
        try:
            if (found := _private_build(build_directory())) is not None:
                module = _load(found)
        except ImportError as error:
            warnings.warn(
                f"{str(found)!r} does not load ({error}), torch's kernels are used; delete it and run libortho kernels",
                stacklevel=2,
            )
        except (ConfigError, OSError) as error:
            warnings.warn(f"torch's kernels are used, no compiled ones: {error}", stacklevel=2)
    use(module)
    return module


def _built(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*" + importlib.machinery.EXTENSION_SUFFIXES[-1]))), None)


def _private_build(folder: Path) -> Path | None:
    """The real path of a build that nobody else can have put there, None without any."""
    found = _built(folder)
    return None if found is None else private_path(found)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path) -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise KernelError(
            f"the C++ compiler {compiler} is not found; install GCC or Clang, or name one by CXX "
            "(nothing but speed depends on it: torch's kernels are used without)"
        )
    if not cpp_extension.is_ninja_available():
        raise KernelError("ninja is not found; install it with: pip install ninja")
    make_private(folder.parent)
    # Built aside and moved in one step: processes may build at once, and a broken build leaves nothing to wait for.
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        flags = ["-O3", *(["-fopenmp"] if platform.system() == "Linux" else [])]
        try:
            cpp_extension.load("libortho_native", [str(SOURCE)], extra_cflags=flags, build_directory=aside)
        except (RuntimeError, ImportError, OSError) as error:
            raise KernelError(f"the C++ kernels could not be built with {compiler}: {error}") from error
        made = _built(Path(aside))
        assert made is not None
        made.chmod(0o700)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.replace(made, folder / made.name)


load()
