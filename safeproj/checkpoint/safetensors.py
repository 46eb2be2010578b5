"""Checkpoints in safetensors: one file, shards with an index, or shards without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safeproj.checkpoint.folder import FolderCheckpoint, read_weight_map
from safeproj.checkpoint.interface import (
    STORED_DTYPES,
    Reader,
    TensorInfo,
    as_matrix,
    stored_dtype,
)
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array
from safeproj.storage.ranges import RangeFile
from safeproj.storage.source import Folder
from safeproj.storage.tensorfile import Header, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsWeight:
    """A tensor of a safetensors file, seen as a matrix and read as it is stored."""

    label: str
    path: Path | RangeFile
    entry: TensorEntry
    shape: tuple[int, int]

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * STORED_DTYPES[self.dtype][1]

    @property
    def source(self) -> str:
        return str(self.path)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        raw = buffer[: (stop - start) * self.row_bytes]
        reader.read(self.label, self.path, self.entry.start + start * self.row_bytes, raw.data)
        return raw.view(stored_dtype(self.dtype)).reshape(stop - start, self.shape[1])

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        first, width = self.entry.start, self.row_bytes
        reader.prefetch(self.path, first + start * width, first + stop * width)


@dataclass
class SafetensorsCheckpoint(FolderCheckpoint):
    """A folder of safetensors files."""

    single = SINGLE
    index = INDEX

    _headers: dict[str, Header] = field(default_factory=dict, repr=False)
    _read: dict[Path | RangeFile, Header] = field(default_factory=dict, repr=False)

    def describe(self, name: str) -> TensorInfo:
        file = self.file_of(name)
        if file not in self._headers:
            self._headers[file] = self.folder.header(file)
        entry = self._entry(self._headers[file], name)
        return TensorInfo(entry.dtype, entry.shape)

    def weight(self, name: str, columns: int | None = None) -> SafetensorsWeight:
        place = self.folder.place(self.file_of(name))
        entry = self._entry(self._header(place), name)
        return SafetensorsWeight(name, place, entry, as_matrix(entry.shape, columns))

    def locate(self, name: str) -> tuple[TensorEntry, Path]:
        """Return where a tensor lies in which local file, downloading the file if need be."""
        path = self.folder.path(self.file_of(name))
        return self._entry(self._header(path), name), path

    def _header(self, place: Path | RangeFile) -> Header:
        """Return the header of a file, read once."""
        if place not in self._read:
            self._read[place] = read_header(place) if isinstance(place, Path) else place.header()
        return self._read[place]

    def _entry(self, header: Header, name: str) -> TensorEntry:
        if name not in header.tensors:
            raise self.not_held(name)
        return header.tensors[name]


def open_safetensors(folder: Folder, files: frozenset[str]) -> SafetensorsCheckpoint | None:
    """Return the checkpoint among the folder's top-level `files`, None if there is none.

    The order is that of transformers: one `model.safetensors`, then an index, then all
    `*.safetensors` files together.

    Raises:
        SafeprojError: the index is unusable, or two files hold a tensor of the same name.
    """
    if SINGLE not in files and INDEX in files:
        return SafetensorsCheckpoint(folder, read_weight_map(folder, INDEX))
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
