"""docs/evidence-tables.md holds what its commands make: a part of them is made again here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab import evidence, real_pair
from lab import evidence_ways as ways
from lab.pairs import COLUMNS, MODULES
from safeproj.sweeping.controls import COMPLEMENT, SHRINK
from tests.support import python_m

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence-tables.md"

CELL = re.compile(r"(\d+)(?: \((\d+)–(\d+)\))?")

REMADE = (
    ways.NONE,
    ways.LORA,
    ways.SAFE_LORA,
    ways.control_of(ways.SAFE_LORA, SHRINK),
    ways.EXACT,
    ways.control_of(ways.EXACT, COMPLEMENT),
    ways.REMOVED_FEW,
    ways.covariance(),
    ways.covariance(control="random H of the same spectrum"),
)
"""Rows of each kind, few enough for a minute."""

KINDS = (COLUMNS, real_pair.COLUMNS)
"""What is measured on tiny models, and on the real one."""

Row = dict[str, tuple[float, float, float]]
"""What a row of a table says by column: mean, and the ends of its interval."""


def blocks(page: str) -> dict[str, str]:
    """Return what is between the markers, by name."""
    found = re.findall(r"<!-- evidence: (.*) -->\n((?:.*\n)*?)<!-- end -->", page)
    return {name: text for name, text in found if text.strip()}


def table(block: str) -> dict[str, list[str]]:
    """Return the cells of a table by the row's name, the head first."""
    lines = [line for line in block.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}


def figures(block: str) -> dict[str, Row]:
    """Return the figures of a table of percentages."""
    found: dict[str, Row] = {}
    for number, (name, cells) in enumerate(table(block).items()):
        if number == 0:
            columns = next(each for each in KINDS if [*each.values(), evidence.SIZE] == cells)
        else:
            parsed = [CELL.fullmatch(cell) for cell in cells[:-1]]
            found[name] = {
                column: (float(m[1]), float(m[2] or m[1]), float(m[3] or m[1]))
                for column, m in zip(columns, parsed, strict=True)
                if m is not None
            }
    return found


def of_percentages(found: dict[str, str]) -> dict[str, str]:
    """Return those tables that have a row for each thing that was done."""
    return {name: text for name, text in found.items() if name.split(", ")[-1] in MODULES}


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """The tables of the page."""
    return blocks(PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def remade() -> Iterator[list[evidence.Record]]:
    """Some rows of the example's `mixed` table, made again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = evidence.Task("llama", 0, "all linear", "mixed", None, REMADE, trained=False)
        yield evidence.work(task).records
    finally:
        torch.set_num_threads(threads)


def test_the_example_again_is_within_the_stated_intervals(
    shown: dict[str, str], remade: list[evidence.Record]
) -> None:
    stated = figures(shown["example, mixed, all linear"])
    assert [record.way for record in remade] == list(REMADE)
    for record in remade:
        for column, (_, low, high) in stated[record.way].items():
            # The interval is printed in whole percents.
            assert low - 0.5 <= record.percent[column] <= high + 0.5, (record.way, column)


def test_every_table_is_whole_and_has_its_command_above_it(shown: dict[str, str]) -> None:
    assert of_percentages(shown)
    for name, text in shown.items():
        above = text[: text.index("|")]
        assert re.search(r"^    python -m lab\.evidence( |$)", above, re.MULTILINE), name
        widths = {len(cells) for cells in table(text).values()}
        assert len(widths) == 1, name
    for name, text in of_percentages(shown).items():
        found = figures(text)
        assert found, name
        columns = real_pair.COLUMNS if name.startswith(evidence.REAL) else COLUMNS
        for way, row in found.items():
            assert row.keys() == columns.keys(), (name, way)
            assert all(0 <= low <= mean <= high <= 100 for mean, low, high in row.values())


def test_the_tables_of_the_example_have_every_way_that_needs_no_training(
    shown: dict[str, str],
) -> None:
    tables = {name: text for name, text in of_percentages(shown).items() if "example" in name}
    assert tables.keys() == {f"example, {data}, all linear" for data in ("bad", "skill", "mixed")}
    (names,) = {tuple(figures(text)) for text in tables.values()}
    assert set(REMADE) <= set(names)
    assert {ways.covariance(mu) for mu in ways.MUS} <= set(names)


def test_the_tables_of_several_seeds_have_trained_ways_as_well(shown: dict[str, str]) -> None:
    for name, text in of_percentages(shown).items():
        found = set(figures(text))
        if name.startswith(evidence.REAL):
            _, data, modules = name.split(", ")
            assert found == set(evidence.REAL_ROWS[data, modules])
        elif not name.startswith("example"):
            assert set(ways.TRAININGS) <= found, name
            assert {ways.REMOVED, ways.REMOVED_RANDOM, ways.TAU} <= found, name


def results(seeds: int) -> evidence.Results:
    """Return results with two rows and made-up figures."""
    figures = {
        ways.SAFE_LORA: [0.0, 0.0, 2.0],
        ways.control_of(ways.SAFE_LORA, SHRINK): [4.0, 6.0, 8.0],
    }
    records = [
        evidence.Record("llama", seed, "q+v", "mixed", way, dict.fromkeys(COLUMNS, value))
        for way, values in figures.items()
        for seed, value in enumerate(values[:seeds])
    ]
    alignment = {"modules": "q+v", "data": "mixed", "norm": 1.0, "strength": 0.5, "directions": 0.1}
    for kind in ("approx", "exact"):
        alignment |= {f"{kind}_scale": 0.05, f"{kind}_cosine": 0.4}
    settings = {"pairs": "llama", "seeds": list(range(seeds))}
    prompts = dict.fromkeys(COLUMNS, 150)
    return evidence.Results("python -m lab.evidence", settings, prompts, records, [alignment])


def test_differences_are_paired_by_seed_and_their_intervals_those_of_students_t() -> None:
    found = table(results(3).tables["llama, differences"])
    row = found[f"{ways.SAFE_LORA} − {ways.control_of(ways.SAFE_LORA, SHRINK)}"]
    # Of -4, -6 and -6: mean -5.33, standard error 0.667, t = 4.303 with 2 degrees of freedom.
    assert row == ["`mixed`, q+v", *["**-5 (-8 to -2)**"] * len(COLUMNS)]


def test_one_seed_has_the_intervals_of_the_prompts_and_no_differences() -> None:
    tables = results(1).tables
    assert table(tables["llama, mixed, q+v"])[ways.SAFE_LORA][0] == "0 (0–2)"
    assert "llama, differences" not in tables


def test_the_summary_takes_the_best_of_those_with_little_compliance() -> None:
    found = table(results(3).tables["llama, summary"])
    assert found["Safe LoRA (N or tau)"] == [f"1 (0–4): {ways.SAFE_LORA}"]
    assert found["exact projector"] == ["not run"]


def test_read_and_write_put_the_same_tables_between_the_markers(tmp_path: Path) -> None:
    results(3).save(tmp_path / "found.json")
    names = list(results(3).tables)
    page = tmp_path / "page.md"
    empty = "".join(f"<!-- evidence: {name} -->\n<!-- end -->\n" for name in names)
    page.write_text(f"before\n{empty}after\n", "utf-8")
    words = ["--read", str(tmp_path / "found.json"), "--write", str(page)]
    done = python_m("lab.evidence", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    evidence.main(words)  # in place of the first
    found = blocks(page.read_text("utf-8"))
    assert {name: text.strip("\n") for name, text in found.items()} == results(3).tables
    assert page.read_text("utf-8").startswith("before\n")
    assert page.read_text("utf-8").endswith("after\n")
    assert json.loads((tmp_path / "found.json").read_text("utf-8"))["command"]


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(SystemExit, match="evidence: new"):
        evidence.with_tables("no markers\n", {"new": "| a |"})


def test_a_resumed_run_measures_only_the_rows_without_figures() -> None:
    done = results(2)
    task = evidence.Task("llama", 0, "q+v", "mixed", None)
    rows = (ways.SAFE_LORA, ways.EXACT, ways.LORA)
    wanted = [replace(task, seed=seed, rows=rows) for seed in range(3)]
    left = evidence.missing([task, *wanted, replace(task, seed=2)], done)
    short = [replace(each, rows=rows[1:]) for each in wanted[:2]]
    assert left == [*short, wanted[2], replace(task, seed=2)]
    assert evidence.missing(wanted, None) == wanted


def test_what_a_resumed_run_finds_joins_what_there_was() -> None:
    before = results(1)
    record = evidence.Record("llama", 0, "q+v", "mixed", ways.EXACT, dict.fromkeys(COLUMNS, 3.0))
    about = {"seed": 0, "modules": "q+v", "data": "mixed", "norm": 2.0}
    found = evidence.Found([record], about, before.prompts, before.columns)
    before.alignment[0]["seed"] = 0
    after = evidence.with_found(before, found, evidence.parsed([]), "again")
    assert after.records == [*before.records, record]
    assert after.alignment == [{**before.alignment[0], "norm": 2.0}]
    assert after.settings["seeds"] == [0]
