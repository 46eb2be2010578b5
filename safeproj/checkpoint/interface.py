"""What the rest of safeproj sees of a checkpoint: names, shapes, dtypes, and rows of a weight."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safeproj.errors import SafeprojError

if TYPE_CHECKING:
    from torch import Tensor

MAX_OPEN_FILES = 8
"""Files one reader keeps open: a large checkpoint has more shards than some systems allow files."""


class Reader:
    """Reads byte ranges of files into buffers; one per thread.

    Attributes:
        digest: a SHA-256 that is fed every byte read, in order; None to feed nothing.
    """

    def __init__(self) -> None:
        self.digest: hashlib._Hash | None = None
        self._files: OrderedDict[Path, FileIO] = OrderedDict()

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` from the file at `offset`.

        Raises:
            SafeprojError: the file ends early or cannot be read.
        """
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
        if self.digest is not None:
            self.digest.update(out)

    def _open(self, path: Path) -> FileIO:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = FileIO(path, "rb")
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return self._files[path]

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()


class Weight(Protocol):
    """One weight of a checkpoint, as plain data that can be sent to another process."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype that `read_rows` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as stored: (out_features, in_features), or the reverse."""

    @property
    def source(self) -> str:
        """The file that holds it, for messages."""

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Return rows `[start, stop)`, read through `buffer` (uint8, on the CPU, large enough).

        The result is valid until the buffer is used again.
        """


class Checkpoint(Protocol):
    """The weights of one model."""

    @property
    def source(self) -> str:
        """The SRC as the user gave it."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository, None for local files."""

    @property
    def model_type(self) -> str | None:
        """The architecture's name in `config.json`, None where that does not tell."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @property
    def documents(self) -> tuple[Path, ...]:
        """Local paths of the small files that were read to understand the tensors."""

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a tensor without reading it, and without downloading it."""

    def weight(self, name: str) -> Weight:
        """Return a tensor that can be read, downloading the file that holds it if need be."""
