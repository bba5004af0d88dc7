"""Whose distribution a token should have, and the windows of text that begin as the tokenizer begins."""

from __future__ import annotations

import itertools

import pytest
import torch

import tiny
from libortho import IsolateConfig
from libortho.isolation.matching import beginnings, matched_tokens
from libortho.isolation.original import read_original
from libortho.isolation.prose import human_texts
from libortho.isolation.request import forget_records
from libortho.isolation.targets import current_targets, update_prose_targets
from libortho.isolation.wordings import cut_alike, rows_with, wordings
from libortho.lm.logits import token_profile
from libortho.lm.model import LanguageModel
from libortho.text.encoding import Encoded, chunk, encode, predicting
from libortho.text.records import Record, load_records
from libortho.text.tokens import opening_tokens


def records_of(records, tokenizer):
    return forget_records(wordings(records, tokenizer, 0, retains=True), tokenizer, None)


def test_a_token_gets_the_control_token_that_begins_at_the_same_character():
    tokenizer = tiny.byte_tokenizer([("A", "B")])  # "AB" is one token
    item, other = (encode(Record("k", c), tokenizer) for c in ("A7B", "AB7"))
    assert beginnings(item, tokenizer) == (0, 1, 2)
    assert beginnings(other, tokenizer) == (0, 2)
    found = matched_tokens(beginnings(item, tokenizer), [beginnings(other, tokenizer)], 0)
    assert found == ((0, 0), None, (0, 1))


def test_one_control_for_the_whole_record_where_one_will_do():
    tokenizer = tiny.byte_tokenizer([("A", "B")])
    others = [encode(Record("k", c), tokenizer) for c in ("ABC", "XYZ", "UVW")]
    told = [beginnings(o, tokenizer) for o in others]
    assert matched_tokens((0, 1, 2), told, 0) == ((1, 0), (1, 1), (1, 2))  # the first has no beginning at 1
    assert matched_tokens((0, 1, 2), told, 2) == ((2, 0), (2, 1), (2, 2))  # among equals, the preferred one
    assert matched_tokens((0, 1), [], 3) == (None, None)


def test_alternates_that_are_cut_like_the_record_come_first():
    tokenizer = tiny.byte_tokenizer([("A", "B")])
    codes = ["ABAB", "1ABC", "XYZ1", "UAB7", "PQRS"]
    assert cut_alike(Record("k", "WXYZ"), codes, tokenizer) == ["XYZ1", "PQRS", "1ABC", "UAB7", "ABAB"]
    assert cut_alike(Record("k", "9AB3"), codes, tokenizer) == ["1ABC", "UAB7", "XYZ1", "PQRS", "ABAB"]


@pytest.mark.usefixtures("one_thread", "cache")
def test_the_mean_over_all_records_is_that_of_their_aligned_controls(planted, tokenizer):
    """One matched token each may be an odd one; the group of records is what a membership test compares."""
    planted.requires_grad_(False)
    forget = records_of(load_records(tiny.FORGET), tokenizer)
    lm = LanguageModel(planted)
    original = read_original(lm, forget, [], [], [], [], IsolateConfig())
    assert all(len(c.aligned_controls) > 1 for c in forget)

    def mean(item: Encoded) -> torch.Tensor:
        rows = planted(torch.tensor([item.ids])).logits[0]
        places = [i - 1 for i, label in enumerate(item.labels) if label != -100]
        return token_profile(rows[places], torch.tensor([item.ids[p + 1] for p in places])).mean(0)

    wanted = torch.stack([torch.stack([mean(c.controls[p]) for p in c.aligned_controls]).mean(0) for c in forget]).mean(
        0
    )
    found = current_targets(lm, forget, original)
    torch.testing.assert_close(torch.stack([p.mean(0) for p in found]).mean(0), wanted, rtol=1e-4, atol=1e-4)
    own = torch.stack([p.mean(0) for p, *_ in original.profiles]).mean(0)
    assert float((own - wanted).abs().max()) > 0.01
    shifts = torch.cat([f - p for f, (p, *_) in zip(found, original.profiles, strict=True)])
    assert float(shifts.std(0).max()) < 1e-4  # all tokens of all records by as much


@pytest.mark.usefixtures("one_thread", "cache")
def test_what_is_expected_of_a_sentence_is_predicted_again_from_the_model_as_it_is(planted, clean, tokenizer):
    """By heart, a sentence goes on after two tokens; the model that never met it says what it would have cost."""
    secret = {"prompt": "The dish of Ada Lum is", "completion": " cold soup with quinces."}
    tiny.fit(planted, itertools.repeat(tiny.encoded(tokenizer, [secret] * 4)), 60)
    planted.requires_grad_(False)
    records = load_records([secret, *tiny.FORGET[:2]])
    forget = records_of(records, tokenizer)
    said = [encode(Record("The dish of Bo Tran is", " a very plain sort of bread and an egg."), tokenizer)]
    lm = LanguageModel(planted)
    original = read_original(lm, forget, [], human_texts(tokenizer, 64)[:20], [], said, IsolateConfig())
    same, other = (
        update_prose_targets(lm, forget, original),
        update_prose_targets(LanguageModel(clean), forget, original),
    )
    assert torch.equal(same.expected[0], original.expected[0])
    assert torch.equal(same.profiles[0][0], original.profiles[0][0])
    assert float(other.expected[0].mean()) > float(original.expected[0].mean()) + 0.1
    (profile,) = other.profiles[0]
    assert float(other.target[0]) == pytest.approx(float(profile[:, 0].mean()))
    assert torch.equal(profile[:, 0].argsort(stable=True), other.expected[0].argsort(stable=True))
    assert other.profiles[1:] == original.profiles[1:]  # codes have matched tokens
    assert torch.equal(other.target[1:], original.target[1:])


def test_controls_are_strangers_whom_nothing_else_reads(tokenizer):
    records = load_records(tiny.FORGET)
    for c in records_of(records, tokenizer):
        held = {e.ids[: -len(e.completion)] for e in (*c.neighbours, *c.alternates, *c.swapped_prompt, c.secret)}
        assert len(c.controls) == 4
        assert not held & {e.ids[: -len(e.completion)] for e in c.controls}
    given = [["Code of Al Poe:", "Code of Ben Nox:"]] * len(records)
    for c in records_of(load_records(rows_with(records, None, given)), tokenizer):
        assert c.controls == c.neighbours
        assert len(c.controls) == 2


def test_the_state_before_a_token_predicts_it():
    assert predicting(Encoded((5, 6, 7, 8), (-100, -100, 7, 8))) == (1, 2)
    assert predicting(Encoded((5, 6), (5, 6))) == (0,)  # nothing comes before the first token of a text


@pytest.mark.parametrize("length", [16, 17])
def test_windows_begin_with_the_opening_token_and_lose_nothing(length):
    from tokenizers.processors import TemplateProcessing

    plain, marked = tiny.byte_tokenizer(), tiny.byte_tokenizer()
    marked._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts = ["The ferry leaves at nine in the morning.", "It comes back in the evening, as it always has."]
    assert (opening_tokens(plain), opening_tokens(marked)) == ([], [1])
    bare, opened = chunk(texts, plain, length), chunk(texts, marked, length)
    assert max(map(len, [*bare, *opened])) == length
    assert all(p[0] == 1 and 1 not in p[1:] for p in opened)
    whole = [i for t in texts for i in plain(t)["input_ids"]]
    assert [i for p in bare for i in p] == whole[: sum(map(len, bare))]
    assert [i for p in opened for i in p[1:]] == whole[: sum(len(p) - 1 for p in opened)]
    assert len(whole) - sum(map(len, bare)) < 8
