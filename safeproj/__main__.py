"""The `safeproj` command, also as `python -m safeproj`."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

INTERRUPTED = "safeproj: interrupted; there is no partial output"


def main() -> None:
    """Run the command.

    A signal ends the process at once while modules are imported: an import can swallow the
    exception that a signal raises, and an extension module crash on it.
    """
    with suppress(ValueError):  # not in the main thread, as when embedded
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_at_once)
    from safeproj.cli import app

    app()


def end_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler
    """Say so and end the process: there is nothing to unwind yet."""
    with suppress(OSError):
        os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
