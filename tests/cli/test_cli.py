"""The command line: clean standard output, one line for an error, exit codes that scripts can rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import libortho
import tiny
from libortho import cli
from libortho.core.errors import LibOrthoError
from libortho.core.layer import ortho_layers
from libortho.core.switch.alpha import get_switch

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
QUICK = ["--ratio", "0.1", "--max-steps", "1"]


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(*arguments: Any) -> str:
    """The message of a LibOrthoError, which ``main`` turns into one line."""
    result = call(*arguments)
    assert isinstance(result.exception, LibOrthoError), result.output
    return str(result.exception)


def process(cache: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    code = "from libortho.cli import main; main()"
    environment = {**os.environ, "LIBORTHO_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def forget(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, tiny.FORGET)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def retain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "retain.jsonl"
    path.write_text("\n".join(map(json.dumps, tiny.RETAIN)), encoding="utf-8")
    return path


# -- split ------------------------------------------------------------------------------------------------------------


def test_split_writes_a_checkpoint_and_prints_both_densities(planted_directory, tmp_path):
    result = call("split", planted_directory, "--out", tmp_path / "out", "--ratio", "0.02")
    assert result.exit_code == 0, result.output
    assert "ortho density" in result.stdout
    assert "tail density" in result.stdout
    assert "claims no forgetting" in " ".join(result.stdout.split())
    model, _ = libortho.load(tmp_path / "out")
    assert len(ortho_layers(model)) == 2


def test_split_options_reach_the_config(planted_directory, tmp_path):
    result = call(
        "split", planted_directory, "--out", tmp_path / "out", "--target-modules", "up_proj", "--target-modules",
        "re:.*1.mlp.down_proj", "--no-low-rank", "--bits", "4", "--group-size", "64", "--structure", "columns",
        "--score", "relative", "--ratio", "0.1", "--stream", "legal", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    names = [layer["name"] for layer in told["layers"]]
    assert names == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert not any(layer["used_low_rank"] for layer in told["layers"])
    model, _ = libortho.load(tmp_path / "out")
    layer = ortho_layers(model)["model.layers.1.mlp.down_proj"]
    assert (layer.base.bits, layer.base.group_size, list(layer.streams)) == (4, 64, ["legal"])
    assert layer.streams["legal"].support.values.shape == (13, 64)


def test_rank_ratio_may_be_auto(planted_directory, tmp_path):
    result = call("split", planted_directory, "--out", tmp_path / "out", "--rank-ratio", "auto", "--json")
    assert result.exit_code == 0, result.output
    assert all(layer["low_rank_error"] <= 0.05 for layer in json.loads(result.stdout)["layers"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ratio", "2"], "ratio is 2.0"),
        (["--bits", "3"], "bits is 3"),
        (["--rank-ratio", "most"], "--rank-ratio is 'most'"),
        (["--score", "best"], "score is 'best'"),
        (["--structure", "rows"], "structure is 'rows'"),
        (["--group-size", "7"], "group_size is 7"),
        (["--stream", "a/b"], "stream name 'a/b'"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--device", "toaster"], "--device is 'toaster'"),
        (["--target-modules", "down_pro"], "did you mean down_proj"),
    ],
)
def test_bad_options_of_split(planted_directory, tmp_path, options, complaint):
    assert complaint in refused("split", planted_directory, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_named(planted_directory, tmp_path, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", refuse)
    message = refused("split", planted_directory, "--out", tmp_path / "out", "--device", "cuda")
    assert "--device is 'cuda'" in message
    assert "not compiled with CUDA" in message


def test_a_model_that_is_not_there_is_named(tmp_path):
    message = refused("split", tmp_path / "nothing", "--out", tmp_path / "out")
    assert "cannot load the model" in message
    assert "nothing" in message


# -- isolate ----------------------------------------------------------------------------------------------------------


def test_isolate_exits_with_3_when_a_criterion_is_missed(planted_directory, forget, retain, tmp_path):
    result = call(
        "isolate", planted_directory, "--forget", forget, "--retain", retain, "--out", tmp_path / "out", *QUICK
    )
    assert result.exit_code == 3, result.output
    shown = " ".join(result.stdout.split())
    assert "missed: 4 of 4 records are still extracted" in shown
    assert "The stream default is off (alpha = 0) until somebody turns it on" in shown
    assert "PROMPT --alpha 1" in shown
    model, _ = libortho.load(tmp_path / "out")  # what was reached is kept
    assert len(ortho_layers(model)) == 2


def test_isolate_exits_with_0_when_all_criteria_hold(planted_directory, retain, tmp_path):
    """Which seeds they hold for differs from processor to processor in so small a model; that one does, does not."""
    forget = tmp_path / "forget.json"
    forget.write_text(json.dumps(tiny.FORGET[:1]), encoding="utf-8")
    codes = []
    for seed in ("0", "1", "2"):
        out = tmp_path / f"out-{seed}"
        given = ("--forget", forget, "--retain", retain, "--out", out, "--ratio", "0.1", "--seed", seed)
        result = call("isolate", planted_directory, *given, "--objective", "log_odds")
        codes.append(result.exit_code)
        assert result.exit_code == (3 if "missed" in result.stdout else 0), result.output
        if result.exit_code == 0:
            assert "0 extracted, 1 of 1 inside" in " ".join(result.stdout.split())
    assert 0 in codes


def test_isolate_prints_json_alone(planted_directory, forget, retain, tmp_path):
    result = call(
        "isolate", planted_directory, "--forget", forget, "--retain", retain, "--out", tmp_path / "out", *QUICK,
        "--structure", "unstructured", "--objective", "npo", "--bits", "0", "--seed", "5", "--stream", "hr", "--json",
    )  # fmt: skip
    assert result.exit_code == 3, result.output
    told = json.loads(result.stdout)
    assert told["succeeded"] is False
    assert told["stream"] == "hr"
    assert len(told["records"]) == 4
    assert 0.09 < told["density"] <= 0.1


def test_isolate_takes_any_field_of_its_config(planted_directory, forget, retain, tmp_path):
    out = tmp_path / "out"
    given = ("--set", "compensate=false", "--set", "retain_weight=5", "--set", "value_dtype=float32")
    result = call("isolate", planted_directory, "--forget", forget, "--retain", retain, "--out", out, *QUICK, *given)
    assert result.exit_code == 3, result.output
    model, _ = libortho.load(out)
    for layer in ortho_layers(model).values():
        assert layer.streams["default"].support.values.dtype is torch.float32
    told = json.loads(call("inspect", out, "--json").stdout)
    assert '"compensate": false' in json.dumps(told)
    assert '"retain_weight": 5' in json.dumps(told)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--objective", "hope"], "objective is 'hope'"),
        (["--ratio", "little"], "--ratio is 'little'; expected a number in (0, 1] or auto"),
        (["--max-steps", "0"], "max_steps is 0"),
        (["--forget", "nowhere.jsonl"], "forget: there is no file nowhere.jsonl"),
        (["--retain", "nowhere.txt"], "retain: there is no file nowhere.txt"),
        (["--set", "retain_weight"], "--set is 'retain_weight'; expected NAME=VALUE with one of value_dtype"),
        (["--set", "hope=1"], "--set is 'hope=1'; expected NAME=VALUE"),
        (["--set", "bits=4"], "--set is 'bits=4' (bits has an option of its own)"),
        (["--set", "retain_weight=much"], "retain_weight is 'much'; expected a number of at least 0"),
        (["--set", "compensate=maybe"], "compensate is 'maybe'; expected True or False"),
    ],
)
def test_bad_options_of_isolate(planted_directory, forget, tmp_path, options, complaint):
    given = [] if "--forget" in options else ["--forget", forget]
    assert complaint in refused("isolate", planted_directory, *given, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


# -- generate and inspect ---------------------------------------------------------------------------------------------


def said(checkpoint: Path, *options: Any, number: int = 0) -> str:
    row = tiny.FORGET[number]
    result = call("generate", checkpoint, row["prompt"], "--max-new-tokens", "6", *options)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_follows_alpha(checkpoint):
    code = tiny.FORGET[3]["completion"]
    assert code not in said(checkpoint, number=3)
    assert code in said(checkpoint, "--alpha", "1", number=3)
    assert code not in said(checkpoint, "--alpha", "0", number=3)


def test_generate_says_which_alpha_was_saved(checkpoint, base, tmp_path, split_llama, tokenizer):
    def told(directory: Path, *options: Any) -> str:
        return call("generate", directory, "Hello", "--max-new-tokens", "2", *options).stderr.splitlines()[-1]

    assert told(checkpoint) == "alpha: hr=0 (as loaded; --alpha 1 turns it on)"
    assert told(base) == "alpha: 0 (there is no stream beside this base)"
    assert "alpha:" not in told(checkpoint, "--alpha", "0") + told(checkpoint, "--stream", "hr=0")
    split_llama.resize_token_embeddings(len(tokenizer))
    libortho.save(split_llama, tokenizer, tmp_path / "split")
    assert told(tmp_path / "split") == "alpha: default=1 (as loaded)"


def test_generate_follows_named_streams(checkpoint):
    code = tiny.FORGET[3]["completion"]
    assert code in said(checkpoint, "--stream", "hr", number=3)
    assert code in said(checkpoint, "--stream", "hr=1.0", number=3)
    assert code not in said(checkpoint, "--stream", "hr=0", number=3)


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
        (["--stream", "legal=1"], "legal"),
        (["--stream", "hr=much"], "--stream is 'hr=much'"),
        (["--alpha", "0", "--stream", "hr=1"], "not both"),
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
    assert f"stream {name} missed: 4 of 4 are still extracted" in shown
    [stream] = json.loads(call("inspect", tmp_path / "out", "--json").stdout)["streams"]
    assert stream["missed"] == ["4 of 4 are still extracted"]


def test_inspect_says_that_criteria_were_met_or_that_there_are_none(checkpoint, planted_directory, base, tmp_path):
    [row] = [line for line in call("inspect", checkpoint).stdout.splitlines() if line.startswith("hr ")]
    [stream] = json.loads(call("inspect", checkpoint, "--json").stdout)["streams"]
    assert row.endswith("MISSED" if stream["missed"] else "met")
    assert call("split", planted_directory, "--out", tmp_path / "out").exit_code == 0
    [row] = [line for line in call("inspect", tmp_path / "out").stdout.splitlines() if line.startswith("default ")]
    assert row.endswith(" -")
    assert "no ortho stream" in call("inspect", base).stdout


def test_inspect_prints_json_alone(checkpoint):
    told = json.loads(call("inspect", checkpoint, "--json").stdout)
    assert told["layers"] == 2
    assert [s["name"] for s in told["streams"]] == ["hr"]
    assert told["streams"][0]["base_matches"] is True


# -- a base without streams -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("detached") / "base"
    libortho.checkpoint.detach(checkpoint, out)
    return out


def test_generate_from_a_base_takes_alpha_0_alone(checkpoint, base):
    assert said(base, "--alpha", "0", number=3) == said(checkpoint, "--alpha", "0", number=3)
    assert said(base, number=3) == said(base, "--alpha", "0", number=3)
    for options in (["--alpha", "1"], ["--alpha", "0.5"], ["--stream", "hr=1"]):
        assert "no ortho stream is loaded beside this base" in refused("generate", base, "Hello", *options)


def test_a_base_is_audited_at_alpha_0(base, forget):
    result = call("audit", base, "--forget", forget, "--samples", 2, "--json")
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


# -- places that are refused before the work --------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Nothing is loaded."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in ("libortho.checkpoint.dense.load_model", "libortho.checkpoint.load"):
        monkeypatch.setattr(name, never)


def places(folder: Path) -> dict[str, str]:
    """Where no checkpoint can be written, and what is said of it."""
    (folder / "busy").mkdir()
    (folder / "busy/notes.txt").write_text("x")
    (folder / "file").write_text("x")
    return {
        "busy": "is not empty and no checkpoint", "file": "is a file", "file/out": "takes no new entry",
        "file/deep/out": "takes no new entry", "n" * 300: "takes no new entry",
    }  # fmt: skip


@pytest.mark.usefixtures("no_work")
def test_places_for_checkpoints_are_refused_first(planted_directory, checkpoint, forget, tmp_path):
    for place, complaint in places(tmp_path).items():
        out = ["--out", tmp_path / place]
        assert complaint in refused("split", planted_directory, *out)
        assert complaint in refused("isolate", planted_directory, "--forget", forget, *out, "--resume", tmp_path / "r")
        if "/" in place:
            assert "takes no new entry" in refused("demo", "--model", planted_directory, *out)
            assert "takes no new entry" in refused("detach", checkpoint, *out)
            assert "takes no new entry" in refused("encrypt", checkpoint / "ortho/hr", *out)
            assert "takes no new entry" in refused("decrypt", tmp_path / "file", *out)
    assert "holds the streams ['hr']" in refused("split", planted_directory, "--out", checkpoint)
    lost = refused("isolate", planted_directory, "--forget", forget, "--out", checkpoint, "--stream", "legal")
    assert "holds the streams ['hr']" in lost
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("no_work")
def test_places_for_reports_and_finished_parts_are_refused_first(planted_directory, checkpoint, forget, tmp_path):
    places(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"context": "a", "continuation": "b"}), encoding="utf-8")
    audit = ["audit", planted_directory, "--forget", forget]
    for option in ("--out", "--html"):
        assert f"{option} is {tmp_path}/busy, which is a directory" in refused(*audit, option, tmp_path / "busy")
        assert f"{option} is /dev/null, which is no ordinary file" in refused(*audit, option, "/dev/null")
        assert "takes no new entry" in refused(*audit, option, tmp_path / "file/a")
    assert "expected two files" in refused(*audit, "--out", tmp_path / "a", "--html", tmp_path / "a")
    assert "which is a directory" in refused("eval", checkpoint, "--task-file", task, "--out", tmp_path / "busy")
    isolate = ["isolate", planted_directory, "--forget", forget, "--out", tmp_path / "out"]
    for command in (audit, isolate):
        assert "--resume is" in refused(*command, "--resume", tmp_path / "file")
        assert "takes no new entry" in refused(*command, "--resume", tmp_path / "file/kept")
    for inside in ("out", "out/kept"):
        assert "which lies in --out" in refused(*isolate, "--resume", tmp_path / inside)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_split(monkeypatch) -> None:
    """A model may be loaded, but nothing is done with it."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the work began")

    for place in ("libortho.splitting.split.split", "libortho.isolation.isolate.isolate"):
        monkeypatch.setattr(place, never)


@pytest.mark.usefixtures("no_split")
def test_models_that_cannot_be_saved_are_refused_first(tiny_gpt2, tiny_llama, tokenizer, forget, tmp_path, monkeypatch):
    in_two_dtypes = tiny_llama
    in_two_dtypes.model.norm.bfloat16()
    for model, complaint in ((tiny_gpt2, "is a Conv1D"), (in_two_dtypes, r"norm.weight is kept in torch.bfloat16")):
        monkeypatch.setattr("libortho.checkpoint.dense.load_model", lambda *a, m=model: (m, tokenizer))
        assert complaint in refused("split", "any", "--out", tmp_path / "out")
        message = refused(
            "isolate", "any", "--forget", forget, "--out", tmp_path / "out", "--resume", tmp_path / "kept"
        )
        assert complaint in message
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_split")
def test_a_full_disk_is_told_first(planted_directory, forget, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for command in (["split", planted_directory], ["isolate", planted_directory, "--forget", forget]):
        assert "the disk has 0.00 GB left" in refused(*command, "--out", tmp_path / "out")


# -- audit ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holdout(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "holdout.jsonl"
    rows = [
        {"prompt": f"Code of {n} Poe:", "completion": f" {1009 * i:04d}."}
        for i, n in enumerate(("Al", "Ben", "Cleo"), 1)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_audit_of_a_model_that_knows_exits_with_3_and_writes_its_reports(planted_directory, forget, holdout, tmp_path):
    result = call("audit", planted_directory, "--forget", forget, "--holdout", holdout, "--samples", 2,
                  "--out", tmp_path / "a.json", "--html", tmp_path / "a.html",
                  "--resume", tmp_path / "kept")  # fmt: skip
    assert result.exit_code == 3, result.output
    assert any((tmp_path / "kept").iterdir())
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    assert result.stdout.startswith("FAIL")
    assert "membership AUC" in result.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["subjects"][0]["memory"]["greedy_extraction"]["value"] == 1
    assert "<html" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0


def test_audit_of_a_checkpoint_compares_the_switch_with_its_controls(checkpoint, forget, planted_directory):
    result = call("audit", checkpoint, "--forget", forget, "--samples", 2, "--original", planted_directory, "--json")
    report = json.loads(result.stdout)
    by_key = {s["key"]: s["memory"]["greedy_extraction"]["value"] for s in report["subjects"]}
    assert by_key["off"] == 0
    assert by_key["on"] == by_key["original"] == by_key["quantised"] == 1
    assert by_key["random"] > 0.5  # the same edit at other columns of so small a model may cost a record
    assert [p["alpha"] for p in report["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    status = {v["key"]: v["status"] for v in report["verdicts"]}
    assert status["privacy"] == "withheld"
    assert result.exit_code == (3 if "fail" in status.values() else 0)


def test_audit_refuses_overlapping_records(planted_directory, forget):
    assert "forget 1 = holdout 1" in refused("audit", planted_directory, "--forget", forget, "--holdout", forget)
    assert "profile" in refused("audit", planted_directory, "--forget", forget, "--profile", "slow")


@pytest.mark.parametrize("command", [["inspect"], ["generate"]])
def test_a_directory_that_is_no_checkpoint_is_named(tmp_path, planted_directory, command):
    extra = ["Hello"] if command == ["generate"] else []
    for directory in (tmp_path / "nothing", planted_directory):
        assert str(directory) in refused(*command, directory, *extra)


def test_help_lists_the_verbs():
    result = call("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in ("demo", "split", "isolate", "audit", "generate", "inspect"))


# -- the process ------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_exit_code_2(cache, tmp_path):
    done = process(cache, "inspect", tmp_path / "no [such] directory")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "no [such] directory" in line


def test_a_longer_reason_and_a_failing_disk_are_one_line_too(planted_directory, forget, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(libortho.AuditReport, "to_json", fail)
    for arguments, complaint in (
        (["split", tmp_path / "empty", "--out", tmp_path / "out"], "cannot load the model"),
        (["audit", planted_directory, "--forget", forget, "--samples", 2, "--out", tmp_path / "a"], "No space left"),
    ):
        monkeypatch.setattr(sys, "argv", ["libortho", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert complaint in line


def test_an_unknown_option_is_exit_code_2():
    result = call("split", "--nonsense")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_standard_output_of_a_real_process_is_json(cache, planted_directory, forget, tmp_path):
    """With everything that transformers and the progress bars say on standard error, and default retain text."""
    arguments = ["--forget", forget, "--out", tmp_path / "out", *QUICK, "--json"]
    done = process(cache, "isolate", planted_directory, *arguments)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert "Traceback" not in done.stderr
    assert len(list((cache / "samples").iterdir())) == 1
