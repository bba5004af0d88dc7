"""--help answers without torch, and shows the settings in the words of the configs."""

import inspect
import json
import subprocess
import sys

import pytest

from commands import call
from libortho import AuditConfig, IsolateConfig, SplitConfig
from libortho.cli.commands import app
from libortho.core.field_docs import fields_help

VERBS = [c.name or c.callback.__name__ for c in app.registered_commands]
CONFIGS = {"split": SplitConfig, "isolate": IsolateConfig, "audit": AuditConfig}
HEAVY = ("torch", "transformers", "numpy", "peft", "safetensors")
ASK = """
import contextlib, io, json, sys
from libortho.cli import main
answers = {}
for verb in json.loads(sys.argv[1]):
    sys.argv = ["libortho", *([verb] if verb else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main()
        except SystemExit as stop:
            answers[verb] = [stop.code, shown.getvalue().split()[0]]
print(json.dumps({"answers": answers, "modules": sorted(sys.modules)}))
"""


def test_no_help_imports_torch():
    command = [sys.executable, "-c", ASK, json.dumps(["", *VERBS])]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["answers"] == {verb: [0, "Usage:"] for verb in ["", *VERBS]}
    assert not set(HEAVY) & set(told["modules"])


def test_help_has_one_line_for_each_verb():
    lines = call("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == VERBS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize("verb", CONFIGS)
def test_options_and_settings_are_the_fields_in_their_own_words(verb):
    def joined(text: str) -> str:
        return " ".join(text.split()).replace("- ", "-")  # a hyphen at the end of a line

    options, settings = map(joined, call(verb, "--help").stdout.split("Settings (--set"))
    for name, text in fields_help(CONFIGS[verb]).items():
        assert (f"--{name.replace('_', '-')} " in options) != (joined(f"{name} {text}") in settings)
        assert joined(text) in options + settings
        assert joined(f"{name}: {text}") in joined(CONFIGS[verb].__doc__)


@pytest.mark.parametrize("verb", CONFIGS)
def test_no_default_of_a_config_stands_in_the_command_line(verb):
    [command] = [c for c in app.registered_commands if c.callback.__name__ == verb]
    taken = inspect.signature(command.callback).parameters
    assert {taken[name].default for name in fields_help(CONFIGS[verb]) if name in taken} == {None}
