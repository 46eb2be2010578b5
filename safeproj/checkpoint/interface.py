"""What the rest of safeproj sees of a checkpoint: names, shapes, dtypes, and rows of a weight."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safeproj.checkpoint.hashes import Digests, Hash, Hasher, hasher
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, DType, dtype_of
from safeproj.storage.ranges import RangeFile, fetch
from safeproj.storage.source import Folder
from safeproj.storage.tensorfile import DTYPES

T = TypeVar("T")

STORED_DTYPES = {
    **DTYPES,
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("uint8", 1),
    "U8": ("uint8", 1),
}
"""The dtypes whose rows can be read: safetensors name to torch name and bytes. Those that safeproj
does not compute with are codes, which `quantised.py` turns into numbers; the exponents of F8_E8M0
are read as plain bytes."""

MAX_OPEN_FILES = 8
"""Files one reader keeps open: a large checkpoint has more shards than some systems allow files."""


FETCH = 256 << 10
"""Bytes that are asked for at once: Linux cuts a longer request to what the device takes."""


class Reader:
    """Reads byte ranges of files into buffers; one per thread.

    Args:
        stop: set when the thread should give up waiting for what is to come.

    Attributes:
        nbytes: bytes read.
        seconds: time in which files were read.
        hash_seconds: time in which what was read was hashed.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop
        self.nbytes = 0
        self.seconds = 0.0
        self.hash_seconds = 0.0
        self._hashed: dict[Hash, dict[str, Hasher]] = {}
        self._window = ""
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._once: dict[Hashable, Any] = {}
        self._kept: dict[Hashable, Any] = {}

    def start(self, hashes: Collection[Hash] = ()) -> None:
        """Begin with another weight: forget what was kept of the last one, and its digests.

        Args:
            hashes: by which what is read is to be hashed.
        """
        self._hashed = {name: {} for name in hashes}
        self._once.clear()

    @property
    def digests(self) -> Digests:
        """Of every label, of all that was read under it since `start`, in order."""
        return {
            name: {label: each.hexdigest() for label, each in found.items()}
            for name, found in self._hashed.items()
        }

    def read(self, label: str, path: Path | RangeFile, offset: int, out: memoryview) -> None:
        """Fill `out` from the file at `offset`; `label` names the tensor whose bytes these are.

        Raises:
            SafeprojError: the file ends early or cannot be read.
        """
        self.fill(path, offset, out)
        self.record(label, out)

    def fill(self, path: Path | RangeFile, offset: int, out: memoryview) -> None:
        """Do the same, for bytes of which `record` is told when they are used.

        Raises:
            SafeprojError: the file ends early or cannot be read.
            StoppedError: the thread should give up.
        """
        start = time.perf_counter()
        if isinstance(path, RangeFile):
            if path.read(offset, out, self._stop):
                self.seconds += time.perf_counter() - start
                return
            assert path.local is not None
            path = path.local
        try:
            file = self._open(path)
            file.seek(offset)
            done = 0
            while done < len(out):
                count = file.readinto(out[done:])
                if not count:
                    raise SafeprojError(f"{path}: truncated while reading byte {offset + done}")
                done += count
        except OSError as error:
            raise SafeprojError(f"{path}: cannot be read ({error.strerror})") from error
        self.seconds += time.perf_counter() - start

    def prefetch(self, path: Path | RangeFile, start: int, stop: int) -> None:
        """Ask the system for bytes that will be read soon: a hint, without which all works too."""
        if isinstance(path, RangeFile):
            if path.local is None:  # asked for beforehand, by `settle`
                return
            path = path.local
        if not hasattr(os, "posix_fadvise"):  # Windows, macOS
            return
        begin = time.perf_counter()
        with suppress(OSError):  # reading will say what is wrong
            file = self._open(path).fileno()
            for offset in range(start, stop, FETCH):
                length = min(FETCH, stop - offset)
                os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)
        self.seconds += time.perf_counter() - begin

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what `read` returned first under this key, for the current weight.

        For what many blocks of a weight's rows need, such as its scales: it is read and fed to its
        digest once, whatever the size of the blocks, and whole, even if only a window is read.
        """
        if key not in self._once:
            window, self._window = self._window, ""
            try:
                self._once[key] = read()
            finally:
                self._window = window
        found: T = self._once[key]
        return found

    def keep(self, path: Path, load: Callable[[Path], T]) -> T:
        """Return what `load` makes of a file, called once per reader: for files without offsets."""
        if (path, load) not in self._kept:
            self._kept[path, load] = load(path)
        found: T = self._kept[path, load]
        return found

    def record(self, label: str, data: memoryview) -> None:
        """Feed the digest of `label`: for bytes that do not come through `read`."""
        self.nbytes += len(data)
        if not self._hashed:
            return
        start, label = time.perf_counter(), label + self._window
        for name, found in self._hashed.items():
            if label not in found:
                found[label] = hasher(name)
            found[label].update(data)
        self.hash_seconds += time.perf_counter() - start

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Mark what is read meanwhile as a part of a tensor, so that each part has its digest."""
        outer = self._window
        self._window = name + outer
        try:
            yield
        finally:
            self._window = outer

    def _open(self, path: Path) -> FileIO:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = FileIO(path, "rb")
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return self._files[path]

    def close(self) -> None:
        """Close all files, and forget what was kept of them."""
        self._once.clear()
        self._kept.clear()
        while self._files:
            self._files.popitem()[1].close()


class _Wanted(Reader):
    """Reads nothing, and notes what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[RangeFile, int, int]] = []

    def prefetch(self, path: Path | RangeFile, start: int, stop: int) -> None:
        if isinstance(path, RangeFile):
            self.ranges.append((path, start, stop))


def settle(weights: Iterable[Weight]) -> None:
    """Say which weights will be read, in this order: what is remote is fetched meanwhile.

    Raises:
        SafeprojError: a file that is better downloaded as a whole cannot be.
    """
    wanted = _Wanted()
    for weight in weights:
        weight.prefetch(wanted, 0, weight.shape[0])
    fetch(wanted.ranges)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        dtype: safetensors name of the dtype that reading it gives.
        shape: its shape as stored.
        turned: the running model has its last two dimensions exchanged, as MXFP4 files do.
        quantised: safetensors name of the stored codes, None if the numbers themselves are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    turned: bool = False
    quantised: str | None = None


class Weight(Protocol):
    """A matrix in a checkpoint, as plain data that can be sent to another process."""

    @property
    def label(self) -> str:
        """Its name in the checkpoint, with an index where it is part of a stack."""

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype that `read_rows` returns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its shape as stored: (out_features, in_features), or the reverse."""

    @property
    def row_bytes(self) -> int:
        """Bytes of buffer that reading one row needs."""

    @property
    def source(self) -> str:
        """The file that holds it, for messages."""

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        """Return rows `[start, stop)`, read through `buffer` (uint8, large enough).

        The result is valid until the buffer is used again.
        """

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """Ask the system for what rows `[start, stop)` are read from: a hint, or nothing."""


class Checkpoint(Protocol):
    """The weights of one model."""

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository, None for local files."""

    @property
    def folder(self) -> Folder | None:
        """Where its files are; None for a file that stands for a model."""

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`; empty where a local checkpoint has none."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @property
    def documents(self) -> tuple[Path, ...]:
        """Local paths of the small files that were read to understand the tensors."""

    @property
    def document_digests(self) -> Mapping[str, str]:
        """The SHA-256 of each of `documents`, by file name: of the bytes that were read."""

    def describe(self, name: str) -> TensorInfo:
        """Return what is known of a tensor without reading it.

        Where the format allows it, also without downloading it.
        """

    def weight(self, name: str, columns: int | None = None) -> Weight:
        """Return a tensor that can be read, downloading the file that holds it if need be.

        Args:
            name: one of `names`.
            columns: see the tensor as a matrix with so many columns; default its last dimension.
        """


def stored_dtype(name: str) -> DType:
    """Return the dtype of rows by its name in `STORED_DTYPES`."""
    found = dtype_of(STORED_DTYPES[name][0])
    assert found is not None
    return found


def as_matrix(shape: tuple[int, ...], columns: int | None) -> tuple[int, int]:
    """Return the shape of a tensor that is seen as a matrix; a vector becomes one column.

    >>> as_matrix((8, 6, 4), None), as_matrix((8, 6, 3, 3), 54), as_matrix((5,), None)
    ((48, 4), (8, 54), (5, 1))
    """
    if columns is None:
        columns = shape[-1] if len(shape) > 1 else 1
    return (math.prod(shape) // columns if columns else 0, columns)
