"""Checkpoints in PyTorch's own format: `pytorch_model.bin`, one file or shards with an index.

Such a file is a zip of a pickle and the tensors' bytes. It is loaded with torch's restricted
unpickler, which runs no code, and mapped into memory: a weight's rows are read when they are asked
for.
"""

from __future__ import annotations

from collections.abc import KeysView
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeproj.checkpoint.interface import (
    STORED_DTYPES,
    Reader,
    TensorInfo,
    as_matrix,
    file_of,
    not_held,
    read_config,
    read_documents,
    read_weight_map,
)
from safeproj.errors import SafeprojError
from safeproj.source import Folder
from safeproj.tensorfile import require_printable

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file starts that torch before 1.6 wrote: its magic number, pickled."""


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

    def _matrix(self, reader: Reader) -> Tensor:
        tensor = reader.keep(self.path, read_pickle)[self.label]
        if tensor.shape == self.shape:
            return tensor
        # A view, unless the tensor is a stack in an unusual memory layout.
        return reader.once((self.path, self.label, self.shape), lambda: tensor.reshape(self.shape))


@dataclass
class PickledCheckpoint:
    """A folder of `.bin` files.

    Attributes:
        folder: where the files are.
        location: tensor name to the name of its file.
    """

    folder: Folder
    location: dict[str, str]
    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def revision(self) -> str | None:
        return self.folder.revision

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @property
    def documents(self) -> tuple[Path, ...]:
        return read_documents(self.folder, SINGLE, INDEX)

    @property
    def names(self) -> KeysView[str]:
        return self.location.keys()

    def describe(self, name: str) -> TensorInfo:
        tensor = self._tensor(name)
        return TensorInfo(_dtype_name(tensor), tuple(tensor.shape))

    def weight(self, name: str, columns: int | None = None) -> PickledWeight:
        info = self.describe(name)
        path = self.folder.path(self.location[name])
        return PickledWeight(name, path, info.dtype, as_matrix(info.shape, columns))

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor, not yet read; there is no header to ask for, so its file is needed."""
        file = file_of(self.folder, self.location, name)
        if file not in self._tensors:
            self._tensors[file] = read_pickle(self.folder.path(file))
        if name not in self._tensors[file]:
            raise not_held(self.folder, file, name)
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


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `torch.save` wrote, mapped into memory.

    Raises:
        SafeprojError: it cannot be read, is in the format before torch 1.6, or holds anything but
            a mapping of names to ordinary tensors.
    """
    import torch

    _refuse_legacy(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise errors of nearly every type
        # Not the error's own text: it advises to switch weights_only off.
        raise SafeprojError(
            f"{path}: cannot be loaded as plain tensors ({type(error).__name__}): truncated or "
            "damaged, or it needs code to run, which is refused; fetch it again, or save the model "
            "as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise SafeprojError(
            f"{path}: expected a mapping of names to tensors and nothing else; save the model as "
            "safetensors"
        )
    require_printable(str(path), found)
    _refuse_unusual(path, found)
    return {name: tensor.detach() for name, tensor in found.items()}


def _refuse_legacy(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as error:
        raise SafeprojError(f"{path}: cannot be read ({error.strerror})") from error
    if start == _LEGACY:
        raise SafeprojError(
            f"{path}: in the format that torch had before 1.6, which cannot be read in parts; load "
            "it with a current torch and save it again, best as safetensors"
        )


def _refuse_unusual(path: Path, tensors: dict[str, Tensor]) -> None:
    import torch

    limit = path.stat().st_size  # a few bytes can describe a tensor that no memory holds
    for name, tensor in tensors.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.numel() * tensor.element_size() > limit
        ):
            raise SafeprojError(
                f"{path}: {name} is no ordinary tensor that the file holds (layout "
                f"{tensor.layout}, device {tensor.device}, shape {list(tensor.shape)}); expected "
                "dense tensors on the CPU"
            )


def _dtype_name(tensor: Tensor) -> str:
    """Return the safetensors name of a tensor's dtype, or torch's for one that cannot be read."""
    found = str(tensor.dtype).removeprefix("torch.")
    names = {torch_name: name for name, (torch_name, _) in STORED_DTYPES.items()}
    return {**names, "float8_e8m0fnu": "F8_E8M0"}.get(found, found)
