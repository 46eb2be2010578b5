"""Paths that are not there: what is near; and files that the user named, read with that in mind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePath

from safeproj.errors import SafeprojError
from safeproj.storage.mistaken import reason, require_finished, require_real
from safeproj.text import first_line, printable, shorten

MAX_ENTRIES = 2_000
"""Entries of a folder among which a near name is looked for."""

CLOSE = 0.7
"""How much of two names must be the same, as `difflib` counts, for one to be meant by the other."""


def nearby(path: Path) -> str:
    """Return what is near a path that is not there, as an end of a message; empty if nothing is.

    Names near the missing part of the path come first, else the folder that it is missing in.
    """
    return near_names(path) or _held_up(path)


def near_names(path: Path) -> str:
    """Return the paths of near names alone, as an end of a message; empty if there are none."""
    found = list(dict.fromkeys(map(str, _near(*_parted(path)))))[:2]
    return f"; did you mean {' or '.join(map(printable, found))}?" if found else ""


def _parted(path: Path) -> tuple[Path, list[str]]:
    return Path(path.anchor), list(path.parts[1 if path.anchor else 0 :])


def _held_up(path: Path) -> str:
    """Return how much of a path is there, as an end of a message; empty if it says nothing."""
    here, parts = _parted(path)
    first = here
    while parts and (here / parts[0]).exists():
        here /= parts.pop(0)
    if here == first or not parts:
        return ""
    if not here.is_dir():
        return f"; {printable(str(here))} is a file"
    return f"; {printable(str(here))} has {shorten(_entries(here)) or 'nothing in it'}"


def _near(here: Path, parts: list[str]) -> Iterator[Path]:
    """Yield paths near one, given as a folder and what follows; the path itself if it is there."""
    if not parts:
        yield here
        return
    first, *rest = parts
    if (here / first).exists():
        yield from _near(here / first, rest)
        return
    # Where more follows one is enough: else a path of many parts would be tried in many ways.
    for name in _close(here, first)[: 1 if rest else 2]:
        yield from list(_near(here / name, rest)) or [here / name]


def _close(folder: Path, name: str) -> list[str]:
    """Return the entries of a folder whose names are near one, with or without their ends."""
    names = _entries(folder)
    known: dict[str, str] = {}
    for each in names:
        known.setdefault(PurePath(each).stem.casefold(), each)
    known |= {each.casefold(): each for each in names}
    wanted = (name.casefold(), PurePath(name).stem.casefold())
    found = [match for each in wanted for match in get_close_matches(each, known, 2, CLOSE)]
    return list(dict.fromkeys(known[each] for each in found))


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden, in order."""
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in islice(entries, MAX_ENTRIES)]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def read_given(
    path: Path, where: str, expected: str, read: Callable[[Path], bytes | bytearray] | None = None
) -> bytes | bytearray:
    """Return the bytes of a file that the user named.

    Args:
        path: the file.
        where: what messages begin with: the option, and what it was given.
        expected: what it should be.
        read: reads it; of any length if None.

    Raises:
        SafeprojError: it is not there, cannot be read, or is something else than its name says.
    """
    path = path.expanduser()
    require_finished(where, path)
    try:
        content = (read or Path.read_bytes)(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SafeprojError(f"{where}: no such file{nearby(path)}") from error
    except (OSError, ValueError) as error:
        raise SafeprojError(
            f"{where}: cannot be read ({reason(error)}); expected {expected}"
        ) from error
    require_real(where, content)
    return content


def given_text(content: bytes | bytearray, where: str, expected: str) -> str:
    """Return the text that such bytes are, without a byte order mark.

    Raises:
        SafeprojError: it is not in UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SafeprojError(
            f"{where}: cannot be read ({first_line(error)}); expected {expected}"
        ) from error


def read_given_text(path: Path, where: str, expected: str) -> str:
    """Return the text of a file that the user named.

    Raises:
        SafeprojError: as `read_given` and `given_text`.
    """
    return given_text(read_given(path, where, expected), where, expected)
