"""What a gate found as JUnit XML: one test suite per adapter, one test case per rule."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.etree import ElementTree as ET

from safeproj.records.checks import Check, Checks, Finding
from safeproj.records.rules import RULES, UNUSABLE, Level, Rule
from safeproj.report.text import Subject, relative, subjects
from safeproj.text import printable

_COUNTERS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
"""Children of a test case, and the attributes of a suite that count them."""


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return JUnit XML. It holds no times, so that the same record gives the same text."""
    root = ET.Element("testsuites", name="safeproj")
    total: Counter[str] = Counter()
    for subject in subjects(checks):
        suite, counts = _suite(subject, checks)
        root.append(suite)
        total += counts
    for name in ("tests", "failures", "errors"):
        root.set(name, str(total[name]))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _suite(subject: Subject, checks: Checks) -> tuple[ET.Element, Counter[str]]:
    check = subject.check
    suite = ET.Element("testsuite", name=printable(check.name))
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(check, checks):
        ET.SubElement(properties, "property", name=printable(name), value=printable(value))
    # Of an adapter that could not be read the other rules were not looked at.
    unusable = any(finding.id == UNUSABLE for finding in check.findings)
    counts: Counter[str] = Counter()
    for rule in sorted(RULES.values(), key=lambda rule: rule.id):
        case = _case(subject, rule, unusable)
        suite.append(case)
        counts["tests"] += 1
        counts.update(_COUNTERS[child.tag] for child in case if child.tag in _COUNTERS)
    aside = [f"warning: {text}" for text in check.report.warnings] if check.report else []
    if aside := [printable(text) for text in (*aside, *check.remarks)]:
        ET.SubElement(suite, "system-out").text = "\n".join(aside)
    for name in ("tests", *_COUNTERS.values()):
        suite.set(name, str(counts[name]))
    return suite, counts


def _properties(check: Check, checks: Checks) -> Iterator[tuple[str, str]]:
    yield "version", checks.version
    yield "outcome", check.outcome.value
    yield "words", check.words
    yield from _flat("policy", checks.policy)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the fields of the policy by their names in safeproj.toml."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif value is not None:
        text = relative(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield name, text


def _case(subject: Subject, rule: Rule, unusable: bool) -> ET.Element:
    """Return the test case of one rule: its worst finding says how it ended."""
    check = subject.check
    case = ET.Element("testcase", classname=printable(check.name), name=f"{rule.id} {rule.name}")
    found = [finding for finding in check.findings if finding.id == rule.id]
    ignored = [finding for finding in check.ignored if finding.id == rule.id]
    levels = {finding.level for finding in found}
    # The sort is stable: what fails comes first, and otherwise what was found first.
    blocking = sorted(
        (finding for finding in found if finding.level is not Level.note),
        key=lambda finding: finding.level is not Level.fail,
    )
    if blocking:
        ended = "failure" if Level.fail in levels else "error"
        headline = "; ".join(words for _, words in subject.groups(blocking))
        _child(case, ended, headline, _lines(subject, blocking), rule.name)
    elif not found and ignored:
        _child(case, "skipped", "ignored by the policy", _lines(subject, ignored))
    elif not found and unusable:
        # Nothing was found because nothing could be looked at: that is no test that passed.
        _child(case, "skipped", "not checked: the adapter cannot be used", [])
    aside = _lines(subject, (each for each in found if each.level is Level.note))
    if found:
        aside += [f"ignored: {line}" for line in _lines(subject, ignored)]
    if aside:
        ET.SubElement(case, "system-out").text = "\n".join(aside)
    return case


def _child(
    case: ET.Element, tag: str, message: str, lines: list[str], kind: str | None = None
) -> None:
    child = ET.SubElement(case, tag, message=message)
    if kind is not None:
        child.set("type", kind)
    child.text = "\n".join(lines) or None


def _lines(subject: Subject, findings: Iterable[Finding]) -> list[str]:
    return [f"{finding.level.value}: {subject.describe(finding)}" for finding in findings]
