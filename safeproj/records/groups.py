"""Findings grouped by rule, and what is said of a group: every format for people shows these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from safeproj.records.checks import Check, Finding
from safeproj.records.rules import RULES, Level, Rule
from safeproj.text import printable

_LARGE = 100.0
"""Numbers from here on are written with three digits, those below with three decimals."""


def message(finding: Finding) -> str:
    """Return what a finding says, on one line."""
    return printable(finding.message)


@dataclass(frozen=True)
class Group:
    """What one rule found in one adapter, at one level.

    Attributes:
        rule: what was found, in general.
        level: what it does to the outcome.
        findings: one or more, the worst first.
        modules: how many modules the adapter has, where all of the findings are about some of them.
    """

    rule: Rule
    level: Level
    findings: tuple[Finding, ...]
    modules: int | None = None

    @property
    def count(self) -> int:
        """How many findings there are."""
        return sum(each.count for each in self.findings)

    def words(self, describe: Callable[[Finding], str] = message) -> str:
        """Return the group in one line: `in 224 of 224 modules, lowest model.layers.31.q 0.094`.

        One finding alone is said in full.

        Args:
            describe: says one finding.
        """
        worst = self.findings[0]
        if self.count == 1:
            return describe(worst)
        if self.rule.worst is not None and worst.value is not None and worst.module is not None:
            number = f"{worst.value:.3f}" if worst.value < _LARGE else f"{worst.value:.3g}"
            shown = f"{self.rule.worst} {printable(worst.module)} {number}"
        else:
            shown = f"such as {describe(worst)}"
        return f"{self._where()}, {shown}"

    def _where(self) -> str:
        for kind in ("module", "tensor", "file"):
            about = [getattr(each, kind) for each in self.findings if each.count == 1]
            if not about or None in about:
                continue
            more = sum(each.count for each in self.findings if each.count > 1)
            count = len(set(about)) + more
            known = self.modules is not None and count <= self.modules and kind == "module"
            of = f" of {self.modules}" if known else ""
            single = (self.modules if of else count) == 1
            return f"in {count}{of} {kind}{'' if single else 's'}"
        return f"{self.count} times"


def grouped(check: Check, findings: Iterable[Finding] | None = None) -> list[Group]:
    """Return what was found about an adapter by rule and level: the worst level first.

    Args:
        check: what was found.
        findings: some of it; what counts if None.
    """
    kinds: dict[tuple[Level, str], list[Finding]] = {}
    for each in check.findings if findings is None else findings:
        kinds.setdefault((each.level, each.id), []).append(each)
    names = {each.name for each in check.report.modules} if check.report is not None else set()
    return [
        Group(
            RULES[id_],
            level,
            tuple(worst_first(found)),
            len(names) if {each.module for each in found if each.count == 1} <= names else None,
        )
        for (level, id_), found in sorted(kinds.items(), key=lambda kind: kind[0][0].severity)
    ]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings of one rule, those with the worst numbers first.

    No number where others have one, such as a cosine that is none, is the worst; what stands for
    others that were left out comes last.
    """

    def key(finding: Finding) -> tuple[bool, float]:
        worst, value = RULES[finding.id].worst, finding.value
        if worst is None or value is None:
            return finding.count > 1, -math.inf
        return finding.count > 1, value if worst == "lowest" else -value

    return sorted(findings, key=key)
