"""Files that are read whole, once, from one descriptor; and small files written in one step."""

from __future__ import annotations

import os
from pathlib import Path

from safeproj.storage.publish import Look, appearing

MAX_WEIGHTS = 64 << 30
"""Bytes of a file of tensors that is read whole."""


def read_whole(path: Path, limit: int) -> bytearray:
    """Return the bytes of a file as it is now: what becomes of the file later does not matter.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `limit` bytes, became shorter meanwhile, or does not fit into
            the memory that there is.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes; expected at most {limit}")
        content = _room(size)
        view, done = memoryview(content), 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"it was cut to {done} of {size} bytes while it was read")
            done += count
    return content


def _room(size: int) -> bytearray:
    """Return memory for a file, if there is so much: else the system may end the process."""
    there = _available()
    if there is not None and size > there:
        raise ValueError(f"it needs {size} bytes of memory, and {there} are available")
    try:
        return bytearray(size)
    except MemoryError as error:
        raise ValueError(f"it needs {size} bytes of memory, more than there are") from error


def _available() -> int | None:
    """Return how many bytes of memory can be had, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) << 10
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def replace_file(place: Path, content: bytes) -> None:
    """Write a file, whatever is there: it is complete, or as it was.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    write_file(place, content, lambda: None)


def write_file(place: Path, content: bytes, look: Look | None = None) -> None:
    """Write a file: it is complete, or as it was.

    Args:
        place: the file.
        content: of the file.
        look: looks at what is there, which may be replaced; None to replace nothing.

    Raises:
        AppearedError: something is there, and nothing may be replaced.
        OSError: it cannot be written; nothing is left behind.
        SafeprojError: it is written, and something went wrong afterwards.
    """
    with appearing(place) as found:
        found.path.write_bytes(content)
        found.appear(look)
