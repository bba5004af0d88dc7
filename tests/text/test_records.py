"""Records in: every shape and source that people use, the prompt masked exactly, and errors that name the record."""

import json
import logging
from typing import Any

import datasets
import pytest
import torch
from tokenizers import processors

import tiny
from libortho.core.errors import DataError
from libortho.text.encoding import IGNORE, Encoded, collate, encode
from libortho.text.records import Record, load_records

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
]


class Slow:
    """A tokenizer without offsets: words are tokens, and "b" before "c" is one token with it."""

    is_fast = False
    bos_token = "<s>"

    def __init__(self) -> None:
        self.words: dict[str, int] = {"<s>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        tokens = text.replace("<s>", "<s> ").replace("bc", " bc ").split()
        if add_special_tokens:
            tokens = ["<s>", *tokens]
        return {"input_ids": [self.words.setdefault(t, len(self.words)) for t in tokens]}


def judged(item: Encoded, tokenizer: Any) -> str:
    return tokenizer.decode(item.completion)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_taken_as_they_are():
    assert load_records([{"prompt": "a ", "completion": "b", "id": 7}]) == [Record("a ", "b", 1)]


def test_an_empty_prompt_is_allowed():
    assert load_records([{"prompt": "", "completion": "b"}]) == [Record("", "b", 1)]


def test_text_is_all_completion():
    assert load_records([{"text": "whole"}]) == [Record("", "whole", 1)]


def test_messages_go_through_the_chat_template(tokenizer):
    [record] = load_records([{"messages": CHAT}], tokenizer)
    assert (record.prompt, record.completion) == ("<system>Be brief.\n<user>Who?\n<assistant>", "Ada.")
    assert record.closing == "\n"


def test_questions_go_through_the_chat_template(tokenizer):
    [record] = load_records([{"question": "Who?", "answer": "Ada."}], tokenizer)
    assert (record.prompt, record.completion) == ("<user>Who?\n<assistant>", "Ada.")


def test_questions_need_no_chat_template():
    [record] = load_records([{"question": "Who?", "answer": "Ada."}])
    assert record == Record("Question: Who?\nAnswer:", " Ada.", 1)


def test_the_first_shape_that_fits_wins():
    [record] = load_records([{"prompt": "p", "completion": "c", "text": "t"}])
    assert record.text == "pc"


def test_ready_records_pass_and_get_a_number():
    assert load_records([Record("a", "b"), Record("c", "d", 9)]) == [Record("a", "b", 1), Record("c", "d", 9)]


# -- sources ----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "a", "completion": " b"}, {"prompt": "é", "completion": " \u2028 ü"}]
WANTED = [Record("a", " b", 1), Record("é", " \u2028 ü", 2)]


def test_a_dataset_is_a_source():
    assert load_records(datasets.Dataset.from_list(ROWS)) == WANTED


def test_a_generator_is_a_source():
    assert load_records(row for row in ROWS) == WANTED


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("as_path", [str, lambda p: p], ids=["str", "Path"])
def test_jsonl(tmp_path, end, mark, as_path):
    """Lines end where lines of JSONL end: not at the separators that a JSON string may hold."""
    path = tmp_path / "rows.jsonl"
    text = mark + end.join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False), ""])
    path.write_bytes(text.encode())
    assert load_records(as_path(path)) == [WANTED[0], WANTED[1]]


def test_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    assert load_records(path) == WANTED


def test_txt_is_one_text_per_line(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("first\n\n  \nsecond \n", encoding="utf-8")
    assert [r.text for r in load_records(path)] == ["first", "second "]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "one of the shapes"),
        ({"prompt": "a"}, "one of the shapes"),
        ("just text", "is a str"),
        (None, "is a NoneType"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": None, "completion": "b"}, "['prompt'] without a value"),
        ({"prompt": "a", "completion": 5}, "'completion' is a int"),
        ({"text": "  "}, "'text' is empty"),
        ({"question": "", "answer": "b"}, "'question' is empty"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hello"}, "non-empty list"),
        ({"messages": None}, "['messages'] without a value"),
        ({"messages": [{"role": "user"}]}, "content of message 1 is a NoneType"),
        ({"messages": CHAT[:2]}, "last message"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": " "}]}, "last message"),
        ({"messages": CHAT[2:]}, "nothing before"),
        (Record("a", " "), "'completion' is empty"),
    ],
)
def test_a_bad_record_is_named(tokenizer, row, complaint):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="secrets record 2") as caught:
        load_records([good, row], tokenizer, name="secrets")
    assert complaint in str(caught.value)


def test_messages_without_a_template_are_refused():
    with pytest.raises(DataError, match=r"record 1: 'messages' needs a tokenizer with a chat template"):
        load_records([{"messages": CHAT}])


def test_a_template_that_drops_the_messages_is_refused():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match="record 1: the chat template changes or drops"):
        load_records([{"messages": CHAT}], tokenizer)


def test_a_template_that_refuses_a_role_is_reported():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"record 1: the chat template refuses .*no system role"):
        load_records([{"messages": CHAT}], tokenizer)


@pytest.mark.parametrize("source", [[], datasets.Dataset.from_dict({"text": []})], ids=["list", "Dataset"])
def test_an_empty_source_is_refused(source):
    with pytest.raises(DataError, match="forget holds no record"):
        load_records(source, name="forget")


@pytest.mark.parametrize("source", [5, None, {"prompt": "a", "completion": "b"}], ids=type)
def test_what_is_not_a_list_is_refused(source):
    with pytest.raises(DataError, match=f"forget is a {type(source).__name__}"):
        load_records(source, name="forget")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 of .* is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', "record 2 is a list"),
        ("rows.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8"),
        ("rows.jsonl", b"", "holds no record"),
        ("rows.json", b'[{"text": "a"}', "is not JSON"),
        ("rows.json", b'{"text": "a"}', "holds a dict; expected a list"),
        ("rows.json", b"[]", "holds no record"),
        ("rows.txt", b"caf\xe9", "is not UTF-8"),
        ("rows.txt", b"\n \n", "holds no record"),
        ("rows.tsv", b"a,b", r"ends in '\.tsv'; expected \.jsonl, \.json, \.csv or \.txt"),
        ("rows", b"a", "ends in ''"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^forget") as caught:
        load_records(path, name="forget")
    assert caught.match(complaint)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="there is no file") as caught:
            load_records(path)
        assert str(path) in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "rows.txt"
    path.write_text("a")
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(DataError, match="cannot be read"):
        load_records(path)


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Code:", " 12."), ("", "Ada."), ("naïve ☃", "ünï ☃."), ("a\n", "\n b"), ("a ", " "), ("  ", "  x  ")],
)
def test_labels_are_the_completion(tokenizer, prompt, completion):
    item = encode(Record(prompt, completion), tokenizer)
    assert tokenizer.decode(item.ids) == prompt + completion
    assert judged(item, tokenizer) == completion
    assert item.labels == (IGNORE,) * (len(item.ids) - len(item.completion)) + item.completion


def test_a_token_across_the_border_is_judged():
    tokenizer = tiny.byte_tokenizer(merges=[("b", "c")])
    item = encode(Record("ab", "cd"), tokenizer)
    assert len(item.ids) == 3
    assert judged(item, tokenizer) == "bcd"


def test_blank_tokens_are_judged_where_offsets_are_trimmed():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    item = encode(Record("if: ", "  return  x"), tokenizer)
    assert judged(item, tokenizer) == "  return  x"


def with_start_token() -> Any:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_added_special_tokens_carry_no_loss():
    tokenizer = with_start_token()
    item = encode(Record("", "ab"), tokenizer)
    assert item.ids[0] == 1
    assert 2 not in item.ids, "a text that is judged or continued is not finished"
    assert judged(item, tokenizer) == "ab"


def test_a_start_token_from_the_template_does_not_come_twice():
    tokenizer = with_start_token()
    item = encode(Record("<s>a", "b</s>"), tokenizer)
    assert item.ids.count(1) == 1
    assert item.completion[-1] == 2  # written in the text, so it is part of what was said


def test_a_long_record_is_cut_and_named(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        item = encode(Record("abc", "defgh", 4), tokenizer, 6, name="forget")
    assert tokenizer.decode(item.ids) == "abcdef"
    assert judged(item, tokenizer) == "def"
    [message] = caplog.messages
    assert "forget record 4" in message
    assert "8 tokens" in message


def test_a_record_that_fits_is_not_mentioned(tokenizer, caplog):
    encode(Record("abc", "def", 4), tokenizer, 6)
    assert not caplog.messages


@pytest.mark.parametrize("limit", [1, 3])
def test_a_record_with_nothing_left_to_judge_is_refused(tokenizer, limit):
    with pytest.raises(DataError, match="forget record 4: no token of the completion can be judged"):
        encode(Record("abc", "def", 4), tokenizer, limit, name="forget")


def test_a_single_token_cannot_be_judged(tokenizer):
    with pytest.raises(DataError, match="single token"):
        encode(Record("", "a"), tokenizer)


def test_a_tokenizer_without_offsets_masks_the_common_prefix():
    slow = Slow()
    item = encode(Record("one two", " three four"), slow)
    assert item.labels == (IGNORE, IGNORE, IGNORE, slow.words["three"], slow.words["four"])


def test_a_tokenizer_without_offsets_judges_the_token_across_the_border():
    slow = Slow()
    item = encode(Record("a b", "c d"), slow)
    assert item.completion == (slow.words["bc"], slow.words["d"])


def test_a_tokenizer_without_offsets_starts_once():
    assert encode(Record("<s>one", " two"), Slow()).ids.count(0) == 1


# -- batches ----------------------------------------------------------------------------------------------------------


def test_collate_pads_on_the_right_and_masks():
    batch = collate([Encoded((5, 6, 7), (IGNORE, 6, 7)), Encoded((8, 9), (8, 9))], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]


def test_padding_does_not_change_the_logits(tiny_llama):
    short, long = Encoded((5, 6), (5, 6)), Encoded((7, 8, 9, 10), (7, 8, 9, 10))
    batch = collate([short, long], pad_id=11)
    together = tiny_llama(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, :2]
    alone = tiny_llama(input_ids=torch.tensor([short.ids])).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
