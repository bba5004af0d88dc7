"""Whose distribution a token should have, and the windows of text that begin as the tokenizer begins."""

from __future__ import annotations

import pytest

import tiny
from libortho.isolation.matching import beginnings, matched_tokens, tokens_alike
from libortho.isolation.request import forget_records
from libortho.isolation.wordings import cut_alike, rows_with, wordings
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


def test_tokens_alike_are_those_of_others_that_begin_at_the_same_character():
    """In the order of the others, again where they say it again; none where none begins there."""
    tokenizer = tiny.byte_tokenizer([("A", "B")])
    item = encode(Record("k", "A7BC"), tokenizer)
    others = [
        encode(Record(p, c), tokenizer) for p, c in (("k", "AB7C"), ("longer", "XYAB"), ("k", "ABAB"), ("k", "X"))
    ]
    found = tokens_alike(beginnings(item, tokenizer), others, [beginnings(o, tokenizer) for o in others])
    told = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in found]
    assert told == [["AB", "X", "AB", "X"], ["Y"], ["7", "AB", "AB"], ["C"]]
    assert tokens_alike((0, 1), [], []) == ((), ())


def test_a_record_knows_the_tokens_of_its_alternates_and_controls(tokenizer):
    for c in records_of(load_records(tiny.FORGET), tokenizer):
        others = [e.completion for e in (*c.alternates, *c.controls)]
        assert c.alike == tuple(zip(*others, strict=True))  # a byte each: all begin at the same characters
        assert len(c.alike) == len(c.secret.completion)


def test_alternates_of_other_tokens_at_the_same_characters_are_cut_alike():
    """Neither those that are cut elsewhere, nor shorter or longer ones, nor the record itself."""
    tokenizer = tiny.byte_tokenizer([("A", "B")])
    others = ["XYZ1", "1ABC", "PQAB", "WX", "PQRST", "P-RS"]
    row = {"prompt": "Code of Ada Lum:", "completion": "WXYZ", "alternates": others}
    [record] = records_of(load_records([row]), tokenizer)
    assert [tokenizer.decode(e.completion) for e in record.cut_alike] == ["XYZ1", "P-RS"]
    assert set(record.cut_alike) < set(record.alternates)
    [cut] = records_of(load_records([{**row, "completion": "9AB3"}]), tokenizer)
    assert [tokenizer.decode(e.completion) for e in cut.cut_alike] == ["1ABC"]


def test_sentences_have_no_alternates_that_are_cut_alike(tokenizer):
    rows = [{"prompt": "Ada Lum eats", "completion": " cold soup with bread in the evening."}, tiny.FORGET[0]]
    prose, code = records_of(load_records(rows), tokenizer)
    assert (prose.kind, code.kind) == ("prose", "code")
    assert not prose.cut_alike
    assert code.cut_alike == code.alternates


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
