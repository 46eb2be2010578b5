"""Where the pieces of remote files are put that were read: for this run, or for later ones too."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.text import first_line

PIECE = 8 << 20
"""Bytes of the largest piece: at 1 Gbit/s it comes in about the time of a slow round trip."""

SPOOL = 8 << 30
"""Bytes of pieces that a run holds on disk at most, if half of what is free is not less."""

KEPT_GB = "SAFEPROJ_KEEP_GB"
"""The variable that bounds what `--keep` keeps, in GB."""

_KEPT_GB = 50.0

WRITTEN = 3600.0
"""Seconds after which a file that is not complete is one that a process left which was killed."""

_NEW = ".new-"

_RANGE = re.compile(r"(\d+)-(\d+)")

Place = int | Path
"""Where a piece is: its number in the spool, or a file that is kept."""


class Spool:
    """Pieces in a file without a name: it is gone with the process, however that ends."""

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile(prefix="safeproj-", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._count = 0
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self.bound = max(min(SPOOL, free // 2) // PIECE, 16)

    @property
    def full(self) -> bool:
        """Whether a piece should make room for the next."""
        return not self._free and self._count >= self.bound

    def put(self, data: memoryview) -> int:
        """Write a piece and return its number.

        Raises:
            SafeprojError: there is no room.
        """
        with self._lock:
            number = self._free.pop() if self._free else self._count
            self._count = max(self._count, number + 1)
            try:
                self._file.seek(number * PIECE)
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError as error:
                self._free.append(number)
                raise SafeprojError(
                    f"{tempfile.gettempdir()}: no room for what is read from the network "
                    f"({error.strerror}); make room, or name another directory in TMPDIR"
                ) from error
        return number

    def get(self, number: int, offset: int, out: memoryview) -> bool:
        """Fill `out` from byte `offset` of a piece."""
        with self._lock:
            self._file.seek(number * PIECE + offset)
            return _filled(self._file, out)

    def drop(self, number: int) -> None:
        """Make room."""
        with self._lock:
            self._free.append(number)


class Kept:
    """Pieces in a directory, which several processes may use, and anybody may delete.

    Each is a file of its own, named by its range, in the directory of its file. It appears complete
    or not at all. Those that were not read for the longest time go first.

    Args:
        root: the directory.
        bound: bytes that it may have.
    """

    def __init__(self, root: Path, bound: int) -> None:
        self.root, self.bound = root, bound
        self._lock = threading.Lock()
        self._fresh = 0

    def directory(self, label: str, identity: str) -> Path:
        """Return the directory of the pieces of a file.

        Args:
            label: what the file is called, for who looks into the directory.
            identity: what tells its content.
        """
        readable = re.sub(r"[^\w.-]+", "--", label).strip("-.")[-80:]
        return self.root / readable / hashlib.sha256(f"{label}\0{identity}".encode()).hexdigest()

    def pieces(self, directory: Path) -> Iterator[tuple[int, int, Path]]:
        """Yield what there is of a file: first byte, end, place."""
        with suppress(OSError):
            for path in sorted(directory.iterdir()):
                named = _RANGE.fullmatch(path.name)
                if named is None:
                    continue
                start, stop = int(named[1]), int(named[2])
                with suppress(OSError):
                    if path.stat().st_size == stop - start > 0:
                        yield start, stop, path

    def put(self, directory: Path, start: int, data: memoryview) -> Path:
        """Write a piece and return its place.

        Raises:
            SafeprojError: it cannot be written.
        """
        path = directory / f"{start}-{start + len(data)}"
        try:
            for last in (False, False, False, True):
                try:
                    _appear(path, data)
                    break
                except FileNotFoundError:  # somebody has just deleted the directory
                    if last:
                        raise
        except OSError as error:
            raise SafeprojError(
                f"{self.root}: what is read cannot be kept there ({error.strerror}); make room, "
                "leave out --keep, or name another directory in HF_ASSETS_CACHE"
            ) from error
        with self._lock:
            self._fresh += len(data)
            is_due = self._fresh > self.bound // 16
            if is_due:
                self._fresh = 0
        if is_due:
            self.trim()
        return path

    def get(self, path: Path, offset: int, out: memoryview) -> bool:
        """Fill `out` from byte `offset` of a piece; False where it is gone."""
        try:
            with FileIO(path, "rb") as file:
                file.seek(offset)
                return _filled(file, out)
        except OSError:
            return False

    def _files(self) -> list[Path]:
        """Return all files, as far as nobody deletes their directories meanwhile."""
        found: list[Path] = []
        with suppress(OSError):
            found.extend(self.root.glob("*/*/*"))
        return found

    def touch(self, path: Path) -> None:
        """Note that a piece was read."""
        with suppress(OSError):
            os.utime(path)

    def trim(self) -> None:
        """Delete the pieces that were not read for the longest time, until the bound is kept."""
        found, written = [], time.time() - WRITTEN
        for path in self._files():
            with suppress(OSError):
                stat = path.stat()
                if stat.st_mtime < written or not path.name.startswith(_NEW):
                    found.append((stat.st_mtime, stat.st_size, path))
        size = sum(each[1] for each in found)
        for _, nbytes, path in sorted(found):
            if size <= self.bound:
                break
            with suppress(OSError):
                path.unlink()
                size -= nbytes


def _appear(path: Path, data: memoryview) -> None:
    """Write a file that is there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(prefix=_NEW, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def kept() -> Kept:
    """Return where `--keep` keeps pieces, as the environment says.

    Raises:
        SafeprojError: the bound is no number.
    """
    from huggingface_hub import cached_assets_path

    given = os.environ.get(KEPT_GB, "")
    try:
        bound = float(given) if given else _KEPT_GB
        if not 0 < bound < float("inf"):
            raise ValueError
    except ValueError:
        raise SafeprojError(
            f"{KEPT_GB} is {given!a}; expected a number of GB above 0, such as 50"
        ) from None
    try:
        root = cached_assets_path("safeproj", "kept", "ranges")
    except (OSError, ValueError) as error:
        raise SafeprojError(
            f"--keep cannot keep anything ({first_line(error)}); name another directory in "
            "HF_ASSETS_CACHE"
        ) from error
    made = Kept(Path(root), int(bound * 1e9))
    made.trim()
    return made


def _filled(file: Any, out: memoryview) -> bool:
    done = 0
    while done < len(out):
        count = file.readinto(out[done:])
        if not count:
            return False
        done += count
    return True
