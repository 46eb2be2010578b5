"""`safeproj.json`: the report, and what is needed to repeat the run."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

from safeproj.adapter import Adapter
from safeproj.adapter.interface import MANIFEST
from safeproj.engine import Score
from safeproj.report.record import Report
from safeproj.source import content_sha256, read_json
from safeproj.subspace import Subspace


def manifest(
    adapter: Adapter,
    subspace: Subspace,
    scores: Mapping[str, Score],
    report: Report,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `safeproj.json` without the digests of what was written.

    It holds no time and no host name, so that the same run gives the same file. Digests are those
    of the files that were read, and for the checkpoints of the tensors: their bytes as stored.
    """
    found = report.to_dict()
    for role, sha256 in subspace.digests(scores).items():
        found["inputs"][role] |= {"sha256": sha256}
    found["inputs"]["adapter"] |= adapter_record(adapter)
    return {**found, "options": dict(options), "versions": versions()}


def adapter_record(adapter: Adapter, further: Collection[str] = ()) -> dict[str, Any]:
    """Return the digests of the files that were read of an adapter, and its own `safeproj.json`.

    Args:
        adapter: the adapter.
        further: files that were read if they are there.

    Raises:
        SafeprojError: its `safeproj.json` is no JSON object.
    """
    present = [name for name in further if name in adapter.folder.files]
    read = (*adapter.format.documents, adapter.weights_file, *present)
    files = {name: content_sha256(adapter.folder, name) for name in read}
    found: dict[str, Any] = {"sha256": {"files": files}}
    if adapter.converted_from is not None:
        found["converted_from"] = adapter.converted_from
    if MANIFEST in adapter.folder.files:
        found["previous"] = read_json(adapter.folder, MANIFEST)
    return found


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
    }


def _processor() -> str:
    """Return which processor the arithmetic ran on, and with which of its instructions.

    Both decide in which order sums are taken, and so about their last bits.
    """
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = next(iter(models), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
