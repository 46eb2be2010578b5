"""What a gate found as annotations of a GitHub workflow, and as the summary of its step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, cast

from safeproj.records.checks import Checks, Outcome
from safeproj.records.groups import Group
from safeproj.records.rules import Level
from safeproj.report.text import Subject, subjects
from safeproj.text import printable

if TYPE_CHECKING:
    from safeproj.report import CheckFormat

MAX_ANNOTATIONS = 10
"""Annotations of a step: GitHub shows so many of each level and drops the rest in silence."""

MESSAGE_LIMIT = 4096
"""Characters of an annotation's message; GitHub's runner cuts what is longer."""

SUMMARY_LIMIT = 1 << 20
"""Bytes of UTF-8 in the summary of a step; GitHub refuses one that is longer."""

COMMANDS = {Level.fail: "error", Level.undecided: "error", Level.note: "notice"}
"""Commands of annotations. What is undecided ends the step too, so it is no mere warning."""


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return workflow commands, to adapters in turn and the worst first, and a line for the log.

    The last line holds nothing of the adapter's: a name in it could be a command.
    """
    found = _in_turn(subjects(checks), verbose)
    many = len(checks.checks) > 1
    shown = found if len(found) <= MAX_ANNOTATIONS else found[: MAX_ANNOTATIONS - 1]
    lines = [_annotation(each, many) for each in shown]
    if left := found[len(shown) :]:
        lines.append(_more(left))
    passed, adapters = checks.count(Outcome.passed), len(checks.checks)
    about = "; ".join(checks.passes) if checks.outcome is not Outcome.passed else ""
    said = f" ({about})" if about not in ("", Outcome.passed.value) else ""
    lines.append(f"safeproj: {checks.words}: {passed} of {adapters} adapters passed{said}")
    return "\n".join(lines) + "\n"


def error(message: str) -> str:
    """Return an error that ended the command as an annotation."""
    return _command("error", printable(message), title="safeproj")


@dataclass(frozen=True)
class _Said:
    """What an annotation says: a group, or one finding of it."""

    subject: Subject
    group: Group
    words: str


def _in_turn(found: Sequence[Subject], verbose: bool) -> list[_Said]:
    """Return what each adapter's worst is, then the second of each, and so on; notes come last."""
    blocking: list[tuple[int, _Said]] = []
    notes: list[tuple[int, _Said]] = []
    for subject in found:
        said = [_Said(subject, *each) for each in subject.groups()]
        if verbose:
            said = [
                _Said(subject, replace(each.group, findings=(one,)), subject.describe(one))
                for each in said
                for one in each.group.findings
            ]
        first = sum(each.group.level is not Level.note for each in said)
        blocking += enumerate(said[:first])
        notes += enumerate(said[first:])
    return [said for turn in (blocking, notes) for _, said in sorted(turn, key=_place)]


def _place(numbered: tuple[int, _Said]) -> tuple[int, int]:
    """Return what orders annotations: within a turn what fails comes first, then the adapters."""
    number, said = numbered
    return number, said.group.level.severity


def _annotation(said: _Said, many: bool) -> str:
    text = said.words
    if many:
        text = f"{printable(said.subject.check.name)}: {text}"
    return _command(
        COMMANDS[said.group.level],
        text,
        title=f"{said.group.rule.id} {said.group.rule.name}",
        file=printable(said.subject.place(said.group.findings[0])),
    )


def _more(left: list[_Said]) -> str:
    """Return the annotation that stands for those that do not fit."""
    counts: Counter[Level] = Counter()
    for each in left:
        counts[each.group.level] += each.group.count
    listed = ", ".join(f"{counts[level]} {level.value}" for level in Level if counts[level])
    text = f"{counts.total()} further findings ({listed}): the report of another format has "
    return _command(
        COMMANDS[min(counts, key=lambda level: level.severity)],
        f"{text}all of them",
        title="safeproj: more findings",
    )


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


def summary(checks: Checks, limit: int = SUMMARY_LIMIT, *, verbose: bool = False) -> str:
    """Return the Markdown for `$GITHUB_STEP_SUMMARY`, cut between lines where it is too long.

    Args:
        checks: the run.
        limit: bytes of UTF-8 that the result may have; less than GitHub's where the step has
            written some already.
        verbose: whether every finding is listed.
    """
    # Imported here: annotations alone need no tables.
    markdown = cast("CheckFormat", import_module("safeproj.report.markdown"))
    text = markdown.render_checks(checks, width=100, color=False, verbose=verbose)
    if len(text.encode()) <= limit:
        return text
    lines = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
    # The note is longest where all lines are left out.
    budget = limit - len(_note(len(lines), lines).encode()) - len(_END.encode())
    kept = 0
    while kept < len(lines) and (budget := budget - len(lines[kept].encode())) >= 0:
        kept += 1
    kept = _without_heads(lines, kept)
    folded = [line for line in lines[:kept] if line.startswith((_BEGIN, _END.strip()))]
    end = _END if folded and folded[-1].startswith(_BEGIN) else ""
    note = _note(len(lines) - kept, lines)
    return "".join(lines[:kept]) + end + note if len(note.encode()) <= limit else ""


_BEGIN, _END = "<details>", "\n</details>\n"
"""Around lines that are folded. What is open where a summary is cut would fold the note as well."""


def _without_heads(lines: list[str], kept: int) -> int:
    """Return how many lines to keep so that the last is no heading, or head of a table."""

    def rules(line: str) -> bool:
        return line.startswith(("|---", "|:--"))

    while kept and (
        lines[kept - 1].startswith(("#", _BEGIN))
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
