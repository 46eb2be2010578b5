"""JUnit XML: valid by a published schema, and counted as test reports count."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from hypothesis import given, settings

from safeproj.records.rules import RULES, Level
from safeproj.report import Check, Checks, render
from tests.report.checks import (
    HOSTILE,
    POLICY,
    Q0,
    TEXTS,
    check,
    checks,
    finding,
    hostile,
    mixed,
    unusable,
)
from tests.report.test_report import EXAMPLE

SCHEMA = Path(__file__).parents[1] / "fixtures/schemas/junit-10.xsd"


@cache
def schema() -> Any:
    return xmlschema.XMLSchema(str(SCHEMA))


def suites(found: Checks) -> ET.Element:
    """Return the root of a document that is valid."""
    text = render(found, "junit")
    assert text.endswith("\n")
    root = ET.fromstring(text.encode())
    schema().validate(text)
    return root


def case(found: Check, id_: str) -> ET.Element:
    (only,) = (
        each
        for each in suites(checks(found)).iter("testcase")
        if each.attrib["name"].startswith(id_)
    )
    return only


def ended(found: Check, id_: str) -> list[str]:
    return [child.tag for child in case(found, id_)]


@pytest.mark.parametrize("found", [checks(), checks(check()), mixed(), hostile()])
def test_every_run_is_valid_and_rendered_alike_twice(found: Checks) -> None:
    suites(found)
    assert render(found, "junit") == render(found, "junit")


def test_an_adapter_is_a_suite_with_a_case_per_rule() -> None:
    root = suites(checks(check(name="one"), check(name="two")))
    assert [suite.attrib["name"] for suite in root] == ["one", "two"]
    for suite in root:
        cases = suite.findall("testcase")
        assert [each.attrib["name"] for each in cases] == [
            f"{id_} {RULES[id_].name}" for id_ in sorted(RULES)
        ]
        assert {each.attrib["classname"] for each in cases} == {suite.attrib["name"]}
        assert not any(len(each) for each in cases)


def test_no_times_and_no_host_are_written() -> None:
    text = render(mixed(), "junit")
    assert not {"time=", "timestamp=", "hostname="} & set(text.replace('"', " ").split())


def test_the_counters_count_the_cases() -> None:
    root = suites(mixed())
    total = {"tests": 0, "failures": 0, "errors": 0}
    for suite in root:
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[name]) == len(suite.findall(f"testcase/{tag}"))
        assert int(suite.attrib["tests"]) == len(RULES)
        for name in total:
            total[name] += int(suite.attrib[name])
    assert {name: int(root.attrib[name]) for name in total} == total
    assert total == {"tests": 3 * len(RULES), "failures": 2, "errors": 2}


def test_what_fails_is_a_failure_with_all_of_its_findings() -> None:
    found = check(finding(module=Q0), finding(message="the cosine is 0.3", module="lm_head"))
    (failure,) = case(found, "SP001")
    assert failure.tag == "failure"
    assert failure.attrib["type"] == "module-below-threshold"
    assert failure.attrib["message"] == (
        f"in 2 modules, such as {Q0}: the cosine is 0.21, expected more than 0.35"
    )
    assert failure.text == (
        f"fail: {Q0}: the cosine is 0.21, expected more than 0.35\nfail: lm_head: the cosine is 0.3"
    )


def test_what_is_undecided_is_an_error() -> None:
    assert ended(check(finding("SP002", "unclear")), "SP002") == ["error"]


def test_what_fails_counts_for_more_than_what_is_undecided() -> None:
    (failure,) = case(
        check(finding("SP030", "b", level=Level.undecided), finding("SP030", "a")), "SP030"
    )
    assert (failure.tag, failure.attrib["message"]) == ("failure", "a; b")
    assert failure.text == "fail: a\nundecided: b"


def test_notes_are_output_of_a_case_that_passed() -> None:
    only = case(check(finding("SP008", "zero", level=Level.note)), "SP008")
    assert [child.tag for child in only] == ["system-out"]
    assert only[0].text == "note: zero"


def test_what_was_ignored_is_skipped() -> None:
    (skipped,) = case(check(ignored=(finding("SP013", "rank 64"),)), "SP013")
    assert skipped.tag == "skipped"
    assert skipped.attrib["message"] == "ignored by the policy"
    assert skipped.text == "fail: rank 64"


def test_what_was_ignored_beside_what_counts_is_output() -> None:
    only = case(check(finding(message="a"), ignored=(finding(message="b"),)), "SP001")
    assert [child.tag for child in only] == ["failure", "system-out"]
    assert only[1].text == "ignored: fail: b"


def test_nothing_passes_of_an_adapter_that_cannot_be_used() -> None:
    found = unusable()
    assert ended(found, "SP090") == ["error"]
    for id_ in RULES.keys() - {"SP090"}:
        assert ended(found, id_) == ["skipped"]


def test_outcome_and_policy_are_properties() -> None:
    root = suites(checks(check(finding())))
    found = {each.attrib["name"]: each.attrib["value"] for each in root.iter("property")}
    assert found["outcome"] == "failed"
    assert found["version"] == "1.2.3"
    assert found["policy.threshold"] == "0.35"
    assert found["policy.max-below"] == "10%"
    assert found["policy.allow.empty-updates"] == "true"
    assert found["policy.ignore"] == '["SP013"]'
    assert "policy.rank" not in found


def test_warnings_of_the_scores_and_remarks_are_output_of_the_suite() -> None:
    (suite,) = suites(checks(check(report=EXAMPLE, remarks=("the signature is valid",))))
    assert suite.findtext("system-out") == "warning: something to know\nthe signature is valid"
    (quiet,) = suites(checks(check()))
    assert quiet.find("system-out") is None


def test_no_absolute_path_is_published(tmp_path: Path) -> None:
    found = check(finding("SP090", f"{tmp_path}: is empty"), source=str(tmp_path))
    text = render(checks(found, policy={**POLICY, "file": str(tmp_path / "x.toml")}), "junit")
    assert str(tmp_path) not in text
    assert 'value="x.toml"' in text


def test_hostile_text_stays_text() -> None:
    text = render(hostile(), "junit")
    assert "<script>" not in text
    assert "]]>" not in text
    assert not {"\x1b", "\x00", "\u202e", "\ufffe", "\r"} & set(text)
    root = suites(hostile())
    # Escapes of what XML and terminals cannot hold, and the rest as it is.
    assert (
        r"evil\n::set-output name=token::x\r::add-mask::\x1b[2J\x00\x07\x9b]]>"
        in (root[0].attrib["name"])
    )
    assert "🧨" in root[0].attrib["name"]
    assert HOSTILE not in text


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_gives_a_valid_document(name: str, message: str) -> None:
    found = check(finding(message=message, module=name), name=name, source=name)
    root = suites(checks(found, policy={name: message, message: [name]}))
    assert root[0].findall("testcase/failure")
