"""The GGUF container: its metadata, where each tensor lies, and writing it back in the same order.

The gguf package reads such files too, but takes the counts of a damaged file for granted, and does
not give the metadata back byte for byte. All that is read here is bounded by the file's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safeproj.errors import SafeprojError
from safeproj.storage.mistaken import reason, require_real
from safeproj.storage.tensorfile import MAX_TENSORS, require_printable
from safeproj.storage.wholefile import MAX_WEIGHTS, read_whole

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Version 1 has counts of 32 bits; nothing writes it any more."""

MAX_HEADER = 100_000_000
"""Bytes; far more than a vocabulary and a chat template need."""

MAX_DIMENSIONS = 4
"""ggml's own limit."""

DTYPES = {0: ("float32", 4), 1: ("float16", 2), 30: ("bfloat16", 2)}
"""ggml's numbers of the types that are not quantised: name and bytes."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9

Value = str | int | float | bool | None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `dims` with the fastest first, as the file has them; `offset` from the data."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values, if its type is one of `DTYPES`."""
        size = DTYPES[self.type][1]
        for dim in self.dims:
            size *= dim
        return size


@dataclass(frozen=True)
class Header:
    """What comes before the tensors' values.

    Attributes:
        version: of the format.
        values: the metadata; None for an array.
        metadata: the metadata's bytes.
        tensors: the tensors, in the file's order.
        alignment: what each tensor's offset is a multiple of.
        data_start: where offsets count from.
    """

    version: int
    values: dict[str, Value]
    metadata: bytes
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int


class _DamagedError(Exception):
    """What is wrong with the file."""


class _Cursor:
    """Reads one thing after another, and never past the end."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > min(len(self._data), MAX_HEADER):
            raise _DamagedError("its header is cut off, or names a size that cannot be")
        found = bytes(self._data[self.at : end])
        self.at = end
        return found

    def integer(self, code: str = "I") -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def text(self) -> str:
        return self.take(self.integer("Q")).decode("utf-8")

    def value(self) -> Value:
        kind = self.integer()
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self._skip_array()
            return None
        if kind not in _SCALARS:
            raise _DamagedError(f"a value has the unknown type {kind}")
        code = f"<{_SCALARS[kind]}"
        found: Value = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return found

    def _skip_array(self) -> None:
        kind, count = self.integer(), self.integer("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self.take(self.integer("Q"))
        else:
            raise _DamagedError(f"an array has items of the unknown type {kind}")


def read_file(path: Path) -> bytearray:
    """Return a GGUF file's bytes, read once.

    Raises:
        SafeprojError: it cannot be read.
    """
    try:
        return read_whole(path, MAX_WEIGHTS)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_header(path: Path, content: bytearray) -> Header:
    """Return the header of a GGUF file.

    Args:
        path: the file, for messages.
        content: its bytes.

    Raises:
        SafeprojError: the file is damaged, or of another format or version.
    """
    magic, number = bytes(content[:4]), bytes(content[4:8])
    if magic != MAGIC:
        require_real(str(path), content, empty=False)
        raise SafeprojError(
            f"{path}: not a GGUF file (it starts with {magic!r}, expected {MAGIC!r}); "
            "fetch it again"
        )
    version = int.from_bytes(number, "little")
    if int.from_bytes(number, "big") in VERSIONS:
        raise SafeprojError(
            f"{path}: a big-endian GGUF file, which is not supported; convert the adapter "
            "again, without `--bigendian`"
        )
    if version not in VERSIONS and len(number) == 4:
        raise SafeprojError(
            f"{path}: GGUF version {version} is not supported; expected "
            f"{' or '.join(map(str, VERSIONS))}: convert the adapter again"
        )
    try:
        return _header(str(path), _Cursor(content), version)
    except (ValueError, _DamagedError) as error:
        raise _damaged(path, error) from error


def _header(source: str, cursor: _Cursor, version: int) -> Header:
    cursor.take(8)
    tensor_count, value_count = cursor.integer("Q"), cursor.integer("Q")
    if tensor_count > MAX_TENSORS or value_count > MAX_TENSORS:
        raise _DamagedError(
            f"it names {tensor_count} tensors and {value_count} values; expected at most "
            f"{MAX_TENSORS}"
        )
    begin, values = cursor.at, dict[str, Value]()
    for _ in range(value_count):
        key = cursor.text()
        if key in values:
            raise _DamagedError(f"it has two values for {key!a}")
        values[key] = cursor.value()
    length = cursor.at - begin
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        info = _tensor_info(cursor)
        if info.name in tensors:
            raise _DamagedError(f"it has two tensors {info.name!a}")
        tensors[info.name] = info
    require_printable(source, (*tensors, *values))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"its alignment is {alignment!a}, expected a power of two")
    data_start = _aligned(cursor.at, alignment)
    cursor.at = begin
    metadata = cursor.take(length)
    return Header(version, values, metadata, tuple(tensors.values()), alignment, data_start)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name, count = cursor.text(), cursor.integer()
    if not 1 <= count <= MAX_DIMENSIONS:
        raise _DamagedError(f"tensor {name!a} has {count} dimensions")
    dims = tuple(cursor.integer("Q") for _ in range(count))
    if 0 in dims:
        raise _DamagedError(f"tensor {name!a} has no values")
    return TensorInfo(name, dims, cursor.integer(), cursor.integer("Q"))


def read_tensors(path: Path, content: bytearray, header: Header) -> dict[str, bytearray]:
    """Return the bytes of all tensors, whose types must be among `DTYPES`.

    Raises:
        SafeprojError: they do not lie one after another, as ggml wants them, or not in the file.
    """
    found: dict[str, bytearray] = {}
    size, expected = len(content) - header.data_start, 0
    for info in header.tensors:
        if info.offset != expected:
            error = f"{info.name} lies at {info.offset}, expected {expected}"
            raise _damaged(path, _DamagedError(error))
        if info.offset + info.nbytes > size:
            error = f"{info.name} ends at byte {info.offset + info.nbytes} of {max(size, 0)}"
            raise _damaged(path, _DamagedError(error))
        expected = _aligned(info.offset + info.nbytes, header.alignment)
        start = header.data_start + info.offset
        found[info.name] = content[start : start + info.nbytes]
    return found


def write(path: Path, header: Header, types: Iterable[int], tensors: Iterable[memoryview]) -> None:
    """Write a file with the same metadata and the same tensors, in the same order.

    Args:
        path: the file to create.
        header: the input's.
        types: ggml's number of each tensor's type.
        tensors: the values of each.

    Raises:
        OSError: the file cannot be written.
    """
    start = struct.pack("<IQ", header.version, len(header.tensors))
    count = struct.pack("<Q", len(header.values))
    parts, offset = [MAGIC, start, count, header.metadata], 0
    for info, kind in zip(header.tensors, types, strict=True):
        name = info.name.encode()
        parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(info.dims))]
        parts.append(struct.pack(f"<{len(info.dims)}QIQ", *info.dims, kind, offset))
        nbytes = TensorInfo(info.name, info.dims, kind, offset).nbytes
        offset = _aligned(offset + nbytes, header.alignment)
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        _pad(file, sum(map(len, parts)), header.alignment)
        for values in tensors:
            file.write(values)
            _pad(file, len(values), header.alignment)


def _pad(file: BinaryIO, size: int, alignment: int) -> None:
    file.write(bytes(_aligned(size, alignment) - size))


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _damaged(path: Path, error: Exception) -> SafeprojError:
    return SafeprojError(f"{path}: not a complete GGUF file ({reason(error)}); fetch it again")
