"""The safetensors container: where each tensor of a file lies, and writing one in a given order.

Reading goes through the `safetensors` library wherever whole tensors are wanted. What it does not
offer is here: byte offsets, for reading rows into reused buffers, and a writer that keeps the order
of tensors and metadata, so that the same input gives the same file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError, first_line

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself, so that a forged length allocates nothing."""

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
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks lengths, offsets, overlaps and that the file is covered to its end.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise SafeprojError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise SafeprojError(
            f"{path}: not a complete safetensors file ({first_line(error)}); fetch it again"
        ) from error
    require_printable(str(path), header)
    metadata = header.pop("__metadata__", None)
    return Header(metadata, {name: _entry(8 + length, found) for name, found in header.items()})


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a JSON object with duplicate keys, on which readers disagree about which one counts.

    For `json.loads(..., object_pairs_hook=unique)`.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


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


def _entry(data_start: int, found: Mapping[str, Any]) -> TensorEntry:
    begin, end = found["data_offsets"]
    return TensorEntry(found["dtype"], tuple(found["shape"]), data_start + begin, end - begin)


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
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for chunk in data:
            file.write(chunk)
