"""Wording of messages of one line, and text that came out of files."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for use inside a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return the text with what could steer a terminal or break an encoding written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_COMMAND = re.compile(r"(^|: )(\$ )?safeproj [a-z]+ (?=[^ ])|^\$ ")
_STYLE = re.compile(r"\x1b\[[\d;]*m")


def fitted(line: str, width: int) -> str:
    r"""Return a line for a terminal of so many columns, broken between words.

    A command stays one line, so that it can be copied.

    >>> fitted("  a cosine is a proxy", 16)
    '  a cosine is a\n  proxy'
    >>> fitted("next: safeproj eval --model MODEL", 16)
    'next: safeproj eval --model MODEL'
    """
    if len(_STYLE.sub("", line)) <= width or _COMMAND.search(line):
        return line
    indent = " " * (len(line) - len(line.lstrip(" ")))
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


_PAGE = re.compile(r"\bdocs/[a-z-]+\.md\b")


def located(text: str) -> str:
    """Return a text with the places of the pages of docs/ that it names, on this machine.

    They are in the package where it was installed, beside it in a clone; a name that leads there
    from the current directory stays.
    """
    return _PAGE.sub(lambda found: _place(found[0]), text)


def _place(page: str) -> str:
    package = Path(__file__).parent
    places = (home / page for home in (package, package.parent))
    found = next((place for place in places if place.is_file()), None)
    if found is None or Path(page).absolute() == found.absolute():
        return page
    return str(found)


def is_text(name: str) -> bool:
    """Tell whether a file name is text: others cannot be written into reports and records."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain(text: str) -> bool:
    """Tell whether a text from a file can be shown in a report or a model card as it is."""
    return text.isprintable() and not set(text) & set("`<>|")


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    listed = [printable(name) for name in names]
    more = f", and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def command_line(words: Sequence[str]) -> str:
    """Return a command as a shell takes it.

    >>> command_line(["safeproj", "eval", "--adapter", "my adapter"])  # doctest: +SKIP
    "safeproj eval --adapter 'my adapter'"
    """
    if os.name != "nt":
        return shlex.join(words)
    from subprocess import list2cmdline

    return list2cmdline(words)


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10.

    >>> sorted(["layers.10.q", "layers.2.q"], key=natural_order)
    ['layers.2.q', 'layers.10.q']
    """
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    )
