"""Output formats: one file each behind one interface."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from safeproj.records.checks import Check, Checks, Evidence, Finding, Outcome
from safeproj.records.evaluations import Evaluation
from safeproj.records.repairs import Repair
from safeproj.records.scores import Failure, ModuleReport, Report, Reports
from safeproj.records.sweeps import Sweep

__all__ = [
    "CHECK_FORMATS",
    "FAILING",
    "FORMATS",
    "Check",
    "Checks",
    "Evaluation",
    "Evidence",
    "Failure",
    "Finding",
    "ModuleReport",
    "Outcome",
    "Record",
    "Repair",
    "Report",
    "Reports",
    "Sweep",
    "render",
]

Record = Report | Reports | Checks | Sweep | Evaluation | Repair
"""What can be rendered: the scores of one adapter or of many, or what a gate found."""

FORMATS = ("table", "json", "markdown", "html")
"""Formats of every record."""

CHECK_FORMATS = (*FORMATS, "sarif", "junit", "github")
"""Formats of what a gate found: the last three know only findings."""


FAILING = "failing"
"""What `-q` leaves of a gate's table; not a choice of `--format`."""


class CheckFormat(Protocol):
    """What every module of a format offers."""

    def render_checks(self, checks: Checks, *, width: int, color: bool, verbose: bool) -> str:
        """Return what a gate found as text, with a newline at its end.

        Formats for people say what each rule found in each adapter (`Group`), those for programs
        every finding.

        Args:
            checks: the run.
            width: columns of the terminal, for formats that care.
            color: whether terminal colours may be used.
            verbose: whether every finding is listed in any format.
        """


class Format(CheckFormat, Protocol):
    """What the modules of `FORMATS` offer beside that."""

    def render(self, report: Report, *, width: int, color: bool) -> str:
        """Return the scores of one adapter as text."""

    def render_many(self, reports: Reports, *, width: int, color: bool) -> str:
        """Return the scores of several adapters as one text."""

    def render_evaluation(self, evaluation: Evaluation, *, width: int, color: bool) -> str:
        """Return what a model does without and with adapters as text."""

    def render_repair(self, repair: Repair, *, width: int, color: bool) -> str:
        """Return what was tried to repair one adapter, and what was reached, as text."""

    def render_sweep(self, sweep: Sweep, *, width: int, color: bool) -> str:
        """Return what interventions on one adapter do as text."""


def render(
    record: Record,
    format: str,  # noqa: A002
    *,
    width: int = 100,
    color: bool = False,
    verbose: bool = False,
) -> str:
    """Return a record in one of `CHECK_FORMATS`; scores in one of `FORMATS`.

    With `verbose` every finding of a gate is listed, in any format.

    Raises:
        SafeprojError: the format needs an extra that is not installed.
    """
    module = cast(Format, import_module(f"safeproj.report.{format}"))
    if isinstance(record, Checks):
        return module.render_checks(record, width=width, color=color, verbose=verbose)
    if isinstance(record, Evaluation):
        return module.render_evaluation(record, width=width, color=color)
    if isinstance(record, Repair):
        return module.render_repair(record, width=width, color=color)
    if isinstance(record, Sweep):
        return module.render_sweep(record, width=width, color=color)
    if isinstance(record, Reports):
        return module.render_many(record, width=width, color=color)
    return module.render(record, width=width, color=color)
