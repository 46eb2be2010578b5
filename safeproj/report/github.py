"""What a gate found as annotations of a GitHub workflow, and as the summary of its step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from safeproj.records.checks import Checks, Finding, Outcome
from safeproj.records.rules import Level
from safeproj.report.text import Subject, by_severity, subjects
from safeproj.text import printable

if TYPE_CHECKING:
    from safeproj.report import CheckFormat

MAX_ANNOTATIONS = 10
"""Annotations of a step: GitHub shows so many of each level and drops the rest in silence."""

MESSAGE_LIMIT = 4096
"""Characters of an annotation's message; GitHub's runner cuts what is longer."""

SUMMARY_LIMIT = 1 << 20
"""Bytes of UTF-8 in the summary of a step; GitHub refuses one that is longer."""

COMMANDS = {Level.fail: "error", Level.undecided: "warning", Level.note: "notice"}
"""Commands of annotations. They only look different: what blocks is the exit code of the step."""


def render_checks(checks: Checks, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return workflow commands, the worst finding first, and a line for the log.

    The last line holds nothing of the adapter's: a name in it could be a command.
    """
    found = by_severity(subjects(checks))
    many = len(checks.checks) > 1
    shown = found if len(found) <= MAX_ANNOTATIONS else found[: MAX_ANNOTATIONS - 1]
    lines = [_annotation(subject, finding, many) for subject, finding in shown]
    if left := found[len(shown) :]:
        lines.append(_more(left))
    passed, adapters = checks.count(Outcome.passed), len(checks.checks)
    about = "; ".join(checks.passes) if checks.outcome is not Outcome.passed else ""
    said = f" ({about})" if about not in ("", Outcome.passed.value) else ""
    lines.append(f"safeproj: {checks.words}: {passed} of {adapters} adapters passed{said}")
    return "\n".join(lines) + "\n"


def _annotation(subject: Subject, finding: Finding, many: bool) -> str:
    text = subject.describe(finding)
    if many:
        text = f"{printable(subject.check.name)}: {text}"
    return _command(
        COMMANDS[finding.level],
        text,
        title=f"{finding.id} {finding.name}",
        file=printable(subject.place(finding)),
    )


def _more(left: list[tuple[Subject, Finding]]) -> str:
    """Return the annotation that stands for those that do not fit."""
    levels = [finding.level for _, finding in left]
    counts = ", ".join(
        f"{levels.count(level)} {level.value}" for level in COMMANDS if level in levels
    )
    text = f"{len(left)} further findings ({counts}): the report of another format has all of them"
    return _command(COMMANDS[levels[0]], text, title="safeproj: more findings")


def _command(name: str, message: str, **properties: str) -> str:
    r"""Return one workflow command, escaped as GitHub's toolkit does it.

    >>> _command("error", "50%\n::stop", title="a: b, c")
    '::error title=a%3A b%2C c::50%25%0A::stop'
    """
    options = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name} {options}::{_data(_shortened(message))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _shortened(text: str) -> str:
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def summary(checks: Checks, limit: int = SUMMARY_LIMIT) -> str:
    """Return the Markdown for `$GITHUB_STEP_SUMMARY`, cut between lines where it is too long.

    Args:
        checks: the run.
        limit: bytes of UTF-8 that the result may have; less than GitHub's where the step has
            written some already.
    """
    # Imported here: annotations alone need no tables.
    markdown = cast("CheckFormat", import_module("safeproj.report.markdown"))
    text = markdown.render_checks(checks, width=100, color=False)
    if len(text.encode()) <= limit:
        return text
    lines = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
    # The note is longest where all lines are left out.
    budget = limit - len(_note(len(lines), lines).encode())
    kept = 0
    while kept < len(lines) and (budget := budget - len(lines[kept].encode())) >= 0:
        kept += 1
    kept = _without_heads(lines, kept)
    note = _note(len(lines) - kept, lines)
    return "".join(lines[:kept]) + note if len(note.encode()) <= limit else ""


def _without_heads(lines: list[str], kept: int) -> int:
    """Return how many lines to keep so that the last is no heading or head of a table."""

    def rules(line: str) -> bool:
        return line.startswith(("|---", "|:--"))

    while kept and (
        lines[kept - 1].startswith("#")
        or not lines[kept - 1].strip()
        or rules(lines[kept - 1])
        or (kept < len(lines) and rules(lines[kept]))
    ):
        kept -= 1
    return kept


def _note(left: int, lines: list[str]) -> str:
    """Return the last line, set off so that it belongs to no table."""
    return (
        f"\n_{left} of {len(lines)} lines are left out here, as the summary of a step is limited; "
        "the report of another format has all of them._\n"
    )
