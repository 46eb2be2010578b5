"""The JSON report."""

from __future__ import annotations

import json
from typing import Any

from safeproj.records.checks import Checks
from safeproj.records.evaluations import Evaluation
from safeproj.records.extractions import Extraction
from safeproj.records.repairs import Repair
from safeproj.records.scores import Report, Reports
from safeproj.records.sweeps import Sweep
from safeproj.report import repair_words
from safeproj.report.sweep_words import commands, conclusion


def render(report: Report, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the report as JSON."""
    return _text(report.to_dict())


def render_many(reports: Reports, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the reports as one JSON object."""
    return _text(reports.to_dict())


def render_evaluation(evaluation: Evaluation, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return what a model does without and with adapters as one JSON object."""
    return _text(evaluation.to_dict())


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return what a gate found as one JSON object."""
    return _text(checks.to_dict())


def render_sweep(sweep: Sweep, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return what interventions do as one JSON object."""
    found = sweep.to_dict()
    told = [{"what": what, "command": line} for what, line in commands(sweep)]
    warnings = found.pop("warnings")
    return _text({**found, "conclusion": conclusion(sweep), "commands": told, "warnings": warnings})


def render_repair(repair: Repair, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return what was tried and what was reached as one JSON object."""
    found = repair.to_dict()
    warnings = found.pop("warnings")
    said = repair_words.conclusion(repair)
    return _text({**found, "conclusion": said, "warnings": warnings})


def render_extraction(extraction: Extraction, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return how closely an adapter holds a full fine-tune as one JSON object."""
    return _text(extraction.to_dict())


def _text(found: dict[str, Any]) -> str:
    return plain(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def plain(text: str) -> str:
    r"""Return JSON with what could steer a terminal as escapes, which are the same JSON.

    >>> plain('{"a": "' + chr(0x9B) + '31m"}')
    '{"a": "\\u009b31m"}'
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
