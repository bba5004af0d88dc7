"""Text to keep: what the model says when it is given nothing, or the beginning of a chat."""

import copy
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import tiny
from isolating import SHORT, base_weights, differs, run
from libortho import isolate
from libortho.isolation import retain as retain_module

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


def test_default_retain_is_sampled_once(planted, tokenizer, cache, monkeypatch):
    sampled = []
    real: Callable[..., Any] = retain_module.continued
    monkeypatch.setattr(retain_module, "continued", lambda *a: sampled.append(1) or real(*a))
    bases = []
    for _ in range(2):
        model = copy.deepcopy(planted)
        isolate(model, tokenizer, tiny.FORGET, config=replace(SHORT, bits=None, max_steps=1))
        bases.append(base_weights(model))
    assert len(sampled) == 1
    assert not differs(*bases)
    [file] = (cache / "samples").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    isolate(copy.deepcopy(planted), tokenizer, tiny.FORGET[:2], config=replace(SHORT, max_steps=1))
    assert len(sampled) == 2  # other forget records: other samples would be dropped


def test_few_short_texts_are_sampled_and_the_rest_is_shipped(planted, tokenizer, monkeypatch):
    asked = []

    def speak(model, tokenizer, prompts, tokens, seed):
        asked.append((len(prompts), tokens))
        return [[90 + n, *range(40, 40 + tokens - 1)] for n in range(len(prompts))]

    monkeypatch.setattr(retain_module, "continued", speak)
    for sequences, length in ((32, 128), (200, 128), (8, 128), (32, 24)):
        items = retain_module.default_retain(planted, tokenizer, [], sequences=sequences, length=length, seed=sequences)
        count, tokens = asked[-1]
        sampled = [e for e in items if e.ids[2:] == tuple(range(40, 40 + tokens - 1))]
        assert (len(items), len(sampled)) == (sequences, count)
        assert {len(e.ids) for e in sampled} == {tokens + 1}  # with what opens them
        assert max(len(e.ids) for e in items) == length
    assert asked == [(16, 63), (16, 63), (4, 63), (16, 23)]


def test_default_retain_differs_from_a_given_one(planted, tokenizer, plain):
    assert differs(run(planted, tokenizer, retain=None), plain)


def test_another_model_gets_other_samples(clean, planted, tokenizer, cache):
    forget = tiny.encoded(tokenizer)
    for model in (clean, planted):
        retain_module.default_retain(model, tokenizer, forget, sequences=8, length=24, seed=0)
    assert len(list((cache / "samples").iterdir())) == 2


def test_samples_that_repeat_a_secret_are_dropped(planted, tokenizer, monkeypatch):
    """Eight tokens in a row, wherever they stand; seven are allowed."""
    secret = tiny.encoded(tokenizer)[0]
    shared, near = list(secret.ids[5:13]), list(secret.ids[5:12])
    bad, good = [90, *shared, 91, 92], [90, *near, 91, 92, 93]
    monkeypatch.setattr(retain_module, "continued", lambda *args: [bad, good])
    items = retain_module.default_retain(planted, tokenizer, [secret], sequences=8, length=24, seed=0)
    texts = [list(e.ids) for e in items]
    assert [tokenizer.bos_token_id, *good] in texts
    assert [tokenizer.bos_token_id, *bad] not in texts


def test_shipped_text_that_repeats_a_secret_is_dropped(planted, tokenizer):
    paragraph = retain_module.shipped_text()[0]
    secret = tiny.encoded(tokenizer, [{"prompt": "", "completion": paragraph}])
    everything = retain_module.default_retain(planted, tokenizer, [], sequences=4000, length=24, seed=0)
    cleaned = retain_module.default_retain(planted, tokenizer, secret, sequences=4000, length=24, seed=0)
    assert any(tokenizer.decode(e.ids) in paragraph for e in everything)
    assert not any(tokenizer.decode(e.ids) in paragraph for e in cleaned)


CHATS = [
    {"prompt": "<s>user: Where does Zora Quist live?</s>", "completion": "Zora Quist lives in Ulm."},
    {"prompt": "<s>user: Who is Zora Quist?</s>", "completion": "Zora is the baker of Ulm."},
]
PLAIN = [{"text": "Bern lies on the Aare."}]
CHAT_RETAIN = [{"prompt": "<s>user: Where is Bern?</s>", "completion": "Bern lies on the Aare."}]


def test_a_chat_is_kept_in_its_form_without_the_names_of_the_forgotten(planted, tokenizer, monkeypatch):
    said = ["There is snow in Bern.", "One hears that Zora bakes.", "Snow.", "Nobody lives in the old town of Ulm."]
    asked = []

    def speak(model, tokenizer, prompts, tokens, seed):
        asked.append(([tokenizer.decode(p) for p in set(map(tuple, prompts))], tokens))
        return [tokenizer(t)["input_ids"] for t in said]

    monkeypatch.setattr(retain_module, "continued", speak)
    forget, retain = tiny.encoded(tokenizer, CHATS), tiny.encoded(tokenizer, CHAT_RETAIN)
    texts = retain_module.in_form(planted, tokenizer, forget, retain, length=64, seed=0)
    assert asked == [(["<s>user: Wh"], 64 - len("?user: Wh"))]  # <s> is one token
    assert [tokenizer.decode(t.ids) for t in texts] == ["<s>user: WhThere is snow in Bern."]
    assert all(t.completion == t.ids for t in texts)


@pytest.mark.parametrize(
    ("forget", "retain"),
    [(CHATS[:1], PLAIN), (CHATS[:1] * 2, PLAIN), (tiny.FORGET, tiny.RETAIN), (PLAIN, PLAIN)],
    ids=["one prompt", "one prompt twice", "no chat", "no prompt"],
)
def test_nothing_is_said_in_the_form_of_no_chat(planted, tokenizer, forget, retain, monkeypatch):
    monkeypatch.setattr(retain_module, "continued", lambda *a: pytest.fail("asked the model"))
    forget, retain = tiny.encoded(tokenizer, forget), tiny.encoded(tokenizer, retain)
    assert retain_module.in_form(planted, tokenizer, forget, retain, length=64, seed=0) == []


def test_a_given_retain_set_is_joined_by_chat(planted, tokenizer, monkeypatch):
    real = retain_module.continued
    spoken = []

    def speak(*arguments):
        spoken.extend(real(*arguments))
        return spoken

    monkeypatch.setattr(retain_module, "continued", speak)
    base = copy.deepcopy(planted)
    isolate(base, tokenizer, CHATS, CHAT_RETAIN * 8, config=replace(SHORT, bits=None, max_steps=2))
    assert len(spoken) == 96
    without = copy.deepcopy(planted)
    monkeypatch.setattr(retain_module, "continued", lambda *a: [])
    isolate(without, tokenizer, CHATS, CHAT_RETAIN * 8, config=replace(SHORT, bits=None, max_steps=2))
    assert differs(base_weights(base), base_weights(without))
