"""Independent readers: what other programs make of a mutated file that the command accepted.

Each looks at a case that ended with exit code 0 and returns what is wrong with that, or None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.support import CONFIG, FACTORS

Array = np.ndarray[Any, np.dtype[np.float64]]
Reader = Callable[[Path, str, Path, str], "str | None"]
"""Of the copy, the subcommand, `--out` and stdout."""

THRESHOLD = 0.1
"""What the campaign gives `check`: random updates of small weights have low cosines."""

TOLERANCE = 2e-4
"""Sums of float32 in the command, of float64 here; factors of a few thousand random numbers."""


def weights(folder: Path) -> dict[str, Array]:
    """Return all weights of a checkpoint in float64."""
    files = folder.glob("*.safetensors")
    return {
        name: each.astype(np.float64) for file in files for name, each in load_file(file).items()
    }


def peft(base: Path, aligned: Path) -> Reader:
    """Return a reader that scores a PEFT adapter again, in float64 and as METHODS has it."""
    with_base, with_aligned = weights(base), weights(aligned)

    def projector(name: str) -> Array:
        V = with_aligned[f"{name}.weight"] - with_base[f"{name}.weight"]
        C: Array = V @ V.T / np.linalg.norm(V)
        return C

    def read(adapter: Path, command: str, out: Path, stdout: str) -> str | None:
        json.loads((adapter / CONFIG).read_text("utf-8-sig"))
        tensors = load_file(adapter / FACTORS)
        document = json.loads(stdout)
        modules = {m["name"]: m for m in document["modules"]} if "modules" in document else None
        if command == "check":
            (checked,) = document["checks"]
            modules = None if checked["outcome"] != "passed" else {}
        patched = load_file(out / FACTORS) if command == "patch" else {}
        for key in tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            stem = key.removesuffix(".lora_A.weight")
            name = stem.removeprefix("base_model.model.")
            A, B = (tensors[f"{stem}.lora_{f}.weight"].astype(np.float64) for f in "AB")
            C = projector(name)
            update, projected = B @ A, C @ B @ A
            norms = np.linalg.norm(update) * np.linalg.norm(projected)
            cosine = float((update * projected).sum() / norms) if norms else None
            if modules is None or not all(map(np.isfinite, (A.sum(), B.sum()))):
                continue
            if command == "check":
                if cosine is not None and cosine < THRESHOLD - TOLERANCE:
                    return f"{name} passes with a cosine of {cosine}"
                continue
            if name not in modules:
                return f"{name} is not in the report"
            found = modules[name]["cosine"]
            if (found is None) != (cosine is None):
                return f"{name}: the cosine is {found}, expected {cosine}"
            if cosine is not None and not math.isclose(found, cosine, abs_tol=TOLERANCE):
                return f"{name}: the cosine is {found}, expected {cosine}"
            if command == "patch" and modules[name]["projected"]:
                written = patched[f"{stem}.lora_B.weight"].astype(np.float64)
                if np.abs(written - C @ B).max() > TOLERANCE * max(np.abs(C @ B).max(), 1e-30):
                    return f"{name}: what was written is not C B"
        return None

    return read


def opened(file: str) -> Reader:
    """Return a reader that opens safetensors with the library."""

    def read(copy: Path, command: str, out: Path, stdout: str) -> str | None:
        del command, out, stdout
        with safe_open(copy / file if file else copy, framework="np") as found:
            return None if found.keys() else "no tensors"

    return read


def pickled(file: str) -> Reader:
    """Return a reader that loads plain tensors with torch."""

    def read(copy: Path, command: str, out: Path, stdout: str) -> str | None:
        del command, out, stdout
        found = torch.load(copy / file, weights_only=True, map_location="cpu")
        return None if isinstance(found, Mapping) else "no mapping"

    return read


def gguf(file: str) -> Reader:
    """Return a reader that loads GGUF with the format's own package."""

    def read(copy: Path, command: str, out: Path, stdout: str) -> str | None:
        del command, out, stdout
        from gguf import GGUFReader

        return None if GGUFReader(copy / file).tensors else "no tensors"

    return read
