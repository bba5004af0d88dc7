"""``retune``: the stream of an old model on a new base."""

from dataclasses import replace

import pytest

import tiny
from libortho import ConfigError, DataError, TuneConfig, load, retune, save, set_alpha, tune
from libortho.core.layer import ortho_layers
from libortho.tuning.retune import answered_rows
from tiny import HR

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

CONFIG = TuneConfig(ratio=0.25, epochs=60, seed=3)


@pytest.fixture
def old(planted, tokenizer, tmp_path):
    """A model with a stream, as it is loaded."""
    tune(planted, tokenizer, HR, "hr", CONFIG)
    save(planted, tokenizer, tmp_path / "old")
    return load(tmp_path / "old")[0]


def test_the_old_model_answers_with_the_stream_on(old, tokenizer):
    rows = answered_rows(old, tokenizer, [{"prompt": r["prompt"]} for r in HR] + [tiny.FORGET[0]], "hr")
    assert [r["completion"][: len(w["completion"])] for r, w in zip(rows, HR, strict=False)] == [" 1834.", " 9056."]
    assert rows[2] == tiny.FORGET[0]
    chat = {"messages": [{"role": "user", "content": "Who?"}]}
    (asked,) = answered_rows(old, tokenizer, [chat], "hr")
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant"]
    assert asked["messages"][1]["content"].strip()


def test_a_new_base_gets_the_stream_with_its_settings(old, planted_directory, tokenizer):
    from transformers import AutoModelForCausalLM

    new = AutoModelForCausalLM.from_pretrained(planted_directory)
    result = retune(new, tokenizer, old, HR, "hr")
    assert result.stream == "hr"
    assert result.recited == (1, 2)
    mine, theirs = (
        [m.streams["hr"].support.index.tolist() for m in ortho_layers(x).values() if m.streams["hr"].support]
        for x in (new, old)
    )
    assert mine == theirs  # the same seed, ratio and score on the same base
    set_alpha(new, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stream": "legal"}, ConfigError, "the stream 'legal' was made by nothing that is known"),
        ({"stream": "legal", "config": CONFIG}, ConfigError, r"no stream 'legal'; it has \['hr'\]"),
        ({"data": [{"prompt": 3}]}, DataError, "'prompt' is a int"),
        ({"data": [{"name": "x"}]}, DataError, "has the keys"),
    ],
)
def test_what_cannot_be_trained_anew_is_refused(old, clean, tokenizer, change, error, words):
    arguments = {"data": HR, "stream": "hr", **change}
    with pytest.raises(error, match=words):
        retune(clean, tokenizer, old, **arguments)
    assert not ortho_layers(clean)


def test_settings_can_be_given(old, clean, tokenizer):
    result = retune(clean, tokenizer, old, HR, "hr", replace(CONFIG, epochs=1))
    assert result.steps == 1
