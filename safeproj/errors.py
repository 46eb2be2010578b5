"""The one exception that safeproj raises on purpose, and what users can do about others."""

from __future__ import annotations

import re

from safeproj.text import cut, first_line, printable

ARGUMENTS = {
    "--adapters-only": "alone",
    "--by": "axis",
    "--chat-template-arg": "arguments",
    "--data-out": "data",
    "--engine": "cluster",
    "--evaluation": "evaluations",
    "--fail-if-unchanged": "only_if_changed",
    "--init": "initial",
    "--judge-command": "command",
    "--judge-guard": "source",
    "--judge-model": "model",
    "--judge-timeout": "timeout",
    "--judge-url": "url",
    "--lm-eval": "tasks",
    "--lm-eval-path": "path",
    "--map": "maps",
    "--override": "overrides",
    "--phrase": "phrases",
    "--pin": "identities",
    "--random-tokens": "data",
    "--ray-address": "address",
    "--reader": "readers",
    "--safety-rank": "rank",
    "--thought-tag": "tags",
}
"""Options, and the arguments in Python that are not called the same, with underscores."""

_NAMED = re.compile(r"`[^`]*`|(?<![^\s(])--[a-z][a-z-]*(?:/--[a-z][a-z-]*)*")
"""What a message may have: a command in backticks, which stays, or the names of options."""


class SafeprojError(Exception):
    """An input or argument that cannot be used.

    The message is one line that says what was found, what was expected and what to do. In Python
    it names arguments.

    Attributes:
        message: the same as it was written, with options, for the command, which prints it and
            exits with code 2, and for records, which are the same whoever makes them.
    """

    def __init__(self, message: str) -> None:
        self.message = cut(message)
        super().__init__(in_python(self.message))


def in_python(message: str) -> str:
    """Return a message with the names of arguments in the place of options.

    Commands are in backticks: they are typed into a shell, and stay what they are.

    >>> in_python("--safety-data is missing; `safeproj stats --aligned` makes statistics")
    'safety_data is missing; `safeproj stats --aligned` makes statistics'
    """

    def named(found: re.Match[str]) -> str:
        options = found[0].split("/")
        return found[0] if found[0].startswith("`") else "/".join(map(argument, options))

    return _NAMED.sub(named, message)


def argument(option: str) -> str:
    """Return what an option is called in Python."""
    return ARGUMENTS.get(option, option.removeprefix("--").replace("-", "_"))


def explained(error: BaseException) -> str | None:
    """Return what a user can do something about, in one line; None for an error of our own.

    What the system refuses can come up anywhere: names that are too long, links that lead to
    themselves, disks and memory that are full.
    """
    if isinstance(error, SafeprojError):
        return error.message
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
