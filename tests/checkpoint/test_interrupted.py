"""A disk that is full at every call, and a process that is killed at every call: the old checkpoint, or the new one."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import contents, two_streams

from disk import Disk, fails_cleanly_everywhere, restore
from libortho import CheckpointError
from libortho.checkpoint import load, save
from libortho.core.layer import ortho_layers


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("earlier", [False, True])
def test_save_on_a_full_disk(earlier: bool, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_streams()
    if earlier:
        save(model, None, tmp_path / "out")
        next(iter(ortho_layers(model).values())).streams["default"].support.values.mul_(2)
    old = contents(tmp_path / "out")
    disk = Disk(monkeypatch)
    assert fails_cleanly_everywhere(lambda: save(model, None, tmp_path / "out"), tmp_path, disk, step) > 15 // step
    load(tmp_path / "out")
    assert contents(tmp_path / "out") != old


@pytest.mark.parametrize("limit_bytes", [0, 100, 3_000, 8_000])
@pytest.mark.parametrize("earlier", [False, True])
def test_save_when_the_system_refuses_to_write_more(limit_bytes: int, earlier: bool, tmp_path: Path) -> None:
    """A real refusal, below Python: the weights are written by native code."""
    model = two_streams()
    if earlier:
        save(model, None, tmp_path / "out")
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        with pytest.raises((OSError, CheckpointError)):
            save(model, None, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if earlier else [])


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def killed_at(number: int, act: Callable[[], Any], place: Path) -> tuple[bool, int]:
    """Fork, act, and die at the given call that names a file below a place; whether it did, and else the calls."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        calls = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            paths = [os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            if any(p.startswith(str(place)) for p in paths) or event == "ctypes.dlsym":
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        signal.alarm(100)
        try:
            sys.addaudithook(hook)
            act()
            os.write(writing, str(calls).encode())
        finally:
            os._exit(0)
    os.close(writing)
    _, status = os.waitpid(process, 0)
    answer = os.read(reading, 20)
    os.close(reading)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, int(answer or 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_kill_9_during_save_leaves_the_old_or_the_new_directory(tmp_path: Path) -> None:
    model, out = two_streams(), tmp_path / "out"
    old = contents(save(model, None, out))
    next(iter(ortho_layers(model).values())).streams["default"].support.values.mul_(2)
    new = contents(save(model, None, tmp_path / "new"))
    killed, calls = killed_at(-1, lambda: save(model, None, out), tmp_path)
    assert not killed
    assert contents(out) == new
    found = []
    for number in sorted({*range(1, calls + 1, max(1, calls // 10)), *range(max(1, calls - 8), calls + 1)}):
        restore(out, old)
        assert killed_at(number, lambda: save(model, None, out), tmp_path)[0], number
        found.append(contents(out))
        assert found[-1] in (old, new), number
    assert found.count(old) > 10
    assert found.count(new) > 0
    strays = [p.name for p in tmp_path.iterdir() if p.name not in ("out", "new")]
    assert strays
    assert all(name.startswith(".out.") for name in strays)
    load(out)
