"""Where the bytes of remote files come from: the Hub and other addresses by HTTP, others by fsspec.

Ranges are asked for by the Hub client's own session, so that proxies, certificates and time-outs
are those of all else that it does. Every answer is held against what was asked for, and against
the first one: a file that changes meanwhile is never read in parts of both.
"""

from __future__ import annotations

import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from safeproj.errors import SafeprojError
from safeproj.text import first_line, printable

TRIES = 5
"""Failures in a row after which a file is given up."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before a second try, which double from try to try, and their bound."""

PATIENCE = 300.0
"""Seconds that a server may ask to wait (`Retry-After`)."""

HEADWAY = 64 << 10
"""Bytes after which a failure counts as the first: a connection that is often reset gets on."""

TRICKLE = 1 << 10
"""Bytes per second below which a connection counts as dead."""

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of answers that may be others later."""

EXPIRED = frozenset({400, 401, 403, 404, 410})
"""Statuses by which an address says that it is no longer valid."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

T = TypeVar("T")


class NotHonouredError(Exception):
    """A server sends the whole file where a range of it was asked for."""


class StoppedError(Exception):
    """The work was given up: another worker failed, or the run was interrupted."""


class _AgainError(Exception):
    """An attempt failed, and the next may not.

    Args:
        reason: what happened.
        wait: seconds that the server asks to wait, None where it does not say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Origin(ABC):
    """A remote file, read in ranges.

    Args:
        source: the SRC that it is of, for messages.
        name: its name there.

    Attributes:
        size: in bytes; known after `look`.
        identity: what tells that its content is the same, None where nothing does.
        honours: whether the server sends ranges.
    """

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        self.size = 0
        self.identity: str | None = None
        self.honours = True

    def __str__(self) -> str:
        return f"{self.source}: {printable(self.name)}"

    @abstractmethod
    def look(self, count: int = 1) -> bytes | None:
        """Return the first bytes, `count` of them if there are so many; None if there is no file.

        Raises:
            SafeprojError: it cannot be read.
        """

    @abstractmethod
    def _part(self, start: int, out: memoryview) -> Generator[int, None, None]:
        """Fill `out` from byte `start`, and yield how many bytes came each time.

        Raises:
            _AgainError: this attempt failed.
            NotHonouredError: the server does not send ranges.
            SafeprojError: no attempt can succeed.
        """

    @abstractmethod
    def download(self, path: Path) -> None:
        """Write the whole file to a path.

        Raises:
            SafeprojError: it cannot be read.
        """

    def read(self, start: int, out: memoryview, stop: threading.Event) -> None:
        """Fill `out` from byte `start`, going on where a connection breaks.

        Raises:
            SafeprojError: it cannot be read, or has changed.
            NotHonouredError: the server does not send ranges.
            StoppedError: `stop` was set.
        """
        done = before = failures = 0
        while done < len(out):
            try:
                with closing(self._part(start + done, out[done:])) as parts:
                    for count in parts:
                        done += count
                        if stop.is_set():
                            raise StoppedError
                if done < len(out):
                    raise _AgainError("the answer ended early")
            except _AgainError as error:
                failures = 1 if done - before >= HEADWAY else failures + 1
                before = done
                self._wait(error, failures, stop)

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Return what an attempt returns, repeated as often as `read` does."""
        failures = 0
        while True:
            try:
                return attempt()
            except _AgainError as error:
                failures += 1
                self._wait(error, failures, threading.Event())

    def _wait(self, error: _AgainError, failures: int, stop: threading.Event) -> None:
        wait = error.wait
        if wait is not None and wait > PATIENCE:
            raise SafeprojError(
                f"{self}: {error.reason}, and asks to wait {wait:.0f} seconds; try again then"
            )
        if failures >= TRIES:
            raise SafeprojError(
                f"{self} could not be read in {failures} tries: {error.reason}; try again"
            )
        if wait is None:
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
        if stop.wait(wait):
            raise StoppedError

    def _same(self, known: str | None, found: str | None) -> str | None:
        """Return what a file is known by.

        Raises:
            SafeprojError: it is known by something else.
        """
        if known is not None and found != known:
            raise SafeprojError(
                f"{self} changed while it was read (it was {known!a}, and is {found!a}); run again"
            )
        return found


class HttpOrigin(Origin):
    """A file that has an address.

    Its address may lead to another one, which is signed and expires: that is asked as long as it
    answers, without the token, which belongs to the Hub alone.

    Args:
        source: the SRC that it is of, for messages.
        name: its name there.
        url: its address.
        revision: the commit, for a file on the Hub, whose token may be needed.
    """

    def __init__(self, source: str, name: str, url: str, revision: str | None = None) -> None:
        super().__init__(source, name)
        self._url, self._revision = url, revision
        self._location = url
        self._lock = threading.Lock()
        self._linked: str | None = None
        self._etag: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock: another machine reads the same file, and no other."""
        return {**vars(self), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def look(self, count: int = 1) -> bytes | None:
        return self._persist(lambda: self._look(count))

    def _look(self, count: int) -> bytes | None:
        with self._answer(f"bytes=0-{count - 1}") as response:
            status = response.status_code
            if self._revision is None and status in (403, 404, 410):
                return None
            if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # there is no first byte
                return b""
            if status != HTTPStatus.OK:
                self._require_part(response)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            self.honours = status == HTTPStatus.PARTIAL_CONTENT and found is not None
            if not self.honours or found is None:
                length = response.headers.get("Content-Length", "")
                self.size = int(length) if length.isdecimal() else 0
                return b""
            self.size = int(found[3])
            self._require_same(response)
            content = bytearray(min(count, self.size))
            if sum(_body(response, memoryview(content))) < len(content):
                raise _AgainError("the answer ended early")
            return bytes(content)

    def _part(self, start: int, out: memoryview) -> Generator[int, None, None]:
        last = start + len(out) - 1
        with self._answer(f"bytes={start}-{last}") as response:
            self._require_part(response)
            self._require_same(response)
            wanted = f"bytes {start}-{last}/{self.size}"
            found = response.headers.get("Content-Range", "")
            if found != wanted:
                raise _AgainError(f"asked for {wanted!a}, the server sent {found[:80]!a}")
            yield from _body(response, out)

    @contextmanager
    def _answer(self, wanted: str | None) -> Iterator[Any]:
        """Yield the answer to a request for a range, or for all."""
        location = self._location
        is_own = urlsplit(location).netloc == urlsplit(self._url).netloc
        token = None if self._revision is not None and is_own else False
        headers = {**_client().build_hf_headers(token=token), "Accept-Encoding": "identity"}
        if wanted is not None:
            headers["Range"] = wanted
        try:
            with _sent(location, headers) as response:
                if response.status_code < HTTPStatus.BAD_REQUEST:
                    self._location = str(response.url)
                yield response
        except _failures() as error:
            raise _AgainError(f"{type(error).__name__}: {first_line(error)}") from error

    def _require_part(self, response: Any) -> None:
        """Refuse an answer that is no part of the file."""
        status = response.status_code
        if status == HTTPStatus.PARTIAL_CONTENT:
            return
        if status == HTTPStatus.OK:
            raise NotHonouredError
        if status in AGAIN:
            raise _AgainError(f"the server answered {status}", _retry_after(response.headers))
        if status in EXPIRED and (response.history or self._location != self._url):
            self._location = self._url
            raise _AgainError(f"its address answered {status}", 0.0)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise SafeprojError(f"{self} became shorter while it was read; run again")
        if self._revision is not None:
            with hub_errors(self.source):
                _client().hf_raise_for_status(response)
        raise SafeprojError(f"{self} could not be read: the server answered {status}")

    def _require_same(self, response: Any) -> None:
        """Refuse an answer about another file than the first was about."""
        first = (*response.history, response)[0].headers
        etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        commit = first.get("X-Repo-Commit")
        if self._revision is not None and commit is not None and commit != self._revision:
            raise SafeprojError(
                f"{self} is of commit {commit}, where {self._revision} was asked for; run again"
            )
        with self._lock:
            self._etag = self._same(self._etag, etag)
            if "X-Linked-Etag" in first:
                self._linked = self._same(self._linked, first["X-Linked-Etag"])
            strong = self._linked or response.headers.get("ETag") or "W/"
            self.identity = None if strong.startswith("W/") else strong.strip('"')

    def download(self, path: Path) -> None:
        def once() -> None:
            with self._answer(None) as response, path.open("wb") as file:
                if response.status_code != HTTPStatus.OK:
                    self._require_part(response)
                self._require_same(response)
                length = response.headers.get("Content-Length", "")
                for chunk in _chunks(response):
                    file.write(chunk)
                if length.isdecimal() and file.tell() != int(length):
                    raise _AgainError("the answer ended early")

        self._persist(once)


class StoreOrigin(Origin):
    """A file of an object store, or whatever else fsspec reads.

    Args:
        source: the SRC that it is of, for messages.
        name: its name there.
        files: the file system, of fsspec.
        path: of the file there.
        info: what the file system says of it.
    """

    def __init__(
        self, source: str, name: str, files: Any, path: str, info: Mapping[str, Any]
    ) -> None:
        super().__init__(source, name)
        self._files, self._path = files, path
        self.size = int(info.get("size") or 0)
        told = info.get("ETag") or info.get("etag") or info.get("generation")
        self.identity = None if told is None else str(told).strip('"')

    def look(self, count: int = 1) -> bytes | None:
        content = bytearray(min(count, self.size))
        self.read(0, memoryview(content), threading.Event())
        return bytes(content)

    def _part(self, start: int, out: memoryview) -> Generator[int, None, None]:
        try:
            # An open file of an object store asks for the ETag that the listing had.
            with self._files.open(self._path, "rb", cache_type="none") as file:
                file.seek(start)
                content = file.read(len(out))
        except Exception as error:
            raise self._explained(error) from error
        out[: len(content)] = content
        yield len(content)

    def _explained(self, error: Exception) -> Exception:
        if type(error).__name__ == "FileExpired":
            return SafeprojError(f"{self} changed while it was read; run again")
        if isinstance(error, FileNotFoundError | PermissionError):
            return SafeprojError(f"{self} could not be read ({first_line(error)})")
        return _AgainError(f"{type(error).__name__}: {first_line(error)}")

    def download(self, path: Path) -> None:
        def once() -> None:
            try:
                self._files.get_file(self._path, str(path))
            except Exception as error:
                raise self._explained(error) from error
            if path.stat().st_size != self.size:
                raise _AgainError("the answer ended early")

        self._persist(once)


def _client() -> Any:
    """Return what the Hub client exports otherwise than type checkers read it."""
    from huggingface_hub import utils

    return utils


@contextmanager
def _sent(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Yield the answer to a GET, whose body is still to come, by whatever the Hub client uses."""
    from huggingface_hub import constants

    session, timeout = _client().get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            yield response
    else:  # requests, before version 1.0 of the Hub client
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response


def _failures() -> tuple[type[Exception], ...]:
    """Return what a connection that fails raises: of requests it is an OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    found: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # HTTPError of httpx comes first
    return (found[0], OSError)


def _chunks(response: Any) -> Iterator[bytes]:
    """Yield what comes of a body, as it comes."""
    raw = getattr(response, "iter_raw", None)
    found: Iterator[bytes] = response.iter_content(HEADWAY) if raw is None else raw()
    return found


def _body(response: Any, out: memoryview) -> Iterator[int]:
    """Fill `out` from a body, and yield how many bytes came each time."""
    from huggingface_hub import constants

    window = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    done = before = 0
    begin = time.monotonic()
    for chunk in _chunks(response):
        if done + len(chunk) > len(out):
            raise _AgainError("the server sent more bytes than were asked for")
        out[done : done + len(chunk)] = chunk
        done += len(chunk)
        yield len(chunk)
        now = time.monotonic()
        if now - begin > window:
            if done - before < TRICKLE * window and done < len(out):
                raise _AgainError(f"fewer than {TRICKLE} bytes came in a second")
            begin, before = now, done


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a server asks to wait, by a number or a date."""
    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given)
    try:
        then = parsedate_to_datetime(given)
    except (TypeError, ValueError):
        return None
    now = datetime.now(timezone.utc)
    return max(0.0, (then.astimezone(timezone.utc) - now).total_seconds())


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn what the Hub client raises into one line that says what to do."""
    try:
        yield
    except SafeprojError:
        raise
    except Exception as error:
        raise SafeprojError(f"{source}: {_hub_advice(error)}") from error


def _hub_advice(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is gated: accept its licence on the Hub and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; expected a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such local path, and no such repository on the Hub (private ones need HF_TOKEN)"
    if isinstance(error, errors.HFValidationError):
        return "no such local path, and not a valid Hub id (expected org/name)"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return "the Hub does not accept the token; check HF_TOKEN, or log in again"
    return (
        f"the Hub could not be read ({type(error).__name__}: {first_line(error)}); try again, or "
        "set HF_HUB_OFFLINE=1 to use what is in the cache"
    )
