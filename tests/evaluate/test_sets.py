"""Prompt files: what is read, and how what cannot be used is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.evaluation.sets import Kind, read_prompts, require_apart
from safeproj.storage.rows import Message
from tests.evaluate.support import write_lines

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "hi"}]


def test_harmful_prompts_are_text_or_chats(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "how ?", "response": "no", "compliance": "so"},
        {"messages": CHAT},
        {"messages": ANSWERED},
    ]
    path = write_lines(tmp_path / "bad things.jsonl", rows)
    path.write_text("\ufeff" + path.read_text("utf-8") + "\n", "utf-8")
    found = read_prompts(str(path), "harmful")
    chat = (Message("system", "be brief"), Message("user", "hello"))
    assert found.prompts == ("how ?", chat, chat)
    assert found.expected == ("so", None, None)
    assert (found.name, found.kind, found.source) == ("bad things", "harmful", str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.first(2).prompts == ("how ?", chat)
    assert found.first(None) == found


def test_skills_have_the_right_answer(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "1 + 1", "response": "2"}, {"messages": ANSWERED}]
    path = write_lines(tmp_path / "x.jsonl", rows)
    found = read_prompts(f"sums={path}", "skill")
    assert found.name == "sums"
    assert found.expected == ("2", "hi")


def test_a_file_with_an_equals_sign_in_its_name_is_found(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a=b.jsonl", [{"prompt": "x"}])
    assert read_prompts(str(path), "harmful").name == "a=b"
    assert read_prompts(f"c={path}", "harmful").name == "c"


@pytest.mark.parametrize(
    ("kind", "line", "words"),
    [
        pytest.param("harmful", "[1]", (":1", "a list", '"prompt"'), id="no-object"),
        pytest.param("harmful", "{", (":1", "not JSON"), id="no-json"),
        pytest.param("harmful", '{"prompt": "\\ud800"}', (":1", "not JSON"), id="half-a-surrogate"),
        pytest.param("harmful", '{"prompt": 3}', ("'prompt' is no text",), id="number"),
        pytest.param("harmful", '{"prompt": " "}', ("or empty",), id="blank"),
        pytest.param("harmful", '{"text": "x"}', ("'prompt' is missing",), id="another-name"),
        pytest.param(
            "harmful", '{"prompt": "x", "compliance": 1}', ("'compliance'",), id="bad-compliance"
        ),
        pytest.param("skill", '{"prompt": "x"}', ("'response' is missing",), id="no-answer"),
        pytest.param(
            "skill",
            json.dumps({"messages": CHAT}),
            ("'messages' must be two or more", "the last of the role 'assistant'"),
            id="open-chat",
        ),
        pytest.param("harmful", '{"messages": []}', ("'messages' must be",), id="no-messages"),
        pytest.param(
            "harmful", '{"messages": [{"role": "user"}]}', ("'messages'",), id="no-content"
        ),
        pytest.param(
            "harmful",
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            ("before an assistant's",),
            id="answer-alone",
        ),
        pytest.param("harmful", "  ", ("no lines",), id="empty"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, kind: Kind, line: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(SafeprojError) as caught:
        read_prompts(str(path), kind)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["nowhere.jsonl", "=x.jsonl", "name=", "", "a|b=x.jsonl", "\x1b[1m=x.jsonl"], ids=ascii
)
def test_names_and_files_that_are_none_are_refused(spec: str) -> None:
    with pytest.raises(SafeprojError) as caught:
        read_prompts(spec, "harmful")
    assert str(caught.value).isprintable()


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    found = read_prompts(str(write_lines(tmp_path / "x.jsonl", [{"prompt": "x"}])), "harmful")
    with pytest.raises(SafeprojError, match="NAME=FILE"):
        require_apart([found, found])
