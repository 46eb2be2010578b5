"""Saved answers: what is kept, what is continued, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeproj.errors import SafeprojError
from safeproj.evaluation.responses import Responses, file_names, make_directory
from tests.evaluate.support import read_lines

MADE_OF: dict[str, Any] = {"model": {"config.json": "0" * 64}, "options": {"max_new_tokens": 8}}


INPUTS = {(name, i): f"{name}{i}" for name in ("a", "b") for i in range(3)}
"""What the model gets of each prompt, in place of digests."""


def opened(
    path: Path,
    made_of: dict[str, Any] = MADE_OF,
    inputs: dict[tuple[str, int], str] = INPUTS,
    **sets: str,
) -> Responses:
    found = Responses(path, made_of, sets or {"a": "1"}, inputs)
    found.open()
    return found


def filled(path: Path) -> Path:
    kept = opened(path)
    kept.add("a", [(1, "p1", "r1"), (0, "p0", "ü")])
    kept.close()
    return path


def test_answers_are_in_the_file_as_they_come(tmp_path: Path) -> None:
    kept = opened(tmp_path / "x.jsonl")
    kept.add("a", [(1, "p1", "r1")])
    assert read_lines(tmp_path / "x.jsonl")[1:] == [
        {"set": "a", "index": 1, "prompt": "p1", "input_sha256": "a1", "response": "r1"}
    ]
    kept.close()


def test_a_run_goes_on_with_them(tmp_path: Path) -> None:
    path = filled(tmp_path / "x.jsonl")
    kept = opened(path)
    assert kept.answers == {("a", 0): "ü", ("a", 1): "r1"}
    kept.add("a", [(2, "p2", "r2")])
    kept.judged({"kind": "keywords"}, {("a", 0): {"verdict": "refused"}})
    header, *rows = read_lines(path)
    assert header["judge"] == {"kind": "keywords"}
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row.get("verdict") for row in rows] == ["refused", None, None]
    assert opened(path).answers == kept.answers


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "x.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    kept = opened(path)
    assert kept.answers == {("a", 1): "r1"}
    kept.add("a", [(0, "p0", "again")])
    kept.close()
    assert opened(path).answers == {("a", 1): "r1", ("a", 0): "again"}


def test_a_file_without_a_whole_line_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"schema"', "utf-8")
    assert opened(path).answers == {}
    assert len(read_lines(path)) == 1


def test_sets_may_come_and_go(tmp_path: Path) -> None:
    path = filled(tmp_path / "x.jsonl")
    kept = opened(path, b="2")
    kept.add("b", [(0, "q", "s")])
    kept.close()
    assert opened(path, a="1", b="2").answers == {("a", 0): "ü", ("a", 1): "r1", ("b", 0): "s"}
    with pytest.raises(SafeprojError, match='sets b "2", now "3"'):
        opened(path, b="3")


@pytest.mark.parametrize(
    ("made_of", "words"),
    [
        pytest.param({"options": {"max_new_tokens": 9}}, "max_new_tokens 8, now 9", id="option"),
        pytest.param({"model": {"config.json": "1" * 64}}, "model config.json differs", id="model"),
        pytest.param({"model": {"other": "1"}}, "model config.json", id="files"),
    ],
)
def test_answers_to_something_else_are_refused(
    tmp_path: Path, made_of: dict[str, Any], words: str
) -> None:
    path = filled(tmp_path / "x.jsonl")
    before = path.read_bytes()
    with pytest.raises(SafeprojError, match=words) as caught:
        opened(path, {**MADE_OF, **made_of})
    assert "--overwrite" in caught.value.message
    assert path.read_bytes() == before
    again = Responses(path, {**MADE_OF, **made_of}, {"a": "1"}, INPUTS)
    again.open(overwrite=True)
    assert again.answers == {}


def test_answers_to_prompts_in_another_form_are_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "x.jsonl")
    before = path.read_bytes()
    with pytest.raises(SafeprojError, match=r"x\.jsonl:2: .* a 1 in another form.*overwrite"):
        opened(path, inputs={**INPUTS, ("a", 1): "other"})
    assert path.read_bytes() == before
    assert opened(path, inputs={("a", 0): "a0"}).answers.keys() == {("a", 0), ("a", 1)}  # a limit
    header, *rows = read_lines(path)
    for row in rows:
        del row["input_sha256"]  # as older versions kept them
    path.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)), "utf-8")
    with pytest.raises(SafeprojError, match="kept by an older safeproj"):
        opened(path)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"set": "a", "index": 0}', b'{"set": "a", "index": 0, "response": 1}', b"\xff"],
    ids=["torn", "list", "fields", "number", "bytes"],
)
def test_damaged_lines_are_named(tmp_path: Path, line: bytes) -> None:
    path = filled(tmp_path / "x.jsonl")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(SafeprojError, match=r"x\.jsonl:4: not a line of saved answers"):
        opened(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text in ("{}\n", json.dumps({"schema": "other/1"}) + "\n", "hello\n"):
        path.write_text(text, "utf-8")
        with pytest.raises(SafeprojError, match=r"x\.jsonl:1: not a line"):
            opened(path)
        assert path.read_text("utf-8") == text


def test_file_names_are_safe_and_apart() -> None:
    names = ["a", "A", "runs/a", "../b", "..", "ü b", "x" * 300]
    found = file_names(names)
    assert len({each.casefold() for each in found}) == len(names)
    assert all("/" not in each and not each.startswith(".") for each in found)
    assert found == file_names(names)


def test_nothing_is_written_into_an_input(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    given = [("--adapter", str(tmp_path / "adapter"))]
    for place in ("adapter", "adapter/answers"):
        with pytest.raises(SafeprojError, match="is inside adapter"):
            make_directory(tmp_path / place, given)
    with pytest.raises(SafeprojError, match="cannot be made"):
        make_directory(tmp_path / "no" / "where", given)
    make_directory(tmp_path / "answers", given)
    make_directory(tmp_path / "answers", given)
    assert (tmp_path / "answers").is_dir()
