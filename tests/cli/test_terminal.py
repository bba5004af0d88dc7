"""Whatever a file or an argument holds, a terminal shows it and does not obey it."""

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

import tiny
from libortho import cli
from libortho.cli import tables, terminal
from libortho.cli.tables import Terminal
from libortho.core.errors import CheckpointError
from libortho.core.escapes import one_line, visible
from libortho.evaluation.evaluate import Evaluation, Figure

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
STEERING = (
    "\x1b]0;PWNED\x07\x1b[1A\x1b[2K\x9b2J\x90q\x7f\b\r\v\f\0\u202eabc\u2066\u061c\u2028\u2029\x85\ufeff\ud800\U000e0041"
)
HOSTILE = f"x{STEERING}[red]y[/red][link=http://a]z[/link]:smile:\nbase matches"
RAW = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def assert_plain(shown: str) -> None:
    assert RAW.search(shown) is None, repr(shown)
    assert "Traceback" not in shown


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    """Exit code, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["libortho", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


# -- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: é 漢 \U0001f600 \u05d0 a\u200db", "plain: é 漢 \U0001f600 \u05d0 a\u200db"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("a\tb\nc", "a\tb\nc"),
        ("a\rb\0", r"a\rb\x00"),
        ("\u202eabc\u2069", r"\u202eabc\u2069"),
        ("a\u2028b\u2029\x85", r"a\u2028b\u2029\x85"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_steering_characters_are_written_out(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown
    visible(text).encode("utf-8")


def test_no_control_character_at_all_gets_through():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert RAW.search(visible(everything)) is None
    assert RAW.search(one_line(everything)) is None
    assert "\n" not in one_line(everything)
    assert "\t" not in one_line(everything)
    assert len(visible("".join(c for c in everything if c.isalnum()))) == sum(c.isalnum() for c in everything)


def test_lines_of_somebody_else_are_no_lines_of_ours():
    assert one_line("hr\nbase matches\n  all is well") == "hr base matches all is well"


# -- tables -----------------------------------------------------------------------------------------------------------


def checkpoint_info() -> Any:
    stream = SimpleNamespace(
        name=HOSTILE, kinds=("columns",), layers=2, density=0.005, tail_density=0.0, bytes_on_disk=10,
        needs_libortho=False, base_matches=False, missed=(HOSTILE,),
    )  # fmt: skip
    return SimpleNamespace(
        bits=8, group_size=-1, layers=2, weights=10, base_bytes=10, bits_per_weight=8.0, streams=(stream,)
    )


def certificate() -> Any:
    removed = SimpleNamespace(name=HOSTILE, density=0.005, tail_density=0.0, layers=2, bytes=10)
    verdicts = [{"key": HOSTILE, "status": HOSTILE}]
    return SimpleNamespace(
        removed=(removed,), kept=(HOSTILE,), base_sha256=HOSTILE, files={}, compared=3, audit={"verdicts": verdicts},
        not_checked=(HOSTILE,),
        unchecked=(HOSTILE,),
    )  # fmt: skip


def isolation() -> Any:
    return SimpleNamespace(
        stream=HOSTILE, records=(), steps=1, seconds=1.0, density=0.1, columns_per_layer={}, retain_kl=0.0, recited=2,
        recited_on=1, warnings=(HOSTILE,), missed=(HOSTILE,), advice=(HOSTILE,),
    )  # fmt: skip


def evaluation() -> Any:
    figures = tuple(Figure(HOSTILE, HOSTILE, c, 0.5) for c in (HOSTILE, "other"))
    difference = SimpleNamespace(task=HOSTILE, metric=HOSTILE, column="other", value=0.0, low=None, high=None)
    return Evaluation((HOSTILE, "other"), figures, (difference,))


SHOWN: dict[str, tuple[Callable[..., None], Callable[[], Any]]] = {
    "checkpoint": (tables.show_checkpoint, checkpoint_info),
    "certificate": (tables.show_certificate, certificate),
    "isolate": (tables.show_isolate, isolation),
    "evaluation": (tables.show_evaluation, evaluation),
    "note": (tables.note, lambda: HOSTILE),
}


@pytest.mark.parametrize("console", [Terminal, Console])
@pytest.mark.parametrize("name", SHOWN)
def test_a_hostile_name_steers_no_table(name, console, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")  # no cell is broken
    show, make = SHOWN[name]
    given = make()
    show(*((console(), given) if name == "note" else (given, console())))
    shown = capsys.readouterr().out
    assert_plain(shown)
    together = re.sub(r"[\s│┃]", "", shown)
    assert r"\x1b]0;PWNED\x07" in together
    assert "[red]y[/red]" in together
    assert ":smile:" in together
    assert not any(line.strip().startswith("base matches") for line in shown.splitlines())


def test_the_console_writes_no_control_character_whatever_it_is_given(capsys):
    table = tables.Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    Terminal().print(HOSTILE, table)
    shown = capsys.readouterr().out
    assert_plain(shown)
    assert "[red]y[/red]" in shown
    assert ":smile:" in shown


def test_colours_are_the_consoles_own(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().print("\x1b[31mred", style="bold")
    assert capsys.readouterr().out == "\x1b[1m\\x1b[31mred\x1b[0m\n"


def test_json_holds_no_delete(capsys):
    terminal.emit({"name": HOSTILE.replace("\ud800", "")})
    shown = capsys.readouterr().out
    assert_plain(shown)
    assert json.loads(shown)["name"] == HOSTILE.replace("\ud800", "")


@pytest.mark.parametrize("terminal_like", ["0", "1"])
def test_phases_of_the_progress_steer_nothing(terminal_like, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", terminal_like)
    monkeypatch.setattr(terminal, "Terminal", lambda **kinds: Terminal(**kinds))
    with terminal.progress_bars() as tell:
        tell(HOSTILE, 0, 2)
        tell(HOSTILE, 2, 2)
    err = capsys.readouterr().err
    assert HOSTILE not in err
    if terminal_like == "0":  # a bar moves the cursor
        assert_plain(err)


def test_where_there_is_no_terminal_progress_is_lines(monkeypatch, capsys):
    now = iter([0.0, 1.0, 3.0, 12.0, 13.0, 14.0, 20.0, 32.0])
    monkeypatch.setattr("libortho.cli.terminal.time.monotonic", lambda: next(now))
    with terminal.progress_bars() as tell:
        for done in (0, 1, 4, 8):
            tell("steps", done, 8)
        tell("result", 0, 1)
        for done in (1, 3):  # what is told of first when one is done took a time that nobody knows
            tell("plant", done, 6)
    assert capsys.readouterr().err.splitlines() == [
        "1 s: steps 0/8", "12 s: steps 4/8, 11 s left at most", "13 s: steps 8/8", "14 s: result 0/1",
        "20 s: plant 1/6", "32 s: plant 3/6, 18 s left at most",
    ]  # fmt: skip


# -- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CheckpointError(HOSTILE), OSError(HOSTILE), OSError(2, "No such file", HOSTILE)])
def test_an_error_is_one_line_of_plain_text(error, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("libortho.checkpoint.inspect", fail)
    code, out, err = run(monkeypatch, capsys, "inspect", "x")
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert_plain(err)
    assert "[red]y[/red]" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "x"), "nothing was written"),
        (("audit", "x", "--forget", "f", "--no-keep"), "nothing was kept"),
        (("audit", "x", "--forget", "f"), "libortho audit x --forget f"),
        (("isolate", "x", "--forget", "my f", "--out", "o", "--resume", "r"), "--forget 'my f' --out o --resume r"),
    ],
)
def test_an_interrupt_says_how_to_go_on(arguments, said, monkeypatch, capsys):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("libortho.checkpoint.inspect", "libortho.cli.models.configured", "libortho.cli.measuring.configured"):
        monkeypatch.setattr(place, stop)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 130
    assert said in err


def test_an_unforeseen_error_steers_nothing_either(monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("libortho.checkpoint.inspect", fail)
    code, _, err = run(monkeypatch, capsys, "inspect", "x")
    assert code == 1
    assert RAW.search(err) is None
    assert r"\x1b]0;PWNED" in err


def test_log_and_warnings_steer_nothing(monkeypatch, capfd):
    def talk(*_: Any, **__: Any) -> Any:
        for name in ("libortho.anything", "transformers.utils", "huggingface_hub.file_download"):
            logging.getLogger(name).error("%s", HOSTILE)
        warnings.warn(HOSTILE, stacklevel=1)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("other").exception("and %s", HOSTILE)
        raise CheckpointError("end")

    monkeypatch.setattr("libortho.checkpoint.inspect", talk)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    before = warnings.showwarning
    monkeypatch.setattr(sys, "argv", ["libortho", "inspect", "x"])
    with pytest.raises(SystemExit):
        cli.main()
    err = capfd.readouterr().err
    assert RAW.search(err) is None, repr(err)
    assert err.count(r"\x1b]0;PWNED") >= 5
    assert "UserWarning: x" in err
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", HOSTILE, HOSTILE],
        ["inspect", f"--{HOSTILE}"],
        ["inspect"],
        [HOSTILE],
        [f"--{HOSTILE}"],
        ["generate", "x", "y", "--max-new-tokens", HOSTILE],
        ["generate", "x", "y", "--alpha", HOSTILE],
        ["generate", "x", "y", "--alpha", HOSTILE + "=z"],
        ["eval", "x", "--limit", HOSTILE],
    ],
    ids=range(9),
)
def test_wrong_arguments_are_exit_code_2_and_steer_nothing(arguments, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert "error: " in err
    assert_plain(err)


def test_places_steer_nothing(tmp_path, monkeypatch, capsys):
    place = tmp_path / HOSTILE.replace("/", "").replace("\0", "").replace("\ud800", "\udcff")
    forget = tmp_path / "forget.json"
    forget.write_text(json.dumps(tiny.FORGET), encoding="utf-8")
    for command in (
        ["inspect", place], ["verify", place], ["generate", place, "Hello"], ["detach", place, "--out", tmp_path / "o"],
        ["attach", place, place], ["encrypt", place, "--out", tmp_path / "o", "-r", "age1x"], ["card", place],
        ["decrypt", place, "--out", tmp_path / "o", "-i", place], ["split", place, "--out", tmp_path / "o"],
        ["isolate", place, "--forget", forget, "--out", tmp_path / "o"], ["audit", place, "--forget", forget],
        ["isolate", "x", "--forget", place, "--out", tmp_path / "o"], ["eval", place, "--task-file", place],
        ["demo", "--model", place],
    ):  # fmt: skip
        place.mkdir(exist_ok=True)
        for name in ("libortho.json", "certificate.json", "config.json", f"{HOSTILE[:4]}.safetensors"):
            (place / name).write_text(json.dumps({HOSTILE: HOSTILE, "format": HOSTILE, "model_type": HOSTILE}))
        code, _, err = run(monkeypatch, capsys, *command)
        assert code == 2, (command, err)
        assert_plain(err)
        assert "error: " in err.splitlines()[-1], err


def test_what_a_model_says_is_shown(tmp_path, tokenizer, checkpoint, monkeypatch, capsys):
    said = "\x1b]0;PWNED\x07 one\n\ttwo\u202e"
    ids = tokenizer(said)["input_ids"]

    def speak(self: Any, given: Any, streamer: Any, **_: Any) -> Any:
        streamer.put(given)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return given

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", speak)
    code, out, _ = run(monkeypatch, capsys, "generate", checkpoint, "Hello", "--alpha", "0")
    assert code == 0
    assert out == "\\x1b]0;PWNED\\x07 one\n\ttwo\\u202e\n"


def test_exit_codes_of_the_application_itself():
    app = typer.Typer(cls=terminal.Commands)

    @app.command()
    def stop(code: int) -> None:
        raise typer.Exit(code)

    @app.command()
    def abort() -> None:
        raise typer.Abort

    for arguments, expected in ((["stop", "3"], 3), (["stop", "0"], 0), (["stop", "x"], 2), (["abort"], 1)):
        with pytest.raises(SystemExit) as stopped:
            app(arguments)
        assert stopped.value.code == expected
