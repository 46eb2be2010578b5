"""What the gate must say of an adapter that was patched correctly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safeproj
from safeproj.gate.policy import ALLOWANCES, Policy
from safeproj.report import Evidence, Outcome
from tests.conformance.architectures import Built

ALLOWED = frozenset(ALLOWANCES) - {"unknown-tensors", "unmatched-modules", "other-weights"}
"""What honest adapters have: biases, magnitudes, saved modules."""


def check_gate(pair: Built, adapter: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every module counts as projected, by its record and computed again."""
    method = safeproj.SafeLora(str(pair.base), str(pair.aligned))
    ignored = frozenset({"SP013"})  # tiny layers have fewer outputs than the rank
    policy = Policy(threshold=1.0, max_size=1e9, allow=ALLOWED, ignore=ignored)
    names = {module["name"] for module in manifest["modules"] if module["cosine"] is not None}

    (recorded,) = safeproj.check(method, [str(out)], policy).checks
    assert recorded.outcome is Outcome.passed, recorded.findings
    assert set(recorded.evidence) >= names

    (recomputed,) = safeproj.verify(str(out), str(adapter), method).checks
    assert recomputed.outcome is Outcome.passed, recomputed.findings
    assert set(recomputed.evidence) >= names
    assert set(recomputed.evidence.values()) == {Evidence.recomputed}
