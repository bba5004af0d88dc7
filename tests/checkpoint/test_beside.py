"""What a checkpoint does not list is not read: files beside it, other weights, streams of another base."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import EMBEDDING, WEIGHTS, forge_json, index_beside, listed, tensors
from making import contents, edit, logits, two_streams, write
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import libortho
import tiny
from libortho import AlphaError, CheckpointError
from libortho.checkpoint import attach, detach, inspect, load, save
from libortho.checkpoint.files import is_known
from libortho.core.report import record_method


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/evil", {"": "someone/else:layer"}])
def test_a_configuration_that_names_code_of_the_hub_is_refused(
    source: Path, tmp_path: Path, key: str, value: Any
) -> None:
    forge_json(source, "config.json", lambda c: c.update({key: value}))
    for call in (lambda: load(source), lambda: detach(source, tmp_path / "base")):
        with pytest.raises(CheckpointError, match="names a repository"):
            call()


# -- files beside a checkpoint -----------------------------------------------------------------------------------------

READ = [
    "additional_chat_templates/default.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tokenizer.4.0.0.json", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tf_model.h5", "flax_model.msgpack",
    "original/consolidated.00.pth", "modeling_llama.py", "custom_generate/generate.py", "notes.txt", "data.bin",
    ".env", "ortho/notes.txt", "ortho/default/adapter_model.bin", "ortho/hr/adapter_config.json", "x/README.md",
    "additional_chat_templates/README.md", ".cache/other/x", "CONFIG.JSON", "audit.txt", "certificate.json.bak",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_file_that_a_loader_could_read_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    write(source, {name: b"{}"})
    calls: tuple[Callable[[], Any], ...] = (
        lambda: load(source),
        lambda: detach(source, tmp_path / "out", streams=["default"]),
        *(() if name.startswith("ortho/") else (lambda: attach(source, source / "ortho/hr", name="again"),)),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=re.escape(name.split("/")[-1 if name.startswith("ortho") else 0])):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_what_people_add_is_left_alone(source: Path, tmp_path: Path) -> None:
    names = (
        "README.md", "MODEL_CARD.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".gitignore", "certificate.json",
        "audit.json", "audit-2.json", "report.html", "plot.png", "plot.svg", "photo.jpg", "records.jsonl", ".git/HEAD",
        ".git/objects/ab/cd", ".cache/huggingface/download/x.metadata", "ortho/hr/README.md", "ortho/README.md",
        "ortho/.hr.0a1b2c3d.tmp/manifest.json",
    )  # fmt: skip
    write(source, dict.fromkeys(names, b"{}"))
    assert torch.equal(logits(load(source)[0]), logits(load(source)[0]))
    detach(source, tmp_path / "out", streams=["default"])
    assert not set(contents(tmp_path / "out")) & (set(names) - {"certificate.json"})
    attach(source, source / "ortho/hr", name="again")
    assert [s.name for s in inspect(source).streams] == ["again", "default", "hr"]


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty folder": (lambda d: (d / "additional_chat_templates").mkdir(), "'additional_chat_templates', a folder"),
    "a folder link": (lambda d: (d / "more").symlink_to(d.parent), "'more', a link to a folder"),
    "a folder link of a harmless name": (lambda d: (d / "README.md").symlink_to(d.parent), "a link to a folder"),
    "a link to nothing": (lambda d: (d / "README.md").symlink_to("nowhere"), "dangling"),
    "a loop of links": (lambda d: (d / "README.md").symlink_to("README.md"), "dangling"),
    "a pipe": (lambda d: os.mkfifo(d / "README.md"), "pipe"),
    "a pipe for a listed file": (lambda d: (swap(d / "tokenizer.json", os.mkfifo)), "pipe"),
    "a pipe for the manifest": (lambda d: swap(d / "libortho.json", os.mkfifo), "no ordinary file"),
    "a pipe for the weights": (lambda d: swap(d / WEIGHTS, os.mkfifo), "pipe"),
    "a pipe for a stream": (lambda d: swap(d / "ortho/hr/ortho.safetensors", os.mkfifo), "pipe"),
    "a pipe for the manifest of a stream": (lambda d: swap(d / "ortho/hr/manifest.json", os.mkfifo), "no ordinary"),
    "a device": (lambda d: swap(d / "tokenizer.json", lambda p: p.symlink_to("/dev/zero")), "device"),
    "a device for the manifest": (lambda d: swap(d / "libortho.json", lambda p: p.symlink_to("/dev/zero")), "ordinary"),
    "a folder for a listed file": (lambda d: swap(d / "tokenizer.json", Path.mkdir), "'tokenizer.json', a folder"),
    "streams behind a link": (lambda d: (d / "ortho").rename(d.parent / "x") and (d / "ortho").symlink_to("../x"),
                              "link to a folder"),
    "a stream behind a link": (lambda d: (d / "ortho/new").symlink_to("hr"), "'new', a link to a folder"),
    "streams are a file": (lambda d: shutil.rmtree(d / "ortho") or (d / "ortho").write_text(""), "'ortho', a file"),
    "a cache behind a link": (lambda d: (d / ".cache").symlink_to(d.parent), "'.cache', a link"),
    "the history behind a link": (lambda d: (d / ".git").symlink_to(d.parent), "'.git', a link"),
    "a name that steers a terminal": (lambda d: (d / "\x1b]0;x\x07").write_text(""), r"'\\x1b\]0;x\\x07'"),
    "a name that is no text": (lambda d: os.mkdir(os.fsencode(d) + b"/\xff\xfe"), r"'\\udcff\\udcfe'"),
}  # fmt: skip


def swap(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("kind", ODD)
def test_links_pipes_devices_and_folders_are_refused(kind: str, source: Path, tmp_path: Path) -> None:
    act, message = ODD[kind]
    act(source)
    for call in (lambda: load(source), lambda: detach(source, tmp_path / "out", streams=["default"])):
        with pytest.raises(CheckpointError, match=message) as error:
            call()
        assert str(error.value).isprintable()


def test_files_may_be_links_as_in_the_cache_of_the_hub(source: Path, tmp_path: Path) -> None:
    for number, name in enumerate(contents(source)):
        (source / name).rename(tmp_path / f"blob{number}")
        (source / name).symlink_to(tmp_path / f"blob{number}")
    detach(source, tmp_path / "out", streams=["hr"])
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert torch.equal(logits(load(source, alpha=1.0)[0]), logits(two_at_one()))


def two_at_one() -> Any:
    model = two_streams()
    libortho.set_alpha(model, 1.0)
    return model


def test_every_file_of_a_tokenizer_is_known(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path)
    names = set(contents(tmp_path))
    assert "additional_chat_templates/tool_use.jinja" in names
    assert all(is_known(n) for n in names)
    save(two_streams(), tokenizer, tmp_path / "out")
    assert load(tmp_path / "out")[1].chat_template == tokenizer.chat_template


def test_save_refuses_a_tokenizer_that_writes_what_load_would_refuse(tmp_path: Path) -> None:
    class Tokenizer(type(tiny.byte_tokenizer())):  # type: ignore[misc]
        def save_pretrained(self, directory: Any, **options: Any) -> Any:
            (Path(directory) / "lexicon.bin").write_bytes(b"x")
            return super().save_pretrained(directory, **options)

    tokenizer = tiny.byte_tokenizer()
    tokenizer.__class__ = Tokenizer
    with pytest.raises(CheckpointError, match=r"names the file 'lexicon\.bin'"):
        save(two_streams(), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- two sets of weights -----------------------------------------------------------------------------------------------


def whole_beside(d: Path) -> None:
    parts: dict[str, torch.Tensor] = {}
    for shard in d.glob("model-*.safetensors"):
        parts |= load_file(shard)
    save_file(parts, d / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("named", [False, True])
def test_weights_and_an_index_in_one_directory_are_refused(named: bool, source: Path, sharded: Path) -> None:
    flipped = lambda d: index_beside(d, lambda t: t.update({EMBEDDING: t[EMBEDDING].flip(0)}))  # noqa: E731
    for place, act in ((source, flipped), (sharded, whole_beside)):
        act(place)
        if named:
            new = {p.name: None for p in place.glob("*.safetensors*")}
            edit(place / "libortho.json", lambda m, new=new: m["files"].update(new))
        for call in (load, inspect, lambda d: detach(d, d.parent / "out")):
            with pytest.raises(CheckpointError, match=r"two sets of weights|does not list"):
                call(place)


def test_a_listed_shard_that_is_not_read_is_refused(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded / "model-00099-of-00099.safetensors")
    edit(sharded / "libortho.json", lambda m: m["files"].update({"model-00099-of-00099.safetensors": None}))
    for call in (load, inspect):
        with pytest.raises(CheckpointError, match=r"model-00099-of-00099\.safetensors is listed but not read"):
            call(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    before = json.loads(index.read_text())
    first, second = sorted(set(before["weight_map"].values()))[:2]
    name = next(n for n, f in before["weight_map"].items() if f == first)
    for change in (
        lambda i: i["weight_map"].update({name: second}),
        lambda i: i["weight_map"].pop(name),
        lambda i: i["weight_map"].update(more=first),
        lambda i: i["metadata"].update(note="x"),
        lambda i: i.update(note="x"),
        lambda i: i["metadata"].update(total_size="x"),
    ):
        edit(index, change)
        with pytest.raises(CheckpointError, match=r"disagree about|unknown|total_size|listed but not read"):
            load(sharded)
        index.write_text(json.dumps(before))
    load(sharded)


def test_a_configuration_that_names_other_weights_is_refused(source: Path, tmp_path: Path) -> None:
    forge_json(source, "config.json", lambda c: c.update(note=0))
    load(source)
    weights = "ortho/default/adapter_model.safetensors"
    forge_json(source, "config.json", lambda c: c.update(transformers_weights=weights))
    for call in (load, lambda d: detach(d, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="names other weights"):
            call(source)


def test_stock_transformers_reads_what_load_reads(source: Path, sharded: Path) -> None:
    for place in (source, sharded):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(place)), logits(load(place, streams=None)[0]))
    assert AutoTokenizer.from_pretrained(source).chat_template == load(source)[1].chat_template


# -- a stream and all of its base --------------------------------------------------------------------------------------


def other_embeddings(place: Path, target: Path) -> Path:
    """The same split layers between other embeddings, with hashes that fit, without streams."""
    write(target, {n: c for n, c in contents(place).items() if not n.startswith("ortho/")})
    tensors(lambda t, d: t[EMBEDDING].copy_(t[EMBEDDING].flip(0)))(target)
    load(target)
    return target


def test_a_stream_of_a_base_with_other_embeddings_is_refused(source: Path, tmp_path: Path) -> None:
    other = other_embeddings(source, tmp_path / "other")
    mine, theirs = (json.loads((d / "libortho.json").read_text()) for d in (source, other))
    assert mine["base_sha256"] == theirs["base_sha256"]
    with pytest.raises(CheckpointError, match="other embeddings"):
        attach(other, source / "ortho/hr")
    shutil.copytree(source / "ortho", other / "ortho")
    for call in (load, lambda d: detach(d, tmp_path / "out"), lambda d: detach(d, tmp_path / "out", streams=["hr"])):
        with pytest.raises(CheckpointError, match="other embeddings"):
            call(other)
    assert [s.base_matches for s in inspect(other).streams] == [False, False]
    assert [s.base_matches for s in inspect(source).streams] == [True, True]


def test_an_earlier_manifest_is_accepted_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(load(source, alpha=1.0)[0])
    for manifest in source.glob("ortho/*/manifest.json"):
        edit(manifest, lambda m: (m.pop("rest_sha256"), m.pop("alpha")))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="libortho"):
        assert torch.equal(logits(load(source, alpha=1.0)[0]), expected)
    assert [r for r in caplog.records if "other tensors were not compared" in r.getMessage()]
    assert [(s.base_matches, s.alpha) for s in inspect(source).streams] == [(True, 1.0), (True, 0.0)]
    detach(source, tmp_path / "out", streams=["default"])
    attach(tmp_path / "out", source / "ortho/default")


# -- alpha -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "expected"), [("split", 1.0), ("isolate", 0.0), ("tune", 0.0), (None, 0.0), (3, 0.0)])
def test_a_stream_stands_as_its_verb_says(verb: Any, expected: float, tmp_path: Path) -> None:
    model = two_streams()
    record_method(model, "hr", {} if verb is None else {"verb": verb})
    for current in (0.0, 1.0):
        libortho.set_alpha(model, current)
        save(model, None, tmp_path / "out")
        assert json.loads((tmp_path / "out/ortho/hr/manifest.json").read_text())["alpha"] == expected
    assert [s.alpha for s in inspect(tmp_path / "out").streams] == [1.0, expected]
    again, _ = load(tmp_path / "out")
    with libortho.alpha(model, {"default": 1.0, "hr": expected}):
        assert torch.equal(logits(again), logits(model))
    edit(tmp_path / "out/ortho/hr/manifest.json", lambda m: m.pop("alpha"))
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(again))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, {"hr": 1.0}, {"default": 0.0}, [0.25], {"hr": [0.5]}])
def test_alpha_of_load_goes_before_the_manifest(value: Any, source: Path) -> None:
    model, _ = load(source, alpha=value)
    expected, _ = load(source)
    libortho.set_alpha(expected, value)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("value", [2.0, -1, float("nan"), "1", {"x": 1.0}, {"hr": 2.0}, [], [0.0, "x"]])
def test_an_impossible_alpha_is_refused_before_the_weights_are_read(value: Any, source: Path) -> None:
    (source / WEIGHTS).write_bytes(b"")
    with pytest.raises(AlphaError):
        load(source, alpha=value)
    with pytest.raises(CheckpointError):
        load(source, alpha=1.0)


def test_a_base_alone_takes_alpha_0(source: Path) -> None:
    assert torch.equal(logits(load(source, streams=None, alpha=0.0)[0]), logits(load(source, alpha=0.0)[0]))
    with pytest.raises(AlphaError, match="no ortho stream is loaded"):
        load(source, streams=None, alpha=1.0)
    with pytest.raises(AlphaError, match="unknown stream 'hr'"):
        load(source, streams=["default"], alpha={"hr": 1.0})


@pytest.mark.parametrize("value", ["1", True, None, 1.5, -0.5, [1.0]])
def test_an_alpha_that_no_stream_can_have_is_no_manifest(value: Any, source: Path) -> None:
    edit(source / "ortho/hr/manifest.json", lambda m: m.update(alpha=value))
    with pytest.raises(CheckpointError, match=r"'alpha' is .* expected a number in \[0, 1\]"):
        load(source)


def test_a_listed_file_of_an_unknown_name_is_refused(source: Path) -> None:
    listed("weights.bin", lambda d: b"x")(source)
    for call in (load, inspect):
        with pytest.raises(CheckpointError, match=r"names the file 'weights\.bin'"):
            call(source)
