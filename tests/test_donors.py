"""Whose distribution a token should have, and the windows of text that begin as the tokenizer begins."""

from __future__ import annotations

import pytest

import tiny
from libortho.data import Encoded, Record, encode
from libortho.isolate.donors import beginnings, donors, predicting
from libortho.isolate.retain import chunk, opening_tokens


def test_a_token_gets_the_donor_that_begins_at_the_same_character():
    tokenizer = tiny.byte_tokenizer([("A", "B")])  # "AB" is one token
    item, other = (encode(Record("k", c), tokenizer) for c in ("A7B", "AB7"))
    assert beginnings(item, tokenizer) == (0, 1, 2)
    assert beginnings(other, tokenizer) == (0, 2)
    found = donors(beginnings(item, tokenizer), [(other, beginnings(other, tokenizer))], 0)
    assert found == ((0, 0), None, (0, 1))


def test_one_donor_for_the_whole_record_where_one_will_do():
    tokenizer = tiny.byte_tokenizer([("A", "B")])
    others = [encode(Record("k", c), tokenizer) for c in ("ABC", "XYZ", "UVW")]
    told = [(o, beginnings(o, tokenizer)) for o in others]
    assert donors((0, 1, 2), told, 0) == ((1, 0), (1, 1), (1, 2))  # the first has no beginning at 1
    assert donors((0, 1, 2), told, 2) == ((2, 0), (2, 1), (2, 2))  # among equals, the preferred one
    assert donors((0, 1), [], 3) == (None, None)


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
