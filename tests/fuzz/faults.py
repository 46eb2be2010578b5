"""Faults while the command writes: killed at every step on the file system, and out of space.

A step is whatever Python announces of the file system to its audit hooks: something is opened for
writing, made, renamed, linked or removed. The command is killed (SIGKILL) right before each in
turn, in a fork. Whatever happens, what it writes is complete or is not there, and the next run to
the same place succeeds and leaves nothing hidden behind.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.campaign import Campaign
from tests.support import snapshot

STEPS = ("os.", "shutil.", "tempfile.", "open")
"""How the audit events begin that are steps on the file system."""

SPACE = (0, 1, 100, 1000, 3000, 10_000, 20_000)
"""Bytes that a file may have before writing fails; the files written here have up to 50 kB."""


@dataclass
class Found:
    """What came of the faults.

    Attributes:
        kills: runs that were killed.
        shortages: runs that ran out of space.
        faults: one line for each that ended as none may.
    """

    kills: int = 0
    shortages: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Writing:
    """A command that writes.

    Attributes:
        name: which.
        arguments: of the command, where `{out}` is what is written.
        out: name of what is written.
        replaces: whether something is there before, which `--overwrite` replaces.
    """

    name: str
    arguments: Sequence[str]
    out: str
    replaces: bool = False


def writings(root: Path) -> tuple[Writing, ...]:
    """Return the commands, on the valid inputs of the campaign."""
    pair = ["--base", str(root / "base"), "--aligned", str(root / "aligned")]
    given = [*pair, "--adapter", str(root / "adapter")]
    data = ["--aligned", str(root / "aligned"), "--data", str(root / "data.jsonl")]
    patch = ["patch", *given, "--out", "{out}", "--all"]
    align = ["align", *pair, "--out", "{out}"]
    return (
        Writing("patch", patch, "out"),
        Writing("patch --overwrite", [*patch, "--overwrite"], "out", True),
        Writing("align", align, "out.safetensors"),
        Writing("align --overwrite", [*align, "--rank", "4", "--overwrite"], "out.safetensors",
                True),
        Writing("stats", ["stats", *data, "--out", "{out}"], "out.safetensors"),
        Writing("report", ["inspect", *given, "--format", "json", "--output", "{out}"], "out.json"),
        Writing("report again", ["inspect", *given, "--format", "html", "--output", "{out}"],
                "out.html", True),
    )  # fmt: skip


class Faults:
    """Runs commands with faults.

    Attributes:
        campaign: whose inputs and entry point are used.
        found: what came of it.
    """

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.found = campaign, Found()
        self._place = campaign.root / "case"

    def run(self, writing: Writing, every: int = 1) -> None:
        """Kill a command before every step, or every few, and let it run out of space.

        Args:
            writing: the command.
            every: how many steps lie between two kills.
        """
        self._fresh(writing)
        before = self._state(writing)
        steps = self._steps(writing)
        complete = self._state(writing)
        assert complete is not None
        assert complete != before
        for step in range(1, steps + 1, every):
            self._fresh(writing)
            status = self._forked(writing, partial(_kill_at, step, self._place))
            self.found.kills += status == -signal.SIGKILL
            self._expect(writing, f"killed at step {step} of {steps}", (before, complete))
            if self._state(writing) == complete:
                continue  # it was killed when all was done
            if self._forked(writing, lambda: None) != 0:
                self._fault(writing, f"step {step}", "the next run does not succeed")
            self._expect(writing, f"run again after step {step}", (complete,), hidden=False)
        for size in SPACE:
            self._fresh(writing)
            status = self._forked(writing, partial(_limit, size))
            self.found.shortages += status == 2
            wanted = (before,) if status == 2 else (complete,)
            if status not in (0, 2) or "Traceback" in self.campaign.printed("stderr"):
                self._fault(writing, f"{size} bytes", f"exit code {status}")
            self._expect(writing, f"space for {size} bytes", wanted, hidden=False)

    def _fresh(self, writing: Writing) -> None:
        """Put what is there before, and nothing else, into the place."""
        self.campaign.empty()
        out = self._place / writing.out
        if not writing.replaces:
            return
        if writing.out == "out":
            shutil.copytree(self.campaign.root / "patched", out)
            (out / "older.txt").write_text("older", "utf-8")
        elif writing.out.endswith(".safetensors"):
            shutil.copy(self.campaign.root / "alignment" / "a.safetensors", out)
        else:
            out.write_text("older", "utf-8")

    def _steps(self, writing: Writing) -> int:
        """Run the command to its end and return how many steps it took."""
        reading, passing = os.pipe()
        status = self._forked(writing, lambda: _count(self._place, passing))
        os.close(passing)
        with os.fdopen(reading, "rb") as pipe:
            steps = len(pipe.read())
        assert status == 0, self.campaign.printed("stderr")
        return steps

    def _forked(self, writing: Writing, prepare: Callable[[], None]) -> int:
        """Run the command in a fork with something prepared; return how it ended."""
        out = str(self._place / writing.out)
        arguments = [word.replace("{out}", out) for word in writing.arguments]
        child = os.fork()
        if not child:
            os._exit(self.campaign.command(arguments, prepare))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _state(self, writing: Writing) -> object:
        """Return what is there, None for nothing."""
        out = self._place / writing.out
        if out.is_dir():
            return snapshot(out)
        return out.read_bytes() if out.exists() else None

    def _expect(
        self, writing: Writing, when: str, states: Sequence[object], *, hidden: bool = True
    ) -> None:
        """Note a fault unless what is there is one of these, and nothing is hidden if so wanted."""
        found = self._state(writing)
        if not any(found == state for state in states):
            self._fault(writing, when, "what is there is neither complete nor what was before")
        left = [path.name for path in self._place.iterdir() if path.name.startswith(".")]
        if left and not hidden:
            self._fault(writing, when, f"{left} left behind")

    def _fault(self, writing: Writing, when: str, what: str) -> None:
        said = self.campaign.printed("stderr").strip()[-200:]
        self.found.faults.append(f"{writing.name}: {when}: {what}: {said}")


def _is_step(event: str, arguments: tuple[Any, ...], place: Path) -> bool:
    """Tell whether an audit event is a step below a directory that changes something."""
    if not event.startswith(STEPS):
        return False
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (writes or (isinstance(mode, str) and set(mode) & set("wax+"))):
            return False
    elif event in ("os.listdir", "os.scandir", "os.walk", "os.chdir", "os.fork"):
        return False
    first = arguments[0] if arguments else ""
    text = os.fsdecode(first) if isinstance(first, (str, bytes, os.PathLike)) else ""
    return text.startswith(str(place)) and not text.endswith(("/stdout", "/stderr"))


def _count(place: Path, pipe: int) -> None:
    """Write a byte into a pipe at each step."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_step(event, arguments, place):
            os.write(pipe, b".")

    sys.addaudithook(hook)


def _kill_at(step: int, place: Path) -> None:
    """End the process right before a step."""
    steps = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if _is_step(event, arguments, place):
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _limit(size: int) -> None:
    """Let every write fail that would make a file larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
