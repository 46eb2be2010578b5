"""The JSON report."""

from __future__ import annotations

import json

from safeproj.report.record import Report


def render(report: Report, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the report as JSON."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
