"""generate and inspect, with and without streams."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import libortho
import tiny
from commands import call, refused, said
from libortho.core.layer import ortho_layers
from libortho.core.switch.alpha import get_switch

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def test_generate_follows_alpha(checkpoint):
    code = tiny.FORGET[3]["completion"]
    assert code not in said(checkpoint, number=3)
    assert code in said(checkpoint, "--alpha", "1", number=3)
    assert code not in said(checkpoint, "--alpha", "0", number=3)


def test_generate_says_which_alpha_was_saved(checkpoint, base, tmp_path, split_llama, tokenizer):
    def told(directory: Path, *options: Any) -> str:
        return call("generate", directory, "Hello", "--max-new-tokens", "2", *options).stderr.strip()

    assert told(checkpoint) == "alpha: hr=0 (as loaded; --alpha 1 turns it on)"
    assert told(base) == "alpha: 0 (there is no stream beside this base)"
    assert "alpha:" not in told(checkpoint, "--alpha", "0") + told(checkpoint, "--alpha", "hr=0")
    split_llama.resize_token_embeddings(len(tokenizer))
    libortho.save(split_llama, tokenizer, tmp_path / "split")
    assert told(tmp_path / "split") == "alpha: default=1 (as loaded)"


def test_generate_follows_named_streams(checkpoint):
    code = tiny.FORGET[3]["completion"]
    assert code in said(checkpoint, "--alpha", "hr=1.0", number=3)
    assert code not in said(checkpoint, "--alpha", "hr=0", number=3)


def test_generate_answers_under_each_alpha(checkpoint):
    each = {text: said(checkpoint, "--alpha", text, number=3) for text in ("hr=1", "0")}
    both = said(checkpoint, "--alpha", "hr=1", "--alpha", "0", number=3)
    assert both == f"alpha hr=1:\n{each['hr=1']}alpha 0:\n{each['0']}"
    assert each["hr=1"] != each["0"]


def test_an_alpha_is_refused_before_the_model_is_loaded(checkpoint, forget, monkeypatch):
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("libortho.checkpoint.load", never)
    for command in (["generate", checkpoint, "Hello"], ["eval", checkpoint, "--task-file", forget]):
        for given, complaint in (
            (["hr=1,legal=1"], "unknown stream 'legal'; this model has ['hr']"),
            (["hr=on"], "expected a number in [0, 1], or one for each stream such as hr=1,legal=0; the streams are hr"),
            (["hr=1.5"], "alpha of stream 'hr' is 1.5; expected a number in [0, 1]"),
            (["0", "hr=1", "0"], "--alpha is 0, hr=1, 0, where one is given twice"),
        ):
            assert complaint in refused(*command, *(word for text in given for word in ("--alpha", text)))


def test_generate_prints_no_special_token(checkpoint, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", lambda self, ids, streamer, **_: stream(streamer))

    def stream(streamer: Any) -> torch.Tensor:
        for token in (torch.tensor([[5]]), torch.tensor([70]), torch.tensor([2])):
            streamer.put(token)
        streamer.end()
        return torch.tensor([[5, 70, 2]])

    text = said(checkpoint)
    assert "</s>" not in text
    assert len(text.strip()) == 1


def test_generate_samples_by_seed(checkpoint):
    one, again, other = (said(checkpoint, "--temperature", "2", "--alpha", "0", "--seed", s) for s in (1, 1, 2))
    assert one == again != other


def test_generate_applies_the_chat_template(checkpoint):
    assert said(checkpoint, "--chat") != said(checkpoint)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--alpha", "2"], "2"),
        (["--alpha", "nan"], "nan"),
        (["--alpha", "legal=1"], "legal"),
        (["--alpha", "hr=much"], "alpha is 'hr=much'"),
        (["--device", "toaster"], "--device is 'toaster'"),
    ],
)
def test_bad_options_of_generate(checkpoint, options, complaint):
    assert complaint in refused("generate", checkpoint, "Hello", *options)


def test_generate_needs_text(checkpoint):
    assert "prompt" in refused("generate", checkpoint, "")


def test_inspect_tells_the_streams(checkpoint):
    result = call("inspect", checkpoint)
    assert result.exit_code == 0
    assert "hr" in result.stdout
    assert "INT8" in result.stdout


def test_inspect_shows_the_missed_criteria_and_whole_names(split_llama, tmp_path):
    name = "people-and-places-of-the-legal-department-in-2024-second-request"
    layers = ortho_layers(split_llama)
    for layer in layers.values():
        layer.streams[name] = layer.streams["default"]
        del layer.streams["default"]
    get_switch(split_llama).add_stream(name)
    libortho.core.report.record_method(
        split_llama, name, {"verb": "isolate", "missed": ("4 of 4 are still extracted",)}
    )
    libortho.save(split_llama, None, tmp_path / "out")
    shown = call("inspect", tmp_path / "out").stdout
    assert name in shown
    assert "1 MISSED" in shown
    assert f"stream {name} missed: 4 of 4 are still extracted" in " ".join(shown.split())
    [stream] = json.loads(call("inspect", tmp_path / "out", "--json").stdout)["streams"]
    assert stream["missed"] == ["4 of 4 are still extracted"]


def test_inspect_says_that_criteria_were_met_or_that_there_are_none(checkpoint, planted_directory, base, tmp_path):
    [row] = [line for line in call("inspect", checkpoint).stdout.splitlines() if line.startswith("hr ")]
    [stream] = json.loads(call("inspect", checkpoint, "--json").stdout)["streams"]
    assert row.rstrip().endswith("MISSED" if stream["missed"] else "met")
    assert call("split", planted_directory, "--out", tmp_path / "out").exit_code == 0
    [row] = [line for line in call("inspect", tmp_path / "out").stdout.splitlines() if line.startswith("default ")]
    assert row.rstrip().endswith(" -")
    assert "no ortho stream" in call("inspect", base).stdout


def test_inspect_prints_json_alone(checkpoint):
    told = json.loads(call("inspect", checkpoint, "--json").stdout)
    assert told["layers"] == 2
    assert [s["name"] for s in told["streams"]] == ["hr"]
    assert told["streams"][0]["base_matches"] is True


@pytest.mark.parametrize("command", [["inspect"], ["generate"]])
def test_a_directory_that_is_no_checkpoint_is_named(tmp_path, planted_directory, command):
    extra = ["Hello"] if command == ["generate"] else []
    for directory in (tmp_path / "nothing", planted_directory):
        assert str(directory) in refused(*command, directory, *extra)


def test_generate_from_a_base_takes_alpha_0_alone(checkpoint, base):
    assert said(base, "--alpha", "0", number=3) == said(checkpoint, "--alpha", "0", number=3)
    assert said(base, number=3) == said(base, "--alpha", "0", number=3)
    for options in (["--alpha", "1"], ["--alpha", "0.5"], ["--alpha", "hr=1"]):
        assert "no ortho stream is loaded beside this base" in refused("generate", base, "Hello", *options)


def test_a_base_is_audited_at_alpha_0(base, forget):
    result = call("audit", base, "--forget", forget, "--set", "samples=2", "--json")
    report = json.loads(result.stdout)
    assert [s["key"] for s in report["subjects"]] == ["off"]
    assert report["model"]["split"] is True
    assert report["model"]["streams"] == report["curve"] == []
    assert report["subjects"][0]["memory"]["greedy_extraction"]["value"] == 0


def test_a_checkpoint_is_no_dense_model(checkpoint, base, forget, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"context": "a", "continuation": "b"}), encoding="utf-8")
    out = tmp_path / "out"
    for command in (
        ["split", checkpoint, "--out", out],
        ["demo", "--model", checkpoint],
        ["audit", checkpoint, "--forget", forget, "--original", checkpoint],
        ["audit", checkpoint, "--forget", forget, "--reference", checkpoint],
        ["eval", checkpoint, "--task-file", task, "--original", checkpoint],
    ):
        message = refused(*command)
        assert "is a checkpoint of libortho with the streams ['hr'], which an ordinary loader drops" in message
        assert "libortho.load" in message
    assert "is a checkpoint of libortho without streams" in refused("split", base, "--out", out)
    assert not out.exists()
