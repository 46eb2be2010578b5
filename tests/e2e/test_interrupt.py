"""Killed at any moment, `patch` leaves a complete adapter: the old one, the new one, or none."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest

from tests.conftest import Trio
from tests.support import MANIFEST, Process, assert_complete, snapshot, started

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")

SMALL_FILES = 400
LARGE_FILE = 8 << 20


@dataclass(frozen=True)
class Slow:
    """A run whose writing takes a while, and how long its phases take.

    Attributes:
        arguments: of `patch`, without `--out`.
        adapter: the input adapter, with many files to copy.
        reading: seconds from the start until something appears beside `--out`.
        writing: seconds from then until `--out` appears.
    """

    arguments: list[str]
    adapter: Path
    reading: float
    writing: float


@dataclass(frozen=True)
class Moment:
    """A point in a run: so much of a phase's usual duration after the phase has begun."""

    phase: str
    share: float

    def __str__(self) -> str:
        return f"{self.phase}+{self.share:.0%}"


@pytest.fixture(scope="module")
def slow(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Slow:
    root = tmp_path_factory.mktemp("slow")
    adapter = root / "adapter"
    shutil.copytree(trio.adapter, adapter)
    add_files(adapter)
    (adapter / "optimizer.pt").write_bytes(os.urandom(LARGE_FILE))
    places = ["--base", str(trio.base), "--aligned", str(trio.aligned), "--adapter", str(adapter)]
    arguments = ["patch", *places, "--all"]
    out = root / "place" / "out"
    out.parent.mkdir()
    begin = time.monotonic()
    process = started(*arguments, "--out", out, anew=True)
    wait_until(lambda: bool(beside(out)), process)
    writing = time.monotonic()
    wait_until((out / MANIFEST).exists, process)
    end = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert_complete(out, adapter)
    return Slow(arguments, adapter, writing - begin, end - writing)


def add_files(adapter: Path) -> None:
    (adapter / "logs").mkdir()
    for number in range(SMALL_FILES):
        (adapter / "logs" / f"step-{number}.json").write_text(f'{{"loss": {number}}}')


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


def wait_until(happened: Callable[[], bool], process: Process) -> None:
    while not happened() and process.poll() is None:
        time.sleep(0.0005)


@dataclass(frozen=True)
class End:
    """How a run ended that got a signal.

    Attributes:
        code: the exit code as a shell reports it.
        errors: what it said on stderr.
        written: the new adapter was there before the signal was sent.
    """

    code: int
    errors: str
    written: bool


def interrupt(
    slow: Slow, out: Path, moment: Moment, signal: Signals, *options: str, anew: bool = False
) -> End:
    """Run `patch` and send it the signal: as it starts, and, if `anew`, later."""
    anew = anew or moment.phase == "reading"
    process = started(*slow.arguments, *options, "--out", out, anew=anew)
    if moment.phase == "reading":
        time.sleep(moment.share * slow.reading)
    elif moment.phase == "writing":
        wait_until(lambda: bool(beside(out)), process)
        time.sleep(moment.share * slow.writing)
    else:
        wait_until((out / MANIFEST).exists, process)
    written = (out / MANIFEST).exists()
    process.send_signal(signal)
    _, errors = process.communicate(timeout=60)
    code = process.returncode
    assert code is not None
    return End(128 - code if code < 0 else code, errors, written)


def assert_ended_by(signal: Signals, end: End) -> None:
    """Check that the signal was obeyed; a run may end well only if it had written before."""
    assert end.code == 128 + signal or (end.written and end.code == 0), end
    assert "unexpected" not in end.errors


CLEAN = [SIGINT, SIGTERM]
MOMENTS = [
    Moment("reading", 0.1),
    Moment("reading", 0.25),
    Moment("reading", 0.4),
    Moment("reading", 0.7),
    Moment("writing", 0.0),
    Moment("writing", 0.4),
    Moment("writing", 0.8),
    Moment("written", 0.0),
]
ANEW = [MOMENTS[5], MOMENTS[7]]
"""Those in the middle of the writing and at its end at which a run of its own is interrupted."""

OVERWRITE_MOMENTS = [Moment("writing", 0.5), Moment("writing", 0.95), Moment("written", 0.0)]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("signal", CLEAN, ids=lambda signal: signal.name)
def test_an_interrupted_run_leaves_a_complete_adapter_or_nothing(
    slow: Slow, tmp_path: Path, signal: Signals, moment: Moment
) -> None:
    out = tmp_path / "out"

    end = interrupt(slow, out, moment, signal, anew=moment in ANEW)

    assert_ended_by(signal, end)
    assert beside(out) == set()
    if out.exists():
        assert_complete(out, slow.adapter)
        assert "nothing written" not in end.errors


@pytest.mark.parametrize("moment", MOMENTS[4:], ids=str)
def test_a_killed_run_leaves_a_complete_adapter_or_none(
    slow: Slow, tmp_path: Path, moment: Moment
) -> None:
    out = tmp_path / "out"

    end = interrupt(slow, out, moment, SIGKILL)

    assert_ended_by(SIGKILL, end)
    if out.exists():
        assert_complete(out, slow.adapter)


@pytest.mark.parametrize("moment", OVERWRITE_MOMENTS, ids=str)
@pytest.mark.parametrize("signal", [*CLEAN, SIGKILL], ids=lambda signal: signal.name)
def test_overwriting_leaves_the_old_adapter_or_the_new_one(
    slow: Slow, trio: Trio, tmp_path: Path, signal: Signals, moment: Moment
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trio.adapter, out)
    add_files(out)
    before = snapshot(out)

    end = interrupt(slow, out, moment, signal, "--overwrite")

    assert_ended_by(signal, end)
    if (out / MANIFEST).exists():
        assert_complete(out, slow.adapter)
        assert "nothing written" not in end.errors
    else:
        assert snapshot(out) == before
    if signal is not SIGKILL:
        assert beside(out) == set()


def test_impatience_does_not_leave_half_an_adapter(slow: Slow, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(*slow.arguments, "--out", out)
    wait_until(lambda: bool(beside(out)), process)
    for _ in range(3):
        process.send_signal(SIGINT)
        time.sleep(0.002)
    process.communicate(timeout=60)

    assert process.returncode != 0
    if out.exists():
        assert_complete(out, slow.adapter)


def test_what_a_killed_run_leaves_does_not_hinder_the_next(slow: Slow, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(slow, out, Moment("writing", 0.0), SIGKILL)
    assert not out.exists()
    assert beside(out)  # it was hit while it wrote

    process = started(*slow.arguments, "--out", out)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert_complete(out, slow.adapter)
