"""Where weights come from: one small interface, one file per encoding."""

from __future__ import annotations

from safeproj.checkpoint.interface import Checkpoint, Reader, Weight
from safeproj.checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from safeproj.errors import SafeprojError, shorten
from safeproj.source import open_folder

__all__ = ["Checkpoint", "Reader", "Weight", "open_checkpoint"]

_ENCODINGS = (open_safetensors,)
"""Each looks at the names of a folder's top-level files and returns a checkpoint or None."""


def open_checkpoint(source: str) -> Checkpoint:
    """Return the checkpoint that SRC names; reads headers or an index, never a weight.

    Raises:
        SafeprojError: there is none, or it is of a kind that is not supported.
    """
    folder = open_folder(source)
    files = frozenset(name for name in folder.files if "/" not in name)
    if "adapter_config.json" in files and not files & {SINGLE, INDEX}:
        raise SafeprojError(
            f"{source}: an adapter (it has adapter_config.json), where a full model checkpoint "
            "was expected; pass it as --adapter"
        )
    for encoding in _ENCODINGS:
        checkpoint = encoding(folder, files)
        if checkpoint is not None:
            return checkpoint
    if not files:
        raise SafeprojError(f"{source}: an empty directory, where a checkpoint was expected")
    raise SafeprojError(
        f"{source}: no safetensors checkpoint (model.safetensors, an index with shards, or "
        f"*.safetensors) among {shorten(sorted(files))}; convert it with "
        "save_pretrained(safe_serialization=True)"
    )
