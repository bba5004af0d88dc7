"""A disk that is full at every call, and a process that is killed at every call: the old checkpoint, or the new one."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from making import contents, two_streams

from disk import Disk, fails_cleanly_everywhere
from libortho import CheckpointError
from libortho.checkpoint import load, save
from libortho.core.layer import ortho_layers


@pytest.mark.parametrize("earlier", [False, True])
def test_save_on_a_full_disk(earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_streams()
    if earlier:
        save(model, None, tmp_path / "out")
        next(iter(ortho_layers(model).values())).streams["default"].support.values.mul_(2)
    old = contents(tmp_path / "out")
    disk = Disk(monkeypatch)
    assert fails_cleanly_everywhere(lambda: save(model, None, tmp_path / "out"), tmp_path, disk) > 15
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

KILLED = """
import os, shutil, signal, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from making import contents, two_streams, write
from libortho.checkpoint import load, save
from libortho.core.layer import ortho_layers

place = Path(sys.argv[1])
model = two_streams()
save(model, None, place / "out")
old = contents(place / "out")
next(iter(ortho_layers(model).values())).streams["default"].support.values.mul_(2)
save(model, None, place / "new")
new = contents(place / "new")


def child(kill_at):
    "Save over the old directory; die at the given call that names a file there. The number of calls otherwise."
    calls = 0

    def hook(event, arguments):
        nonlocal calls
        paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        if any(p.startswith(str(place)) for p in paths) or event == "ctypes.dlsym":
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(model, None, place / "out")
    return calls


def forked(kill_at):
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.write(write, str(child(kill_at)).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(process, 0)
    answer = os.read(read, 20)
    os.close(read)
    return os.WIFSIGNALED(status), int(answer or 0)


killed, calls = forked(-1)
assert not killed and contents(place / "out") == new
kinds = {"old": 0, "new": 0}
for kill_at in sorted({*range(1, calls + 1, max(1, calls // 10)), *range(max(1, calls - 8), calls + 1)}):
    shutil.rmtree(place / "out")
    write(place / "out", old)
    killed, _ = forked(kill_at)
    assert killed, kill_at
    found = contents(place / "out")
    assert found in (old, new), (kill_at, sorted(found))
    kinds["old" if found == old else "new"] += 1
strays = [p for p in place.iterdir() if p.name not in ("out", "new")]
assert strays and all(p.name.startswith(".out.") for p in strays)
load(place / "out")
print(kinds["old"], kinds["new"], calls)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_kill_9_during_save_leaves_the_old_or_the_new_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    old, new, _ = map(int, done.stdout.split())
    assert old > 10
    assert new > 0
