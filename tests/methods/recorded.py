"""Files that stand for a model, for the tests that change their text or their tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def text_of(file: Path) -> str:
    """Return the JSON in a file's metadata."""
    with safe_open(file, framework="pt") as opened:
        return str(opened.metadata()["safeproj"])


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> Path:
    """Write a file of this text and these tensors, sound or not."""
    save_file(tensors, path, metadata={"format": "pt", "safeproj": text})
    return path
