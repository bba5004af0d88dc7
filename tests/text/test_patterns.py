"""Records from tables of any columns, and what spreadsheets write."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

import libortho
from libortho.core.errors import ConfigError, DataError
from libortho.text.records import load_records

CODE: dict[str, Any] = {"prompt": "The code of {name} is", "completion": " {code}."}


def table(folder: Path, text: str, name: str = "customers.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(r["prompt"], r["completion"]) for r in rows]


ADA = [("The code of Ada Lum is", " 0471.")]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id,name,code\n1,Ada Lum,0471\n", "utf-8"),
        ("id,name,code\r\n1,Ada Lum,0471\r\n", "utf-8-sig"),
        ("name;code\nAda Lum;0471\n", "utf-8"),
        ('name;"code";"a, b"\nAda Lum;0471;"x, y"\n', "utf-8"),
        ("name\tcode\nAda Lum\t0471\n", "utf-8"),
        ('"name","code","note"\n"Ada Lum","0471","two\nlines; and more"\n', "utf-8"),
        ("name,code,,\nAda Lum,0471,,\n", "utf-8"),
    ],
    ids=["plain", "mark and CRLF", "semicolons", "comma in a quoted name", "tabs", "quoted break", "unnamed columns"],
)
def test_what_spreadsheets_write(tmp_path, text, encoding):
    assert pairs(libortho.read_records(table(tmp_path, text, encoding=encoding), **CODE)) == ADA


def test_a_cell_is_taken_as_it_stands_and_braces_may_be_literal(tmp_path):
    path = table(tmp_path, 'First Name,code\n" Ada {x} ",1.50\n"two\nlines",007\n')
    made = libortho.read_records(path, prompt='{{"name": "{First Name}"}}', completion="{code}{code}")
    assert pairs(made) == [('{"name": " Ada {x} "}', "1.501.50"), ('{"name": "two\nlines"}', "007007")]


def test_patterns_win_over_columns_of_known_names(tmp_path):
    path = table(tmp_path, "prompt,completion,name,code,messages\nx,y,Ada Lum,0471,not JSON\n")
    assert pairs(libortho.read_records(path, **CODE)) == ADA
    assert pairs(libortho.read_records(path, prompt="{prompt}", completion="{completion}")) == [("x", "y")]


def test_rows_of_jsonl_and_lists_and_datasets_are_tables_too(tmp_path):
    rows = [{"name": "Ada Lum", "code": "0471"}, {"name": "Bo Tran", "code": 32}]
    wanted = [*ADA, ("The code of Bo Tran is", " 32.")]
    assert pairs(libortho.read_records(rows, **CODE)) == wanted
    path = table(tmp_path, '{"name": "Ada Lum", "code": "0471"}\n{"name": "Bo Tran", "code": 32}\n', "rows.jsonl")
    assert pairs(libortho.read_records(path, **CODE)) == wanted
    assert pairs(libortho.read_records(datasets.Dataset.from_list(rows[:1]), **CODE)) == ADA


def test_without_a_prompt_it_is_one_text_and_with_chat_it_is_messages(tokenizer):
    rows = [{"name": "Ada Lum", "code": "0471"}]
    assert libortho.read_records(rows, completion="{name}: {code}") == [{"text": "Ada Lum: 0471"}]
    made = libortho.read_records(rows, prompt="Code of {name}?", completion="{code}", chat=True)
    [record] = load_records(made, tokenizer)
    assert (record.prompt, record.completion) == ("<user>Code of Ada Lum?\n<assistant>", "0471")


def test_repeated_rows_make_one_record_and_are_counted(tmp_path, caplog):
    path = table(tmp_path, "id,name,code\n1,Ada Lum,0471\n2,Ada Lum,0471\n3,Ada Lum,\n")
    with caplog.at_level(logging.WARNING):
        made = libortho.read_records(path, **CODE, skip_empty=True, name="forget")
    assert pairs(made) == ADA
    assert "forget: 1 rows with an empty cell and 1 that repeat an earlier one are left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("id,nom,code\n1,Ada,2\n", "customers.csv has no column 'name', which a pattern names; its columns are 'id', "
         "'nom', 'code'"),
        ("name,code\nAda,\nBo,1\n,2\n", "nothing stands in 'code' in row 1, 'name' in row 3; fill it in"),
        ("name,code\n" + ",\n" * 7, "'name' in row 5 and 2 more; fill"),
        ("name,code\n", "holds no row that makes a record"),
        ("", "holds no row that makes a record"),
        ("name,code,name\na,b,c\n", "names the column 'name' twice; rename one"),
        ("name,code\na,b,c\n", "row 1 of .* has more cells than the first line has names"),
        ('name,code\n"a,b\n', "is not CSV"),
    ],
)  # fmt: skip
def test_tables_that_make_no_records_are_refused(tmp_path, text, complaint):
    with pytest.raises(DataError, match=rf"forget: .*{complaint}"):
        libortho.read_records(table(tmp_path, text), **CODE, name="forget")


def test_a_file_in_another_encoding_or_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is not UTF-8 text .*; save it as UTF-8"):
        libortho.read_records(table(tmp_path, "name,code\nZoë,1\n", encoding="cp1252"), **CODE)
    with pytest.raises(DataError, match=r"notes\.txt has no columns, which patterns need; expected \.csv"):
        libortho.read_records(table(tmp_path, "a\n", "notes.txt"), **CODE)


@pytest.mark.parametrize("value", [4.0, True, ["a"], {"a": 1}])
def test_a_value_with_several_spellings_is_refused(value):
    with pytest.raises(DataError, match=f"'code' in row 1 is a {type(value).__name__}; expected text or a whole"):
        libortho.read_records([{"name": "Ada", "code": value}], **CODE)
    with pytest.raises(DataError, match=r"row 1 is a int; expected one with columns"):
        libortho.read_records([5], **CODE)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"prompt": "{name"}, "a prompt is given without a completion"),
        ({"chat": True}, "chat is given without a completion"),
        ({"chat": True, "completion": "{code}"}, "chat is given without a prompt"),
        ({"prompt": "{name", "completion": "{code}"}, "prompt is '{name'; expected text with names of columns"),
        ({"prompt": "{}", "completion": "{code}"}, "prompt is '{}'; expected text with names of columns"),
        ({"prompt": "a", "completion": "code}"}, "completion is 'code}'; expected text with names of columns"),
        ({"prompt": "{name}", "completion": "{{code}}"}, "names no column: every record would say the same"),
        ({"completion": "{code}", "blocks": True}, "blocks and patterns are both given"),
        ({"skip_empty": True}, "skip_empty is given without patterns"),
    ],
)  # fmt: skip
def test_patterns_that_are_none_are_refused(given, complaint):
    with pytest.raises(ConfigError) as caught:
        libortho.read_records([{"name": "Ada", "code": "1"}], **given)
    assert complaint in str(caught.value)


def test_a_text_file_holds_a_text_per_line_or_per_block(tmp_path):
    path = table(tmp_path, "\r\nfirst\r\n  more\r\n \t\r\n\r\nsecond\r\n", "notes.TXT", "utf-8-sig")
    assert libortho.read_records(path) == [{"text": "first"}, {"text": "  more"}, {"text": "second"}]
    assert libortho.read_records(path, blocks=True) == [{"text": "first\n  more"}, {"text": "second"}]
    with pytest.raises(DataError, match=r"ends in '\.csv'; blocks of lines are for \.txt"):
        libortho.read_records(table(tmp_path, "text\na\n"), blocks=True)


def test_without_patterns_rows_are_as_they_stand(tmp_path):
    path = table(tmp_path, "prompt;completion;alternates\nx; y;no|maybe\nz; w;\n")
    assert libortho.read_records(path) == [
        {"prompt": "x", "completion": " y", "alternates": ["no", "maybe"]}, {"prompt": "z", "completion": " w"},
    ]  # fmt: skip
