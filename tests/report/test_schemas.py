"""The schemas of docs/schema: what safeproj writes is valid, and what it does not write is not."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from safeproj import Options, SafeLora, Selection, inspect
from safeproj.gate.policy import Policy
from safeproj.records.checks import Checks
from safeproj.records.rules import RULES
from safeproj.records.scores import Report
from safeproj.report import Failure, Reports, render
from tests.conftest import Trio
from tests.report.checks import check, checks, finding, hostile, mixed
from tests.report.test_report import EXAMPLE, SALORA
from tests.support import MANIFEST, read_json, safeproj, save_safety_module

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-lm"
PAIR = ("--base", EXAMPLES / "base", "--aligned", EXAMPLES / "aligned")
BAD = EXAMPLES / "adapters" / "bad"


def validator(name: str) -> Draft202012Validator:
    """Return the validator of a schema. Each is known by its file's name, as they refer so."""
    registry: Registry[Any] = Registry().with_resources(
        (path.name, Resource.from_contents(read_json(path))) for path in SCHEMAS.iterdir()
    )
    return Draft202012Validator({"$ref": f"{name}-1.schema.json"}, registry=registry)


def printed(*arguments: str | Path) -> Any:
    """Return what the command prints as JSON."""
    result = safeproj(*arguments, "--format", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("path", sorted(SCHEMAS.iterdir()), ids=lambda path: path.name)
def test_a_schema_is_one(path: Path) -> None:
    Draft202012Validator.check_schema(read_json(path))


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(EXAMPLE, id="safe-lora"),
        pytest.param(SALORA, id="salora"),
    ],
)
def test_reports_are_valid(report: Report) -> None:
    validator("report").validate(json.loads(render(report, "json")))
    many = Reports("1.2.3", {"a": report}, {"b": Failure("dir/b", "is empty")})
    validator("reports").validate(json.loads(render(many, "json")))


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(checks(), id="empty"),
        pytest.param(mixed(), id="mixed"),
        pytest.param(hostile(), id="hostile"),
        pytest.param(checks(check(finding(), report=EXAMPLE), check(report=SALORA)), id="scores"),
        pytest.param(checks(policy=Policy().to_dict()), id="policy"),
    ],
)
def test_checks_are_valid(found: Checks) -> None:
    validator("check").validate(found.to_dict())


def test_every_rule_has_a_valid_finding() -> None:
    found = check(*(finding(id_) for id_ in RULES))
    validator("check").validate(checks(found, policy=Policy().to_dict()).to_dict())


CHECK = checks(check(finding(), report=EXAMPLE)).to_dict()


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("tool",),
        ("policy",),
        ("summary",),
        ("checks", 0),
        ("checks", 0, "findings", 0),
        ("checks", 0, "report"),
        ("checks", 0, "report", "projector"),
        ("checks", 0, "report", "selection"),
        ("checks", 0, "report", "inputs"),
        ("checks", 0, "report", "inputs", "base"),
        ("checks", 0, "report", "summary"),
        ("checks", 0, "report", "summary", "cosine"),
        ("checks", 0, "report", "modules", 0),
        ("checks", 0, "report", "unprojected", 0),
    ],
    ids=str,
)
def test_records_are_closed_and_complete(place: tuple[str | int, ...]) -> None:
    found = deepcopy(CHECK)
    schema = validator("check")
    schema.validate(found)
    record: Any = found
    for part in place:
        record = record[part]
    record["other"] = 1
    assert not schema.is_valid(found)
    del record["other"]
    optional = {"revision", "added_rows", "changed", "value"}  # earlier records have none of them
    for name in set(record) - optional:
        value = record.pop(name)
        assert not schema.is_valid(found), name
        record[name] = value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("outcome", "ok"),
        ("schema", "safeproj.check/2"),
        ("checks", {}),
        ("checks", [{**CHECK["checks"][0], "evidence": {"a": "believed"}}]),
        ("policy", {**CHECK["policy"], "threshold": 1.5}),
        ("policy", {**CHECK["policy"], "max-below": "many"}),
        ("summary", {**CHECK["summary"], "passed": -1}),
    ],
)
def test_other_values_are_not_valid(name: str, value: object) -> None:
    assert not validator("check").is_valid({**CHECK, name: value})


def test_fields_that_belong_together_come_together() -> None:
    schema = validator("report")
    bounded = EXAMPLE.to_dict()
    bounded["modules"][0]["cosine_bounds"] = [0.1, 0.2]
    assert not schema.is_valid(bounded)
    bounded["modules"][0] |= {"truncation_error": 0.1, "uncertain": False}
    schema.validate(bounded)
    assert not schema.is_valid({**EXAMPLE.to_dict(), "projector": {"kind": "exact"}})
    schema.validate({**EXAMPLE.to_dict(), "projector": {"kind": "exact", "rank": 4}})
    assert not schema.is_valid({**EXAMPLE.to_dict(), "method": "salora"})


def test_reports_of_checkpoints_are_valid() -> None:
    validator("report").validate(printed("inspect", *PAIR, "--adapter", BAD))


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (Options(Selection(all=True)), {}),
        (Options(Selection(layers=3, include=("q_proj", "v_proj"), exclude=("k_proj",))), {}),
        (Options(), {"projector": "exact", "rank": 4}),
        (Options(), {"projector": "exact", "energy": 0.5}),
    ],
    ids=["all", "layers", "rank", "energy"],
)
def test_reports_of_every_option_are_valid(options: Options, settings: dict[str, Any]) -> None:
    method = SafeLora(str(EXAMPLES / "base"), str(EXAMPLES / "aligned"), **settings)
    found = inspect(method, str(BAD), options)
    validator("report").validate(json.loads(render(found, "json")))


def test_reports_of_several_adapters_are_valid() -> None:
    found = printed("inspect", *PAIR, "--adapter", BAD, "--adapter", EXAMPLES / "adapters/skill")
    validator("reports").validate(found)
    assert len(found["reports"]) == 2


def test_reports_and_manifests_with_an_alignment_file_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "m.safealign.safetensors"
    made = safeproj("align", *PAIR, "--out", file, "--rank", "16")
    assert made.returncode == 0, made.stderr
    using = ("--alignment", file, "--adapter", BAD)
    report = printed("inspect", *using)
    validator("report").validate(report)
    assert "cosine_bounds" in report["modules"][0]
    validator("report").validate(printed("patch", *using, "--out", tmp_path / "p"))
    validator("manifest").validate(read_json(tmp_path / "p" / MANIFEST))


def test_reports_and_manifests_with_a_safety_module_are_valid(trio: Trio, tmp_path: Path) -> None:
    file = save_safety_module(trio.aligned_model, tmp_path / "m.safety.safetensors")
    using = ("--safety-module", file, "--adapter", trio.adapter)
    report = printed("inspect", *using)
    validator("report").validate(report)
    assert "safety_energy" in report["summary"]
    validator("report").validate(printed("patch", *using, "--out", tmp_path / "p"))
    validator("manifest").validate(read_json(tmp_path / "p" / MANIFEST))


@pytest.mark.parametrize(
    "options",
    [(*PAIR, "--all"), ("--merge-rank", "3"), (*PAIR, "--projector", "exact", "--rank", "4")],
    ids=["exact", "low-rank", "chosen by the exact projector"],
)
def test_reports_and_manifests_of_merging_are_valid(
    tmp_path: Path, options: tuple[str | Path, ...]
) -> None:
    using = ("--safe-adapter", EXAMPLES / "adapters/skill", *options, "--adapter", BAD)
    report = printed("inspect", *using)
    validator("report").validate(report)
    assert "merge_error" in report["summary"]
    validator("report").validate(printed("patch", *using, "--out", tmp_path / "p"))
    validator("manifest").validate(read_json(tmp_path / "p" / MANIFEST))
    wrong = {**report, "projector": {**report["projector"], "kind": "approx"}}
    assert not validator("report").is_valid(wrong)


def test_checks_of_adapters_are_valid(tmp_path: Path) -> None:
    result = safeproj("check", BAD, tmp_path / "missing", *PAIR, "--format", "json")
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    validator("check").validate(found)
    assert [each["outcome"] for each in found["checks"]] == ["failed", "undecided"]


def test_manifests_of_checkpoints_are_valid(tmp_path: Path) -> None:
    printed("patch", *PAIR, "--adapter", BAD, "--out", tmp_path / "p", "--all")
    printed("patch", *PAIR, "--adapter", tmp_path / "p", "--out", tmp_path / "q", "--all")
    found = read_json(tmp_path / "q" / MANIFEST)
    schema = validator("manifest")
    schema.validate(found)
    assert "previous" in found["inputs"]["adapter"]
    assert not schema.is_valid({**found, "time": "now"})
    assert not validator("report").is_valid(found)
    for name in ("options", "versions", "output"):
        assert not schema.is_valid({key: found[key] for key in found if key != name})
