"""The campaign: cases one after the other, through the command's own entry point, in forks."""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.ground import Kind, build

CPU_SECONDS = 10
"""Processor time that a case may take."""

WALL_SECONDS = 120
"""Time that a case may take: a machine that does other work beside it is no fault."""

PEAK = 1 << 30
"""Bytes of memory that a case may hold, those of imported modules among them."""

CODES = (0, 1, 2)


BATCH = 25
"""Cases in one fork: forking a process of some 300 MB takes longer than a case."""


@dataclass(frozen=True)
class Record:
    """How one case ended.

    Attributes:
        kind: of file.
        code: exit code.
        seconds: processor time.
        peak: bytes of memory, the most of this and earlier cases of its fork.
        read: whether an independent reader looked at it.
        fault: what is wrong with it, if anything.
    """

    kind: str
    code: int
    seconds: float
    peak: int
    read: bool
    fault: str | None


@dataclass
class Tally:
    """What came of the cases.

    Attributes:
        cases: by kind.
        codes: how often each exit code came.
        read: cases that ended with 0 and that an independent reader looked at.
        peak: most bytes that one held.
        slowest: most processor time that one took, in seconds.
        faults: one line for each case that ended as none may.
    """

    cases: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    read: int = 0
    peak: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count one case."""
        self.cases[record.kind] += 1
        self.codes[record.code] += 1
        self.read += record.read
        self.peak, self.slowest = max(self.peak, record.peak), max(self.slowest, record.seconds)
        if record.fault is not None:
            self.faults.append(record.fault)

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "cases": sum(self.cases.values()),
            "kinds": dict(sorted(self.cases.items())),
            "exit codes": {str(code): n for code, n in sorted(self.codes.items())},
            "read by others": self.read,
            "peak MB": round(self.peak / 1e6),
            "slowest s": round(self.slowest, 2),
            "faults": self.faults,
        }


class Campaign:
    """Runs cases below a directory.

    Attributes:
        root: where its files are.
        kinds: what is mutated.
        keep: where cases that show a fault are kept, if anywhere.
    """

    def __init__(self, root: Path, keep: Path | None = None) -> None:
        import transformers.conversion_mapping
        import transformers.core_model_loading
        import transformers.models.auto.modeling_auto
        import transformers.models.llama.modeling_llama  # noqa: F401 - what commands import
        import typer.main

        import safeproj
        from safeproj.cli.app import app

        for module in pkgutil.walk_packages(safeproj.__path__, "safeproj."):
            importlib.import_module(module.name)
        make = typer.main.get_command
        command = make(app)  # made once: it takes longer than most cases
        typer.main.get_command = lambda typer_instance: (
            command if typer_instance is app else make(typer_instance)
        )
        self.root, self.keep, self._place = root, keep, root / "case"
        root.mkdir(parents=True, exist_ok=True)
        self.kinds: tuple[Kind, ...] = build(root, self.exit_code)
        for kind in self.kinds:  # what is imported late is imported here
            for words in kind.commands:
                self.empty()
                given = _filled(words, _copy(kind, self._place), self._place / "out")
                code = self.command(given)
                if code == 2:
                    raise RuntimeError(f"{given}: {code}: {self.printed('stderr')}")
        gc.collect()
        gc.freeze()

    def exit_code(self, arguments: Sequence[str]) -> int:
        """Run the command and return its exit code."""
        self.empty()
        return self.command(arguments)

    def run(self, seed: int, numbers: Sequence[int], tally: Tally) -> None:
        """Run cases, some in one fork each; one that ends its fork is a fault, and others go on.

        Args:
            seed: of the random numbers.
            numbers: of the cases; with the seed each says what is done.
            tally: what is counted in.
        """
        for start in range(0, len(numbers), BATCH):
            todo = list(numbers[start : start + BATCH])
            while todo:
                records, status = self._forked(seed, todo)
                for record in records:
                    tally.add(record)
                todo = todo[len(records) :]
                if todo:  # the next one ended the process
                    name = _kind(self.kinds, Random(f"{seed}/{todo[0]}")).name
                    fault = f"{name}: {seed}/{todo[0]}: ended by {status}"
                    tally.add(Record(name, 1, 0.0, 0, False, fault))
                    todo = todo[1:]

    def _forked(self, seed: int, numbers: Sequence[int]) -> tuple[list[Record], str]:
        """Run cases in a fork; return what came of those that ended, and how the fork ended."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                with os.fdopen(writing, "w") as pipe:
                    for number in numbers:
                        record = self.case(seed, number)
                        pipe.write(json.dumps(asdict(record)) + "\n")
                        pipe.flush()
            except BaseException:  # a fault of the campaign: this fork must not go on as its parent
                traceback.print_exc()
                os._exit(70)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            records = [Record(**json.loads(line)) for line in pipe if line.endswith("\n")]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return records, signal.Signals(-status).name if status < 0 else f"exit code {status}"

    def case(self, seed: int, number: int) -> Record:
        """Make one case, run it in this process and judge it."""
        random = Random(f"{seed}/{number}")
        kind = _kind(self.kinds, random)
        self.empty()
        copy = _copy(kind, self._place)
        file = copy / kind.file if kind.file else copy
        file.write_bytes(random.choice(kind.mutators)(file.read_bytes(), random))
        words = random.choice(kind.commands)
        arguments = _filled(words, copy, self._place / "out")
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        before = resource.getrusage(resource.RUSAGE_SELF)
        code = self.command(arguments)
        after = resource.getrusage(resource.RUSAGE_SELF)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        read = code == 0 and kind.reader is not None
        fault = self._fault(code, after.ru_maxrss * 1024, words[0])
        if fault is None and read:
            fault = self._misread(kind, words[0], copy)
        if fault is not None:
            fault = f"{kind.name}: {seed}/{number}: {words[0]}: {fault}"
            if self.keep is not None:
                place = self.keep / f"{seed}-{number}"
                shutil.copytree(self._place, place, dirs_exist_ok=True)
                (place / "arguments.json").write_text(json.dumps(arguments), "utf-8")
        return Record(kind.name, code, seconds, after.ru_maxrss * 1024, read, fault)

    def _fault(self, code: int, peak: int, command: str) -> str | None:
        """Return what is wrong with how a case ended."""
        stderr = self.printed("stderr")
        if "Traceback" in stderr or "error: unexpected " in stderr:
            return f"traceback: {stderr.strip().splitlines()[-1][:300]}"
        if code not in CODES:
            return f"exit code {code}: {stderr.strip()[-200:]}"
        if peak > PEAK:
            return f"a peak of {peak / 1e6:.0f} MB"
        if code == 2 and "error" not in stderr.lower():
            return f"no error line: {stderr[:200]!r}"
        if code == 2 and command != "check" and any(self._place.glob("out*")):
            return "something was written"
        if any(path.name.startswith(".") for path in self._place.iterdir()):
            return "something hidden was left"
        return None

    def _misread(self, kind: Kind, command: str, copy: Path) -> str | None:
        """Return what an independent reader has against a case that ended with 0."""
        assert kind.reader is not None
        try:
            return kind.reader(copy, command, self._place / "out", self.printed("stdout"))
        except Exception as error:  # it refuses what the command took
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"accepted; another reader: {error!r:.200} ({where.name})"

    def empty(self) -> None:
        """Empty the directory of the current case."""
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()

    def printed(self, stream: str) -> str:
        """Return what the last command printed to `stdout` or `stderr`."""
        return (self._place / stream).read_text("utf-8", "replace")

    def command(self, arguments: Sequence[str], prepare: Callable[[], None] | None = None) -> int:
        """Run the command's entry point in this process and return its exit code.

        Args:
            arguments: of the command.
            prepare: called right before.
        """
        from safeproj.__main__ import main

        streams, argv = (sys.stdout, sys.stderr), sys.argv
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        sys.argv = ["safeproj", *arguments]
        code: Any = 0
        printed = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in streams]
        sys.stdout, sys.stderr = printed
        try:
            if prepare is not None:
                prepare()
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            (sys.stdout, sys.stderr), sys.argv = streams, argv
            for number, handler in handlers:
                signal.signal(number, handler)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            for name, stream in zip(("stdout", "stderr"), printed, strict=True):
                stream.flush()
                (self._place / name).write_bytes(stream.buffer.getvalue())
        return code if isinstance(code, int) else int(code is not None)


def _kind(kinds: Sequence[Kind], random: Random) -> Kind:
    return random.choices(kinds, [each.weight for each in kinds])[0]


def _copy(kind: Kind, case: Path) -> Path:
    """Put a copy of the valid input into the directory of a case."""
    place = case / ("subject" if kind.file else f"subject{kind.source.suffix}")
    if kind.file:
        shutil.copytree(kind.source, place)
    else:
        shutil.copy(kind.source, place)
    return place


def _filled(words: Sequence[str], copy: Path, out: Path) -> list[str]:
    return [word.replace("{}", str(copy)).replace("{out}", str(out)) for word in words]
