"""Output formats: one file each, with `render` for one report and `render_many` for several."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from safeproj.report.record import Failure, ModuleReport, Report, Reports

__all__ = ["FORMATS", "Failure", "ModuleReport", "Report", "Reports", "render", "render_many"]

FORMATS = ("table", "json", "markdown")


class Format(Protocol):
    """What a module of this package offers."""

    def render(self, report: Report, *, width: int, color: bool) -> str:
        """Return the report as text, with a newline at its end.

        Args:
            report: the run.
            width: columns of the terminal, for formats that care.
            color: whether terminal colours may be used.
        """

    def render_many(self, reports: Reports, *, width: int, color: bool) -> str:
        """Return the reports of several adapters as one text."""


def render(report: Report, format: str, *, width: int = 100, color: bool = False) -> str:  # noqa: A002
    """Return the report in one of `FORMATS`."""
    module = cast(Format, import_module(f"safeproj.report.{format}"))
    return module.render(report, width=width, color=color)


def render_many(reports: Reports, format: str, *, width: int = 100, color: bool = False) -> str:  # noqa: A002
    """Return the reports of several adapters in one of `FORMATS`."""
    module = cast(Format, import_module(f"safeproj.report.{format}"))
    return module.render_many(reports, width=width, color=color)
