"""What a gate found as SARIF 2.1.0, for code scanning and for viewers of static analysis."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any
from urllib.parse import quote

from safeproj.records.checks import Checks, Finding, Outcome
from safeproj.records.rules import RULES, Level, Rule
from safeproj.report.json import plain
from safeproj.report.text import Subject, by_severity, subjects
from safeproj.text import printable

SCHEMA_URI = "https://json.schemastore.org/sarif-2.1.0.json"

MAX_RESULTS = 25_000
"""Results of one run: GitHub refuses a file with more, and keeps the worst 5,000 of them."""

LEVELS = {Level.fail: "error", Level.undecided: "error", Level.note: "note"}
"""Levels of SARIF. What is undecided blocks as well, and by default GitHub blocks on errors only:
as a warning it would let a change through that the gate does not."""


JUSTIFICATION = "Left out by --ignore or by the policy."

_RULES = sorted(RULES.values(), key=lambda rule: rule.id)
_INDEX = {rule.id: index for index, rule in enumerate(_RULES)}


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return a SARIF log of one run, with a result for every finding."""
    log = {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [_run(checks)]}
    return plain(json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def _run(checks: Checks) -> dict[str, Any]:
    adapters = subjects(checks)
    counted = by_severity(adapters)
    ignored = [(subject, finding) for subject in adapters for finding in subject.check.ignored]
    # Ignored ones come last, so that they are the first to be left out.
    found = [*counted, *ignored]
    seen: Counter[str] = Counter()
    results = []
    for position, (subject, finding) in enumerate(found[:MAX_RESULTS]):
        result = _result(subject, finding, seen)
        if position >= len(counted):
            result["suppressions"] = [{"kind": "external", "justification": JUSTIFICATION}]
        results.append(result)
    return {
        "tool": {"driver": _driver(checks.version)},
        "invocations": [_invocation(checks, len(found))],
        "columnKind": "utf16CodeUnits",
        "results": results,
        "properties": {
            "outcome": checks.outcome.value,
            "words": checks.words,
            "adapters": [
                {
                    "name": printable(check.name),
                    "outcome": check.outcome.value,
                    "words": check.words,
                }
                for check in checks.checks
            ],
        },
    }


def _driver(version: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "safeproj", "version": version}
    if re.fullmatch(r"\d+\.\d+\.\d+", version):  # those before a release are not written so
        found["semanticVersion"] = version
    return {**found, "rules": [_rule(rule) for rule in _RULES]}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": rule.name,
        "shortDescription": {"text": rule.name.replace("-", " ").capitalize()},
        "fullDescription": {"text": rule.meaning},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": LEVELS[rule.level]},
    }


def _invocation(checks: Checks, found: int) -> dict[str, Any]:
    """Return how the run ended: one that could not decide did not succeed."""
    invocation: dict[str, Any] = {
        "executionSuccessful": checks.outcome is not Outcome.undecided,
        "exitCode": checks.outcome.exit_code,
        "exitCodeDescription": checks.words,
    }
    said = [("warning", warning) for warning in checks.warnings]
    said += [
        ("note", f"{check.name}: {remark}") for check in checks.checks for remark in check.remarks
    ]
    if found > MAX_RESULTS:
        left = f"{found - MAX_RESULTS} of {found} results are left out, the least severe ones"
        said.append(("warning", f"{left}; the JSON report has all of them."))
    if said:
        invocation["toolExecutionNotifications"] = [
            {"level": level, "message": {"text": _plain(printable(text))}} for level, text in said
        ]
    return invocation


def _result(subject: Subject, finding: Finding, seen: Counter[str]) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(subject.place(finding)), "uriBaseId": "%SRCROOT%"},
            # The files are not text, but code scanning shows no result without a line.
            "region": {"startLine": 1},
        }
    }
    if logical := _logical(finding):
        location["logicalLocations"] = logical
    return {
        "ruleId": finding.id,
        "ruleIndex": _INDEX[finding.id],
        "level": LEVELS[finding.level],
        "message": {"text": _plain(subject.describe(finding))},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": _fingerprint(subject, finding, seen)},
    }


def _logical(finding: Finding) -> list[dict[str, str]]:
    named = (("module", finding.module), ("tensor", finding.tensor))
    return [{"fullyQualifiedName": printable(name), "kind": kind} for kind, name in named if name]


def _fingerprint(subject: Subject, finding: Finding, seen: Counter[str]) -> str:
    """Return what tells a finding from others from one run to the next, whatever its numbers.

    Its name is the one that GitHub goes by. Without it, GitHub would take a digest of the first
    line of the file, which is the same for all modules.
    """
    about = [finding.id, subject.check.name, finding.module, finding.tensor, finding.file]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    seen[digest] += 1
    return f"{digest}:{seen[digest]}"


def _uri(path: str) -> str:
    return quote(path, safe="/", errors="backslashreplace")


def _plain(text: str) -> str:
    """Return a message in which no name reads as a link: SARIF has `[text](target)` in plain text.

    >>> _plain("experts[3] [here](https://example.org)")
    'experts[3] [here] (https://example.org)'
    """
    return text.replace("](", "] (")
