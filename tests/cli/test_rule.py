"""`safeproj rule`: one text for the command, the page and SARIF."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeproj.gate.policy import ALLOWANCES, ALLOWED
from safeproj.records.rules import RULES
from tests.support import safeproj

PAGE = (Path(__file__).parents[2] / "docs" / "gate.md").read_text("utf-8")


def said(*arguments: str, columns: int = 80) -> str:
    done = safeproj("rule", *arguments, env={"COLUMNS": str(columns)})
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= columns
    return done.stdout


def test_all_are_listed_in_order() -> None:
    lines = [line.split() for line in said().splitlines()]
    assert lines == [[rule.id, rule.level.value, rule.name] for rule in RULES.values()]


@pytest.mark.parametrize("wanted", ["SP001", "sp001", "module-below-threshold"])
def test_a_finding_is_explained_by_id_or_name(wanted: str) -> None:
    found = said(wanted, columns=120)
    assert found.startswith("SP001 module-below-threshold\n\n")
    words, rule = " ".join(found.split()), RULES["SP001"]
    assert f"{rule.meaning} It fails. What to do: {rule.remedy}" in words
    assert "`--ignore SP001` leaves it out" in words


def test_what_a_policy_may_allow_is_said() -> None:
    for name, id_ in list(ALLOWANCES.items())[::3]:
        words = " ".join(said(id_).split())
        assert (f"--forbid {name}" if name in ALLOWED else f"--allow {name}") in words
    assert "--ignore" not in said("SP090")


@pytest.mark.parametrize("id_", RULES)
def test_the_page_says_the_same(id_: str) -> None:
    rule = RULES[id_]
    section = f"### {id_} {rule.name}\n\n{rule.text}\n\n*What to do:* {rule.remedy}\n"
    assert section in PAGE


@pytest.mark.parametrize(
    ("wanted", "near"), [("SP99", ""), ("module-below", "module-below-threshold")]
)
def test_what_is_no_finding_is_one_line(wanted: str, near: str) -> None:
    done = safeproj("rule", wanted)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"safeproj: error: no finding is called {wanted!r}; ")
    assert ("did you mean" in done.stderr) == bool(near)
    assert near in done.stderr
    assert "`safeproj rule` lists all" in done.stderr
