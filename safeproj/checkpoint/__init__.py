"""Where weights come from: one small interface, one file per encoding."""

from __future__ import annotations

from safeproj.checkpoint import pickled, safetensors
from safeproj.checkpoint.interface import Checkpoint, Reader, Weight
from safeproj.checkpoint.quantised import decoded
from safeproj.errors import SafeprojError
from safeproj.storage.source import open_folder
from safeproj.text import shorten

__all__ = ["Checkpoint", "Reader", "Weight", "open_checkpoint"]

_ENCODINGS = (safetensors.open_safetensors, pickled.open_pickled)
"""Each looks at the names of a folder's top-level files and returns a checkpoint or None. The order
is that of transformers, for a folder that holds the same weights twice."""

_MODELS = frozenset({safetensors.SINGLE, safetensors.INDEX, pickled.SINGLE, pickled.INDEX})

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
    if "adapter_config.json" in files and not files & _MODELS:
        raise SafeprojError(
            f"{source}: an adapter (it has adapter_config.json), where a full model checkpoint "
            "was expected; pass it as --adapter"
        )
    for encoding in _ENCODINGS:
        checkpoint = encoding(folder, files)
        if checkpoint is not None:
            return decoded(checkpoint)
    if not files:
        raise SafeprojError(f"{source}: an empty directory, where a checkpoint was expected")
    others = (
        advice for name in sorted(files) for end, advice in _OTHERS.items() if name.endswith(end)
    )
    raise SafeprojError(
        f"{source}: no checkpoint among {shorten(sorted(files))}; expected {safetensors.SINGLE} or "
        f"{pickled.SINGLE}, an index with shards, or *.safetensors; "
        + next(others, "save the model with save_pretrained")
    )
