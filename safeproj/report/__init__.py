"""Output formats: one file each behind one interface."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from safeproj.errors import SafeprojError
from safeproj.records.checks import Check, Checks, Evidence, Finding, Outcome
from safeproj.records.evaluations import Evaluation
from safeproj.records.extractions import Extraction
from safeproj.records.repairs import Repair
from safeproj.records.scores import Failure, ModuleReport, Report, Reports
from safeproj.records.sweeps import Sweep
from safeproj.storage.source import StrPath
from safeproj.storage.wholefile import replace_file
from safeproj.text import first_line

__all__ = [
    "CHECK_FORMATS",
    "FAILING",
    "FORMATS",
    "WIDTH",
    "Check",
    "Checks",
    "Evaluation",
    "Evidence",
    "Extraction",
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
    "save",
    "write",
]

WIDTH = 100
"""Columns of a table where no terminal says otherwise, so that logs look alike everywhere."""

Record = Report | Reports | Checks | Sweep | Evaluation | Repair | Extraction
"""What can be rendered: the scores of one adapter or of many, or what a gate found."""

FORMATS = ("table", "json", "markdown", "html")
"""Formats of every record."""

CHECK_FORMATS = (*FORMATS, "sarif", "junit", "github")
"""Formats of what a gate found: the last three know only findings."""

EXTRACTION_FORMATS = FORMATS[:2]
"""Formats of what was extracted."""

SUFFIXES = {
    ".txt": "table",
    ".json": "json",
    ".md": "markdown",
    ".html": "html",
    ".htm": "html",
    ".sarif": "sarif",
    ".xml": "junit",
}
"""Ends of a file's name, and the format that each stands for."""


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

    def render_extraction(self, extraction: Extraction, *, width: int, color: bool) -> str:
        """Return how closely an adapter holds a full fine-tune as text; `EXTRACTION_FORMATS`."""

    def render_repair(self, repair: Repair, *, width: int, color: bool) -> str:
        """Return what was tried to repair one adapter, and what was reached, as text."""

    def render_sweep(self, sweep: Sweep, *, width: int, color: bool) -> str:
        """Return what interventions on one adapter do as text."""


def render(
    record: Record,
    format: str,  # noqa: A002
    *,
    width: int = WIDTH,
    color: bool = False,
    verbose: bool = False,
) -> str:
    """Return what a gate found in one of `CHECK_FORMATS`, other records in one of `FORMATS`.

    What was extracted has `EXTRACTION_FORMATS`.

    With `verbose` every finding of a gate is listed, in any format.

    Raises:
        SafeprojError: there is no such format of it, or it needs an extra that is not installed.
    """
    known: tuple[str, ...] = CHECK_FORMATS if isinstance(record, Checks) else FORMATS
    if isinstance(record, Extraction):
        known = EXTRACTION_FORMATS
    if format not in known and not (format == FAILING and isinstance(record, Checks)):
        raise SafeprojError(f"--format {format}: expected {', '.join(known[:-1])} or {known[-1]}")
    module = cast(Format, import_module(f"safeproj.report.{format}"))
    if isinstance(record, Checks):
        return module.render_checks(record, width=width, color=color, verbose=verbose)
    if isinstance(record, Evaluation):
        return module.render_evaluation(record, width=width, color=color)
    if isinstance(record, Extraction):
        return module.render_extraction(record, width=width, color=color)
    if isinstance(record, Repair):
        return module.render_repair(record, width=width, color=color)
    if isinstance(record, Sweep):
        return module.render_sweep(record, width=width, color=color)
    if isinstance(record, Reports):
        return module.render_many(record, width=width, color=color)
    return module.render(record, width=width, color=color)


def write(record: Record, format: str, path: Path, *, verbose: bool = False) -> None:  # noqa: A002
    """Write a record to a file: it is complete, or as it was.

    Raises:
        OSError: it cannot be written.
        SafeprojError: as for `render`.
    """
    content = render(record, format, verbose=verbose).encode()
    place = path.resolve()
    if place.exists() and not place.is_file():  # such as /dev/null or a pipe
        place.write_bytes(content)
    else:
        replace_file(place, content)


def save(
    record: Record,
    path: StrPath,
    format: str | None = None,  # noqa: A002
    *,
    verbose: bool = False,
) -> None:
    """Write a record to a file, in the format that its name tells if none is given.

    Raises:
        SafeprojError: as for `render`, the name tells no format, or the file cannot be written.
    """
    name = os.fspath(path)
    found = format or SUFFIXES.get(Path(name).suffix.lower())
    if found is None:
        raise SafeprojError(
            f"path {name}: its end tells no format; expected {', '.join(SUFFIXES)}, or give format"
        )
    try:
        write(record, found, Path(name), verbose=verbose)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SafeprojError(f"path {name}: the report cannot be written ({reason})") from error
