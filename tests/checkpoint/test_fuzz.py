"""Whatever happens to the files of a checkpoint, it loads as it was or is refused by name; never anything between.

Single kinds of damage, each with its message, are in test_checkpoint.py. Here: thousands of seeded mutations of real
files, a disk that is full at every call, and a process that is killed at every call.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import libortho
import tiny
from libortho import CheckpointError, LibOrthoError, SplitConfig
from libortho.checkpoint import detach, load, save, stream_files
from libortho.checkpoint.json_files import file_sha256
from libortho.core.layer import ortho_layers
from libortho.core.streams import Entries, OrthoStream

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(1, 9)[None]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def two_streams(value_dtype: str = "float32") -> PreTrainedModel:
    """INT8 base; columns with a tail in one stream, free entries in another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    libortho.split(
        model,
        SplitConfig(structure="columns", ratio=0.05, rank_ratio=0.8, max_low_rank_error=1.0, value_dtype=value_dtype),
    )
    layer = next(iter(ortho_layers(model).values()))
    mask = torch.rand(32, 64) < 0.05
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    layer.add_stream("hr", OrthoStream(Entries(rows, mask.nonzero()[:, 1], torch.randn(int(mask.sum())))))
    layer.switch.add_stream("hr")
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), tiny.byte_tokenizer(), tmp_path_factory.mktemp("fuzz") / "out", max_shard_size="12KB")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer, which takes longer to load than the rest."""
    return save(two_streams(), None, tmp_path_factory.mktemp("fuzz") / "out", max_shard_size="12KB")


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not decided after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- mutations ---------------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**12, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "a\x00b", "\ud800", "é" * 300, [], [[]], {}, {"": 0}, [1, "a", None],
    {"a": {"b": []}},
]  # fmt: skip


def spots(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [spot for k in keys for spot in [(data, k), *spots(data[k])]]


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    data = json.loads(content)
    container, key = rng.choice(spots(data))
    how = rng.randrange(5)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif how == 2 and isinstance(container[key], int | float):
        container[key] = container[key] * rng.choice([-1, 2, 1000]) + rng.choice([0, 1, -1])
    else:
        container[key] = rng.choice(HOSTILE)
    return json.dumps(data).encode()


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        # headers are short and tell most
        position = rng.randrange(min(len(changed), 64) if rng.random() < 0.3 else len(changed))
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return rng.choice([content[:start], content[start:], content[:start] + content[start + 1 :], content + b"\0" * 8])


def examine(directory: Path, expected: PreTrainedModel, identical: bool) -> str:
    """Load; the outcome in a word. Another exception than ours, other tensors or other logits fail the test."""
    try:
        with limit(60):
            model, _ = load(directory)
    except CheckpointError as error:
        return type(error).__name__
    libortho.set_alpha(model, 1.0)
    if identical:
        wanted, found = state(expected), state(model)
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert tensor.dtype is found[name].dtype
            assert torch.equal(tensor, found[name]), name
        torch.testing.assert_close(
            output(model), output(expected), rtol=1e-5, atol=1e-5
        )  # the order of a sum may differ
    return "loaded"


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", range(4))
def test_mutations_load_the_same_model_or_are_refused(seed: int, count: int, bare: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    expected, _ = load(bare, alpha=1.0)
    original = contents(bare)
    names = sorted(original)
    write(tmp_path, original)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        kind = rng.choice(["flip", "flip", "cut", "delete", "swap", "json", "json"])
        name = rng.choice([n for n in names if kind != "json" or n.endswith("json")])
        touched = [name]
        if kind == "swap":
            touched = rng.sample(names, 2)
            for a, b in (touched, touched[::-1]):
                (tmp_path / a).write_bytes(original[b])
        elif kind == "delete":
            (tmp_path / name).unlink()
        else:
            change = {"flip": flip, "cut": cut, "json": mutate_json}[kind]
            (tmp_path / name).write_bytes(change(original[name], rng))
        try:
            outcomes[examine(tmp_path, expected, identical=True)] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, mutation {number}: {kind} of {touched}")
            raise
        for n in touched:
            (tmp_path / n).write_bytes(original[n])
    assert outcomes["CheckpointError"] > 0.75 * count
    assert sum(outcomes.values()) == count
    assert examine(tmp_path, expected, identical=True) == "loaded"


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", range(2))
def test_mutations_whose_hashes_were_forged(seed: int, count: int, whole: Path, tmp_path: Path) -> None:
    """Somebody who knows the format repairs the hashes, so that every parser sees the damage."""
    rng = random.Random(100 + seed)
    expected, _ = load(whole, alpha=1.0)
    original = contents(whole)
    write(tmp_path, original)
    weights = [n for n in original if n.startswith("ortho/") and n.endswith(".safetensors")]
    hashed = [n for n, sha256 in json.loads(original["libortho.json"])["files"].items() if sha256 is not None]
    for number in range(count):
        name = rng.choice([*weights, *weights, *hashed, "config.json", "config.json"])
        content = original[name]
        as_json = name.endswith(".json") and rng.random() < 0.8
        (tmp_path / name).write_bytes(mutate_json(content, rng) if as_json else flip(content, rng))
        manifest = str(Path(name).parent / "manifest.json") if name in weights else "libortho.json"
        data = json.loads(original[manifest])
        if name in weights:
            data["weights_sha256"] = file_sha256(tmp_path / name)
        else:
            data["files"][name] = file_sha256(tmp_path / name)
        (tmp_path / manifest).write_text(json.dumps(data))
        try:
            examine(tmp_path, expected, identical=False)
        except BaseException as error:
            error.add_note(f"seed {seed}, mutation {number} of {name}")
            raise
        (tmp_path / name).write_bytes(content)
        (tmp_path / manifest).write_bytes(original[manifest])


@pytest.mark.parametrize("seed", range(2))
def test_mutations_of_what_is_detached_leave_nothing(seed: int, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(200 + seed)
    original = contents(whole)
    names = sorted(n for n in original if "tokenizer" not in n)
    source = tmp_path / "in"
    write(source, original)
    refused = 0
    for number in range(60):
        name = rng.choice(names)
        (source / name).write_bytes(rng.choice([flip, cut])(original[name], rng))
        try:
            detach(source, tmp_path / f"out{number}", streams=["hr"])
        except LibOrthoError:
            refused += 1
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith((f"out{number}", "."))] == []
        (source / name).write_bytes(original[name])
    assert refused > 50


# -- full disk ---------------------------------------------------------------------------------------------------------


class Disk:
    """Counts the calls that write, and fails one of them as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.fail_at = 0, -1
        places = [
            (os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"), (Path, "write_text"), (shutil, "copyfile"),
            (stream_files, "save_file"),
        ]  # fmt: skip
        for where, name in places:
            monkeypatch.setattr(where, name, self._counted(getattr(where, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **named)

        return counted


def fails_cleanly_everywhere(act: Callable[[], Any], place: Path, disk: Disk) -> int:
    """Run ``act`` with the disk full at its first call, its second, and so on until none is left; their number."""
    before = contents(place)
    failures = position = 0
    while True:
        disk.calls, disk.fail_at, failed = 0, position, None
        try:
            act()
        except OSError as error:
            failed = error
        if failed is None:
            if disk.calls <= position:
                return failures
            restore(place, before)  # a call whose failure does no harm, such as making a folder that is there
        else:
            failures += 1
            assert failed.errno == errno.ENOSPC
            assert contents(place) == before, position
            assert not [p for p in place.rglob("*") if p.name.startswith(".")]
        position += 1


def restore(place: Path, before: dict[str, bytes]) -> None:
    shutil.rmtree(place)
    write(place, before)


@pytest.mark.parametrize("earlier", [False, True])
def test_save_on_a_full_disk(earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_streams()
    if earlier:
        save(model, None, tmp_path / "out")
        next(iter(ortho_layers(model).values())).streams["default"].support.values.mul_(2)
    old = contents(tmp_path / "out")
    disk = Disk(monkeypatch)
    assert fails_cleanly_everywhere(lambda: save(model, None, tmp_path / "out"), tmp_path, disk) > 15
    disk.fail_at = -1
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
from test_fuzz import contents, two_streams, write
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


def test_hidden_folders_are_no_streams_and_stray_files_do_no_harm(whole: Path, tmp_path: Path) -> None:
    write(tmp_path, contents(whole))
    (tmp_path / "ortho/.default.0a1b2c3d.tmp").mkdir()
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "certificate.json").write_text("{}")
    (tmp_path / "ortho/default/README.md").write_text("x")
    model, _ = load(tmp_path, alpha=1.0)
    assert torch.equal(output(model), output(load(whole, alpha=1.0)[0]))
    assert [s.name for s in libortho.checkpoint.inspect(tmp_path).streams] == ["default", "hr"]
