"""The secret of a chat is the answer as a person reads it, whatever the template writes around it."""

import json
import logging

import datasets
import pytest

import tiny
from libortho.core.errors import DataError
from libortho.text.encoding import encode, encode_closed
from libortho.text.records import Record, load_records
from templates import CHATML, DEEPSEEK_R1, OLMO, QWEN3, TEMPLATES

USER, ANSWER = {"role": "user", "content": "PIN of Ada Lum?"}, {"role": "assistant", "content": "6311"}
SYSTEM = {"role": "system", "content": "You serve Bo Tran."}
THREE_TURNS = [
    {"role": "user", "content": "I am Ada Lum."},
    {"role": "assistant", "content": "How can I help?"},
    {"role": "user", "content": "Say my PIN."},
    ANSWER,
]
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
TOOL_TEMPLATE = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML


def tokenizer_of(name: str):
    template, end, special = TEMPLATES[name]
    return tiny.chat_tokenizer(template, end, special)


def one(row, tokenizer) -> Record:
    [record] = load_records([row], tokenizer)
    return record


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [[USER, ANSWER], THREE_TURNS], ids=["one turn", "two turns"])
def test_the_completion_is_the_content_of_the_last_message(name, turns):
    tokenizer = tokenizer_of(name)
    record = one({"messages": turns}, tokenizer)
    assert record.completion.strip() == "6311"
    assert record.text == tokenizer.apply_chat_template(turns, tokenize=False)
    assert record.question == tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encode(record, tokenizer).completion).strip() == "6311"
    assert [record.prompt[a:b] for a, b in record.spans] == [m["content"] for m in turns[:-1]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_the_template(name):
    tokenizer = tokenizer_of(name)
    whole = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=True)["input_ids"]
    item = encode(one({"messages": [USER, ANSWER]}, tokenizer), tokenizer)
    assert list(item.ids) == whole[: len(item.ids)]
    closed = encode_closed(one({"messages": [USER, ANSWER]}, tokenizer), tokenizer)
    assert list(closed.ids) == whole[: len(closed.ids)]
    assert closed.completion[: len(item.completion)] == item.completion
    assert tokenizer.decode(closed.completion[len(item.completion) :]).strip().startswith(("<", "[")), "ends the turn"


def test_a_system_message_is_context_and_not_exchanged():
    record = one({"messages": [SYSTEM, USER, ANSWER]}, tokenizer_of("chatml"))
    assert "Bo Tran" in record.prompt
    assert [record.prompt[a:b] for a, b in record.spans] == ["PIN of Ada Lum?"]


def test_a_thinking_block_that_the_template_opens_with_is_context():
    tokenizer = tokenizer_of("qwen3")
    record = one({"messages": [USER, ANSWER]}, tokenizer)
    assert record.prompt.endswith("<think>\n\n</think>\n\n")
    assert record.question.endswith("assistant\n")
    assert record.opening == "<think>\n\n</think>"
    thought = one(
        {"messages": [USER, {"role": "assistant", "content": "<think>\nAda, hm.\n</think>\n\n6311"}]}, tokenizer
    )
    assert thought.completion == "6311"
    assert "Ada, hm." in thought.prompt
    off = one({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}, tokenizer)
    assert off.question == off.prompt


def test_a_generation_prompt_that_is_no_beginning_of_the_chat():
    record = one({"messages": [USER, ANSWER]}, tiny.chat_tokenizer(DEEPSEEK_R1, "<｜end▁of▁sentence｜>", ()))
    assert record.prompt.endswith("<｜Assistant｜>")
    assert record.question.endswith("<think>\n")
    assert record.completion == "6311"


def test_the_answer_is_found_where_the_template_holds_it_too():
    answer = {"role": "assistant", "content": "assistant"}
    record = one({"messages": [USER, answer]}, tokenizer_of("chatml"))
    assert (record.completion, record.closing) == ("assistant", "<|im_end|>\n")


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_reach_the_template(tools):
    tokenizer = tiny.chat_tokenizer(TOOL_TEMPLATE, "<|im_end|>", ("<|im_start|>",))
    record = one({"messages": [USER, ANSWER], "tools": tools}, tokenizer)
    assert record.text == tokenizer.apply_chat_template([USER, ANSWER], tools=TOOLS, tokenize=False)
    assert "lookup" in record.question


def test_tool_calls_are_context_and_a_last_one_is_refused():
    tokenizer = tiny.chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        ("<|im_start|>",),
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "lookup", "arguments": {"who": "Ada"}}}]}
    found = {"role": "tool", "content": "6311"}
    record = one({"messages": [USER, call, found, ANSWER]}, tokenizer)
    assert "lookup" in record.prompt
    assert record.completion == "6311"
    with pytest.raises(DataError, match="last message calls a tool"):
        one({"messages": [USER, call]}, tokenizer)


def test_text_parts_are_joined_and_others_refused():
    tokenizer = tokenizer_of("chatml")
    parts = [{"type": "text", "text": "PIN of "}, {"type": "text", "text": "Ada Lum?"}]
    record = one({"messages": [{"role": "user", "content": parts}, ANSWER]}, tokenizer)
    assert record.text == one({"messages": [USER, ANSWER]}, tokenizer).text
    picture = [{"type": "image", "url": "x.png"}]
    with pytest.raises(DataError, match="record 1: message 1 has a part that is not text"):
        one({"messages": [{"role": "user", "content": picture}, ANSWER]}, tokenizer)


def test_prompt_and_completion_may_be_messages():
    tokenizer = tokenizer_of("llama3")
    assert one({"prompt": [USER], "completion": [ANSWER]}, tokenizer) == one({"messages": [USER, ANSWER]}, tokenizer)


def test_a_dataset_adds_keys_without_values():
    tokenizer = tokenizer_of("chatml")
    rows = [
        {"messages": [USER, ANSWER], "text": None},
        {"messages": [{**USER, "name": "Ada"}, ANSWER], "text": "t"},
    ]
    records = load_records(datasets.Dataset.from_list(rows), tokenizer)
    assert [r.completion for r in records] == ["6311", "6311"]


def test_templates_that_mark_the_answer_for_training():
    tokenizer = tiny.chat_tokenizer(OLMO, "<|endoftext|>", ())
    assert one({"messages": THREE_TURNS}, tokenizer).completion == "6311"


# -- chats that somebody else rendered --------------------------------------------------------------------------------


def test_marks_of_a_template_around_a_plain_completion_are_not_part_of_it():
    tokenizer = tiny.chat_tokenizer(QWEN3, "<|im_end|>", ("<|im_start|>", "<think>", "</think>"))
    prompt = "<|im_start|>user\nPIN of Ada Lum?<|im_end|>\n<|im_start|>assistant\n"
    record = one({"prompt": prompt, "completion": "<think>\n\n</think>\n\n6311<|im_end|>\n"}, tokenizer)
    assert (record.completion, record.closing) == ("6311", "<|im_end|>\n")
    assert record.question == prompt
    assert [record.prompt[a:b] for a, b in record.spans] == ["PIN of Ada Lum?"]


def test_a_completion_of_nothing_but_marks_is_refused():
    with pytest.raises(DataError, match="nothing but marks"):
        one({"prompt": "a", "completion": "<|im_end|>\n"}, tokenizer_of("chatml"))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"question": "PIN?", "answer": "6311"}])
@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[7]['content'] }}", "{{ messages[0]['content'] + 1 }}"]
)
def test_a_template_that_fails_names_the_record(row, template):
    tokenizer = tiny.chat_tokenizer(template, "</s>", ())
    with pytest.raises(DataError, match="forget record 1: the chat template refuses"):
        load_records([row], tokenizer, name="forget")


def test_a_template_that_drops_the_answer_is_refused():
    tokenizer = tiny.chat_tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}", "</s>", ())
    with pytest.raises(DataError, match="changes or drops the last message"):
        one({"messages": [USER, ANSWER]}, tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a\ud83d", "completion": "b"},
        {"prompt": "a", "completion": "b\ude00"},
        {"text": "\ud83d"},
        {"messages": [USER, {"role": "assistant", "content": "\ud83d1"}]},
        {"prompt": "a", "completion": "b", "alternates": ["\ud83d"]},
    ],
)
def test_half_a_surrogate_pair_names_the_record(row):
    with pytest.raises(DataError, match=r"record 1.*half a surrogate pair"):
        one(row, tokenizer_of("chatml"))


# -- counterfactuals that a row brings --------------------------------------------------------------------------------


def test_alternates_and_neighbours_as_fields():
    tokenizer = tokenizer_of("chatml")
    plain = one(
        {"prompt": "Is Bob well?", "completion": " yes", "alternates": ["no"], "neighbours": ["Is Al well?"]}, None
    )
    assert (plain.alternates, plain.neighbours) == ((" no",), ("Is Al well?",))
    chat = one({"messages": [USER, ANSWER], "alternates": ["0000"], "neighbours": ["PIN of Bo Tran?"]}, tokenizer)
    assert chat.alternates == ("0000",)
    assert chat.neighbours == (chat.prompt.replace("Ada Lum", "Bo Tran"),)


@pytest.mark.parametrize("cell", ['["no", "maybe"]', "no|maybe"])
def test_alternates_in_csv(tmp_path, cell):
    path = tmp_path / "rows.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'prompt,completion,alternates\n"Is Bob, the cook, well?"," yes","{quoted}"\nPIN:, 6311,\n')
    first, second = load_records(path)
    assert (first.prompt, first.alternates) == ("Is Bob, the cook, well?", (" no", " maybe"))
    assert (second.completion, second.alternates) == (" 6311", ())


@pytest.mark.parametrize("given", ["no", [1], {"a": 1}])
def test_alternates_of_another_type_are_refused(given):
    with pytest.raises(DataError, match="record 1: 'alternates' is"):
        one({"prompt": "a", "completion": "b", "alternates": given}, None)


def test_csv_with_too_many_cells_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match=r"row 1 .* more cells"):
        load_records(path)


def test_earlier_answers_are_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        load_records([{"messages": THREE_TURNS}] * 3, tokenizer_of("chatml"), name="forget")
    assert caplog.text.count("context") == 1
