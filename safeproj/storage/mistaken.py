"""Files that are not what their names say: pointers to the real one, pages, halves of downloads.

Only what nobody gives on purpose is told here, by its first bytes or by the end of its name.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from safeproj.errors import SafeprojError
from safeproj.text import first_line, printable

HEAD = 4096
"""Bytes from the start that tell."""

_FETCH = "fetch the file itself, such as with `hf download`"

EMPTY = f"is empty; {_FETCH}"

_STARTS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/"),
        "is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its clone, "
        f"or {_FETCH}",
    ),
    (
        re.compile(rb"(\.\./)*(\.git)?/annex/objects/"),
        "is a pointer of git-annex, not the file that it stands for; run `git annex get` for it",
    ),
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(!doctype\s+html|html)\b", re.I | re.S),
        "is a web page, such as of a login or of an error, not the file; fetch it with `hf "
        "download`, or from an address with /resolve/ where the page's has /blob/",
    ),
)
"""How such files start, and what to say of them."""

_TEXTS = re.compile(
    rb"\s*((404:? )?(entry |repository |page )?not found|invalid username or password|"
    rb"access to (model|dataset) \S+ is restricted.*|<\?xml[^>]*>\s*<error>.*)\.?\s*",
    re.I | re.S,
)
"""What the Hub and other servers say in the place of a file."""

_SAID = frozenset({"error", "errors", "message", "detail"})
_BESIDE = frozenset({"code", "documentation_url", "error_description", "error_type", "status"})
_BESIDE |= {"path", "request_id", "requestId", "statusCode", "timestamp"}
"""Keys of JSON that is about an error, and of what servers say beside it."""

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
"""Ends of names of downloads that are not finished."""


def mistaken(head: bytes | bytearray) -> str | None:
    """Return what a file is that surely is not what its name says, and what to do; else None.

    Args:
        head: its first `HEAD` bytes, or more.

    >>> mistaken(b"version https://git-lfs.github.com/spec/v1")[:23]
    'is a Git LFS pointer, n'
    """
    start = bytes(head[:HEAD])
    for pattern, found in _STARTS:
        if pattern.match(start.removeprefix(b"\xef\xbb\xbf")):
            return found
    if len(head) < HEAD and (_TEXTS.fullmatch(start) or _is_error(start)):
        said = printable(" ".join(start.decode("utf-8", "replace").split()))[:200]
        return f"is what a server said in the place of the file ({said}); {_FETCH}"
    if len(start) >= 16 and not any(start):
        return f"begins with nothing but zeros, as an unfinished download does; {_FETCH}"
    return None


def _is_error(text: bytes) -> bool:
    """Tell whether all of a text is JSON about an error and nothing else."""
    if not text.lstrip().startswith(b"{"):
        return False
    try:
        keys = frozenset(json.loads(text))
    except (ValueError, RecursionError):
        return False
    return bool(keys & _SAID) and keys <= _SAID | _BESIDE


def require_real(where: str, head: bytes | bytearray, *, empty: bool = True) -> None:
    """Refuse a file that is something else than its name says.

    Args:
        where: what the message begins with, which names the file.
        head: its first bytes.
        empty: whether it may be empty.

    Raises:
        SafeprojError: it is.
    """
    found = EMPTY if not (head or empty) else mistaken(head)
    if found is not None:
        raise SafeprojError(f"{where}: {found}")


def mistaken_file(path: Path, *, empty: bool = True) -> str | None:
    """Return the same of a file that is not in memory, None also where it cannot be read.

    Args:
        path: the file.
        empty: whether it may be empty.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    return mistaken(head) if head or empty else EMPTY


def require_finished(where: str, path: Path) -> None:
    """Refuse a file whose name says that its download was not finished.

    Raises:
        SafeprojError: it is one.
    """
    if path.name.endswith(_UNFINISHED):
        raise SafeprojError(
            f"{where}: is the beginning of a file, whose download was not finished; run the "
            "download again, such as `hf download`"
        )


def unfinished(folder: Path) -> str | None:
    """Return the name of a download into a folder that was not finished, None if there is none."""
    with suppress(OSError):
        places = (folder, folder / ".cache" / "huggingface" / "download")
        names = (each.name for place in places if place.is_dir() for each in place.iterdir())
        return next((name for name in sorted(names) if name.endswith(_UNFINISHED)), None)
    return None


def reason(error: BaseException) -> str:
    """Return why the system did not read a file, in one line."""
    return getattr(error, "strerror", None) or first_line(error)
