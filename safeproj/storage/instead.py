"""What a SRC holds where something else was expected of it, in words."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import PurePosixPath

from safeproj.errors import SafeprojError
from safeproj.storage.source import Folder, LocalFolder
from safeproj.text import printable, shorten

ADAPTER = frozenset(
    {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}
    | {"adapters.safetensors", "lit_model.pth.lora"}
)
"""Names of files of adapters, in any format."""

_TOKENIZER = frozenset(
    {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    | {"merges.txt", "vocab.json", "vocab.txt"}
)


def held_instead(folder: Folder) -> str:
    """Return what a SRC holds, for the middle of a message."""
    own = own_schema(folder)
    if own is not None:
        return f"it is a file that safeproj made ({own}), which has an option of its own"
    names = sorted(name for name in folder.files if "/" not in name)
    for what, known in (
        ("an adapter", [name for name in names if name in ADAPTER]),
        ("a whole model", [name for name in names if name.endswith((".safetensors", ".bin"))]),
        ("a GGUF file", [name for name in names if name.endswith(".gguf")]),
        ("a tokenizer without weights", [name for name in names if name in _TOKENIZER]),
    ):
        if known:
            return f"it holds {what} ({shorten(known)})"
    return f"it holds {shorten(names)}" if names else "it holds no file"


def own_schema(folder: Folder) -> str | None:
    """Return the schema of a SRC that is a file which safeproj made, None for everything else."""
    if not isinstance(folder, LocalFolder) or folder.only is None:
        return None
    with suppress(SafeprojError, ValueError, TypeError, LookupError, RecursionError):
        if PurePosixPath(folder.only).suffix == ".safetensors":
            metadata = folder.header(folder.only).metadata or {}
            return printable(str(json.loads(metadata["safeproj"])["schema"]))[:80]
    return None
