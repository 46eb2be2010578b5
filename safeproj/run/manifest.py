"""`safeproj.json`: the report, and what is needed to repeat the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.digests import adapter_record
from safeproj.methods.reference import Reference
from safeproj.methods.score import Score
from safeproj.records.scores import Report
from safeproj.versions import versions


def manifest(
    adapter: Adapter,
    reference: Reference,
    scores: Mapping[str, Score],
    report: Report,
    options: Mapping[str, Any],
    *,
    by_torch: bool = False,
) -> dict[str, Any]:
    """Return the content of `safeproj.json` without the digests of what was written.

    It holds no time and no host name, so that the same run gives the same file. Digests are those
    of the files that were read, and for the checkpoints of the tensors: their bytes as stored.
    """
    found = report.to_dict()
    for role, sha256 in reference.digests(scores).items():
        found["inputs"][role] |= {"sha256": sha256}
    found["inputs"]["adapter"] |= adapter_record(adapter)
    return {**found, "options": dict(options), "versions": versions(by_torch=by_torch)}
