"""The one exception that safeproj raises on purpose, and what users can do about others."""

from __future__ import annotations

from safeproj.text import cut, first_line, printable


class SafeprojError(Exception):
    """An input or option that cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command
    prints it and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut(message))


def explained(error: BaseException) -> str | None:
    """Return what a user can do something about, in one line; None for an error of our own.

    What the system refuses can come up anywhere: names that are too long, links that lead to
    themselves, disks and memory that are full.
    """
    if isinstance(error, SafeprojError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in RUN_MODELS:
        return missing(error.name)
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


def missing(package: str) -> str:
    """Return what to say where a package that runs models is not installed."""
    return f"{package} is not installed, which runs the model; {install('train')}"


def install(extra: str) -> str:
    """Return how to install safeproj with one of its extras: it is on no package index.

    >>> install("train")
    "install it with `pip install '.[train]'` in a clone of safeproj"
    """
    return f"install it with `pip install '.[{extra}]'` in a clone of safeproj"


RUN_MODELS = ("array_api_compat", "torch", "transformers", "peft")
"""Packages without which no model runs; all else works."""

_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc")
"""What the messages of errors have that torch raises where memory is full."""
