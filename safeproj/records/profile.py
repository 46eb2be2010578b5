"""Where a run's time and memory go, phase by phase: `--profile`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Usage:
    """What the engine's workers did, summed over them.

    Attributes:
        workers: how many there were.
        wall_seconds: from the first task's start to the last one's end.
        busy_seconds: time they had a task.
        read_seconds: the part of it in which they read files; mapped files are read while they are
            computed with, and count as that.
        hash_seconds: the part of it in which they hashed what they read.
        read_bytes: bytes they read.
    """

    workers: int = 0
    wall_seconds: float = 0.0
    busy_seconds: float = 0.0
    read_seconds: float = 0.0
    hash_seconds: float = 0.0
    read_bytes: int = 0


@dataclass(frozen=True)
class Phase:
    """One step of a run.

    Attributes:
        name: in words.
        seconds: wall time.
        peak_bytes: largest resident memory, mapped files included; None where the system does not
            tell. Linux tells of the phase alone, other systems of the process so far.
    """

    name: str
    seconds: float
    peak_bytes: int | None

    def __add__(self, other: Phase) -> Phase:
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        return Phase(self.name, self.seconds + other.seconds, max(peaks, default=None))


@dataclass
class Profile:
    """The phases of a run, in order, and what the engine did in the one that scores."""

    phases: list[Phase] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    _current: str | None = field(default=None, init=False, repr=False, compare=False)
    _since: float = field(default=0.0, init=False, repr=False, compare=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what is done inside.

        A phase that comes again is added to the first. One inside another takes its time and its
        peak from that: every moment counts once.
        """
        outer = self._current
        self._turn(name)
        try:
            yield
        finally:
            self._turn(outer)

    def _turn(self, name: str | None) -> None:
        """Add what was since the last turn to the phase that it was in, and begin another one."""
        now = time.perf_counter()
        if self._current is not None:
            self._add(Phase(self._current, now - self._since, _peak_bytes()))
        _forget_peak()
        self._current, self._since = name, time.perf_counter()

    def _add(self, found: Phase) -> None:
        for index, before in enumerate(self.phases):
            if before.name == found.name:
                self.phases[index] = before + found
                return
        self.phases.append(found)

    def render(self) -> str:
        """Return the profile as lines of text."""
        lines = [f"{'phase':<16}{'seconds':>9}{'peak MB':>9}"]
        for phase in self.phases:
            peak = "" if phase.peak_bytes is None else f"{phase.peak_bytes / 1e6:.0f}"
            lines.append(f"{phase.name:<16}{phase.seconds:>9.3f}{peak:>9}")
        return "\n".join([*lines, *self._engine()])

    def _engine(self) -> Iterator[str]:
        usage = self.usage
        if not usage.workers or not usage.wall_seconds:
            return
        waiting = max(usage.workers * usage.wall_seconds - usage.busy_seconds, 0.0)
        computing = usage.busy_seconds - usage.read_seconds - usage.hash_seconds
        yield (
            f"score: {usage.read_bytes / 1e9:.3f} GB read at "
            f"{usage.read_bytes / usage.wall_seconds / 1e9:.2f} GB/s effective; "
            f"{usage.workers} workers, summed: reading {usage.read_seconds:.3f} s, "
            f"hashing {usage.hash_seconds:.3f} s, computing {max(computing, 0.0):.3f} s, "
            f"waiting {waiting:.3f} s"
        )


def _forget_peak() -> None:
    """Let the kernel count the peak from now on, where it can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return None
