"""Whatever happens to the files of a checkpoint, it loads as it was or is refused by name; never anything between.

Single kinds of damage, each with its message, are in test_damage.py. Here: thousands of seeded mutations of real files.
"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from making import contents, logits, two_streams, write
from mutations import cut, flip_bits, limit, mutate_json
from torch import nn
from transformers import PreTrainedModel

import libortho
import tiny
from libortho import CheckpointError, LibOrthoError
from libortho.checkpoint import detach, load, save
from libortho.checkpoint.json_files import file_sha256


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(two_streams(), tiny.byte_tokenizer(), tmp_path_factory.mktemp("fuzz") / "out", max_shard_size="12KB")


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
        close = {"rtol": 1e-5, "atol": 1e-5}  # the order of a sum may differ
        torch.testing.assert_close(logits(model), logits(expected), **close)
    return "loaded"


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", range(4))
def test_mutations_load_the_same_model_or_are_refused(
    seed: int, count: int, made_sharded: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    expected, _ = load(made_sharded, alpha=1.0)
    original = contents(made_sharded)
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
            change = {"flip": flip_bits, "cut": cut, "json": mutate_json}[kind]
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


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.nightly)])
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
        (tmp_path / name).write_bytes(mutate_json(content, rng) if as_json else flip_bits(content, rng))
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
        (source / name).write_bytes(rng.choice([flip_bits, cut])(original[name], rng))
        try:
            detach(source, tmp_path / f"out{number}", streams=["hr"])
        except LibOrthoError:
            refused += 1
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith((f"out{number}", "."))] == []
        (source / name).write_bytes(original[name])
    assert refused > 50


def test_hidden_folders_are_no_streams_and_stray_files_do_no_harm(whole: Path, tmp_path: Path) -> None:
    write(tmp_path, contents(whole))
    (tmp_path / "ortho/.default.0a1b2c3d.tmp").mkdir()
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "certificate.json").write_text("{}")
    (tmp_path / "ortho/default/README.md").write_text("x")
    model, _ = load(tmp_path, alpha=1.0)
    assert torch.equal(logits(model), logits(load(whole, alpha=1.0)[0]))
    assert [s.name for s in libortho.checkpoint.inspect(tmp_path).streams] == ["default", "hr"]
