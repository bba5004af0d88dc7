"""``libortho eval``: figures side by side, paired differences, and errors before anything runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import libortho
import tiny
from commands import call
from libortho.auditing.subjects import at, dense_copy
from libortho.core.errors import AlphaError, CheckpointError, ConfigError, DataError, LibOrthoError
from libortho.evaluation.evaluate import Column, evaluate_columns
from libortho.evaluation.harness import harness_tasks, lm_eval_tasks
from libortho.evaluation.tasks import evaluate, load_task
from libortho.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


def told(*arguments: Any) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def value(report: dict[str, Any], metric: str, column: str) -> float:
    (found,) = [f["value"] for f in report["figures"] if (f["metric"], f["column"]) == (metric, column)]
    return found


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """A task whose answers are the secrets."""
    path = tmp_path_factory.mktemp("tasks") / "codes.jsonl"
    rows = [{"context": r["prompt"], "continuation": r["completion"]} for r in tiny.FORGET]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "choices.jsonl"
    others = [r["completion"].strip() for r in tiny.FORGET]
    rows = [{"query": r["prompt"], "choices": others, "gold": i} for i, r in enumerate(tiny.FORGET)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def harness_folder(codes: Path, tmp_path_factory) -> Path:
    """A task of the harness whose data are a local file."""
    folder = tmp_path_factory.mktemp("harness")
    lines = [
        "task: local_codes", "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    test: {codes}",
        f"  cache_dir: {folder / 'cache'}", "test_split: test", "output_type: loglikelihood",
        'doc_to_text: "{{context}}"', 'doc_to_target: "{{continuation}}"', "target_delimiter: ''", "metric_list:",
        "  - metric: acc", "  - metric: perplexity",
    ]  # fmt: skip
    (folder / "local_codes.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder


# -- figures ----------------------------------------------------------------------------------------------------------


def test_alphas_side_by_side_with_the_paired_difference(checkpoint, codes, planted_directory):
    report = told(
        "eval", checkpoint, "--alpha", "1", "--alpha", "0", "--original", planted_directory, "--task-file", codes
    )
    assert report["columns"] == ["alpha 1", "alpha 0", "original"]
    assert value(report, "exact_match", "alpha 1") == value(report, "exact_match", "original") == 1.0
    assert value(report, "exact_match", "alpha 0") == 0.0
    lost = {(d["metric"], d["column"]): d for d in report["differences"]}
    assert {d["versus"] for d in report["differences"]} == {"alpha 1"}
    gone = lost["exact_match", "alpha 0"]
    assert (gone["value"], gone["rows"]) == (-1.0, 4)
    assert gone["low"] == -1.0
    assert gone["high"] < 0
    same = lost["exact_match", "original"]
    assert same["value"] == 0
    assert same["low"] < 0 < same["high"]
    assert lost["nll", "alpha 0"]["low"] > 0
    assert value(report, "nll", "alpha 0") - value(report, "nll", "alpha 1") == pytest.approx(
        lost["nll", "alpha 0"]["value"]
    )


def test_figures_are_those_of_the_dense_weights(checkpoint, codes, choices, tokenizer):
    report = told("eval", checkpoint, "--alpha", "hr=0.5", "--alpha", "0", "--task-file", codes, "--task-file", choices)
    model, _ = libortho.load(checkpoint)
    for label, a in (("alpha hr=0.5", 0.5), ("alpha 0", 0.0)):
        dense = LanguageModel(dense_copy(at(model, a)))
        asked = evaluate(dense, tokenizer, load_task(choices))
        chosen = {f["metric"]: f for f in report["figures"] if (f["task"], f["column"]) == ("choices", label)}
        assert chosen["acc_norm"]["value"] == asked.accuracy
        assert asked.unnormalised is not None
        assert chosen["acc"]["value"] == sum(asked.unnormalised) / 4
        assert chosen["nll"]["value"] == pytest.approx(sum(asked.nll) / 4, rel=1e-4)
        assert chosen["acc"]["low"] < chosen["acc"]["value"] + 1e-9
        assert chosen["acc"]["rows"] == 4


def test_an_ordinary_model_needs_no_checkpoint(planted_directory, codes, tmp_path):
    result = call("eval", planted_directory, "--task-file", codes, "--limit", 2, "--out", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "exact_match" in text
    assert "1.0000 [0.34" in text  # Wilson's interval of two rows out of two
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert (saved["columns"], saved["limit"], saved["differences"]) == (["model"], 2, [])
    assert {f["rows"] for f in saved["figures"]} == {2}


def test_names_go_through_the_harness(checkpoint, codes, harness_folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    report = told(
        "eval", checkpoint, "--alpha", "1", "--alpha", "0", "--tasks", "local_codes", "--include-path", harness_folder,
        "--batch-size", 3, "--task-file", codes,
    )  # fmt: skip
    for column, known in (("alpha 1", 1.0), ("alpha 0", 0.0)):
        assert value(report, "acc", column) == value(report, "exact_match", column) == known
    assert value(report, "perplexity", "alpha 0") > 2 * value(report, "perplexity", "alpha 1")
    (stderr,) = {f["stderr"] for f in report["figures"] if f["metric"] == "acc"}
    assert stderr == 0  # of four equal rows
    assert all(f["stderr"] > 0 for f in report["figures"] if f["metric"] == "perplexity")


def test_tasks_may_be_read_once_and_asked_often(planted, tokenizer, codes, harness_folder):
    pytest.importorskip("lm_eval")
    once = harness_tasks(["local_codes"], harness_folder)
    first = lm_eval_tasks(planted, tokenizer, once)
    assert lm_eval_tasks(planted, tokenizer, once) == first
    assert "acc_stderr" not in first["local_codes"]
    assert "acc_stderr" in lm_eval_tasks(planted, tokenizer, once, bootstrap=10)["local_codes"]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        (["--alpha", "2"], AlphaError, "'hr' is 2.0"),
        (["--alpha", "nan"], AlphaError, "'hr' is nan"),
        (["--alpha", "legal=1"], AlphaError, "unknown stream 'legal'"),
        (["--alpha", "on"], AlphaError, "alpha is 'on'"),
        (["--device", "toaster"], ConfigError, "--device is 'toaster'"),
        (["--dtype", "int8"], ConfigError, "--dtype is 'int8'"),
        (["--original", "/nowhere"], LibOrthoError, "cannot load the model"),
    ],
)
def test_bad_options(checkpoint, codes, options, kind, complaint):
    result = call("eval", checkpoint, "--task-file", codes, *options)
    assert isinstance(result.exception, kind), result.output
    assert complaint in str(result.exception)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(None, "cannot be read"), ("", "holds no row"), ("{", "line 1 of"), ('{"context": "a"}', "one of the shapes"),
     ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "'gold' is 2")],
)  # fmt: skip
def test_a_task_file_that_is_none(checkpoint, tmp_path, text, complaint):
    path = tmp_path / "task.jsonl"
    if text is not None:
        path.write_text(text)
    result = call("eval", checkpoint, "--task-file", path)
    assert isinstance(result.exception, DataError), result.output
    assert complaint in str(result.exception)


def test_nothing_to_run_and_alpha_without_a_switch(checkpoint, planted_directory, codes):
    result = call("eval", checkpoint)
    assert isinstance(result.exception, ConfigError)
    assert "give --task-file" in str(result.exception)
    result = call("eval", planted_directory, "--task-file", codes, "--alpha", "0")
    assert isinstance(result.exception, ConfigError)
    assert "not a checkpoint" in str(result.exception)
    result = call("eval", checkpoint, "--task-file", codes, "--task-file", codes)
    assert isinstance(result.exception, ConfigError)
    assert "two task files are named 'codes'" in str(result.exception)
    assert call("eval", checkpoint, "--task-file", codes, "--limit", 0).exit_code == 2


def test_a_checkpoint_without_a_tokenizer(split_llama, codes, tmp_path):
    libortho.save(split_llama, None, tmp_path / "out")
    result = call("eval", tmp_path / "out", "--task-file", codes)
    assert isinstance(result.exception, CheckpointError)
    assert "no tokenizer" in str(result.exception)


def test_without_alpha_the_column_is_what_was_saved(checkpoint, codes):
    report = told("eval", checkpoint, "--task-file", codes)
    assert report["columns"] == ["alpha 0"]
    assert value(report, "exact_match", "alpha 0") == 0.0


def test_a_base_without_streams_is_alpha_0_and_nothing_else(checkpoint, codes, tmp_path):
    base, tokenizer = libortho.load(checkpoint, streams=None)
    libortho.save(base, tokenizer, tmp_path / "base")
    alone = told("eval", tmp_path / "base", "--alpha", "0", "--task-file", codes)
    assert value(alone, "nll", "alpha 0") == value(
        told("eval", checkpoint, "--alpha", "0", "--task-file", codes), "nll", "alpha 0"
    )
    assert told("eval", tmp_path / "base", "--task-file", codes)["figures"] == alone["figures"]
    result = call("eval", tmp_path / "base", "--alpha", "1", "--task-file", codes)
    assert isinstance(result.exception, AlphaError), result.output
    assert "no ortho stream is loaded" in str(result.exception)


def test_bad_columns_are_refused_before_anything_runs(planted, tokenizer, codes, monkeypatch):
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("libortho.evaluation.evaluate.evaluate", never)
    task = load_task(codes)
    twice = [Column("a", planted, tokenizer), Column("a", planted, tokenizer)]
    for columns, tasks, complaint in (
        (twice, [task], "two columns are named 'a'"),
        (twice[:1], [], "nothing to evaluate"),
        ([], [task], "nothing to evaluate"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            evaluate_columns(columns, tasks)
    with pytest.raises(AlphaError, match="no ortho stream"):
        evaluate_columns([twice[0], Column("b", planted, tokenizer, 0.0)], [task])


def test_tasks_that_the_harness_cannot_load(checkpoint, harness_folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    result = call("eval", checkpoint, "--tasks", "local_codes", "--include-path", tmp_path / "nowhere")
    assert isinstance(result.exception, LibOrthoError)
    assert "is not a directory" in str(result.exception)
    broken = (harness_folder / "local_codes.yaml").read_text().replace("codes.jsonl", "absent.jsonl")
    (tmp_path / "broken.yaml").write_text(broken)
    result = call("eval", checkpoint, "--tasks", "local_codes", "--include-path", tmp_path)
    assert isinstance(result.exception, LibOrthoError), result.output
    assert "cannot load the task 'local_codes'" in str(result.exception)


def test_without_the_harness_files_work_and_names_say_what_to_install(checkpoint, codes, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call("eval", checkpoint, "--task-file", codes, "--limit", 1).exit_code == 0
    result = call("eval", checkpoint, "--tasks", "arc_easy")
    assert isinstance(result.exception, LibOrthoError)
    assert "pip install 'libortho[eval]'" in str(result.exception)
