"""`safeproj.json`: the report, and what is needed to repeat the run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

from safeproj.adapter import Adapter
from safeproj.adapter.interface import MANIFEST
from safeproj.checkpoint import Checkpoint
from safeproj.engine import Score
from safeproj.match import Plan
from safeproj.report.record import Report
from safeproj.source import read_json


def manifest(
    adapter: Adapter,
    aligned: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    scores: Mapping[str, Score],
    report: Report,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `safeproj.json` without the digests of what was written.

    It holds no time and no host name, so that the same run gives the same file. Digests are those
    of the files that were read, and for the checkpoints of the tensors: their bytes as stored.
    """
    found = report.to_dict()
    tensors: dict[str, dict[str, str]] = {"aligned": {}, "base": {}}
    for planned in plan.modules:
        sha256 = scores[planned.module.name].sha256
        if sha256 is not None:
            tensors["aligned"] |= sha256[0]
            tensors["base"] |= sha256[1]
    for role, checkpoint in (("aligned", aligned), ("base", base)):
        files = {path.name: _sha256(path) for path in checkpoint.documents}
        found["inputs"][role] |= {"sha256": {"tensors": tensors[role], "files": files}}
    read = (*adapter.format.documents, adapter.weights_file)
    files = {name: _sha256(adapter.path(name)) for name in read}
    found["inputs"]["adapter"] |= {"sha256": {"files": files}}
    if MANIFEST in adapter.folder.files:
        found["inputs"]["adapter"] |= {"previous": read_json(adapter.folder, MANIFEST)}
    return {**found, "options": dict(options), "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
