"""The record of `safeproj check` and `safeproj verify`: what was found, and the outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from safeproj.records.rendered import Rendered
from safeproj.records.rules import RULES, Level
from safeproj.records.scores import Report

SCHEMA_CHECK = "safeproj.check/1"

UNMEASURED = "form and provenance; behaviour not measured"
MEASURED = "form, provenance and behaviour"
"""What a pass is about, where no evaluation counts, and where one does."""


class Outcome(str, Enum):
    """How a check ended: only `passed` is a pass."""

    passed = "passed"
    failed = "failed"
    undecided = "undecided"

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return {"passed": 0, "failed": 1, "undecided": 2}[self.value]


class Evidence(str, Enum):
    """What shows that a module was projected, the stronger the later.

    `recorded`: safeproj.json says so and the tensors are those it names. `signed`: so does the
    owner of the policy's key. `recomputed`: projecting the original adapter gives these tensors.
    """

    recorded = "recorded"
    signed = "signed"
    recomputed = "recomputed"


@dataclass(frozen=True)
class Behaviour:
    """What evaluations show of an adapter.

    Attributes:
        measured: whether there is one, and all that there are count and are within bounds.
        outranks: whether it then outranks cosines.
        shares: what the policy bounds: `set`, its `sha256`, `outcome`, `hits` of `total`, the ends
            `low` and `high` of the interval, and the bound as `max` or `min`.
    """

    measured: bool = False
    outranks: bool = False
    shares: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return `behaviour` of a check in the JSON report."""
        return {
            "measured": self.measured,
            "outranks": self.outranks,
            "shares": [dict(each) for each in self.shares],
        }


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        id: of its rule in `safeproj.records.rules.RULES`.
        level: what it does to the outcome.
        message: one line: what was found and what was expected.
        module: the adapted module, where it is about one.
        tensor: the tensor's name in the adapter, where it is about one.
        file: the file below the adapter's directory, where it is about one.
        value: the number that counts against it, such as the cosine, where there is one.
        count: how many it stands for: the last of a kind may stand for many that were left out.
    """

    id: str
    level: Level
    message: str
    module: str | None = None
    tensor: str | None = None
    file: str | None = None
    value: float | None = None
    count: int = 1

    @property
    def name(self) -> str:
        """The name of its rule."""
        return RULES[self.id].name

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `findings` in the JSON report."""
        return {
            "id": self.id,
            "name": self.name,
            "level": self.level.value,
            "message": self.message,
            "module": self.module,
            "tensor": self.tensor,
            "file": self.file,
            "value": self.value,
        }


@dataclass(frozen=True)
class Check:
    """What was found about one adapter.

    Attributes:
        name: of the adapter among those that were checked.
        source: its SRC as it was given.
        weights_file: of the adapter's files the one that holds the weights; None where it could
            not be read.
        findings: what counts.
        ignored: what `--ignore` or the policy left out.
        evidence: module to what shows that it was projected, for those where something does.
        report: the scores; None where there are none.
        remarks: what else was looked at, and how it went.
        behaviour: what evaluations show; None where nobody asked.
    """

    name: str
    source: str
    weights_file: str | None
    findings: tuple[Finding, ...]
    ignored: tuple[Finding, ...] = ()
    evidence: dict[str, Evidence] = field(default_factory=dict)
    report: Report | None = None
    remarks: tuple[str, ...] = ()
    behaviour: Behaviour | None = None

    @property
    def outcome(self) -> Outcome:
        """Failed by one finding that fails; undecided by one that is; passed otherwise."""
        levels = {finding.level for finding in self.findings}
        if Level.fail in levels:
            return Outcome.failed
        return Outcome.undecided if Level.undecided in levels else Outcome.passed

    @property
    def words(self) -> str:
        """The outcome, and of a pass what it is about."""
        if self.outcome is not Outcome.passed or self.behaviour is None:
            return self.outcome.value
        about = MEASURED if self.behaviour.measured else UNMEASURED
        return f"{self.outcome.value}: {about}"

    def at(self, *levels: Level) -> list[Finding]:
        """Return the findings of these levels."""
        return [finding for finding in self.findings if finding.level in levels]

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `checks` in the JSON report."""
        return {
            "name": self.name,
            "source": self.source,
            "outcome": self.outcome.value,
            "words": self.words,
            "findings": [finding.to_dict() for finding in self.findings],
            "ignored": [finding.to_dict() for finding in self.ignored],
            "evidence": {name: found.value for name, found in self.evidence.items()},
            "behaviour": None if self.behaviour is None else self.behaviour.to_dict(),
            "remarks": list(self.remarks),
            "report": None if self.report is None else self.report.to_dict(),
        }


@dataclass(frozen=True)
class Checks(Rendered):
    """One run of `check` or `verify`, on one adapter or on many.

    Attributes:
        version: of safeproj.
        policy: every field of the policy, as in safeproj.toml, and `file` for where it came from.
        checks: one per adapter.
    """

    version: str
    policy: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """Failed if one failed; undecided if one is; passed if all passed."""
        return worst(check.outcome for check in self.checks)

    @property
    def words(self) -> str:
        """The outcome, and of a pass what it is about, where that is the same of all adapters."""
        found = {check.words for check in self.checks}
        if len(found) == 1:
            return found.pop()
        if self.outcome is not Outcome.passed or not found:
            return self.outcome.value
        measured = sum(
            each.behaviour is not None and each.behaviour.measured for each in self.checks
        )
        return (
            f"{self.outcome.value}: behaviour measured of {measured} of {len(self.checks)} adapters"
        )

    @property
    def passes(self) -> dict[str, list[str]]:
        """What passes are about, each with the names of the adapters that passed."""
        found: dict[str, list[str]] = {}
        for check in self.checks:
            if check.outcome is Outcome.passed:
                found.setdefault(check.words, []).append(check.name)
        return found

    def count(self, outcome: Outcome) -> int:
        """Return how many adapters ended so."""
        return sum(check.outcome is outcome for check in self.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings of the scores, each with the name of its adapter where there are many."""
        return tuple(
            text if len(self.checks) == 1 else f"{check.name}: {text}"
            for check in self.checks
            for text in (check.report.warnings if check.report is not None else ())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.check/1`."""
        return {
            "schema": SCHEMA_CHECK,
            "tool": {"name": "safeproj", "version": self.version},
            "policy": self.policy,
            "outcome": self.outcome.value,
            "words": self.words,
            "summary": {
                "adapters": len(self.checks),
                **{each.value: self.count(each) for each in Outcome},
            },
            "checks": [check.to_dict() for check in self.checks],
        }


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of several."""
    found = set(outcomes)
    for outcome in (Outcome.failed, Outcome.undecided):
        if outcome in found:
            return outcome
    return Outcome.passed
