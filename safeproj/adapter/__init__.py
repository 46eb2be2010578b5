"""LoRA adapters on disk: reading, checking, and writing a patched one; one file per format."""

from __future__ import annotations

from safeproj.adapter.gguf import Gguf
from safeproj.adapter.interface import CONFIG, Format
from safeproj.adapter.litgpt import LitGpt
from safeproj.adapter.mlx import Mlx
from safeproj.adapter.peft import Peft
from safeproj.adapter.record import AdaptedModule, Adapter, FullChange
from safeproj.errors import SafeprojError
from safeproj.storage.instead import held_instead
from safeproj.storage.source import Folder, LocalFolder, open_folder

__all__ = [
    "FORMATS",
    "AdaptedModule",
    "Adapter",
    "FullChange",
    "open_adapter",
    "read_adapter",
    "stands_for_folder",
]

FORMATS: tuple[type[Format], ...] = (Mlx, Gguf, LitGpt, Peft)
"""Each looks at the names of a folder's files; PEFT comes last, since MLX has a config of the same
name and a converted GGUF file may lie beside any of them."""


def stands_for_folder(name: str | None) -> bool:
    """Tell whether a file of this name, given as a SRC, stands for the folder that it is in."""
    return any(name in kind.stand_ins for kind in FORMATS)


def open_adapter(source: str) -> Folder:
    """Return the folder of an adapter, which its config or its weights may stand for.

    Raises:
        SafeprojError: there is no such path, and no such repository either.
    """
    folder = open_folder(source)
    if isinstance(folder, LocalFolder) and stands_for_folder(folder.only):
        return LocalFolder(folder.root, source)
    return folder


def read_adapter(source: str, *, unknown: bool = False) -> Adapter:
    """Return the LoRA adapter that SRC names, checked.

    Args:
        source: the SRC.
        unknown: whether it may have tensors that belong to no update and no known change.

    Raises:
        SafeprojError: it is missing, damaged, has a value that is not finite, or is of a kind
            that is not supported.
    """
    folder = open_adapter(source)
    for kind in FORMATS:
        adapter = kind.read(folder)
        if adapter is not None:
            for message in () if unknown else adapter.unknown.values():
                raise SafeprojError(f"{source}: {message}")
            return adapter
    raise SafeprojError(
        f"{source}: {CONFIG} not found, {held_instead(folder)}; expected a PEFT adapter directory, "
        "as save_pretrained writes it, an adapter directory of MLX or of litgpt, or a GGUF adapter"
    )
