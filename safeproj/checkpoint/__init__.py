"""Where weights come from: one small interface, one file per encoding."""

from __future__ import annotations

import re

from safeproj.checkpoint import pickled, safetensors
from safeproj.checkpoint.interface import Checkpoint, Reader, Weight, settle
from safeproj.checkpoint.quantised import decoded
from safeproj.errors import SafeprojError
from safeproj.storage.instead import ADAPTER, held_instead, own_schema
from safeproj.storage.mistaken import unfinished
from safeproj.storage.source import Folder, LocalFolder, open_folder
from safeproj.text import shorten

__all__ = ["Checkpoint", "Reader", "Weight", "open_checkpoint", "settle"]

_ENCODINGS = (safetensors.open_safetensors, pickled.open_pickled)
"""Each looks at the names of a folder's top-level files and returns a checkpoint or None. The order
is that of transformers, for a folder that holds the same weights twice."""

_MODELS = frozenset({safetensors.SINGLE, safetensors.INDEX, pickled.SINGLE, pickled.INDEX})

_FACTOR = re.compile(r"\.(lora_([abeAB]|embedding_[AB]|magnitude_vector)|modules_to_save)\b")
"""What the names of an adapter's tensors have in them, wherever it was trained."""

_RESAVE = "load it with the program it was made for and save it as safetensors"
_OTHERS = {
    ".gguf": "GGUF is quantised or renamed: pass the checkpoint that it was converted from",
    ".pt": _RESAVE,
    ".pth": _RESAVE,
    ".ckpt": _RESAVE,
    ".msgpack": f"a Flax checkpoint: {_RESAVE}",
    ".h5": f"a TensorFlow checkpoint: {_RESAVE}",
}
"""What to do about files of other kinds."""


def open_checkpoint(source: str) -> Checkpoint:
    """Return the checkpoint that SRC names; reads headers or an index, never a weight.

    Raises:
        SafeprojError: there is none, or it is of a kind that is not supported.
    """
    folder = open_folder(source)
    files = frozenset(name for name in folder.files if "/" not in name)
    if files & ADAPTER and not files & _MODELS:
        raise _adapter(source, shorten(sorted(files & ADAPTER)))
    for encoding in _ENCODINGS:
        checkpoint = encoding(folder, files)
        if checkpoint is not None:
            _require_model(folder, checkpoint)
            return decoded(checkpoint)
    if not files:
        raise SafeprojError(f"{source}: an empty directory, where a checkpoint was expected")
    others = (
        advice for name in sorted(files) for end, advice in _OTHERS.items() if name.endswith(end)
    )
    begun = unfinished(folder.root) if isinstance(folder, LocalFolder) else None
    last = "save the model with save_pretrained" if begun is None else folder.advice
    raise SafeprojError(
        f"{source}: no checkpoint among {shorten(sorted(files))}, {held_instead(folder)}; expected "
        f"{safetensors.SINGLE} or {pickled.SINGLE}, an index with shards, or *.safetensors; "
        + next(others, last)
    )


def _require_model(folder: Folder, checkpoint: Checkpoint) -> None:
    """Refuse what has tensors, and no model's.

    Raises:
        SafeprojError: they are an adapter's, or of a file that safeproj made.
    """
    if checkpoint.names and all(_FACTOR.search(name) for name in checkpoint.names):
        raise _adapter(folder.source, shorten(checkpoint.names))
    if own_schema(folder) is not None:
        raise SafeprojError(
            f"{folder.source}: no checkpoint, {held_instead(folder)}; expected a model's directory"
        )


def _adapter(source: str, files: str) -> SafeprojError:
    return SafeprojError(
        f"{source}: an adapter (it has {files}), where a full model checkpoint was expected; pass "
        "it as --adapter"
    )
