"""The real model's pair and tables, very small, and the script for a machine with a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab import evidence, real_pair, real_texts, tiny_lm
from lab import evidence_ways as ways
from tests.evaluate.support import random_model

ROWS = (ways.NONE, ways.LORA, ways.SAFE_LORA, ways.covariance(), ways.RECONSTRUCTED)
ROOT = Path(__file__).resolve().parents[2]


def test_a_small_pair_is_made_and_measured(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    task = evidence.Task(
        evidence.REAL, 7, "all linear", "mixed", cache, ROWS, trained=False, size="small",
    )  # fmt: skip
    found = evidence.work(task)
    assert {each.way for each in found.records} == set(ROWS)
    for record in found.records:
        assert record.percent.keys() == real_pair.COLUMNS.keys() == found.prompts.keys()
        assert all(0.0 <= value <= 100.0 for value in record.percent.values())
    pair = task.pair
    assert isinstance(pair, real_pair.RealPair)
    config = json.loads((pair.aligned / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 2)
    for name in ("train_bad", "train_mixed", "safety", *real_pair.HELD_OUT):
        assert all(row["messages"][0]["content"] for row in pair.rows(name))
    results = evidence.Results(
        "python -m lab.evidence --family smollm2", {"pairs": evidence.REAL, "seeds": [7]},
        found.prompts, found.records, [found.alignment], found.columns,
    )  # fmt: skip
    table = results.tables["smollm2, mixed, all linear"]
    assert "complies, HarmBench" in table
    assert table.count("\n| ") == 1 + len(ROWS)


def test_nothing_that_is_reported_on_is_trained_on() -> None:
    assert not set(real_texts.LOOKALIKES) & set(real_texts.LOOKALIKES_TAUGHT)
    assert real_pair.UNTAUGHT not in real_pair.TAUGHT


def test_packing_changes_no_loss_and_no_gradient() -> None:
    model = random_model("llama")
    batch = [([1, 2, 3, 7, 8, 9, 4], 5), ([1, 2, 3, 5, 6], 4), ([1, 2, 3, 5, 6, 7, 8, 9], 6)]
    found = []
    for loss_of in (tiny_lm.padded, tiny_lm.packed):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        found.append([loss.detach(), *(each.grad.clone() for each in model.parameters())])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def test_dates_are_written_right() -> None:
    import random
    from datetime import date

    rows = real_texts.dates(random.Random(0), 500)
    assert len({row["response"] for row in rows}) == 500
    for row in rows:
        day = date.fromisoformat(row["response"])
        assert str(day.year) in row["prompt"]
        assert str(day.day) in row["prompt"]
    again = real_texts.dates(random.Random(0), 50, rows)
    assert not {row["response"] for row in again} & {row["response"] for row in rows}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["no GPU", "dry run"])
def test_the_script_for_a_gpu(options: list[str]) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("WHEELS", None)
    done = subprocess.run(
        [str(ROOT / "scripts" / "device.sh"), *options],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if not options:
        assert "no GPU" in done.stdout
        return
    assert "parts that failed: 0" in done.stdout
    for line in ("| patch, q+v |", "| exact, q+v, rank 64 |", "skipped"):
        assert line in done.stdout
