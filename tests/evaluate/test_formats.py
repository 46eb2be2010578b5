"""The same prompts and responses through every format, wherever files of them are read."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from safeproj.evaluation.sets import read_prompts
from safeproj.lm.data import read_data
from tests.evaluate.support import TINY, read_lines, write_lines
from tests.support import safeproj

command = partial(safeproj, env={"OMP_NUM_THREADS": "1"})
ROWS = read_lines(TINY / "data" / "safety.jsonl")[:6]
PROMPTS = tuple(row["prompt"] for row in ROWS)


def columns(path: Path, prompt: str, response: str, **others: str) -> Path:
    """Write the rows as a table with these names of columns, as spreadsheets do."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow([*others, prompt, response])
        writer.writerows([*others.values(), row["prompt"], row["response"]] for row in ROWS)
    return path


def fields(prompt: str, response: str, **others: str) -> list[dict[str, str]]:
    """Return the rows under these names of fields."""
    return [{prompt: row["prompt"], response: row["response"], **others} for row in ROWS]


def array(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as one indented array."""
    path.write_text(json.dumps(rows, indent=2), "utf-8")
    return path


def every_format(place: Path) -> list[Path]:
    """Return files with the rows."""
    return [
        write_lines(place / "pairs.jsonl", fields("prompt", "response")),
        array(place / "pairs.json", fields("prompt", "response")),
        array(place / "alpaca.json", fields("instruction", "output", input="")),
        write_lines(place / "dolly.jsonl", fields("instruction", "response", context="")),
        write_lines(place / "questions.jsonl", fields("question", "answer")),
        write_lines(place / "completions.jsonl", fields("prompt", "completion")),
        columns(place / "pairs.csv", "prompt", "response"),
        columns(place / "pairs.tsv", "prompt", "response"),
        columns(place / "goals.csv", "goal", "response", target="Sure"),
        columns(place / "behaviours.csv", "Behavior", "response", ContextString=""),
    ]


def test_prompts_and_samples_are_the_same(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY / "aligned"))
    samples = read_data(every_format(tmp_path)[0], tokenizer).samples
    for path in every_format(tmp_path):
        assert read_prompts(str(path), "harmful").prompts == PROMPTS
        skills = read_prompts(str(path), "skill")
        assert skills.prompts == PROMPTS
        assert skills.expected == tuple(row["response"] for row in ROWS)
        assert read_data(path, tokenizer).samples == samples
    path = tmp_path / "prompts.txt"
    path.write_text("\r\n".join(PROMPTS), "utf-8", newline="")
    assert read_prompts(str(path), "harmful").prompts == PROMPTS


def test_commands_read_them(tmp_path: Path) -> None:
    files = {path.name: path for path in every_format(tmp_path)}
    made = []
    for name in ("pairs.jsonl", "alpaca.json"):
        out = tmp_path / f"{name}.stats.safetensors"
        done = command("stats", "--aligned", TINY / "aligned", "--data", files[name], "--out", out)
        assert done.returncode == 0, done.stderr
        made.append(load_file(out))
    assert made[0].keys() == made[1].keys()
    assert all(made[0][name].equal(made[1][name]) for name in made[0])
    done = command(
        "eval", "--model", TINY / "aligned", "--harmful", files["goals.csv"],
        "--skill", f"same={files['alpaca.json']}", "--phrase", "sorry i will not",
        "--max-new-tokens", "12", "--dtype", "float32", "--device", "cpu", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (subject,) = json.loads(done.stdout)["subjects"]
    assert subject["sets"]["goals"]["refused"]["rate"] == 1.0
    assert subject["sets"]["same"]["correct"]["rate"] == 1.0


@pytest.mark.parametrize("name", ["pairs.csv", "alpaca.json"])
def test_corrections_read_them(tmp_path: Path, name: str) -> None:
    files = {path.name: path for path in every_format(tmp_path)}
    adapter = ("--adapter", TINY / "adapters" / "bad", "--aligned", TINY / "aligned")
    patched = []
    for number, path in enumerate((files["pairs.jsonl"], files[name])):
        out = tmp_path / f"out{number}"
        done = command("patch", *adapter, "--safety-data", path, "--task-data", path, "--out", out)
        assert done.returncode == 0, done.stderr
        patched.append((out / "adapter_model.safetensors").read_bytes())
    assert patched[0] == patched[1]
