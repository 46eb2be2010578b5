"""Tables in narrow terminals: nothing is broken inside a word, and nothing is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from safeproj.records.evaluations import Evaluation, Subject
from safeproj.records.rates import Rate
from safeproj.records.repairs import AFTER, BEFORE, Attempt, Goal, Repair
from safeproj.records.scores import Failure, Reports
from safeproj.report import render
from tests.report.checks import check, checks, finding
from tests.report.test_findings import run
from tests.report.test_report import EXAMPLE, report
from tests.sweep.records import EXAMPLE as SWEEP

SETS = {"harmful": "advbench", "skill": "text-to-sql"}


def subject(name: str, refused: int, right: int) -> Subject:
    sets = {
        SETS["harmful"]: {
            "refused": Rate(refused, 60),
            "complied": Rate(60 - refused, 60),
            "empty": Rate(0, 60),
        },
        SETS["skill"]: {"correct": Rate(right, 60)},
    }
    return Subject(name, None, sets)


def evaluation(*names: str) -> Evaluation:
    return Evaluation(
        version="1.2.3",
        versions={},
        model={"source": "org/model"},
        judge={"kind": "keywords", "phrases": ["sorry i will not"]},
        options={},
        sets=tuple(
            {"name": name, "kind": kind, "source": f"{name}.csv", "prompts": 60}
            for kind, name in SETS.items()
        ),
        subjects=tuple(subject(name, 60 - i, 57 + i) for i, name in enumerate(names)),
    )


CONTROL = "the adapter times 0.3"
LONGEST = "covariance-weighted correction layer by layer, mu 3"
REPAIR = Repair(
    version="1.2.3",
    inputs={},
    goal=Goal(0.95, 0.05),
    methods=("Safe LoRA",),
    splits={"harmful": {"fit": 80, "validation": 60, "test": 60}},
    validation=(
        Attempt("no adapter", (), None, Rate(60, 60), Rate(23, 60)),
        Attempt("the adapter as it is", (), 0.0, Rate(0, 60), Rate(59, 60)),
        Attempt(LONGEST, ("--mu", "3"), 3.3, Rate(60, 60), Rate(59, 60)),
    ),
    controls=(Attempt(CONTROL, (), 0.7, Rate(60, 60), Rate(23, 60)),),
    chosen=2,
    test=evaluation("no adapter", BEFORE, AFTER, CONTROL),
    out="out",
    command=("safeproj", "patch", "my-lora", "--out", "out"),
)

RECORDS: dict[str, Any] = {
    "one": EXAMPLE,
    "many": Reports(
        "1.2.3",
        {name: replace(EXAMPLE, warnings=("w",)) for name in ("bad", "my-adapter-for-sql")},
        {"broken": Failure("adapters/broken", "it is no adapter")},
    ),
    "gate": run(),
    "passed": checks(
        check(name="bad", report=report()),
        check(finding(), finding("SP020", "there is no file"), name="other"),
    ),
    "evaluation": evaluation("no adapter", "my-lora", "my-lora-safe"),
    "repair": REPAIR,
    "sweep": SWEEP,
}


def words(record: Any, width: int) -> Counter[str]:
    """Return how often each word is in the table of a record, but for headings said again."""
    return Counter(render(record, "table", width=width).split())


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("kind", RECORDS)
def test_words_are_whole_at_any_width(kind: str, width: int) -> None:
    record = RECORDS[kind]
    wide, narrow = words(record, 400), words(record, width)
    assert narrow.keys() - wide.keys() == set()
    assert wide.keys() - narrow.keys() == set()
    assert all(narrow[each] >= count for each, count in wide.items())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", ["one", "many", "evaluation", "repair", "sweep"])
def test_tables_fit_the_screen(kind: str, width: int) -> None:
    lines = render(RECORDS[kind], "table", width=width).splitlines()
    tables = [line for line in lines if "  " in line.strip()]
    assert len(tables) > 2
    assert max(map(cell_len, tables)) <= width
