"""How far a run is: what was counted, and lines about it where no terminal shows a bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from safeproj.engine import Progress

INTERVAL = 30.0
"""Seconds between two lines: so often a log shows that a run goes on."""


class Counted(Protocol):
    """What lines are about."""

    @property
    def text(self) -> str:
        """Counts, such as `3/20 answers`."""

    @property
    def share(self) -> float:
        """What share of the present stage is done."""

    @property
    def since(self) -> tuple[float, float]:
        """When the counting of it began, by the monotonic clock, and what share was done then."""


class Steps:
    """Steps of one kind.

    Args:
        what: is counted, such as `answers`.
    """

    def __init__(self, what: str) -> None:
        self._what, self._done, self._total = what, 0, 0
        self.since = time.monotonic(), 0.0

    def told(self, done: int, total: int) -> None:
        """So many of them are done, so many there are."""
        is_first = not self._total
        self._done, self._total = done, total
        if is_first:  # what came before, such as loading a model, says nothing of what is left
            self.since = time.monotonic(), self.share

    @property
    def text(self) -> str:
        """Counts."""
        return f"{self._done}/{self._total} {self._what}" if self._total else f"no {self._what} yet"

    @property
    def share(self) -> float:
        """What share of them is done."""
        return self._done / self._total if self._total else 0.0


class Run:
    """The observer of a run over checkpoints: weights that are read, or data that is run before.

    Args:
        changed: called with this after each change, if at all.
    """

    def __init__(self, changed: Callable[[Run], object] | None = None) -> None:
        self._changed = changed or (lambda run: run)
        self._weights = self._finished = self._nbytes = self._read = 0
        self._batches = Steps("batches of the data")
        self._is_reading, self._lock = False, Lock()
        self.since = time.monotonic(), 0.0

    def start(self, modules: int, nbytes: int) -> None:
        """So many weights are to be read, so many bytes; again for each further batch."""
        self._is_reading = True
        self._weights += modules
        self._nbytes += nbytes
        self.since = time.monotonic(), self.share
        self._changed(self)

    def ran(self, done: int, total: int) -> None:
        """So many of all batches of data were run, before anything is read."""
        self._is_reading = False
        self._batches.told(done, total)
        self.since = self._batches.since
        self._changed(self)

    def progress(self, event: Progress) -> None:
        """Something was read or finished; called from the engine's threads."""
        with self._lock:
            self._finished += event.finished
            self._read += event.nbytes
        self._changed(self)

    @property
    def text(self) -> str:
        """Counts."""
        if self._is_reading:
            return f"{self._finished}/{self._weights} weights"
        return self._batches.text if self._batches.share else "nothing read yet"

    @property
    def share(self) -> float:
        """What share of the bytes was read, or of the data was run."""
        if self._is_reading:
            return self._read / self._nbytes if self._nbytes else 0.0
        return self._batches.share

    @property
    def bar(self) -> dict[str, Any]:
        """What a bar over the bytes shows."""
        return {
            "description": self.text,
            "completed": self._read,
            "total": self._nbytes or None,
            "visible": self._is_reading or 0.0 < self._batches.share < 1.0,
        }


class Lines:
    """Says how far something is while it goes on, from a thread: one step may take long.

    Args:
        counted: what is told.
        say: writes a line.
        interval: seconds between two; `INTERVAL` if None.
    """

    def __init__(
        self, counted: Counted, say: Callable[[str], None], interval: float | None = None
    ) -> None:
        self._counted, self._say = counted, say
        self._interval = INTERVAL if interval is None else interval
        self._ended = Event()
        self._thread = Thread(target=self._go_on, daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._ended.wait(self._interval):
            self._say(f"safeproj: {self.line(time.monotonic())}")

    def line(self, now: float) -> str:
        """Return counts, the time that passed, and about how much is left.

        Args:
            now: by the monotonic clock.
        """
        counted = self._counted
        said = f"{counted.text}, {_clock(now - self._began)} so far"
        (began, before), share = counted.since, min(counted.share, 1.0)
        if share <= before:
            return said
        left = (now - began) * (1.0 - share) / (share - before)
        return f"{said}, about {_clock(left)} left"


def _clock(seconds: float) -> str:
    """Return minutes and seconds, and hours where there are some.

    >>> _clock(29.6), _clock(3_723)
    ('0:30', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
