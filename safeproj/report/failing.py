"""What `-q` leaves of a gate's table: the findings for which it does not pass."""

from __future__ import annotations

from dataclasses import replace

from safeproj.records.checks import Checks
from safeproj.records.rules import Level
from safeproj.report.table import console_of, print_findings, text_of


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:
    """Return these findings by rule as text; none where all passed."""
    console = console_of(width, color)
    counting = tuple(
        replace(each, findings=tuple(each.at(Level.fail, Level.undecided)))
        for each in checks.checks
    )
    print_findings(console, replace(checks, checks=counting), verbose)
    return text_of(console) if any(each.findings for each in counting) else ""
