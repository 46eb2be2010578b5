"""`safeproj.json`: the report, and what is needed to repeat the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeproj.adapter import Adapter
from safeproj.adapter.digests import adapter_record
from safeproj.adapter.interface import MANIFEST
from safeproj.checkpoint.hashes import NEW, Hash, hash_of
from safeproj.errors import SafeprojError
from safeproj.methods.reference import Reference
from safeproj.methods.score import Score
from safeproj.records.scores import Report
from safeproj.storage.source import read_json
from safeproj.versions import versions

MODELS = ("base", "aligned", "safety_module", "safety_data", "task_data")
"""The inputs whose tensors a check compares with those that it reads itself."""


ADAPTERS = ("safe_adapter",)
"""Those whose files it compares."""


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
    of the files that were read, and for the checkpoints of the tensors: their bytes as stored. In
    which form, `safeproj.checkpoint.hashes` says.
    """
    found = report.to_dict()
    for role, digests in reference.digests(scores).items():
        found["inputs"][role] |= digests
    found["inputs"]["adapter"] |= adapter_record(adapter)
    return {**found, "options": dict(options), "versions": versions(by_torch=by_torch)}


def recorded_hash(document: Mapping[str, Any]) -> Hash | None:
    """Return the hash by which a record has the digests of tensors of `MODELS`, None without any.

    Raises:
        ValueError: they are by more than one, or by one that is not known.
        LookupError, AttributeError: it is no record.
    """
    inputs = document["inputs"]
    return hash_of(*(inputs[role] for role in MODELS if role in inputs))


def wanted_hashes(adapter: Adapter) -> set[Hash]:
    """Return the hashes by which to read what an adapter's record is compared with; none without.

    What is said in no way that is known, the gate refuses; until then nothing is compared less.
    """
    if MANIFEST not in adapter.folder.files:
        return set()
    try:
        found = recorded_hash(read_json(adapter.folder, MANIFEST))
    except (SafeprojError, LookupError, TypeError, ValueError, AttributeError):
        found = None
    return {found or NEW}
