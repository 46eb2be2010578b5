"""The one exception that safeproj raises on purpose, and the wording of one-line messages."""

from __future__ import annotations

from collections.abc import Iterable


class SafeprojError(Exception):
    """An input or option that cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command
    prints it and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for use inside a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return the text with what could steer a terminal or break an encoding written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    listed = [printable(name) for name in names]
    more = f", and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
