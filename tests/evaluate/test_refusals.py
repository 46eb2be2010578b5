"""`safeproj data refusals`: a model's own refusals as safety data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import safeproj as api
from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import RefusalJudge, Verdict
from safeproj.evaluation.refusals import refusals
from safeproj.evaluation.sets import read_prompts
from safeproj.lm.data import read_data
from safeproj.storage.rows import Message, Prompt, Row
from tests.evaluate.support import TEMPLATE, TINY, random_model, read_lines, tokenizer, write_lines
from tests.support import assert_refused, safeproj

DATA = TINY / "data"
command = partial(safeproj, env={"OMP_NUM_THREADS": "1"})
PHRASE = ("--phrase", "sorry i will not")

HAZARDS = [row["prompt"] for row in read_lines(DATA / "held_out_pairs.jsonl")][:24]
HARMLESS = [row["prompt"] for row in read_lines(DATA / "old_skills.jsonl")][:3]

BARE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
"""A template that adds nothing, so that the tiny model reads what it was trained on."""


def run(*arguments: str | Path, model: Path = TINY / "aligned") -> subprocess.CompletedProcess[str]:
    return command(
        "data", "refusals", "--aligned", model, *arguments, "--device", "cpu", "--dtype", "float32",
        "--max-new-tokens", "16",
    )  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Hazardous requests that the tiny model refuses, and harmless ones that it does not."""
    path = tmp_path / "prompts.csv"
    lines = ["goal,target", *(f"{each},Sure" for each in (*HARMLESS, *HAZARDS))]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    place = tmp_path_factory.mktemp("chatting") / "model"
    AutoModelForCausalLM.from_pretrained(str(TINY / "aligned")).save_pretrained(str(place))
    tokens = AutoTokenizer.from_pretrained(str(TINY / "aligned"))
    tokens.chat_template = "{{ bos_token }} " + BARE
    tokens.save_pretrained(str(place))
    return place


def test_refusals_are_kept_and_serve_as_safety_data(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "safety.jsonl"
    done = run("--prompts", prompts, "--out", out, *PHRASE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"wrote {out} (24 of 27 answers kept; dropped: 3 complied, 0 other)\n"
    rows = read_lines(out)
    assert [row["prompt"] for row in rows] == HAZARDS
    assert all(row["response"].startswith("sorry i will not help with") for row in rows)
    again = tmp_path / "again.jsonl"
    assert run("--prompts", prompts, "--out", again, *PHRASE, "--batch-size", "5").returncode == 0
    assert again.read_bytes() == out.read_bytes()

    assert read_prompts(str(out), "harmful").prompts == tuple(HAZARDS)
    patched = tmp_path / "patched"
    done = command(
        "patch", "--adapter", TINY / "adapters" / "mixed", "--aligned", TINY / "aligned",
        "--safety-data", out, "--task-data", DATA / "task.jsonl", "--out", patched,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command(
        "eval", "--model", TINY / "aligned", "--adapter", patched, "--harmful", out, *PHRASE,
        "--limit", "8", "--max-new-tokens", "12", "--device", "cpu", "--format", "json",
    )  # fmt: skip
    shares = [
        each["sets"]["safety"]["refused"]["rate"] for each in json.loads(done.stdout)["subjects"]
    ]
    assert shares == [1.0, 1.0]


def test_a_model_with_a_chat_template_makes_chats(
    tmp_path: Path, prompts: Path, chatting: Path
) -> None:
    out = tmp_path / "safety.jsonl"
    done = run("--prompts", prompts, "--out", out, *PHRASE, model=chatting)
    assert done.returncode == 0, done.stderr
    rows = read_lines(out)
    assert [list(row) for row in rows] == [["messages"]] * 24
    first = rows[0]["messages"]
    assert first[0] == {"role": "user", "content": HAZARDS[0]}
    assert first[1]["role"] == "assistant"
    assert first[1]["content"].startswith("sorry i will not help with")
    assert len(read_data(out, AutoTokenizer.from_pretrained(str(chatting))).samples) == 24
    assert read_prompts(str(out), "harmful").prompts[0] == (Message("user", HAZARDS[0]),)


def test_a_file_of_which_nothing_is_refused_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(HARMLESS), "utf-8")
    out = tmp_path / "safety.jsonl"
    result = run("--prompts", path, "--out", out, *PHRASE)
    assert_refused(result, "none of 3 prompts", "3 complied", "nothing was written", "--phrase")
    assert list(tmp_path.iterdir()) == [path]


def test_few_refusals_are_said_to_be_few(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "safety.jsonl"
    done = run("--prompts", prompts, "--out", out, *PHRASE, "--limit", "8")
    assert done.returncode == 0
    assert f"warning: {out}: 5 refusals are few" in done.stderr
    assert len(read_lines(out)) == 5


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path: Path, prompts: Path) -> None:
    there = write_lines(tmp_path / "there.jsonl", [{"prompt": "x", "response": "y"}])
    other = write_lines(tmp_path / "other.jsonl", [{"schema": "x"}])
    kept = (tmp_path / "link.jsonl", there)
    kept[0].symlink_to(there)
    plain = write_lines(tmp_path / "plain.jsonl", [{"prompt": HAZARDS[0], "response": "x"}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, given, words in (
        ("there.jsonl", (), ("exists", "--overwrite")),
        ("other.jsonl", ("--overwrite",), ("--out", "'prompt' is missing")),
        ("link.jsonl", ("--overwrite",), ("no file",)),
        ("new.csv", (), ("a name such as safety.jsonl",)),
        ("nowhere/new.jsonl", (), ("no directory",)),
        ("new.jsonl", ("--limit", "0"), ("--limit must be 1 or more",)),
        ("new.jsonl", ("--judge", "prefix", "--judge-url", "x"), ("exclude each other",)),
    ):
        result = run("--prompts", prompts, "--out", tmp_path / out, *given)
        assert_refused(result, *words)
    result = run("--prompts", plain, "--out", plain, "--overwrite")
    assert_refused(result, "is --prompts", "another name")
    result = run("--prompts", tmp_path / "none.csv", "--out", tmp_path / "new.jsonl")
    assert_refused(result, "--prompts", "no such file")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert other.exists()


def test_an_earlier_file_is_replaced_where_that_is_asked_for(tmp_path: Path, prompts: Path) -> None:
    out = write_lines(tmp_path / "safety.jsonl", [{"prompt": "x", "response": "y"}])
    found = api.refusals(
        str(TINY / "aligned"), prompts, out, api.Keywords(["sorry i will not"], []), limit=5,
        device="cpu", overwrite=True,
    )  # fmt: skip
    assert [row["prompt"] for row in read_lines(out)] == HAZARDS[:2]
    assert (found.asked, dict(found.dropped)) == (5, {"complied": 3, "other": 0})


def test_a_prompt_that_cannot_be_used_is_named_before_the_model_runs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(SafeprojError, match="no chat template"):
        api.refusals(str(TINY / "aligned"), path, tmp_path / "out.jsonl")


class Alternately(RefusalJudge):
    """Calls every second answer a refusal."""

    def verdicts(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Verdict]:
        del prompts
        labels = [Verdict.refused, Verdict.complied]
        return [labels[i % 2] for i in range(len(answers))]

    def identity(self) -> dict[str, Any]:
        return {}


def test_rows_of_a_loaded_model_are_of_the_form_that_its_template_asks_for() -> None:
    system = {"role": "system", "content": "w3"}
    user = {"role": "user", "content": "w4", "name": "x"}
    chat = (system, user, {"role": "assistant", "content": "w9"})
    rows = [
        Row("a", "w1"),
        Row("b", "w2"),
        Row("c", (Message("system", "w3"), Message("user", "w4")), chat=chat),
    ]
    model, told = random_model("llama"), []
    generator = Generator(tokenizer(template=TEMPLATE), max_new_tokens=3, chat=True)
    found = refusals(model, generator, Alternately(), rows, lambda *step: told.append(step))
    first, last = found.rows
    assert first.chat == ({"role": "user", "content": "w1"}, answer(first))
    assert first.prompt == (Message("user", "w1"),)
    assert last.chat == (system, user, answer(last))
    assert last.prompt == rows[2].prompt
    assert (found.asked, dict(found.dropped)) == (3, {"complied": 1, "other": 0})
    assert told[-1] == (3, 3)

    generator = Generator(tokenizer(), max_new_tokens=3)
    (only,) = refusals(model, generator, Alternately(), rows[:1]).rows
    assert (only.prompt, only.chat) == ("w1", None)
    assert only.response == generator.answers(model, ["w1"])[0]


def test_thoughts_are_no_part_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["<think>w1</think> w5", "w6", "<think>w7"]
    monkeypatch.setattr(Generator, "answers", lambda *_: said)
    dated = "{% set day = strftime_now('%d') %}" + TEMPLATE
    generator = Generator(tokenizer(template=dated), chat=True)
    rows = [Row(str(i), f"w{i}") for i in range(3)]
    found = refusals(None, generator, Alternately(), rows)
    assert [row.response for row in found.rows] == ["w5"]
    assert dict(found.dropped) == {"complied": 1, "other": 1}
    date, unfinished = found.warnings
    assert "--date" in date
    assert "1 of 3 answers ended inside their thoughts" in unfinished


def answer(row: Row) -> dict[str, str | None]:
    return {"role": "assistant", "content": row.response}
