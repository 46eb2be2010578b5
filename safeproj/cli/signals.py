"""What signals do to the command: end it at once, unwind its work, or end it without a word."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

INTERRUPTED = "safeproj: interrupted; there is no partial output"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def at_once() -> None:
    """From now on a signal ends the process at once, with a line.

    So it is while modules are imported: an import can swallow the exception that a signal raises,
    and an extension module crash on it.
    """
    gc.disable()  # what is imported is not garbage
    _handle(_end)


def interruptible() -> None:
    """From now on a signal unwinds the work in progress; call it when all imports are done."""
    gc.enable()
    gc.freeze()  # what was imported stays: looking through it for garbage takes 50 ms each time
    _handle(_unwind)


def done() -> None:
    """From now on a signal ends the process without a word: the work is done."""
    _handle(signal.SIG_DFL)


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a command that was interrupted, as a shell reports it."""
    return 128 + int(error.args[0] if error.args else signal.SIGINT)


def leave(code: object) -> None:
    """End the process without tearing it down, if that is the code of an interruption.

    A thread that the signal kept from being waited for would abort it.
    """
    if isinstance(code, int) and code - 128 in _SIGNALS:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(code)


def _handle(handler: Any) -> None:
    with suppress(ValueError):  # not in the main thread, as when embedded
        for number in _SIGNALS:
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler
    with suppress(OSError):
        os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


def _unwind(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler
    raise KeyboardInterrupt(number)
