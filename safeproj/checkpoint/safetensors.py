"""Checkpoints in safetensors: one file, shards with an index, or shards without one."""

from __future__ import annotations

import math
from collections.abc import KeysView
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safeproj.checkpoint.interface import Reader
from safeproj.errors import SafeprojError
from safeproj.source import Folder, read_json
from safeproj.tensorfile import DTYPES, Header, TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsWeight:
    """A tensor of a local safetensors file, read as it is stored."""

    name: str
    path: Path
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def source(self) -> str:
        return str(self.path)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Tensor) -> Tensor:
        import torch

        dtype, itemsize = DTYPES[self.dtype]
        row = math.prod(self.shape[1:]) * itemsize
        raw = buffer[: (stop - start) * row]
        reader.read(self.path, self.entry.start + start * row, raw.numpy().data)
        return raw.view(getattr(torch, dtype)).view(stop - start, *self.shape[1:])


@dataclass
class SafetensorsCheckpoint:
    """A folder of safetensors files.

    Attributes:
        folder: where the files are.
        location: tensor name to the name of its file.
    """

    folder: Folder
    location: dict[str, str]
    _headers: dict[str, Header] = field(default_factory=dict, repr=False)
    _local: dict[Path, Header] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def revision(self) -> str | None:
        return self.folder.revision

    @cached_property
    def model_type(self) -> str | None:
        if "config.json" not in self.folder.files:
            if self.folder.revision is not None:
                # Not to know the architecture may mean a wrong orientation of square weights.
                raise SafeprojError(f"{self.source}: no config.json; {self.folder.advice}")
            return None
        found = read_json(self.folder, "config.json").get("model_type")
        return found if isinstance(found, str) else None

    @property
    def documents(self) -> tuple[Path, ...]:
        index = (INDEX,) if SINGLE not in self.folder.files else ()
        names = [name for name in ("config.json", *index) if name in self.folder.files]
        return tuple(self.folder.path(name) for name in names)

    @property
    def names(self) -> KeysView[str]:
        return self.location.keys()

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        file = self.location[name]
        if file not in self._headers:
            # Only now, not for the whole index: a partly filled cache serves what it holds.
            if file not in self.folder.files:
                raise SafeprojError(
                    f"{self.source}: the index says that {file} holds {name}, but the folder has "
                    f"no such file; {self.folder.advice}"
                )
            self._headers[file] = self.folder.header(file)
        entry = self._entry(self._headers[file], name)
        return entry.dtype, entry.shape

    def weight(self, name: str) -> SafetensorsWeight:
        path = self.folder.path(self.location[name])
        if path not in self._local:
            self._local[path] = read_header(path)
        return SafetensorsWeight(name, path, self._entry(self._local[path], name))

    def _entry(self, header: Header, name: str) -> TensorEntry:
        if name not in header.tensors:
            raise SafeprojError(
                f"{self.source}: the index says that {self.location[name]} holds {name}, but it "
                "does not; fetch the checkpoint again"
            )
        return header.tensors[name]


def open_safetensors(folder: Folder, files: frozenset[str]) -> SafetensorsCheckpoint | None:
    """Return the checkpoint among the folder's top-level `files`, None if there is none.

    The order is that of transformers: one `model.safetensors`, then an index, then all
    `*.safetensors` files together.

    Raises:
        SafeprojError: the index is unusable, or two files hold a tensor of the same name.
    """
    if SINGLE not in files and INDEX in files:
        return SafetensorsCheckpoint(folder, _read_index(folder))
    shards = [SINGLE] if SINGLE in files else sorted(f for f in files if f.endswith(".safetensors"))
    if not shards:
        return None
    checkpoint = SafetensorsCheckpoint(folder, {})
    for shard in shards:
        checkpoint._headers[shard] = folder.header(shard)
        for name in checkpoint._headers[shard].tensors:
            other = checkpoint.location.setdefault(name, shard)
            if other != shard:
                raise SafeprojError(
                    f"{folder.source}: {other} and {shard} both hold {name}, and there is no "
                    f"{INDEX} to say which counts; keep one set of files in the directory"
                )
    return checkpoint


def _read_index(folder: Folder) -> dict[str, str]:
    location = read_json(folder, INDEX).get("weight_map")
    if not isinstance(location, dict) or not all(isinstance(f, str) for f in location.values()):
        raise SafeprojError(
            f'{folder.source}: {INDEX} has no usable "weight_map"; expected an object that maps '
            "tensor names to file names"
        )
    return location
