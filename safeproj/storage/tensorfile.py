"""The safetensors container: where each tensor of a file lies, and writing one in a given order.

What the `safetensors` library does not offer is here: byte offsets, for reading rows into reused
buffers; headers without mapping the file, which ends the process when the file shrinks; and a
writer that keeps the order of tensors and metadata, so that the same input gives the same file.
What the library refuses is refused here too.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from safeproj.errors import SafeprojError
from safeproj.storage import documents as jsontext
from safeproj.storage.documents import unique as unique
from safeproj.storage.mistaken import mistaken, mistaken_file, reason
from safeproj.storage.nearby import nearby
from safeproj.text import printable

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself, so that a forged length allocates nothing."""

MAX_TENSORS = 300_000
"""Tensors of one file: a mixture of experts with one pair of factors for each has 94,000."""

MAX_DIMENSIONS = 64
"""Of one tensor; torch's own limit."""

PREFIX = 8
"""Bytes before the header, which say how long it is."""

MAX_NAME = 1000
"""Characters of a tensor name: names are matched against the patterns of transformers and of the
user, whose cost may grow faster than the name."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
"""The floating-point dtypes safeproj computes with: safetensors name to torch name and bytes."""

OTHER_DTYPES = {
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Dtypes that whole tensors may have which are only copied: safetensors name to torch name."""


BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of a value of every dtype of the format."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: `dtype` as the format names it, `start` from byte 0."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: dict[str, str] | None
    tensors: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Return the header of a complete, valid safetensors file.

    Raises:
        SafeprojError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(PREFIX), size)
            return _header(str(path), file.read(length), size)
    except FileNotFoundError as error:
        raise SafeprojError(f"{path}: no such file{nearby(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise incomplete(path, error) from error


def header_of(source: str, size: int, read: Callable[[int, int], bytes], most: int) -> Header:
    """Return the header of a safetensors file that is elsewhere.

    Args:
        source: what messages call it.
        size: its bytes.
        read: returns the bytes from one to before another.
        most: bytes to read at first.

    Raises:
        SafeprojError: it is no complete, valid safetensors file, or cannot be read.
    """
    first = read(0, min(size, most))
    try:
        stop = PREFIX + _header_length(first[:PREFIX], size)
        if stop > len(first):
            first += read(len(first), stop)
        return _header(source, first[PREFIX:stop], size)
    except (ValueError, RecursionError) as error:
        found = mistaken(first) or f"is no complete safetensors file ({reason(error)})"
        raise SafeprojError(f"{source} {found}; the repository is incomplete") from error


def parse_header(source: str, content: bytearray) -> Header:
    """Return the header of a safetensors file that was read whole.

    Raises:
        SafeprojError: it names its tensors in a way that cannot be shown.
        ValueError, RecursionError: it is no complete, valid safetensors file.
    """
    length = _header_length(content[:PREFIX], len(content))
    return _header(source, bytes(content[PREFIX : PREFIX + length]), len(content))


def incomplete(path: Path, error: Exception) -> SafeprojError:
    """Return the error for a file that is no complete safetensors file."""
    where = printable(str(path))
    found = mistaken_file(path)
    return SafeprojError(
        f"{where}: not a complete safetensors file ({reason(error)}); fetch it again"
        if found is None
        else f"{where}: {found}"
    )


def _header_length(start: bytes | bytearray, size: int) -> int:
    if not size:
        raise ValueError("it is empty")
    length = int.from_bytes(start, "little")
    if len(start) < PREFIX or length > min(MAX_HEADER, size - PREFIX):
        raise ValueError(f"its header would have {length} bytes, of {size} in all")
    return length


def _header(source: str, text: bytes, size: int) -> Header:
    """Return what a header says, checked as the safetensors library checks it.

    Raises:
        ValueError: the tensors do not lie one after another up to the end of the file, or one of
            them is not as long as its shape says.
    """
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ValueError(f"it names {count} tensors; expected at most {MAX_TENSORS}")
    found = jsontext.parse(text, numbers_alone=True)
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    metadata = found.pop("__metadata__", None)
    if metadata is not None and not _is_metadata(metadata):
        raise ValueError("its metadata does not map texts to texts")
    require_printable(source, found)
    start = PREFIX + len(text)
    tensors = {name: _entry(start, name, given) for name, given in found.items()}
    end = start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            raise ValueError(f"a tensor begins at byte {entry.start}; expected {end}")
        end += entry.nbytes
    if end > size:
        raise ValueError(f"only {size} of its {end} bytes are there, as if a download was cut off")
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
    return Header(metadata, tensors)


def _is_metadata(given: object) -> bool:
    return isinstance(given, dict) and all(isinstance(value, str) for value in given.values())


def _entry(start: int, name: str, given: object) -> TensorEntry:
    """Return where one tensor lies.

    Raises:
        ValueError: it is not as long as its shape says, or of an unknown dtype.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{name!a} is no JSON object")
    dtype, shape, offsets = (given.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!a} has the unknown dtype {str(dtype)[:40]!a}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!a} has no usable shape or data_offsets")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{name!a} has {end - begin} bytes; expected {bits / 8:g}")
    return TensorEntry(dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(given: object) -> TypeGuard[list[int]]:
    return (
        isinstance(given, list)
        and len(given) <= MAX_DIMENSIONS
        and all(type(each) is int and 0 <= each < 1 << 63 for each in given)
    )


def require_printable(source: str, names: Iterable[str]) -> None:
    """Refuse tensor names that could steer a terminal or a report, or keep a pattern busy.

    Raises:
        SafeprojError: a name has a character that is not printable, or is too long.
    """
    for name in names:
        if len(name) > MAX_NAME:
            raise SafeprojError(
                f"{source}: a tensor name has {len(name)} characters, expected at most {MAX_NAME}; "
                f"it starts with {name[:40]!a}"
            )
        if not name.isprintable():
            raise SafeprojError(
                f"{source}: the tensor name {name!a} has characters that are not printable"
            )


def write(
    path: Path,
    metadata: Mapping[str, str] | None,
    layout: Mapping[str, tuple[str, tuple[int, ...], int]],
    data: Iterable[memoryview],
) -> None:
    """Write a safetensors file whose tensors come in the order of `layout`.

    Args:
        path: the file to create.
        metadata: the `__metadata__` object, its order kept.
        layout: name to safetensors dtype, shape and number of bytes.
        data: the bytes of each tensor, in the same order.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_head(metadata, layout))
        for chunk in data:
            file.write(chunk)


def data_start(
    metadata: Mapping[str, str] | None, layout: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> int:
    """Return where the first tensor begins in the file that `write` makes of the same."""
    return len(_head(metadata, layout))


def _head(
    metadata: Mapping[str, str] | None, layout: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> bytes:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape, nbytes) in layout.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, begin + nbytes],
        }
        begin += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text
