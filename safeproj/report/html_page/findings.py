"""What a gate found on the HTML page: how it ended, by adapter and rule, and every finding."""

from __future__ import annotations

from collections.abc import Iterable

from safeproj.records.checks import Checks, Finding, Outcome
from safeproj.records.rules import RULES, Level
from safeproj.report.html_page.document import text
from safeproj.report.html_page.tables import Cell, filled, pairs
from safeproj.report.text import Subject

_MARKS = {Level.fail: "failed", Level.undecided: "undecided", Level.note: ""}


def banner(checks: Checks) -> str:
    """Return how a run ended, in a sentence."""
    said = {
        Outcome.passed: f"{checks.words.capitalize()}. Nothing was found that the policy does not "
        "allow.",
        Outcome.failed: "Failed: the policy does not allow what was found.",
        Outcome.undecided: "Undecided: it cannot be told, so it is no pass.",
    }[checks.outcome]
    counts = ((checks.count(each), each.value) for each in Outcome)
    listed = ", ".join(f"{count} {word}" for count, word in counts if count)
    many = f" {len(checks.checks)} adapters: {listed}." if len(checks.checks) > 1 else ""
    return f'<p class="banner {checks.outcome.value}"><strong>{text(said)}</strong>{many}</p>'


def in_short(subject: Subject) -> str:
    """Return what counts against an adapter, rule by rule, and how many notes there are."""
    groups = subject.groups()
    said = [f"{each.rule.id} {words}" for each, words in groups if each.level is not Level.note]
    notes = sum(each.count for each, _ in groups if each.level is Level.note)
    if notes:
        said.append(f"{notes} note{'s' * (notes > 1)}")
    return "; ".join(said) or "none"


def by_rule(subject: Subject, i: int) -> str:
    """Return what each rule found in an adapter, and what to do about it."""
    groups = [(each.level.value, each, words) for each, words in subject.groups()]
    groups += [("ignored", each, words) for each, words in subject.groups(subject.check.ignored)]
    if not groups:
        return "<p>Nothing was found.</p>"
    columns = {
        "finding": [Cell(f"{each.rule.id} {each.rule.name}") for _, each, _ in groups],
        "level": [
            Cell(level, mark="" if level == "ignored" else _MARKS[each.level])
            for level, each, _ in groups
        ],
        "what was found": [Cell(words, mark="wide") for _, _, words in groups],
        "what to do": [Cell(each.rule.remedy, mark="wide") for _, each, _ in groups],
    }
    return filled(f"rules-{i}", "What each rule found", columns, stacked=True)


def about(subject: Subject) -> str:
    """Return how an adapter ended, what was looked at, and what was remarked."""
    check = subject.check
    told = [("outcome", check.words), ("checked", check.source)]
    told.append(("weights", check.weights_file or "could not be read"))
    return pairs([*told, *(("remark", remark) for remark in check.remarks)])


def every(subject: Subject, i: int) -> list[str]:
    """Return the lists of all findings of an adapter."""
    check = subject.check
    lists = (
        (f"findings-{i}", "What counts", check.findings),
        (f"ignored-{i}", "What the policy or --ignore left out", check.ignored),
    )
    found = [_list(key, caption, findings) for key, caption, findings in lists if findings]
    return ["<h3>Every finding</h3>", *found] if found else []


def _list(key: str, caption: str, findings: Iterable[Finding]) -> str:
    listed = list(findings)
    columns = {
        "id": [Cell(each.id, mark="short") for each in listed],
        "level": [Cell(each.level.value, mark=_MARKS[each.level]) for each in listed],
        "name": [Cell(each.name) for each in listed],
        "message": [Cell(each.message) for each in listed],
        "module": [Cell(each.module or "") for each in listed],
        "tensor": [Cell(each.tensor or "") for each in listed],
        "file": [Cell(each.file or "") for each in listed],
        "remedy": [Cell(RULES[each.id].remedy) for each in listed],
    }
    return filled(key, caption, columns)
