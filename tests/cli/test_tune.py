"""tune and retune: options reach the config, exit codes tell how it went, refusals come first."""

import json

import pytest

import libortho
from commands import call, refused
from tiny import HR

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "hr.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in HR))
    return path


def test_a_stream_is_trained_saved_and_trained_anew(planted_directory, data, tmp_path):
    out = tmp_path / "out"
    result = call(
        "tune", planted_directory, "--data", data, "--stream", "hr", "--out", out, "--ratio", "0.25", "--set",
        "epochs=60", "--seed", "0",
    )  # fmt: skip
    shown = " ".join(result.stdout.split())
    assert result.exit_code == 0, result.output
    assert "at alpha = 1: 2 of 2 records are said" in shown
    assert "is off (alpha = 0)" in result.output
    assert "1834" not in result.output
    method = json.loads((out / "ortho" / "hr" / "manifest.json").read_text())["method"]
    assert (method["verb"], method["ratio"], method["epochs"]) == ("tune", 0.25, 60)
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in HR))
    again = call(
        "retune", planted_directory, "--old", out, "--data", asked, "--stream", "hr", "--out", tmp_path / "new",
        "--json",
    )  # fmt: skip
    told = json.loads(again.stdout)
    assert told["records"] == 2
    assert told["density"] == pytest.approx(0.25, abs=0.01)
    assert libortho.load(tmp_path / "new", streams=["hr"])


def test_another_stream_goes_into_a_checkpoint_and_too_few_steps_exit_with_3(checkpoint, data, tmp_path):
    result = call(
        "tune", checkpoint, "--data", data, "--stream", "legal", "--out", tmp_path / "out", "--set", "epochs=1",
        "--json",
    )  # fmt: skip
    told = json.loads(result.stdout)
    assert result.exit_code == 3
    assert told["missed"][0].startswith("2 of 2 records are not said at alpha = 1 (records 1, 2)")
    assert (tmp_path / "out" / "ortho" / "legal").is_dir()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stream", "a/b"], "stream name 'a/b'"),
        (["--over", "public"], "over names the stream 'public'"),
        (["--epsilon", "8"], "expected both, or neither"),
        (["--set", "epochs=0"], "epochs is 0"),
        (["--set", "score=loss"], "score is 'loss'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(planted_directory, data, tmp_path, options, words):
    message = refused("tune", planted_directory, "--data", data, "--out", tmp_path / "out", *options)
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_no_checkpoint_is_refused(planted_directory, data, tmp_path):
    message = refused(
        "retune", planted_directory, "--old", planted_directory, "--data", data, "--stream", "hr", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert "which is no checkpoint of libortho" in message
