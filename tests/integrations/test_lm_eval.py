"""The registered model ``libortho``: the harness's own entry points, and the figures of the dense weights."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import libortho
from libortho.auditing.subjects import at, dense_copy
from libortho.core.errors import AlphaError, CheckpointError, ConfigError, LibOrthoError
from libortho.core.report import record_method

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from libortho.integrations.lm_eval import LibOrthoLM, main, parse_streams

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
ROWS = [
    {"context": f"{a} and {b} and {c}", "answer": f" {a}", "choices": [a, b, c], "gold": 0}
    for a, b, c in zip(WORDS, WORDS[1:] + WORDS[:1], WORDS[2:] + WORDS[:2], strict=True)
]
FIGURES = {"choice": ("acc", "acc_norm"), "word": ("acc", "perplexity"), "text": ("bits_per_byte",), "open": ("bleu",)}


@pytest.fixture
def checkpoint(clean, tokenizer, tmp_path: Path) -> Path:
    """Half of the down projections' directions in the stream "hr"."""
    config = libortho.SplitConfig(
        bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1, structure="columns", value_dtype="float32",
        stream="hr",
    )  # fmt: skip
    libortho.save(libortho.split(clean, config), tokenizer, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every kind of request that the harness makes, on local data."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    def task(name: str, kind: str, **more: Any) -> dict[str, Any]:
        return {
            "task": name, "dataset_path": "json", "output_type": kind, "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
            "metric_list": [{"metric": m} for m in FIGURES[name]], **more,
        }  # fmt: skip

    return [
        task("choice", "multiple_choice", doc_to_choice="choices", doc_to_target="gold"),
        task("word", "loglikelihood"),
        task("text", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}"),
        task("open", "generate_until", generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
    ]


def simple(tasks: list[dict[str, Any]], model: Any, **options: Any) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """The harness's figures, and what the model answered to each row."""
    output = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=lm_eval.tasks.TaskManager(include_defaults=False), bootstrap_iters=0,
        **options,
    )  # fmt: skip
    figures = {
        f"{task} {key}": value
        for task, values in output["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }
    return figures, {t: [s["resps"] for s in samples] for t, samples in output["samples"].items()}


def answers(harness: HFLM) -> list[Any]:
    """Log-likelihoods, rolling ones, and generated text."""
    pairs = [(r["context"], r["answer"]) for r in ROWS]
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return [
        *harness.loglikelihood([Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)], disable_tqdm=True),
        *harness.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (c,), i) for i, (c, _) in enumerate(pairs)], disable_tqdm=True
        ),
        *harness.generate_until(
            [Instance("generate_until", {}, (c, until), i) for i, (c, _) in enumerate(pairs)], disable_tqdm=True
        ),
    ]


def test_each_alpha_has_the_figures_of_its_dense_weights(checkpoint, tasks, tokenizer):
    model, _ = libortho.load(checkpoint)
    found = {}
    for value in (0, 1):
        arguments = {"pretrained": str(checkpoint), "alpha": value, "device": "cpu"}
        found[value], said = simple(tasks, "libortho", model_args=arguments, batch_size=3)
        dense = HFLM(pretrained=dense_copy(at(model, value)), tokenizer=tokenizer, batch_size=3)
        expected, also_said = simple(tasks, dense)
        assert found[value] == pytest.approx(expected, rel=1e-4)
        assert said["open"] == also_said["open"]
        assert len({str(r) for r in said["open"]}) > 1
    assert {k for k in found[0] if found[0][k] != found[1][k]} >= {"word perplexity,none", "text bits_per_byte,none"}


def test_every_forward_pass_runs_under_the_alpha(checkpoint):
    harness = LibOrthoLM(checkpoint, alpha="hr=0.25", device="cpu", batch_size=2)
    layer = next(m for m in harness.model.modules() if isinstance(m, libortho.OrthoLinear))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(dict(layer.switch.current().values)))
    libortho.set_alpha(harness.model, 1.0)  # somebody else's persistent value does not matter
    answers(harness)
    assert len(seen) > 3 * len(ROWS)
    assert all(s == {"hr": 0.25} for s in seen)


def test_alpha_and_streams_choose_what_takes_part(checkpoint, tokenizer):
    def loaded(**options: Any) -> list[Any]:
        return answers(LibOrthoLM(checkpoint, device="cpu", batch_size=4, **options))

    on, off = loaded(alpha=1), loaded(alpha=0)
    assert on != off
    assert loaded(streams="hr", alpha=1) == loaded(alpha={"hr": 1.0}) == on
    assert loaded(streams="none", alpha=0) == loaded(alpha="hr=0") == off
    assert loaded(streams="none") == off
    assert LibOrthoLM(checkpoint, device="cpu", streams="none").alpha == 0.0


def test_without_alpha_it_is_what_was_saved(checkpoint, tmp_path):
    assert LibOrthoLM(checkpoint, device="cpu").alpha == {"hr": 1.0}  # of split
    model, tokenizer = libortho.load(checkpoint)
    record_method(model, "hr", {"verb": "isolate"})
    libortho.save(model, tokenizer, tmp_path / "out")
    assert LibOrthoLM(tmp_path / "out", device="cpu").alpha == {"hr": 0.0}


def test_the_dtype_and_the_options_of_the_harness_reach_it(checkpoint):
    harness = LibOrthoLM(checkpoint, device="cpu", dtype="bfloat16", batch_size="2", max_length=16)
    assert harness.model.dtype is torch.bfloat16
    assert (harness.max_length, harness.batch_size, harness.softmax_dtype) == (16, 2, torch.float32)


def test_the_results_name_the_checkpoint_and_the_alpha(checkpoint, tasks):
    output = lm_eval.simple_evaluate(
        model="libortho", model_args=f"pretrained={checkpoint},alpha=hr=0.5", device="cpu", tasks=tasks[:1], limit=1,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert output["config"]["alpha"] == {"hr": 0.5}
    assert output["config"]["model_sha"] == ""


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"alpha": 1.5}, AlphaError, "'hr' is 1.5"),
        ({"alpha": -1}, AlphaError, "'hr' is -1"),
        ({"alpha": "legal=1"}, AlphaError, "unknown stream 'legal'"),
        ({"alpha": "hr=off"}, AlphaError, "alpha is 'hr=off'"),
        ({"alpha": True}, AlphaError, "alpha is True"),
        ({"alpha": 1, "streams": "legal"}, CheckpointError, "no stream 'legal'"),
        ({"alpha": "hr=1", "streams": "none"}, AlphaError, "no ortho stream is loaded"),
        ({"alpha": 1, "streams": "none"}, AlphaError, "alpha is 1.0, but no ortho stream is loaded"),
        ({"streams": "../hr"}, CheckpointError, "stream"),
        ({"dtype": "int8"}, ConfigError, "dtype is 'int8'"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"batch_size": "auto:4"}, ConfigError, "running out of memory"),
        ({"peft": "x"}, ConfigError, "does not take 'peft'"),
        ({"parallelize": True}, ConfigError, "does not take 'parallelize'"),
    ],
)
def test_bad_arguments(checkpoint, options, kind, complaint):
    with pytest.raises(kind, match=complaint):
        LibOrthoLM(checkpoint, **{"device": "cpu", **options})


def test_what_is_no_checkpoint(checkpoint, planted_directory, tmp_path, monkeypatch):
    for directory in (planted_directory, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="not a checkpoint of libortho; for an ordinary model use --model hf"):
            LibOrthoLM(directory)
    bare, _ = libortho.load(checkpoint)
    libortho.save(bare, None, tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LibOrthoLM(tmp_path / "bare", device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        LibOrthoLM(checkpoint, device="cpu")


def test_a_response_cache_of_another_alpha_is_refused(checkpoint, tasks, tmp_path):
    def cached(alpha: float) -> dict[str, float]:
        arguments = {"pretrained": str(checkpoint), "alpha": alpha, "device": "cpu"}
        return simple(tasks[:2], "libortho", model_args=arguments, use_cache=str(tmp_path / "responses"))[0]

    first = cached(1.0)
    assert cached(1.0) == first
    with pytest.raises(ConfigError, match="another alpha"):
        cached(0.0)


def test_the_command_line(checkpoint, tasks, tmp_path, monkeypatch):
    """The documented command: alpha = 0 from ``--model_args``, and the results on disk."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "word.yaml").write_text(json.dumps(tasks[1]), encoding="utf-8")  # JSON is YAML
    command = [
        "lm_eval", "--model", "libortho", "--model_args", f"pretrained={checkpoint},alpha=0,streams=hr", "--tasks",
        str(folder / "word.yaml"), "--device", "cpu", "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the whole index takes half a minute
    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    main()
    (results,) = (tmp_path / "results").rglob("results_*.json")
    saved = json.loads(results.read_text())
    arguments = {"pretrained": str(checkpoint), "alpha": 0, "device": "cpu"}
    expected, _ = simple(tasks[1:2], "libortho", model_args=arguments)
    assert saved["results"]["word"]["perplexity,none"] == pytest.approx(expected["word perplexity,none"])
    assert saved["config"]["alpha"] == {"hr": 0.0}


def test_errors_on_the_command_line_are_one_line(monkeypatch, capsys, tmp_path):
    def refused() -> None:
        capsys.readouterr()
        LibOrthoLM(tmp_path)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refused)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("error: ")


def test_without_the_harness_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "libortho.integrations.lm_eval")
    with pytest.raises(LibOrthoError, match=r"pip install 'libortho\[eval\]'"):
        import libortho.integrations.lm_eval  # noqa: F401


def test_streams_are_read():
    assert parse_streams("all") == "all"
    assert parse_streams("none") is None
    assert parse_streams("hr; legal") == parse_streams(["hr", "legal"]) == ["hr", "legal"]
    for bad in ("", "hr;;legal", 3, [1], []):
        with pytest.raises(ConfigError, match="streams is"):
            parse_streams(bad)
