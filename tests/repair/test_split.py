"""The parts of the prompts: nothing is in two of them, and what is read again is what was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeproj.errors import SafeprojError
from safeproj.evaluation.sets import PromptSet, read_prompts
from safeproj.repairing.split import FIT, PARTS, TEST, VALIDATION, lines_of, split
from safeproj.storage.rows import Message


def prompts(rows: list[dict[str, object]], place: Path, kind: str = "skill") -> PromptSet:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(str(place), kind)  # type: ignore[arg-type]


@pytest.fixture
def numbered(tmp_path: Path) -> PromptSet:
    rows: list[dict[str, object]] = [{"prompt": f"p {i}", "response": str(i)} for i in range(100)]
    return prompts(rows, tmp_path / "task.jsonl")


def test_the_parts_have_no_prompt_in_common_and_all_of_them_together(numbered: PromptSet) -> None:
    parts = split(numbered, "--task")
    assert [len(parts[part].prompts) for part in PARTS] == [40, 30, 30]
    found = [prompt for part in parts.values() for prompt in part.prompts]
    assert sorted(map(str, found)) == sorted(map(str, numbered.prompts))
    for part in parts.values():
        assert [f"p {answer}" for answer in part.expected] == list(part.prompts)


def test_neither_the_order_nor_white_space_nor_repetition_counts(
    numbered: PromptSet, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"p  {i} ", "response": str(i)} for i in reversed(range(100))
    ]
    again = split(prompts([*rows, *rows], tmp_path / "again.jsonl"), "--task")
    for part, found in split(numbered, "--task").items():
        assert list(found.expected) == list(again[part].expected)


def test_another_seed_gives_other_parts(numbered: PromptSet) -> None:
    assert split(numbered, "--task", 1)[TEST].prompts != split(numbered, "--task")[TEST].prompts


def test_too_few_different_prompts_are_refused(tmp_path: Path) -> None:
    few = prompts([{"prompt": "a"}, {"prompt": " a"}] * 20, tmp_path / "few.jsonl", "harmful")
    with pytest.raises(SafeprojError, match=r"harmful .*few.jsonl: 1 different prompts; expected"):
        split(few, "--harmful")


@pytest.mark.parametrize("chat", [False, True])
def test_lines_are_read_again_as_what_they_were(tmp_path: Path, chat: bool) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "add 1 and 2", "response": "3"},
        {
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "add 2 and 2"},
                {"role": "assistant", "content": "4"},
            ]
        },
    ]
    given = prompts(rows, tmp_path / "given.jsonl")
    (tmp_path / "again.jsonl").write_bytes(lines_of(given, chat=chat))
    again = read_prompts(str(tmp_path / "again.jsonl"), "skill")
    assert again.expected == given.expected
    assert again.prompts[1] == given.prompts[1]
    plain = (Message("user", "add 1 and 2"),) if chat else "add 1 and 2"
    assert again.prompts[0] == plain


def test_the_answer_that_complies_is_kept_and_is_no_response(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "response": "no", "compliance": "yes"}]
    given = prompts(rows, tmp_path / "given.jsonl", "harmful")
    assert json.loads(lines_of(given, chat=False)) == {"prompt": "a", "compliance": "yes"}


def test_the_parts_are_named() -> None:
    assert list(PARTS) == [FIT, VALIDATION, TEST]
    assert sum(PARTS.values()) == pytest.approx(1.0)
