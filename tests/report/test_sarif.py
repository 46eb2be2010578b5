"""SARIF: valid by the published schema, and what code scanning goes by."""

from __future__ import annotations

import doctest
import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest
from hypothesis import given, settings

from safeproj.records.rules import RULES, Level
from safeproj.report import Checks, Report, render, sarif
from tests.report.checks import (
    HOSTILE,
    Q0,
    TEXTS,
    WEIGHTS,
    check,
    checks,
    finding,
    hostile,
    mixed,
    unusable,
)
from tests.report.test_report import EXAMPLE

SCHEMA = Path(__file__).parents[1] / "fixtures/schemas/sarif-2.1.0-rtm.5.json"


@cache
def validator() -> Any:
    return jsonschema.Draft4Validator(json.loads(SCHEMA.read_text("utf-8")))


def run(found: Checks) -> Any:
    """Return the run of a log that is valid."""
    log = json.loads(render(found, "sarif"))
    validator().validate(log)
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    return only


def uri(source: str, *, file: str | None = None, weights_file: str | None = WEIGHTS) -> str:
    found = check(finding(file=file), source=source, weights_file=weights_file)
    (result,) = run(checks(found))["results"]
    (location,) = result["locations"]
    artifact = location["physicalLocation"]["artifactLocation"]
    assert artifact["uriBaseId"] == "%SRCROOT%"
    return str(artifact["uri"])


@pytest.mark.parametrize("found", [checks(), checks(check()), mixed(), hostile()])
def test_every_run_is_valid_and_rendered_alike_twice(found: Checks) -> None:
    run(found)
    assert render(found, "sarif") == render(found, "sarif")


def test_every_rule_is_declared_in_order_with_its_remedy() -> None:
    driver = run(checks())["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("safeproj", "1.2.3")
    assert [rule["id"] for rule in driver["rules"]] == sorted(RULES)
    for rule in driver["rules"]:
        assert rule["name"] == RULES[rule["id"]].name
        assert rule["fullDescription"]["text"] == RULES[rule["id"]].meaning
        assert rule["help"]["text"] == RULES[rule["id"]].remedy
        # The limits of code scanning.
        assert len(rule["name"]) <= 255
        assert max(len(rule[each]["text"]) for each in ("shortDescription", "help")) <= 1024


def test_a_version_that_semantic_versioning_does_not_know_is_not_called_one() -> None:
    driver = run(Checks("1.2.3.dev4", {}, ()))["tool"]["driver"]
    assert driver["version"] == "1.2.3.dev4"
    assert "semanticVersion" not in driver
    assert run(checks())["tool"]["driver"]["semanticVersion"] == "1.2.3"


def test_a_result_says_what_was_found_where() -> None:
    found = run(checks(check(finding(module=Q0, tensor="base_model.lora_B"))))
    (result,) = found["results"]
    assert result["ruleId"] == "SP001"
    assert found["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "SP001"
    assert result["level"] == "error"
    assert result["message"]["text"] == f"{Q0}: the cosine is 0.21, expected more than 0.35"
    (location,) = result["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == f"adapters/bad/{WEIGHTS}"
    assert location["physicalLocation"]["region"] == {"startLine": 1}
    assert location["logicalLocations"] == [
        {"fullyQualifiedName": Q0, "kind": "module"},
        {"fullyQualifiedName": "base_model.lora_B", "kind": "tensor"},
    ]
    assert "suppressions" not in result


def test_what_blocks_is_an_error_and_the_worst_comes_first() -> None:
    results = run(mixed())["results"]
    assert [(each["ruleId"], each["level"]) for each in results] == [
        ("SP001", "error"),
        ("SP005", "error"),
        ("SP002", "error"),
        ("SP090", "error"),
        ("SP017", "note"),
        ("SP013", "error"),
    ]


def test_ignored_findings_are_suppressed_results() -> None:
    suppressed = [each for each in run(mixed())["results"] if "suppressions" in each]
    assert [each["ruleId"] for each in suppressed] == ["SP013"]
    (suppression,) = suppressed[0]["suppressions"]
    assert suppression["kind"] == "external"
    assert "policy" in suppression["justification"]


@pytest.mark.parametrize(
    ("found", "successful", "code"),
    [
        (checks(check()), True, 0),
        (checks(check(finding())), True, 1),
        (checks(unusable()), False, 2),
        (mixed(), True, 1),
    ],
)
def test_the_invocation_has_the_exit_code(found: Checks, successful: bool, code: int) -> None:
    (invocation,) = run(found)["invocations"]
    assert invocation["executionSuccessful"] is successful
    assert invocation["exitCode"] == code
    assert "toolExecutionNotifications" not in invocation


def test_the_outcome_of_every_adapter_is_in_the_properties() -> None:
    assert run(mixed())["properties"] == {
        "outcome": "failed",
        "words": "failed",
        "adapters": [
            {"name": "bad", "outcome": "failed", "words": "failed"},
            {"name": "good", "outcome": "passed", "words": "passed"},
            {"name": "broken", "outcome": "undecided", "words": "undecided"},
        ],
    }


def test_warnings_of_the_scores_and_remarks_are_notifications() -> None:
    found = checks(check(report=EXAMPLE, remarks=("the signature is valid",)))
    (invocation,) = run(found)["invocations"]
    assert invocation["toolExecutionNotifications"] == [
        {"level": "warning", "message": {"text": "something to know"}},
        {"level": "note", "message": {"text": "bad: the signature is valid"}},
    ]


def test_more_results_than_code_scanning_takes_are_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sarif, "MAX_RESULTS", 5)
    many = [finding("SP017", str(i)) for i in range(5)] + [finding(module=Q0), finding()]
    found = run(checks(check(*many, ignored=(finding("SP013"),))))
    assert [each["ruleId"] for each in found["results"]] == ["SP001"] * 2 + ["SP017"] * 3
    (notification,) = found["invocations"][0]["toolExecutionNotifications"]
    assert notification["message"]["text"].startswith("3 of 8 results are left out")


def test_the_limit_is_that_of_code_scanning() -> None:
    assert sarif.MAX_RESULTS == 25_000


def fingerprints(found: Checks) -> list[str]:
    return [
        each["partialFingerprints"]["primaryLocationLineHash"] for each in run(found)["results"]
    ]


def test_fingerprints_stay_when_numbers_change_and_differ_otherwise() -> None:
    (first,) = fingerprints(checks(check(finding(module=Q0))))
    (second,) = fingerprints(checks(check(finding(message="the cosine is 0.19", module=Q0))))
    assert first == second
    others = [
        finding("SP002", module=Q0),
        finding(module=f"{Q0}2"),
        finding(tensor=Q0),
        finding(file=Q0),
    ]
    assert len({first, *fingerprints(checks(check(*others)))}) == 5
    assert fingerprints(checks(check(finding(module=Q0), name="other"))) != [first]


def test_findings_about_the_same_thing_are_told_apart() -> None:
    found = fingerprints(checks(check(finding(message="a"), finding(message="b"))))
    assert found[0] != found[1]


def test_an_adapter_below_the_current_directory_is_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "work" / "my adapters" / "ä%b"
    adapter.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    expected = f"my%20adapters/%C3%A4%25b/{WEIGHTS}"
    assert uri("my adapters/ä%b") == expected
    assert uri("./my adapters/../my adapters/ä%b/") == expected
    assert uri(str(adapter)) == expected
    assert uri(str(adapter), file="sub/x.bin") == "my%20adapters/%C3%A4%25b/sub/x.bin"
    monkeypatch.chdir(adapter)
    assert uri(".") == WEIGHTS
    assert uri(".", weights_file=None) == "."


def test_an_adapter_elsewhere_is_named_by_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "bad").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert uri(str(tmp_path / "bad")) == f"bad/{WEIGHTS}"
    assert uri("../bad") == f"bad/{WEIGHTS}"
    assert uri(str(tmp_path / "missing"), weights_file=None) == "missing"
    assert uri("org/name@0123") == f"org/name/{WEIGHTS}"
    assert uri("/", weights_file=None) == "."


def test_a_link_to_the_current_directory_is_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "adapters" / "bad").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    assert uri(str(tmp_path / "link" / "adapters" / "bad")) == f"adapters/bad/{WEIGHTS}"


def test_an_adapter_that_is_a_file_is_the_place_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert uri("a/x.gguf", weights_file="x.gguf") == "a/x.gguf"
    assert uri("a/x.gguf", weights_file=None) == "a/x.gguf"
    assert uri("a/x.gguf", file="y.bin") == "a/y.bin"


@pytest.mark.parametrize("file", ["/etc/passwd", "../../etc/passwd", "//etc/./passwd"])
def test_the_name_of_an_unsafe_file_leads_nowhere(file: str) -> None:
    assert uri("adapters/bad", file=file) == "adapters/bad/etc/passwd"


def test_a_name_that_is_no_unicode_is_written_as_escapes() -> None:
    assert uri("org/name", file="a\udcff") == "org/name/a%5Cudcff"


def test_a_name_with_a_colon_is_no_scheme() -> None:
    assert uri("javascript:alert(1)").startswith("javascript%3Aalert")
    assert uri("C:\\adapters\\bad") == f"adapters/bad/{WEIGHTS}"


def test_no_absolute_path_of_the_adapter_is_published(tmp_path: Path) -> None:
    found = finding("SP090", f"{tmp_path}/adapter_config.json is missing")
    text = render(checks(check(found, source=str(tmp_path))), "sarif")
    assert str(tmp_path) not in text
    assert f"{tmp_path.name}/adapter_config.json is missing" in text


def test_hostile_names_are_shown_as_escapes_and_are_no_links() -> None:
    text = render(hostile(), "sarif")
    assert not {"\x1b", "\u202e", "\u2028", "\x9b", "\u200b"} & set(text)
    for result in run(hostile())["results"]:
        assert "](" not in result["message"]["text"]
        assert "\\x1b[2J" in result["message"]["text"]


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_any_text_gives_a_valid_log(name: str, source: str, message: str, file: str) -> None:
    found = finding(message=message, module=name, file=file)
    only = run(checks(check(found, name=name, source=source, weights_file=name)))
    (result,) = only["results"]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert not place.startswith("/")
    assert place.isascii()
    assert ".." not in place.split("/")
    assert unquote(place)


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(sarif) == (0, 1)


def test_a_report_with_scores_is_not_repeated() -> None:
    assert isinstance(EXAMPLE, Report)
    assert "alignment_norm" not in render(checks(check(report=EXAMPLE)), "sarif")


def test_levels_of_findings_go_before_those_of_their_rules() -> None:
    (result,) = run(checks(check(finding("SP008", level=Level.note))))["results"]
    assert result["level"] == "note"
    assert HOSTILE not in str(result)
