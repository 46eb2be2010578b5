"""Checkpoints in PyTorch's own format: `pytorch_model.bin`, one file or shards with an index.

It is known where each tensor lies in its file: a weight's rows are read when they are asked for.
"""

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
from safeproj.storage.arrays import Array
from safeproj.storage.picklefile import StoredTensor, find_tensors
from safeproj.storage.source import Folder

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class PickledWeight:
    """A tensor of a local `.bin` file, seen as a matrix and read as it is stored."""

    label: str
    path: Path
    stored: StoredTensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> str:
        return _dtype_name(self.stored)

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * STORED_DTYPES[self.dtype][1]

    @property
    def source(self) -> str:
        return str(self.path)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        raw = buffer[: (stop - start) * self.row_bytes]
        dtype = stored_dtype(self.dtype)
        rows = raw.view(dtype).reshape(stop - start, self.shape[1])
        if self.stored.is_contiguous:
            first = self.stored.start + start * self.row_bytes
            reader.read(self.label, self.path, first, raw.data)
        else:
            rows[...] = self._matrix(reader)[start:stop].view(dtype)
            reader.record(self.label, raw.data)
        return rows

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        if self.stored.is_contiguous:
            first, width = self.stored.start, self.row_bytes
            reader.prefetch(self.path, first + start * width, first + stop * width)

    def _matrix(self, reader: Reader) -> Array:
        """Return a tensor whose values lie in another order, read whole."""

        def read() -> Array:
            content = bytearray(self.stored.nbytes)
            reader.fill(self.path, self.stored.start, memoryview(content))
            return self.stored.lay(content).reshape(self.shape)

        return reader.once((self.path, self.label, self.shape), read)


@dataclass
class PickledCheckpoint(FolderCheckpoint):
    """A folder of `.bin` files."""

    single = SINGLE
    index = INDEX

    _tensors: dict[str, dict[str, StoredTensor]] = field(default_factory=dict, repr=False)

    def describe(self, name: str) -> TensorInfo:
        stored = self._tensor(name)
        return TensorInfo(_dtype_name(stored), stored.shape)

    def weight(self, name: str, columns: int | None = None) -> PickledWeight:
        stored = self._tensor(name)
        path = _local(self.folder, self.location[name])
        return PickledWeight(name, path, stored, as_matrix(stored.shape, columns))

    def _tensor(self, name: str) -> StoredTensor:
        """Return where a tensor lies; there is no header to ask for, so its file is needed."""
        file = self.file_of(name)
        if file not in self._tensors:
            self._tensors[file] = find_tensors(_local(self.folder, file))
        if name not in self._tensors[file]:
            raise self.not_held(name)
        return self._tensors[file][name]


def open_pickled(folder: Folder, files: frozenset[str]) -> PickledCheckpoint | None:
    """Return the checkpoint among the folder's top-level `files`, None if there is none.

    As in transformers, one `pytorch_model.bin` comes before an index. Without either, a single
    `.bin` file counts, whatever its name: SRC may name one.

    Raises:
        SafeprojError: the index or the file is unusable.
    """
    if SINGLE not in files and INDEX in files:
        return PickledCheckpoint(folder, read_weight_map(folder, INDEX))
    found = [SINGLE] if SINGLE in files else [f for f in files if f.endswith(".bin")]
    if len(found) != 1:
        return None
    tensors = find_tensors(_local(folder, found[0]))
    return PickledCheckpoint(folder, dict.fromkeys(tensors, found[0]), {found[0]: tensors})


def _local(folder: Folder, name: str) -> Path:
    """Return a file on this machine: what says where its tensors lie is all over it."""
    place = folder.place(name)
    return place if isinstance(place, Path) else place.whole("is a pickle, which is read whole")


def _dtype_name(stored: StoredTensor) -> str:
    """Return the safetensors name of a tensor's dtype, or torch's for one that cannot be read."""
    found = stored.dtype
    names = {torch_name: name for name, (torch_name, _) in STORED_DTYPES.items()}
    return {**names, "float8_e8m0fnu": "F8_E8M0"}.get(found, found)
