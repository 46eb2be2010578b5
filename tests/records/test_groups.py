"""Findings by rule, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

from safeproj.records.groups import grouped, worst_first
from safeproj.records.rules import Level
from tests.report.checks import Q0, check, finding
from tests.report.test_report import module, report

MODULES = tuple(module(f"model.layers.{i}.mlp.up_proj", 0.1 + i / 100) for i in range(6))


def words(*findings: object, of: int | None = None) -> list[str]:
    """Return what is said of findings about an adapter with so many modules, or without scores."""
    scores = None if of is None else report(*MODULES[:of])
    return [each.words() for each in grouped(check(*findings, report=scores))]  # type: ignore[arg-type]


def low(i: int, value: float | None) -> object:
    each = finding(message=f"{MODULES[i].name}: cosine {value}", module=MODULES[i].name)
    return replace(each, value=value)


def test_a_group_says_how_many_of_how_many_and_which_is_worst() -> None:
    found = [low(2, 0.12), low(5, 0.094), low(0, 0.1)]
    assert words(*found, of=6) == ["in 3 of 6 modules, lowest model.layers.5.mlp.up_proj 0.094"]
    assert words(*found) == ["in 3 modules, lowest model.layers.5.mlp.up_proj 0.094"]


def test_the_highest_number_is_the_worst_of_other_rules() -> None:
    found = [
        replace(finding("SP035", "x", module=each.name), value=value)
        for each, value in zip(MODULES, (3e6, 2e9), strict=False)
    ]
    assert words(*found, of=6) == ["in 2 of 6 modules, highest model.layers.1.mlp.up_proj 2e+09"]


def test_one_finding_is_said_in_full() -> None:
    assert words(low(0, 0.1), of=6) == ["model.layers.0.mlp.up_proj: cosine 0.1"]


def test_a_cosine_that_is_no_number_is_worse_than_any() -> None:
    (said,) = words(low(0, 0.01), low(1, None), of=6)
    assert said == "in 2 of 6 modules, such as model.layers.1.mlp.up_proj: cosine None"


def test_what_has_no_number_is_said_by_its_first() -> None:
    files = [finding("SP017", f"{each} is not judged", file=each) for each in ("a", "b")]
    assert words(*files) == ["in 2 files, such as a is not judged"]
    tensors = [finding("SP005", "is no part", tensor=each) for each in ("a", "b", "b")]
    assert words(*tensors) == ["in 2 tensors, such as is no part"]
    assert words(finding("SP011", "a"), finding("SP011", "b")) == ["2 times, such as a"]


def test_a_module_with_two_findings_is_one_module() -> None:
    found = [
        replace(finding("SP036", "x", module=MODULES[0].name), value=value) for value in (0.1, 0.2)
    ]
    assert words(*found, of=1) == ["in 1 of 1 module, highest model.layers.0.mlp.up_proj 0.200"]


def test_modules_that_were_not_scored_are_not_counted_against_those_that_were() -> None:
    found = [finding("SP006", "no weight", module=each) for each in (Q0, f"{Q0}2")]
    assert words(*found, of=6) == ["in 2 modules, such as no weight"]


def test_findings_that_were_left_out_are_counted() -> None:
    rest = replace(finding(message="and 4 more of this kind"), count=4)
    assert words(rest, low(0, 0.1), low(1, 0.2), of=6) == [
        "in 6 of 6 modules, lowest model.layers.0.mlp.up_proj 0.100"
    ]


def test_levels_are_apart_and_the_worst_comes_first() -> None:
    found = [
        finding("SP017", "a note"),
        finding("SP002", "unclear"),
        finding("SP005", "fails"),
        finding("SP005", "is allowed", level=Level.note),
    ]
    groups = grouped(check(*found))
    assert [(each.level.value, each.rule.id) for each in groups] == [
        ("fail", "SP005"),
        ("undecided", "SP002"),
        ("note", "SP017"),
        ("note", "SP005"),
    ]


def test_findings_without_numbers_keep_their_order() -> None:
    found = [finding("SP005", each) for each in "cab"]
    assert worst_first(found) == found
