"""Checkpoints in PyTorch's own format: `pytorch_model.bin`, one file or shards with an index.

The files are mapped into memory: a weight's rows are read when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safeproj.checkpoint.folder import FolderCheckpoint, read_weight_map
from safeproj.checkpoint.interface import (
    STORED_DTYPES,
    Reader,
    TensorInfo,
    as_matrix,
)
from safeproj.picklefile import read_pickle
from safeproj.source import Folder

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class PickledWeight:
    """A tensor of a local `.bin` file, seen as a matrix and read as it is stored."""

    label: str
    path: Path
    dtype: str
    shape: tuple[int, int]

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * STORED_DTYPES[self.dtype][1]

    @property
    def source(self) -> str:
        return str(self.path)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Tensor) -> Tensor:
        import torch

        raw = buffer[: (stop - start) * self.row_bytes]
        dtype = getattr(torch, STORED_DTYPES[self.dtype][0])
        rows = raw.view(dtype).view(stop - start, self.shape[1])
        rows.copy_(self._matrix(reader)[start:stop].view(dtype))
        reader.record(self.label, raw.numpy().data)
        return rows

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        pass  # where the rows lie in the file is not known

    def _matrix(self, reader: Reader) -> Tensor:
        tensor = reader.keep(self.path, read_pickle)[self.label]
        if tensor.shape == self.shape:
            return tensor
        # A view, unless the tensor is a stack in an unusual memory layout.
        return reader.once((self.path, self.label, self.shape), lambda: tensor.reshape(self.shape))


@dataclass
class PickledCheckpoint(FolderCheckpoint):
    """A folder of `.bin` files."""

    single = SINGLE
    index = INDEX

    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def describe(self, name: str) -> TensorInfo:
        tensor = self._tensor(name)
        return TensorInfo(_dtype_name(tensor), tuple(tensor.shape))

    def weight(self, name: str, columns: int | None = None) -> PickledWeight:
        info = self.describe(name)
        path = self.folder.path(self.location[name])
        return PickledWeight(name, path, info.dtype, as_matrix(info.shape, columns))

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor, not yet read; there is no header to ask for, so its file is needed."""
        file = self.file_of(name)
        if file not in self._tensors:
            self._tensors[file] = read_pickle(self.folder.path(file))
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
    tensors = read_pickle(folder.path(found[0]))
    return PickledCheckpoint(folder, dict.fromkeys(tensors, found[0]), {found[0]: tensors})


def _dtype_name(tensor: Tensor) -> str:
    """Return the safetensors name of a tensor's dtype, or torch's for one that cannot be read."""
    found = str(tensor.dtype).removeprefix("torch.")
    names = {torch_name: name for name, (torch_name, _) in STORED_DTYPES.items()}
    return {**names, "float8_e8m0fnu": "F8_E8M0"}.get(found, found)
