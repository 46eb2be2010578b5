"""What several formats share: tensors in and out of safetensors files, and checks of values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from safeproj.errors import SafeprojError
from safeproj.storage import tensorfile
from safeproj.storage.arrays import Array, DType, bytes_of, dtype_of, is_finite, is_float
from safeproj.storage.nearby import nearby
from safeproj.storage.source import Folder, contents
from safeproj.storage.wholefile import MAX_WEIGHTS

if TYPE_CHECKING:
    from safeproj.adapter.record import AdaptedModule

_NAMES = {
    **{code: name for code, (name, _) in tensorfile.DTYPES.items()},
    **tensorfile.OTHER_DTYPES,
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Dtypes of whole bytes: safetensors name to that of torch and `ml_dtypes`."""


def read_safetensors(folder: Folder, name: str) -> tuple[dict[str, str] | None, dict[str, Array]]:
    """Return the metadata and all tensors of a file, in the file's order.

    The file is read once, whole: the tensors lie in the bytes of which `content_sha256` tells the
    digest, and stay what they are whatever becomes of the file.

    Raises:
        SafeprojError: it cannot be read.
    """
    path = folder.path(name)
    try:
        content = contents(folder, name, MAX_WEIGHTS)
        header = tensorfile.parse_header(str(path), content)
    except FileNotFoundError as error:
        raise SafeprojError(f"{path}: no such file{nearby(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise tensorfile.incomplete(path, error) from error
    return header.metadata, {
        key: _tensor(str(path), content, key, entry) for key, entry in header.tensors.items()
    }


def _tensor(source: str, content: bytearray, key: str, entry: tensorfile.TensorEntry) -> Array:
    name = _NAMES.get(entry.dtype)
    dtype = None if name is None else dtype_of(name)
    if dtype is None:
        raise SafeprojError(
            f"{source}: {key} has dtype {entry.dtype}; expected float64, float32, float16 or "
            "bfloat16"
        )
    return from_bytes(content, dtype, entry.start, entry.nbytes).reshape(entry.shape)


def from_bytes(content: bytearray, dtype: DType, start: int, nbytes: int) -> Array:
    """Return numbers that lie in a file's bytes, flat: a view, where processors allow that."""
    if nbytes == 0:
        return numpy.empty(0, dtype)
    count = nbytes // dtype.itemsize
    if start % dtype.itemsize:
        content, start = content[start : start + nbytes], 0
    return numpy.frombuffer(content, dtype, count, start)


def write_safetensors(
    path: Path, metadata: Mapping[str, str] | None, tensors: Mapping[str, Array]
) -> dict[str, str]:
    """Write the tensors in the given order and return the SHA-256 of each."""
    codes = {name: code for code, (name, _) in tensorfile.DTYPES.items()}
    codes |= {name: code for code, name in tensorfile.OTHER_DTYPES.items()}
    layout, digests = {}, {}
    for name, tensor in tensors.items():
        code = codes[tensor.dtype.name]
        layout[name] = (code, tuple(tensor.shape), tensor.nbytes)

    def data() -> Iterator[memoryview]:
        for name, tensor in tensors.items():
            view = bytes_of(tensor)
            digests[name] = hashlib.sha256(view).hexdigest()
            yield view

    tensorfile.write(path, metadata, layout, data())
    tensorfile.read_header(path)
    return digests


def check_values(
    source: str, tensors: Mapping[str, Array], full_changes: Collection[str] = ()
) -> None:
    """Refuse tensors that are no floating-point numbers, or not finite.

    Args:
        source: the SRC, for messages.
        tensors: all tensors of an adapter.
        full_changes: those that are only copied.

    Raises:
        SafeprojError: one cannot be used.
    """
    for key, tensor in tensors.items():
        dtype, wide = tensor.dtype.name, is_float(tensor.dtype)
        if not wide and key in full_changes and dtype in tensorfile.OTHER_DTYPES.values():
            continue  # such as a counter of a module that is saved whole
        if not wide:
            raise SafeprojError(
                f"{source}: {key} has dtype {dtype}; expected float64, float32, float16 or bfloat16"
            )
        if not is_finite(tensor):
            raise SafeprojError(
                f"{source}: {key} has NaN or Inf; the adapter is damaged or its training diverged"
            )


def finite_number(what: str, value: object) -> float:
    """Return a number that a file holds.

    Raises:
        SafeprojError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SafeprojError(f"{what} is {value!r}; expected a number")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise SafeprojError(f"{what} is not finite; expected a number")
    return found


def dora_warnings(modules: Iterable[AdaptedModule]) -> Iterator[str]:
    """Yield what to know about modules with a magnitude, if there are any."""
    dora = [module.name for module in modules if module.dora]
    if dora:
        yield (
            f"{len(dora)} modules are DoRA: the direction's update is projected, the magnitude "
            "is kept"
        )
