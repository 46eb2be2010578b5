"""The `safeproj` command, also as `python -m safeproj`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = "safeproj: interrupted; there is no partial output"
INTERRUPTIONS = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes, as a shell reports them."""


def main() -> None:
    """Run the command.

    A signal ends the process at once while modules are imported: an import can swallow the
    exception that a signal raises, and an extension module crash on it. After one that was unwound
    nothing is torn down either: a thread that the signal kept from being waited for would abort.
    """
    with suppress(ValueError):  # not in the main thread, as when embedded
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_at_once)
    from safeproj.cli import app

    try:
        app()
    except SystemExit as end:
        if end.code in INTERRUPTIONS:
            for stream in (sys.stdout, sys.stderr):
                with suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(end.code)
        raise


def end_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler
    """Say so and end the process: there is nothing to unwind yet."""
    with suppress(OSError):
        os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
