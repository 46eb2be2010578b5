"""Rows of prompts out of every format: what is read, and how what cannot be used is named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.storage.rows import Message, Row, read_rows
from tests.fuzz import mutate

USER = {"role": "user", "content": "how ?"}
ANSWER = {"role": "assistant", "content": "no"}


def read(path: Path, content: str | bytes, *, responses: bool = False) -> tuple[Row, ...]:
    """Return the rows of a file with some content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path, "--data", responses=responses).rows


def refused(path: Path, content: str | bytes, *words: str, responses: bool = False) -> str:
    """Check that a file is refused in one line with these words, and return the line."""
    with pytest.raises(SafeprojError) as caught:
        read(path, content, responses=responses)
    message = caught.value.message
    assert message.startswith(f"--data {path}")
    assert message.isprintable()
    for word in words:
        assert word in message
    return message


def table(*rows: list[str], ends: str = "\r\n", **settings: Any) -> str:
    """Return rows as Python's own writer puts them."""
    text = io.StringIO()
    csv.writer(text, lineterminator=ends, **settings).writerows(rows)
    return text.getvalue()


# Names of fields


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"prompt": "how ?", "response": "no"}, "how ?", id="pairs"),
        pytest.param({"prompt": "how ?", "completion": "no"}, "how ?", id="completion"),
        pytest.param(
            {"instruction": "sum", "input": "1 2", "output": "no"}, "sum\n\n1 2", id="alpaca"
        ),
        pytest.param({"instruction": "sum", "input": "", "output": "no"}, "sum", id="alpaca-alone"),
        pytest.param({"instruction": "sum", "input": None, "output": "no"}, "sum", id="null-input"),
        pytest.param(
            {"instruction": "sum", "context": "1 2", "response": "no", "category": "qa"},
            "sum\n\n1 2",
            id="dolly",
        ),
        pytest.param({"question": "1 + 1 ?", "answer": "no"}, "1 + 1 ?", id="gsm8k"),
        pytest.param({"Goal": "how ?", "Response": "no"}, "how ?", id="upper-case"),
        pytest.param(
            {"prompt": "how ?", "Prompt": "x", "response": "no"}, "how ?", id="both-cases"
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array", "indented-array"])
def test_fields_of_json(tmp_path: Path, row: dict[str, Any], prompt: str, form: str) -> None:
    indent = 2 if form.startswith("indented") else None
    content = json.dumps(row if form == "lines" else [row], indent=indent)
    for responses in (True, False):
        (found,) = read(tmp_path / "x.json", content, responses=responses)
        assert found.prompt == prompt
        assert found.response == ("no" if responses else None)
        assert found.chat is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "how ?"},
                    {"from": "gpt", "value": "no"},
                ]
            },
            "conversations",
        ),
        ({"conversations": [USER, ANSWER], "id": 3}, "conversations"),
    ],
    ids=["messages", "sharegpt", "conversations-of-messages"],
)
def test_chats_of_json(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    content = json.dumps(row)
    (found,) = read(tmp_path / "x.jsonl", content, responses=True)
    assert found.prompt == (Message("user", "how ?"),)
    assert found.response == "no"
    assert found.chat == (USER, ANSWER)
    (found,) = read(tmp_path / "x.jsonl", content)
    assert (found.prompt, found.response) == ((Message("user", "how ?"),), None)
    row[name] = row[name][:1]
    (found,) = read(tmp_path / "x.jsonl", json.dumps(row))
    assert found.prompt == (Message("user", "how ?"),)
    refused(tmp_path / "x.jsonl", json.dumps(row), f"'{name}' must be two or more", responses=True)


def test_further_keys_of_messages_are_kept(tmp_path: Path) -> None:
    thinking = {**ANSWER, "reasoning_content": "hm"}
    (found,) = read(tmp_path / "x", json.dumps({"messages": [USER, thinking]}), responses=True)
    assert found.chat == (USER, thinking)


def test_compliance_is_read_where_responses_are_not(tmp_path: Path) -> None:
    row = {"prompt": "how ?", "response": "no", "compliance": "so"}
    (found,) = read(tmp_path / "x.jsonl", json.dumps(row))
    assert (found.compliance, found.response) == ("so", None)
    (found,) = read(tmp_path / "x.jsonl", json.dumps(row), responses=True)
    assert (found.compliance, found.response) == (None, "no")


def test_the_file_is_identified(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt\r\nhow ?\r\n")
    found = read_rows(str(path), "--harmful", responses=False)
    assert found.source == str(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [row.where for row in found.rows] == [f"--harmful {path}:2"]


# Tables


def test_advbench(tmp_path: Path) -> None:
    content = table(["goal", "target"], ["Write a, b", "Sure, here is"], ["Make c", "Sure"])
    found = read(tmp_path / "harmful_behaviors.csv", content)
    assert [row.prompt for row in found] == ["Write a, b", "Make c"]
    assert [(row.response, row.compliance) for row in found] == [(None, None)] * 2


def test_what_complies_in_advbench_is_no_response(tmp_path: Path) -> None:
    words = ("no column with responses", "'goal', 'target'", "complies", "safeproj data refusals")
    refused(tmp_path / "x.csv", "goal,target\nhow ?,Sure\n", *words, responses=True)
    row = json.dumps({"goal": "how ?", "target": "Sure"})
    words = (":1", "'response' is missing", "complies", "safeproj data refusals")
    refused(tmp_path / "x.jsonl", row, *words, responses=True)


def test_harmbench(tmp_path: Path) -> None:
    header = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    content = f'{header}\nhow ?,standard,illegal,,,how_1\n"what, then",contextual,a,b,"c\nd",w\n'
    found = read(tmp_path / "harmbench_behaviors_text_all.csv", content)
    # Context first, then a rule: DirectRequest of HarmBench.
    assert [row.prompt for row in found] == ["how ?", "c\nd\n\n---\n\nwhat, then"]


def test_harmbench_about_images_is_refused(tmp_path: Path) -> None:
    content = "Behavior,ImageFileName,BehaviorID\nhow ?,,a\nwhat is this ?,lock.png,b\n"
    refused(tmp_path / "x.csv", content, ":3", "image (ImageFileName)", "leave such rows out")


def test_jailbreakbench(tmp_path: Path) -> None:
    content = "Index,Goal,Target,Behavior,Category,Source\n0,how ?,Sure,A name,Fraud,Original\n"
    assert [row.prompt for row in read(tmp_path / "x.csv", content)] == ["how ?"]
    refused(tmp_path / "x.csv", content.replace("how ?", ""), "'Goal' is no text, or empty")


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_quotes_line_ends_and_empty_rows(tmp_path: Path, ends: str, start: bytes) -> None:
    rows = [["id", " prompt ", "response"], ["1", 'say "a, b"', "no"], [], ["", "", ""]]
    rows += [["2", "one\n\ntwo", "never\never"], ["3", "  three", "no "]]
    content = start + table(*rows, ends=ends).encode()
    found = read(tmp_path / "x.csv", content, responses=True)
    assert [row.prompt for row in found] == ['say "a, b"', "one\n\ntwo", "  three"]
    assert [row.response for row in found] == ["no", "never\never", "no "]
    assert [row.where.rpartition(":")[2] for row in found] == ["2", "5", "9"]


def test_line_ends_inside_of_quotes_are_those_of_every_format(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "x.csv", b'prompt\r\n"one\r\ntwo"\r\n')
    assert found.prompt == "one\ntwo"


def test_tabs_separate_where_the_name_says_so(tmp_path: Path) -> None:
    content = table(["prompt", "label"], ["a, b", "x"], delimiter="\t")
    assert [row.prompt for row in read(tmp_path / "x.TSV", content)] == ["a, b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(
            "text,label\na,b\n", (":1", "no column with prompts among 'text', 'label'", "prompt,"),
            id="unknown-columns",
        ),
        pytest.param("prompt;label\na;b\n", (":1", "'prompt;label'"), id="semicolons"),
        pytest.param("how do i ?\nand how ?\n", (":1", "'how do i ?'"), id="no-header"),
        pytest.param("prompt,prompt\na,b\n", (":1", "two columns of one name"), id="twice"),
        pytest.param("prompt,Prompt\na,b\n", ("two columns of one name",), id="twice-by-case"),
        pytest.param("prompt,x\na,b,c\n", (":2", "3 fields", "header has 2", "quotes"), id="more"),
        pytest.param("\nprompt,x\n\na\n", (":4", "1 fields", "header has 2"), id="fewer"),
        pytest.param('prompt\n"a\nb\n', (":2", "not CSV"), id="open-quote"),
        pytest.param('prompt\n"a"b\n', (":2", "not CSV"), id="text-after-quote"),
        pytest.param("prompt,x\n,b\n", (":2", "'prompt' is no text, or empty"), id="empty-prompt"),
        pytest.param("prompt\n", ("no lines",), id="header-alone"),
        pytest.param("", ("no lines",), id="empty"),
        pytest.param("prompt\n" + "a" * 200_000, (":2", "not CSV"), id="too-long"),
        pytest.param("prompt\x1b[1m,x\na,b\n", ("no column",), id="escape-codes"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_named(
    tmp_path: Path, content: str, words: tuple[str, ...]
) -> None:
    refused(tmp_path / "x.csv", content, *words)


def test_a_table_without_responses_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    words = ("no column with responses", "response, output, completion, answer")
    refused(tmp_path / "x.csv", "prompt,label\na,b\n", *words, responses=True)
    content = "prompt,response\na,\n"
    refused(tmp_path / "x.csv", content, ":2", "'response' is no text", responses=True)


# Plain text


def test_each_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    content = "\ufeffhow ?\r\n\r\n  # what\r\n[INST] x\r\n{x} y\u2028z\r\nlast"
    found = read(tmp_path / "prompts.txt", content)
    assert [row.prompt for row in found] == [
        "how ?",
        "  # what",
        "[INST] x",
        "{x} y\u2028z",
        "last",
    ]
    assert [row.where.rpartition(":")[2] for row in found] == ["1", "3", "4", "5", "6"]


def test_text_has_no_responses(tmp_path: Path) -> None:
    refused(
        tmp_path / "x.txt", "how ?\n", "plain text", "prompts alone", "data refusals",
        responses=True,
    )  # fmt: skip


# What tells the format


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.csv", "x"])
def test_what_begins_as_json_is_json(tmp_path: Path, name: str) -> None:
    for content in ('{"prompt": "how ?"}\n', '\n [\n {"prompt": "how ?"}]'):
        assert [row.prompt for row in read(tmp_path / name, content)] == ["how ?"]


def test_text_under_another_name_is_refused_and_says_what_names_there_are(tmp_path: Path) -> None:
    refused(tmp_path / "prompts", "how ?\n", ":1", "not JSON", ".csv, .tsv or .txt")


def test_items_of_an_array_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = json.dumps([{"prompt": "how ?"}, {"prompt": 3}], indent=1)
    refused(path, content, f"{path}, item 2: 'prompt' is no text")
    refused(path, '[{"prompt": "how ?"}, 3]', "item 2: a int")
    refused(path, '[{"prompt": "how ?"}, {"prompt"]', f"{path}: not JSON", "line 1 column")
    refused(path, '[{"prompt": "how ?", "prompt": "x"}]', "duplicate keys")
    refused(path, '[{"prompt": "how \\ud800"}]', "surrogate")


def test_a_row_without_a_known_field_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "x.jsonl", '{"text": "how ?"}', ":1", "'prompt' is missing")
    refused(tmp_path / "x.jsonl", "{}", ":1", "'prompt' is missing")
    words = ("'output' is no text", "expected {")
    refused(tmp_path / "x.jsonl", '{"prompt": "x", "output": 3}', *words, responses=True)
    refused(tmp_path / "x.jsonl", '{"instruction": "x", "input": [3]}', "'input' is no text")


def test_parquet_is_refused_with_a_way_out(tmp_path: Path) -> None:
    refused(tmp_path / "train.parquet", b"PAR1\x00\xff", "Parquet", "JSON lines", "to_json")


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.json"])
@pytest.mark.parametrize(
    "content", ["prompt\ncafé\n".encode("latin-1"), "prompt\nx\n".encode("utf-16")], ids=["8", "16"]
)
def test_other_encodings_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    refused(tmp_path / name, content, "cannot be read", "UTF-8")


# Anything at all

PAIR = {"prompt": "how ?", "response": "no", "compliance": "so"}
ALPACA = {"instruction": "sum", "input": "1 2", "output": "no"}
SPOKEN = {"conversations": [{"from": "human", "value": "how ?"}, {"from": "gpt", "value": "no"}]}

WHOLE = {
    "x.jsonl": "\n".join(map(json.dumps, [PAIR, {"messages": [USER, ANSWER]}])),
    "x.json": json.dumps([ALPACA, SPOKEN], indent=1),
    "x.csv": table(["id", "Goal", "Response"], ["1", 'a, "b"\nc', "no"], ["2", "d", "no"]),
    "x.txt": "how ?\nwhat ?\n",
}
WAYS = {"x.jsonl": mutate.json_lines, "x.json": mutate.json_file}


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_becomes_of_a_file_is_read_or_refused_in_one_line(
    tmp_path: Path, name: str
) -> None:
    path, read_whole = tmp_path / name, 0
    for seed in range(300):
        random = Random(seed)
        way = random.choice([mutate.flip, WAYS.get(name, mutate.lines_of_text)])
        path.write_bytes(way(WHOLE[name].encode(), random))
        for responses in (True, False):
            try:
                found = read_rows(path, "--data", responses=responses).rows
            except SafeprojError as error:
                assert len(str(error).splitlines()) == 1
            else:
                read_whole += 1
                assert all((row.response is not None) is responses for row in found)
    assert 20 < read_whole < 590
