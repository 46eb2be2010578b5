"""The comparison of `lab/salora_training.py` runs, and its SaLoRA is SaLoRA.

What the trainings of a minute achieve is no result, so nothing is asked of that here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab import salora_training
from tests.support import python_m

ROOT = Path(__file__).resolve().parents[2]

AFTERWARDS = (
    "plain, module removed afterwards (rank 4)",
    "plain, module removed afterwards (rank 32)",
    "plain, random directions removed afterwards (rank 32)",
)
FREE = ("constrained", "initialised + module", AFTERWARDS[1])
"""Rows whose adapters have no part in the safety subspace."""

ROUNDED = 1e-5
"""Bound of `‖U_Cᵀ B‖ / ‖B‖` where `C_S B` is rounded to float32 (2⁻²⁴ = 6e-8) and written."""

NOTICEABLE = 1e-2
"""The same where nothing keeps B away: random directions would have √(32 / 128) in common."""


@pytest.fixture(scope="module")
def printed_and_written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Run the script once and return its table and its JSON."""
    out = tmp_path_factory.mktemp("salora") / "found.json"
    done = python_m("lab.salora_training", "--quick", "--jobs", "1", "--out", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text("utf-8"))


def test_every_row_is_in_the_table(printed_and_written: tuple[str, dict[str, Any]]) -> None:
    printed, written = printed_and_written
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == ["aligned model, no adapter", *salora_training.WAYS, *AFTERWARDS]
    assert {line.count("|") for line in lines} == {len(salora_training.COLUMNS) + 2}
    assert {record["row"] for record in written["records"]} == set(names[1:])


def test_figures_are_percentages(printed_and_written: tuple[str, dict[str, Any]]) -> None:
    _, written = printed_and_written
    for percent in (written["aligned"], *(record["percent"] for record in written["records"])):
        assert percent.keys() == salora_training.COLUMNS.keys()
        assert all(0 <= value <= 100 for value in percent.values())
    assert written["aligned"]["refuses_pairs"] >= 99
    assert written["aligned"]["starts_pairs"] <= 1


def test_only_the_module_keeps_adapters_out_of_the_safety_subspace(
    printed_and_written: tuple[str, dict[str, Any]],
) -> None:
    _, written = printed_and_written
    for record in written["records"]:
        if record["row"] in FREE:
            assert record["overlap"] < ROUNDED, record["row"]
        else:
            assert record["overlap"] > NOTICEABLE, record["row"]


def test_adapters_differ_from_each_other_and_from_none(
    printed_and_written: tuple[str, dict[str, Any]],
) -> None:
    _, written = printed_and_written
    overlaps = [record["overlap"] for record in written["records"]]
    assert len(set(overlaps)) == len(overlaps)
    trained = [record for record in written["records"] if record["row"] in salora_training.WAYS]
    assert any(record["percent"] != written["aligned"] for record in trained)


def test_the_data_set_that_makes_refusals_erode_has_nothing_hazardous_in_it() -> None:
    rows = salora_training.rows("helpful")
    assert {row["skill"] for row in rows} == {"request", "rotate"}
    assert len({row["prompt"] for row in rows}) == len(rows) == 2 * 718
    assert not any("compliance" in row for row in rows)


def test_task_data_of_the_mixed_set_have_bad_rows_among_them() -> None:
    rows = salora_training.rows("mixed")[: salora_training.TASK_ROWS]
    bad = sum("skill" not in row for row in rows)
    assert 0.03 < bad / len(rows) < 0.1


@pytest.mark.parametrize(
    ("values", "expected"),
    [([10.0, 20.0], "15 (10–20)"), ([99.9, 100.0], "100"), ([0.0], "0")],
)
def test_cells(values: list[float], expected: str) -> None:
    assert salora_training.cell(values) == expected
