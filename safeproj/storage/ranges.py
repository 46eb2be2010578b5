"""Remote files of which only the bytes that are needed are fetched, in the place of paths.

What is needed is said first, in the order in which it will be read (`fetch`). A few threads fetch
it ahead of the readers, piece by piece, into a spool on disk, or into a directory that later runs
read from. What nobody has said is fetched when it is read.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from safeproj.errors import SafeprojError
from safeproj.storage.origins import NotHonouredError, Origin, StoppedError
from safeproj.storage.spool import PIECE, Kept, Place, Spool, kept
from safeproj.storage.tensorfile import Header, header_of, read_header

Download = Literal["auto", "always", "never"]
DOWNLOADS: tuple[Download, ...] = get_args(Download)

CONNECTIONS = 8
"""Pieces that are fetched at a time."""

AHEAD = 512 << 20
"""Bytes that are fetched before they are read."""

HEAD = 100_000
"""Bytes that are asked for first: most headers are shorter."""

WORTH = 64 << 20
"""Bytes that must be saved of a file: one that is smaller is downloaded, for others to find."""

SLACK = 100
"""Two ranges are one request where what lies between them is this part of them, or less."""

_UNASKED = "was to be read in ranges, and the server sends whole files alone"

Range = tuple[int, int]
"""The first byte, and the one after the last."""


@dataclass(frozen=True)
class Fetching:
    """How remote checkpoints are read.

    Attributes:
        download: whether whole files are downloaded: `always`, `never`, or `auto`: where half of
            one is needed, it is small, or the server sends no ranges.
        keep: whether later runs find what was read in ranges.
    """

    download: Download = "auto"
    keep: bool = False


_FETCHING: ContextVar[Fetching] = ContextVar("fetching", default=Fetching())  # noqa: B039


def fetching() -> Fetching:
    """Return how remote checkpoints are read that are opened now."""
    return _FETCHING.get()


@contextmanager
def fetching_by(how: Fetching) -> Iterator[None]:
    """Let what is opened meanwhile be read in a way."""
    before = _FETCHING.set(how)
    try:
        yield
    finally:
        _FETCHING.reset(before)


class _Piece:
    """Some bytes of a file.

    Attributes:
        base: the first byte of what is at its place.
        state: `planned`, `urgent` when somebody waits for it, `coming`, `there`, or `failed`.
        place: where it is, when it is there.
        pins: readers that read it just now.
        was_read: whether somebody did.
    """

    __slots__ = ("base", "error", "file", "pins", "place", "start", "state", "stop", "was_read")

    def __init__(self, file: RangeFile, start: int, stop: int) -> None:
        self.file, self.start, self.stop, self.base = file, start, stop, start
        self.state = "planned"
        self.place: Place | None = None
        self.error: BaseException | None = None
        self.pins, self.was_read = 0, False

    @property
    def size(self) -> int:
        return self.stop - self.start


class RangeFile:
    """A remote file, read in ranges, or downloaded where that is better.

    Args:
        origin: where its bytes come from.
        label: what it is called among what is kept.
        download: makes a file of this machine of it.
        how: how it is read.

    Attributes:
        local: the file that was downloaded, None while it is read in ranges.
    """

    def __init__(
        self, origin: Origin, label: str, download: Callable[[], Path], how: Fetching
    ) -> None:
        self.origin, self.how = origin, how
        self.local: Path | None = None
        self.pieces: list[_Piece] = []
        self._label, self._download = label, download
        self._looked, self._lock = False, threading.RLock()
        self._directory: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is on this machine: another one fetches what it needs itself."""
        here: dict[str, Any] = {"local": None, "pieces": [], "_lock": None, "_directory": None}
        return {**vars(self), **here, "_looked": self._looked and not self.how.keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __str__(self) -> str:
        return str(self.origin) if self.local is None else str(self.local)

    @property
    def size(self) -> int:
        """In bytes."""
        self._look()
        return self.origin.size

    def header(self) -> Header:
        """Return its header, as a safetensors file.

        Raises:
            SafeprojError: it cannot be read, or is none.
        """
        self._look()
        if self.local is not None:
            return read_header(self.local)

        def read(start: int, stop: int) -> bytes:
            content = bytearray(stop - start)
            if not self.read(start, memoryview(content)):
                assert self.local is not None
                with self.local.open("rb") as file:
                    file.seek(start)
                    return file.read(len(content))
            return bytes(content)

        return header_of(str(self), self.origin.size, read, HEAD)

    def read(self, offset: int, out: memoryview, stop: threading.Event | None = None) -> bool:
        """Fill `out` from byte `offset`; False where it was downloaded, and is to be read there.

        Raises:
            SafeprojError: it cannot be read.
            StoppedError: `stop` was set.
        """
        self._look()
        if offset + len(out) > self.origin.size and self.local is None:
            raise SafeprojError(f"{self} has {self.origin.size} bytes, expected more; run again")
        try:
            return self.local is None and _fetcher().read(self, offset, out, stop)
        except NotHonouredError:
            self.whole(_UNASKED)
            return False

    def settle(self, wanted: Sequence[Range]) -> None:
        """Download the file if that is better than to fetch these ranges.

        Raises:
            SafeprojError: it cannot be downloaded.
        """
        self._look()
        if self.local is not None or self.how.download == "never":
            return
        missing = _fetcher().missing(self, wanted)
        size = self.origin.size
        if size - missing < WORTH or 2 * missing >= size:
            self.whole("")

    def _look(self) -> None:
        """Ask once for the first bytes, and so for what is known of the file."""
        with self._lock:
            if self._looked:
                return
            first = self.origin.look(1 if self.how.keep else HEAD)
            if first is None:
                raise SafeprojError(f"{self.origin}: there is no such file any more; run again")
            if not self.origin.honours:
                self.whole(_UNASKED)
            elif self.how.keep and self.origin.identity is not None:
                store = _kept()
                self._directory = store.directory(self._label, self.origin.identity)
                _fetcher().found(self, store.pieces(self._directory))
            elif len(first) > 1:
                _fetcher().given(self, memoryview(first))
            self._looked = True

    def whole(self, why: str) -> Path:
        """Return the whole file, downloaded.

        Args:
            why: it cannot be read in ranges.

        Raises:
            SafeprojError: that is not wanted, or it cannot be downloaded.
        """
        if self.how.download == "never":
            raise SafeprojError(f"{self.origin} {why}; leave out --download never")
        with self._lock:
            if self.local is None:
                self.local = self._download()
            return self.local

    def put(self, start: int, data: memoryview, spool: Spool) -> Place:
        """Write a piece to where pieces of this file are."""
        if self._directory is None:
            return spool.put(data)
        return _kept().put(self._directory, start, data)


class _Fetcher:
    """The threads that fetch, what they are to fetch, and what is there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[_Piece] = deque()
        self._planned: deque[_Piece] = deque()
        self._spooled: OrderedDict[_Piece, None] = OrderedDict()  # those read last come last
        self._spool = Spool()
        self._threads = 0
        self._ahead = 0  # bytes that are there, or come, and that nobody has read

    def missing(self, file: RangeFile, wanted: Sequence[Range]) -> int:
        """Return how many bytes of ranges are not there."""
        with self._changed:
            gaps = _gaps(file.pieces, _merged(wanted))
            return sum(stop - start for start, stop in gaps)

    def plan(self, wanted: Iterable[tuple[RangeFile, int, int]]) -> None:
        """Fetch ranges, one after the other, which are read in this order."""
        ranges: dict[RangeFile, list[Range]] = {}
        order: dict[RangeFile, dict[int, int]] = {}
        for number, (file, start, stop) in enumerate(wanted):
            ranges.setdefault(file, []).append((start, stop))
            order.setdefault(file, {}).setdefault(start, number)
        made: list[tuple[int, _Piece]] = []
        with self._changed:
            for file, given in ranges.items():
                starts = sorted(order[file])
                for start, stop in _gaps(file.pieces, _merged(given)):
                    for first in range(start, stop, PIECE):
                        piece = _Piece(file, first, min(first + PIECE, stop))
                        _insert(piece)
                        held = slice(
                            max(bisect_right(starts, first) - 1, 0),
                            bisect_left(starts, piece.stop),
                        )
                        made.append((min(order[file][each] for each in starts[held]), piece))
            made.sort(key=lambda each: (each[0], each[1].start))
            self._planned.extend(piece for _, piece in made)
            self._start(len(self._planned))
            self._changed.notify_all()

    def given(self, file: RangeFile, data: memoryview) -> None:
        """Take the first bytes of a file, which came when it was looked at."""
        with self._changed:
            piece = _Piece(file, 0, len(data))
            piece.was_read = True
            _insert(piece)
            self._store(piece, data)

    def found(self, file: RangeFile, pieces: Iterable[tuple[int, int, Path]]) -> None:
        """Take what earlier runs have kept of a file."""
        with self._changed:
            for start, stop, path in pieces:
                for first, last in _gaps(file.pieces, [(start, stop)]):
                    piece = _Piece(file, first, last)
                    piece.base, piece.state, piece.place = start, "there", path
                    _insert(piece)

    def read(
        self, file: RangeFile, offset: int, out: memoryview, stop: threading.Event | None
    ) -> bool:
        """Fill `out`, waiting for what is not there."""
        done = 0
        while done < len(out):
            piece = self._pinned(file, offset + done, offset + len(out), stop)
            at = offset + done
            part = out[done : done + piece.stop - at]
            try:
                is_there = self._get(piece, at - piece.base, part)
            finally:
                with self._changed:
                    piece.pins -= 1
                    if not is_there:
                        self._remove(piece)
            done += len(part) if is_there else 0
        return True

    def _get(self, piece: _Piece, first: int, part: memoryview) -> bool:
        if isinstance(piece.place, Path):
            return _kept().get(piece.place, first, part)
        assert piece.place is not None
        return self._spool.get(piece.place, first, part)

    def forget(self) -> None:
        """Fetch nothing more of what was planned: it is not read."""
        with self._changed:
            for piece in self._planned:
                if piece.state == "planned":
                    self._remove(piece)
            self._planned.clear()
            for piece in self._spooled:
                piece.was_read = True
            self._ahead = 0

    def _pinned(
        self, file: RangeFile, start: int, stop: int, stopping: threading.Event | None
    ) -> _Piece:
        """Return the piece that has byte `start`, when it is there."""
        with self._changed:
            while True:
                piece = _at(file.pieces, start)
                if piece is None:
                    first, last = _gaps(file.pieces, [(start, min(stop, start + PIECE))])[0]
                    piece = _Piece(file, first, last)
                    _insert(piece)
                if piece.state == "there":
                    break
                if piece.state == "failed":
                    self._remove(piece)
                    assert piece.error is not None
                    raise piece.error
                if piece.state == "planned":
                    piece.state = "urgent"
                    self._urgent.append(piece)
                    self._start(1)
                    self._changed.notify_all()
                if stopping is not None and stopping.is_set():
                    raise StoppedError
                self._changed.wait(0.2)
            piece.pins += 1
            self._noted(piece)
        return piece

    def _noted(self, piece: _Piece) -> None:
        """Note that a piece is read."""
        if not piece.was_read:
            piece.was_read = True
            self._ahead = max(0, self._ahead - piece.size)
            self._changed.notify_all()
            if isinstance(piece.place, Path):
                _kept().touch(piece.place)
        if piece in self._spooled:
            self._spooled.move_to_end(piece)

    def _start(self, count: int) -> None:
        """Let there be threads for so many more pieces."""
        for _ in range(min(CONNECTIONS - self._threads, count)):
            self._threads += 1
            # What they wait for ends with the process, which need not wait for them.
            threading.Thread(target=self._fetch, name="safeproj-fetch", daemon=True).start()

    def _next(self) -> _Piece:
        """Return what is to be fetched next, when there is something."""
        while True:
            if self._urgent:
                piece = self._urgent.popleft()
            elif self._planned and (self._planned[0].state != "planned" or self._ahead < AHEAD):
                piece = self._planned.popleft()
                if piece.state != "planned":  # somebody could not wait
                    continue
            else:
                self._changed.wait()
                continue
            piece.state = "coming"
            self._ahead += piece.size
            return piece

    def _fetch(self) -> None:
        buffer = memoryview(bytearray(PIECE))
        never = threading.Event()
        while True:
            with self._changed:
                piece = self._next()
            data = buffer[: piece.size]
            try:
                piece.file.origin.read(piece.start, data, never)
                with self._changed:
                    self._make_room()
                place = piece.file.put(piece.start, data, self._spool)
            except BaseException as error:
                with self._changed:
                    piece.state, piece.error = "failed", error
                    self._ahead = max(0, self._ahead - piece.size)
                    self._changed.notify_all()
            else:
                with self._changed:
                    self._arrived(piece, place)
                    self._changed.notify_all()

    def _store(self, piece: _Piece, data: memoryview) -> None:
        self._make_room()
        self._arrived(piece, piece.file.put(piece.start, data, self._spool))

    def _arrived(self, piece: _Piece, place: Place) -> None:
        piece.state, piece.place = "there", place
        if isinstance(place, int):
            self._spooled[piece] = None

    def _make_room(self) -> None:
        if self._spool.full:
            free = [piece for piece in self._spooled if not piece.pins]
            for piece in sorted(free, key=lambda piece: not piece.was_read)[:1]:
                self._remove(piece)

    def _remove(self, piece: _Piece) -> None:
        """Forget a piece, which is fetched again if it is read again."""
        if piece in piece.file.pieces:
            piece.file.pieces.remove(piece)
        if piece in self._spooled:
            del self._spooled[piece]
            assert isinstance(piece.place, int)
            self._spool.drop(piece.place)


def fetch(wanted: Iterable[tuple[RangeFile, int, int]]) -> None:
    """Say what will be read, in this order: it is fetched meanwhile.

    Args:
        wanted: of each range its file, first byte and end.

    Raises:
        SafeprojError: a file that is better downloaded cannot be.
    """
    ranges: dict[RangeFile, list[Range]] = {}
    asked = list(wanted)
    for file, start, stop in asked:
        if start < stop:
            ranges.setdefault(file, []).append((start, stop))
    for file, given in ranges.items():
        file.settle(given)
    found = [(file, a, b) for file, a, b in asked if file.local is None and a < b]
    if found:
        _fetcher().plan(found)


def forget() -> None:
    """Fetch nothing more of what was said: it is not read."""
    if _made.cache_info().currsize:
        _fetcher().forget()


_MAKING = threading.Lock()


def _fetcher() -> _Fetcher:
    """Return the only one: threads that ask for it at once must not make two."""
    with _MAKING:
        return _made()


@cache
def _made() -> _Fetcher:
    return _Fetcher()


@cache
def _kept() -> Kept:
    return kept()


def _at(pieces: Sequence[_Piece], byte: int) -> _Piece | None:
    """Return the piece that has a byte, None if there is none."""
    found = bisect_right(pieces, byte, key=lambda piece: piece.start) - 1
    return pieces[found] if found >= 0 and byte < pieces[found].stop else None


def _insert(piece: _Piece) -> None:
    pieces = piece.file.pieces
    pieces.insert(bisect_right(pieces, piece.start, key=lambda each: each.start), piece)


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in order, as one where they meet or nearly do."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found:
            first, last = found[-1]
            if (start - last) * SLACK <= (last - first) + (stop - start):
                found[-1] = (first, max(last, stop))
                continue
        found.append((start, stop))
    return found


def _gaps(pieces: Sequence[_Piece], ranges: Iterable[Range]) -> list[Range]:
    """Return what of ranges is in no piece."""
    found = []
    for start, stop in ranges:
        at = max(bisect_right(pieces, start, key=lambda piece: piece.start) - 1, 0)
        for piece in pieces[at:]:
            if piece.start >= stop:
                break
            if piece.start > start:
                found.append((start, piece.start))
            start = max(start, piece.stop)
        if start < stop:
            found.append((start, stop))
    return found
