"""What all checkpoints have in common whose tensors lie in the files of one folder."""

from __future__ import annotations

from collections.abc import KeysView
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from safeproj.errors import SafeprojError
from safeproj.storage.source import Folder, content_sha256, read_json
from safeproj.storage.tensorfile import require_printable


@dataclass
class FolderCheckpoint:
    """Tensors in files of a folder, with `config.json` beside them.

    Attributes:
        folder: where the files are.
        location: tensor name to the name of its file.
    """

    single: ClassVar[str]
    """Name of the file of a checkpoint that is not sharded."""

    index: ClassVar[str]
    """Name of the file that says which shard holds which tensor."""

    folder: Folder
    location: dict[str, str]

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def revision(self) -> str | None:
        return self.folder.revision

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, empty if a local checkpoint has none."""
        if "config.json" in self.folder.files:
            return read_json(self.folder, "config.json")
        if self.revision is not None:
            # Not to know the architecture may mean a wrong orientation of square weights.
            raise SafeprojError(f"{self.source}: no config.json; {self.folder.advice}")
        return {}

    @property
    def documents(self) -> tuple[Path, ...]:
        index = () if self.single in self.folder.files else (self.index,)
        found = (name for name in ("config.json", *index) if name in self.folder.files)
        return tuple(self.folder.path(name) for name in found)

    @property
    def document_digests(self) -> dict[str, str]:
        """The SHA-256 of each of `documents`, of the bytes that were read."""
        return {path.name: content_sha256(self.folder, path.name) for path in self.documents}

    @property
    def names(self) -> KeysView[str]:
        return self.location.keys()

    def file_of(self, name: str) -> str:
        """Return the file that holds a tensor, which must be one of the folder's own.

        Asked for one tensor at a time, not for the whole index: a partly filled cache serves what
        it holds.

        Raises:
            SafeprojError: the folder has no such file; so an index cannot point outside of it.
        """
        file = self.location[name]
        if file not in self.folder.files:
            raise SafeprojError(
                f"{self.source}: the index says that {file} holds {name}, but the folder has no "
                f"such file; {self.folder.advice}"
            )
        return file

    def not_held(self, name: str) -> SafeprojError:
        """Return the error for a file that lacks what the index says it holds."""
        return SafeprojError(
            f"{self.source}: the index says that {self.location[name]} holds {name}, but it does "
            "not; fetch the checkpoint again"
        )


def read_weight_map(folder: Folder, index: str) -> dict[str, str]:
    """Return what an index says: tensor name to the name of the file that holds it.

    Raises:
        SafeprojError: the index is unusable.
    """
    location = read_json(folder, index).get("weight_map")
    if not isinstance(location, dict) or not all(isinstance(f, str) for f in location.values()):
        raise SafeprojError(
            f'{folder.source}: {index} has no usable "weight_map"; expected an object that maps '
            "tensor names to file names"
        )
    require_printable(folder.source, location)
    return location
