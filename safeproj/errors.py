"""The one exception that safeproj raises on purpose, and the wording of one-line messages."""

from __future__ import annotations

from collections.abc import Iterable


class SafeprojError(Exception):
    """An input or option that cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command
    prints it and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut(message))


MAX_MESSAGE = 2_000
"""Characters of a message: what it repeats may come from a file, and be of any length."""


def cut(text: str) -> str:
    """Return a message without its middle, if it is longer than anyone reads.

    >>> len(cut("x" * 100_000)) <= MAX_MESSAGE
    True
    """
    if len(text) <= MAX_MESSAGE:
        return text
    gap = f" […{len(text)} characters in all…] "
    end = MAX_MESSAGE // 4
    return text[: MAX_MESSAGE - end - len(gap)] + gap + text[len(text) - end :]


def explained(error: BaseException) -> str | None:
    """Return what a user can do something about, in one line; None for an error of our own.

    What the system refuses can come up anywhere: names that are too long, links that lead to
    themselves, disks and memory that are full.
    """
    if isinstance(error, SafeprojError):
        return str(error)
    text = cut(printable(first_line(error)))
    if isinstance(error, MemoryError) or any(each in str(error) for each in _NO_MEMORY):
        return (
            f"not enough memory ({text}); use fewer --workers, a smaller --batch-size, or a larger "
            "machine"
        )
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{printable(str(error.filename))}: "
        return cut(f"{place}refused by the system ({error.strerror})")
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # from pathlib
        return f"{text}: a link that leads to itself; replace it"
    return None


_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc")
"""What the messages of errors have that torch raises where memory is full."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for use inside a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return the text with what could steer a terminal or break an encoding written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_text(name: str) -> bool:
    """Tell whether a file name is text: others cannot be written into reports and records."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    listed = [printable(name) for name in names]
    more = f", and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
