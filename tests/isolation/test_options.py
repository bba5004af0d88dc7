"""Options of isolate: each one changes something, in the way that it promises."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
from isolating import SHORT, differs, run
from libortho import isolate
from libortho.core.layer import ortho_layers

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def test_the_same_seed_gives_the_same_bits(planted, tokenizer, plain):
    torch.manual_seed(99)  # the caller's random state must not matter
    assert not differs(run(planted, tokenizer), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"ratio": 0.05},
        {"damping": 0.1},
        {"max_steps": 2},
        {"alternates": [[" 1111.", " 2222."]] * 4},
        {"neighbours": [["Code of Al Poe:", "Code of Eve Ray:"]] * 4},
        {"retain": tiny.RETAIN[:6]},
    ],
    ids=str,
)
def test_every_option_changes_the_result(planted, tokenizer, plain, options):
    assert differs(run(planted, tokenizer, **options), plain)


def test_the_stream_is_stored_in_the_value_dtype(planted, tokenizer):
    isolate(planted, tokenizer, tiny.FORGET, tiny.RETAIN, config=replace(SHORT, value_dtype="float16"))
    layers = ortho_layers(planted).values()
    assert {m.streams["default"].support.values.dtype for m in layers if m.streams["default"].support} == {
        torch.float16
    }


def test_a_path_is_the_same_source_as_a_list(planted, tokenizer, plain, tmp_path):
    for name, rows in (("forget", tiny.FORGET), ("retain", tiny.RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = run(planted, tokenizer, tmp_path / "forget.jsonl", retain=str(tmp_path / "retain.jsonl"))
    assert not differs(found, plain)


def test_a_tokenizer_without_a_pad_token_will_do(planted, tokenizer):
    bare = tiny.byte_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    isolate(planted, bare, tiny.FORGET, config=replace(SHORT, max_steps=1))
    assert ortho_layers(planted)
