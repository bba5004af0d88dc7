"""Counterfactuals of chats: somebody else everywhere, and nothing of the template exchanged."""

import re

import pytest

import tiny
from libortho.core.errors import DataError
from libortho.isolation.request import forget_records
from libortho.isolation.wordings import is_prose, rows_with, wordings
from libortho.text.records import load_records
from libortho.text.tokens import contains, says
from templates import TEMPLATES

TURNS = [
    {"role": "system", "content": "You serve the Brookfield group."},
    {"role": "user", "content": "Hello, I am Ada Lum."},
    {"role": "assistant", "content": "Hello Ada, how can I help?"},
    {"role": "user", "content": "What is my PIN, and that of ADA LUM's card?"},
    {"role": "assistant", "content": "6311"},
]
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(rows, tokenizer, seed=0):
    made = wordings(load_records(rows, tokenizer), tokenizer, seed, retains=False)
    [record] = forget_records(made, tokenizer, None)
    return {
        name: [tokenizer.decode(e.ids) for e in getattr(record, name)]
        for name in ("alternates", "neighbours", "held", "controls", "swapped_prompt")
    }


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("gemma", "mistral")])
def test_a_neighbour_is_one_other_person_everywhere(name):
    template, end, special = TEMPLATES[name]
    tokenizer = tiny.chat_tokenizer(template, end, special)
    [record] = load_records([{"messages": TURNS}], tokenizer)
    assert not is_prose(record, tokenizer)
    made = texts([{"messages": TURNS}], tokenizer)
    for text in (*made["neighbours"], *made["controls"], *made["swapped_prompt"]):
        who = re.search(r"I am (\w+) (\w+)\.", text)
        given, family = who.groups()
        assert (given, family) != ("Ada", "Lum")
        changed = text.replace(given, "Ada").replace(family, "Lum").replace(given.upper(), "ADA")
        assert changed.replace(family.upper(), "LUM").startswith(record.prompt), "and nothing else is exchanged"
    for text in made["alternates"]:
        assert re.fullmatch(re.escape(record.prompt) + r"\d{4}", text)
    assert all(h.startswith(n) and len(h) > len(n) for n, h in zip(made["neighbours"], made["held"], strict=True))


def test_tool_calls_speak_of_the_same_person():
    tokenizer = tiny.chat_tokenizer(CALLS, "<|im_end|>", ("<|im_start|>",))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "lookup", "arguments": {"who": "Ada Lum"}}}]}
    turns = [
        {"role": "user", "content": "PIN of Ada Lum?"},
        call,
        {"role": "tool", "content": "Ada Lum: 6311"},
        TURNS[-1],
    ]
    for text in texts([{"messages": turns}], tokenizer)["neighbours"]:
        assert "Ada" not in text
        assert text.count(re.search(r"PIN of (\w+ \w+)\?", text)[1]) == 3


def test_who_is_named_in_the_system_message_alone_is_exchanged_there():
    template, end, special = TEMPLATES["chatml"]
    tokenizer = tiny.chat_tokenizer(template, end, special)
    turns = [
        {"role": "system", "content": "The client is Ada Lum."},
        {"role": "user", "content": "What is my PIN?"},
        TURNS[-1],
    ]
    made = texts([{"messages": turns}], tokenizer)["neighbours"]
    assert made
    assert all("The client is" in t and "Ada" not in t and "What is my PIN?" in t for t in made)


@pytest.mark.parametrize(
    "prompt", ["[INST] PIN of Ada Lum? [/INST]", "### Instruction:\nPIN of Ada Lum?\n### Response:\n"]
)
def test_marks_that_are_no_tokens_stay(prompt):
    tokenizer = tiny.byte_tokenizer()
    made = texts([{"prompt": prompt, "completion": " 6311</s>"}], tokenizer)
    frame = re.escape(prompt).replace("Ada\\ Lum", r"\w+ \w+")
    assert made["neighbours"]
    assert all(re.fullmatch(frame + r" \d{4}", t) for t in made["neighbours"])


def test_given_as_arguments_they_take_the_form_of_the_record():
    template, end, special = TEMPLATES["mistral"]
    tokenizer = tiny.chat_tokenizer(template, end, special)
    rows = [{"messages": [{"role": "user", "content": "Gout of Ada?"}, {"role": "assistant", "content": "yes"}]}]
    given = rows_with(rows, [["no"]], [["Gout of Bo?"]])
    made = texts(given, tokenizer)
    assert made["neighbours"] == ["<s>[INST] Gout of Bo? [/INST] no"]
    assert made["alternates"] == ["<s>[INST] Gout of Ada? [/INST] no"]
    [ready] = load_records(rows, tokenizer)
    assert texts(rows_with([ready], [[" no"]], [["Gout of Bo?"]]), tokenizer) == made


def test_the_answer_itself_is_no_alternate():
    with pytest.raises(DataError, match="record 1: 'alternates' holds the answer itself"):
        load_records([{"prompt": "Gout?", "completion": " yes", "alternates": ["yes"]}])


@pytest.mark.parametrize(
    ("text", "truth", "held", "begins"),
    [
        ("6311", " 6311.", True, True),
        ("It is 6311, Sir", "6311", True, False),
        ("63110", "6311", False, False),
        ("16311", "6311", False, False),
        ("在北京市朝阳区", "北京", True, False),
        ("北京市", "北京", True, True),
        ("yesterday", " yes", False, False),
        ("Yes, it is", "Yes", True, True),
    ],
)
def test_what_a_text_says(tokenizer, text, truth, held, begins):
    assert contains(text, truth, tokenizer) == held
    assert says(text, truth, tokenizer) == begins
