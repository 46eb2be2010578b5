"""How what is written appears: in one step, complete or not at all, and over nothing unseen.

It is written under a hidden name in the same directory, which belongs to the run that made it (a
lock tells), and gets its own name when it is complete. Where nothing may be replaced, what has
appeared under that name meanwhile stays; where something may, it is looked at once more directly
before.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from platform import node
from typing import IO, Any

from safeproj.errors import SafeprojError

Look = Callable[[], None]
"""Raises a `SafeprojError` where what is there may not be replaced."""

LONGEST_NAME = 200
"""Bytes of a name that are repeated in the hidden one: systems allow 255 in all."""

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{6}-[0-9a-f]{8}\.tmp", re.DOTALL)

_HERE = {"linux": -100, "darwin": -2}
"""AT_FDCWD, by system."""

_CALLS = {"linux": "renameat2", "darwin": "renameatx_np"}
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS."""

_KEEP = {"linux": 1, "darwin": 4}
"""RENAME_NOREPLACE, RENAME_EXCL."""

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class AppearedError(Exception):
    """Something has appeared under the name that a run was to write, and was left as it is."""


def appeared(where: str) -> str:
    """Return what to say of something that a run was to write, and others wrote meanwhile."""
    return f"{where}: has appeared while this run went on; it is left as it is"


@contextmanager
def refused_in_one_line(out: Path, what: str = "name") -> Iterator[None]:
    """Say in one line why an `--out` is not written.

    Args:
        out: as it was given.
        what: what the user may choose another of.

    Raises:
        SafeprojError: it has appeared meanwhile, or cannot be written.
    """
    try:
        yield
    except AppearedError as error:
        raise SafeprojError(
            f"{appeared(f'--out {out}')}, and nothing was written: choose another {what}, or give "
            "--overwrite"
        ) from error
    except OSError as error:
        raise SafeprojError(
            f"--out {out}: cannot be written ({error.strerror or error}); nothing was written"
        ) from error


class Appearance:
    """A file or directory that is being written, and is to appear at `place`.

    Attributes:
        place: where it is to appear.
        path: where it is until then. After it has appeared, what was there before is here.
        appeared: whether it has.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.appeared = False
        self._kept = False
        self._lock: int | None = None
        self._name()

    def _name(self) -> None:
        name = f"{_start(self.place.name)}{secrets.token_hex(4)}.tmp"
        self.path = self.place.with_name(name)

    def make(self, *, directory: bool) -> None:
        """Make it, empty; `close` has to follow even where a signal interrupts this.

        Raises:
            OSError: it cannot be made.
        """
        remove_leftovers(self.place)
        while True:
            if directory:
                self.path.mkdir()
            else:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            self._lock = _locked(self.path, wait=True)
            if os.path.lexists(self.path):
                return
            self._release()  # another run took it for a leftover, before it was locked
            self._name()

    def appear(self, look: Look | None) -> None:
        """Flush it to the disk and give it its name; what had that name is at `path` then.

        Args:
            look: looks at what is there, which may be replaced; None to replace nothing.

        Raises:
            AppearedError: something is there, and nothing may be replaced.
            OSError: it cannot be written; nothing has appeared.
            SafeprojError: what is there may not be replaced; or it is written, and something went
                wrong afterwards.
        """
        for path in [*self.path.rglob("*"), self.path]:
            flush(path)
        with uninterrupted():
            _move(self.path, self.place, look)
            self.appeared = True
            self._settle()

    def _settle(self) -> None:
        """Make the names last, and remove what was replaced."""
        try:
            flush(self.place.parent)
        except OSError as error:
            # After a power failure either may have the name: so neither is removed.
            self._kept = os.path.lexists(self.path)
            kept = f"; what was there before is kept as {self.path}" if self._kept else ""
            raise SafeprojError(
                f"{self.place} is written and complete, but the system does not say that its name "
                f"is on the disk ({error.strerror}): a power failure now may undo it{kept}"
            ) from error
        try:
            remove(self.path)
        except OSError as error:
            self._kept = True
            raise SafeprojError(
                f"{self.place} is written and complete, but what was there before cannot be "
                f"removed ({error.strerror}): its remains are {self.path}; remove them"
            ) from error

    def close(self) -> None:
        """Remove what has not appeared, and let go of the lock."""
        with uninterrupted():
            if not self._kept:
                with suppress(OSError):
                    remove(self.path)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


PARTIAL, STATE = ".partial", "safeproj.resume.json"
"""End of the name of a directory that an interrupted run leaves to be gone on with, and the file in
it that says which run that is."""


class Resumed(Appearance):
    """A directory that is there again where the run that wrote it was interrupted.

    Args:
        place: where it is to appear.
        run: what tells the run from every other; what another one left is removed.
    """

    def __init__(self, place: Path, run: str) -> None:
        self._run = run
        super().__init__(place)

    def _name(self) -> None:
        self.path = self.place.with_name(f"{self.place.name}{PARTIAL}")

    def make(self, *, directory: bool) -> None:
        assert directory
        remove_leftovers(self.place)
        if os.path.lexists(self.path):
            self._look()
        else:
            self.path.mkdir()
        self._lock = _locked(self.path)
        if self._lock is None and sys.platform != "win32":
            raise SafeprojError(f"{self.path}: another run writes it; wait for it to end")
        if self._state().get("run") != self._run:
            for path in self.path.iterdir():
                remove(path)
        self.keep({})

    def appear(self, look: Look | None) -> None:
        (self.path / STATE).unlink()
        super().appear(look)

    def close(self) -> None:
        """Leave it as it is, for the next run."""
        with uninterrupted():
            self._release()

    @property
    def kept(self) -> dict[str, Any]:
        """What `keep` was given, by the run that was interrupted too."""
        found = self._state().get("kept")
        return found if isinstance(found, dict) else {}

    def keep(self, values: Mapping[str, Any]) -> None:
        """Keep values for the run that goes on, beside those of before."""
        text = json.dumps({"run": self._run, "kept": {**self.kept, **values}})
        part = self.path / f"{STATE}.part"
        part.write_text(text, "utf-8")
        part.replace(self.path / STATE)

    def _look(self) -> None:
        """Refuse what no interrupted run left."""
        if _is_directory(self.path) and (
            (self.path / STATE).is_file() or not any(self.path.iterdir())
        ):
            return
        raise SafeprojError(
            f"{self.path}: is in the way, and was not left by an interrupted run; remove it"
        )

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@contextmanager
def appearing(
    place: Path, *, directory: bool = False, run: str | None = None
) -> Iterator[Appearance]:
    """Yield something to write that appears at `place`; whatever happens, nothing else is left.

    Args:
        place: where it is to appear.
        directory: whether it is one.
        run: what tells the run from every other, if an interrupted one is to be gone on with: then
            what is written stays until it is complete.

    Raises:
        OSError: it cannot be made.
    """
    found = Appearance(place) if run is None else Resumed(place, run)
    try:  # from here on: a signal may come when it is made, and before it is known to be
        found.make(directory=directory)
        yield found
    finally:
        found.close()


def is_leftover(name: str) -> bool:
    """Tell whether a name is one that a run gives to what is not complete yet."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(place: Path) -> None:
    """Remove what runs to the same place left behind that were killed.

    A run holds a lock on what it writes, until it ends in whatever way. What a run on another
    machine writes has another name, since locks may not reach there.
    """
    start = _start(place.name)
    with suppress(OSError):
        names = [each.name for each in os.scandir(place.parent) if each.name.startswith(start)]
        for name in names:
            path = place.with_name(name)
            if is_leftover(name) and (lock := _locked(path)) is not None:
                with suppress(OSError):
                    remove(path)
                os.close(lock)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there.

    Raises:
        OSError: something of it cannot be removed.
    """
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unremovable(directory: Path) -> Path | None:
    """Return what of a directory certainly cannot be removed, None if there is no such thing."""
    for place, _, _ in os.walk(directory):
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            return Path(place)
    return None


def hold(file: IO[bytes]) -> None:
    """Let other runs see that this one writes a file, until it closes it: see `is_held`."""
    with suppress(ImportError, OSError):  # Windows; a file system that knows no locks
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Tell whether another run that is alive writes a file."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _start(name: str) -> str:
    """Return how the hidden names of runs on this machine begin."""
    stem = name
    if len(os.fsencode(name)) > LONGEST_NAME:
        stem = sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{stem}.{sha256(node().encode()).hexdigest()[:6]}-"


def _locked(path: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """Return a descriptor that holds a lock on a file or directory; None if none can be had.

    Args:
        path: the file or directory.
        shared: whether others may hold one of the same kind.
        wait: for another run to let go of it; else there is none then.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        found = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(found, kind if wait else kind | fcntl.LOCK_NB)
    except OSError:  # another run has it, or the file system knows no locks
        os.close(found)
        return None
    return found


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no SIGINT or SIGTERM come between steps that belong together.

    They last milliseconds. Their signals are dropped: when they are done, so is the work.
    """
    if threading.current_thread() is not threading.main_thread():  # only it handles signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flush(path: Path) -> None:
    """Flush a file or directory to the disk, where the system can."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(path: Path, place: Path, look: Look | None) -> None:
    """Give what is complete its name; what had that name is at `path` then."""
    while True:
        try:
            _rename_to_nothing(path, place)
        except FileExistsError:
            if look is None:
                raise AppearedError(place) from None
        else:
            return
        # Locked, so that nobody takes what was there for a leftover while it has the hidden name.
        lock = _locked(place, shared=True)
        try:
            before = _identity(place)
            if _is_directory(place) != _is_directory(path):
                kind = errno.EISDIR if _is_directory(place) else errno.ENOTDIR
                raise OSError(kind, os.strerror(kind), str(place))
            look()
            if before is not None and _replace(path, place, before):
                return
        finally:
            if lock is not None:
                os.close(lock)


def _rename_to_nothing(path: Path, place: Path) -> None:
    """Rename a file or directory to a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if sys.platform in _CALLS:
        try:
            _renamed(path, place, _KEEP[sys.platform])
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    if sys.platform == "win32":
        path.rename(place)  # fails where something is there
    elif path.is_dir():
        place.mkdir()  # fails where something is there, and only what is empty is replaced
        try:
            path.rename(place)
        except OSError as error:
            with suppress(OSError):
                place.rmdir()
            if error.errno == errno.ENOTEMPTY:  # somebody has put something into it
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            raise
    else:
        try:
            place.hardlink_to(path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            path.replace(place)
        else:
            path.unlink()


def _replace(path: Path, place: Path, before: tuple[int, int]) -> bool:
    """Exchange what is complete with what was looked at; False if that is something else by now."""
    try:
        _renamed(path, place, _EXCHANGE)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _replace_in_steps(path, place, before)
    if _identity(path) == before:
        return True
    _renamed(path, place, _EXCHANGE)  # something else came between: it gets its name back
    return False


def _replace_in_steps(path: Path, place: Path, before: tuple[int, int]) -> bool:
    """Do the same where no two names can be exchanged: for a moment the old has another name."""
    if not path.is_dir():
        path.replace(place)
        return True
    old = path.with_suffix(".old")
    place.rename(old)
    if _identity(old) != before:
        old.rename(place)
        return False
    try:
        path.rename(place)
    except OSError:
        old.rename(place)
        raise
    old.rename(path)
    return True


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or directory from every other, None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _renamed(first: Path, second: Path, how: int) -> None:
    """Rename in one of the ways that only the system's own call offers.

    Raises:
        OSError: it did not work; with one of the errors of `_UNSUPPORTED` if there is no such way.
    """
    name = _CALLS.get(sys.platform)
    call = None if name is None else getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = _HERE[sys.platform]
    if int(call(here, os.fsencode(first), here, os.fsencode(second), how)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))
