"""What the command says on the terminal and how it ends: progress, warnings, errors."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safeproj.cli import signals
from safeproj.errors import SafeprojError, explained
from safeproj.records.rules import UNUSABLE
from safeproj.storage.wholefile import replace_file
from safeproj.text import cut, first_line, printable

if TYPE_CHECKING:
    from safeproj.api import Observer
    from safeproj.engine import Progress
    from safeproj.records.profile import Profile
    from safeproj.report import Checks, Record

WIDTH = 100
"""Columns of the report where no terminal says otherwise, so that logs look alike everywhere."""


def say(text: str) -> None:
    """Write one line to stderr, if there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(cut(printable(text)), file=sys.stderr, flush=True)


@contextmanager
def command(verbose: bool, *, annotated: bool = False) -> Iterator[None]:
    """End in one line and with the exit code of the contract, whatever happens inside.

    A signal ends the process at once until `signals.interruptible` is called.

    Args:
        verbose: whether an error shows where it came up.
        annotated: whether it is said as an annotation of a GitHub workflow as well.
    """
    signals.at_once()
    if sys.stdout is not None:
        with suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        yield
    except KeyboardInterrupt as error:
        say(signals.INTERRUPTED)
        raise typer.Exit(signals.exit_code(error)) from None
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        message = explained(error) or ""
        if not message:
            where = "" if verbose else "; --verbose shows where, please report it"
            message = f"unexpected {type(error).__name__}: {first_line(error)}{where}"
        if verbose:
            traceback.print_exc()
    else:
        return
    message = " ".join(message.split())
    say(f"safeproj: error: {message}")
    if annotated:
        annotate(message)
    raise typer.Exit(2)


def annotate(message: str) -> None:
    """Say an error that ends the command as an annotation of a GitHub workflow, on stderr too."""
    from safeproj.report.github import error

    say(error(message))


def check_outputs(
    outputs: Iterable[tuple[str, Path | None]],
    out: Path | None,
    inputs: Sequence[tuple[str, str | None]],
) -> None:
    """Refuse an `--output` that cannot be written or that would replace something else.

    Args:
        outputs: formats and the files for them, None for stdout.
        out: the directory for the adapter, if one is written.
        inputs: option names and SRC; the files of an input are never changed.

    Raises:
        SafeprojError: it is a directory, in no directory, `--out` itself, or a file of an input.
    """
    for output in (path for _, path in outputs if path is not None):
        if output.is_dir() or not output.parent.is_dir():
            raise SafeprojError(f"--output {output}: not a file in an existing directory")
        place = output.resolve()
        if out is not None and place == out.resolve():
            raise SafeprojError(f"--output {output}: is --out; choose another name")
        for option, source in inputs:
            if source is None:
                continue
            given = Path(source).expanduser().resolve()
            if place == given or (place.exists() and given in place.parents):
                raise SafeprojError(f"--output {output}: is a file of {option} {source}")


def finish(
    record: Record,
    outputs: Sequence[tuple[str, Path | None]],
    quiet: bool,
    result: str,
    profile: Profile | None = None,
    *,
    verbose: bool = False,
    ending: Sequence[str] = (),
    errors: Sequence[str] = (),
) -> None:
    """Send the reports where they were asked for, the warnings, result and profile to stderr.

    Args:
        record: of the run: scores of one adapter or of many, or what a gate found.
        outputs: formats and the files for them, None for stdout.
        quiet: leave out warnings and result.
        result: what was written, for the last lines and for errors; empty if nothing was.
        profile: where the time went, if that was asked for.
        verbose: list every finding of a gate in any format.
        ending: what there is to know after it, and what is to be done next.
        errors: why this run failed, although the report could be made.

    Raises:
        SafeprojError: a report cannot be written.
        Exit: with exit code 1, if one of many adapters failed, a gate did, or there are errors;
            with 2, if a gate could not decide.
    """
    from safeproj.report import Checks, Evaluation, Repair, Reports

    signals.done()
    for format_, output in outputs:
        try:
            _send(record, format_, output, verbose)
        except BrokenPipeError:
            # The reader has gone. Python would report that again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except OSError as error:
            where = "stdout" if output is None else f"--output {output}"
            reason = error.strerror or str(error)
            written = f"; {result}" if result else ""
            raise SafeprojError(
                f"{where}: the report cannot be written ({reason}){written}"
            ) from error
    closing(record.warnings, quiet, result, profile, ending)
    failures = record.failures if isinstance(record, Reports | Evaluation) else {}
    why = [f"{name}: {' '.join(each.error.split())}" for name, each in failures.items()]
    for line in (*why, *errors):
        say(f"safeproj: error: {line}")
    if why or errors:
        raise typer.Exit(1)
    if isinstance(record, Repair) and record.is_reached is False:
        raise typer.Exit(1)
    if isinstance(record, Checks):
        _end(record)


def _end(checks: Checks) -> None:
    """End a gate; why an adapter cannot be read is also said on stderr."""
    for check in checks.checks:
        for finding in check.findings:
            if finding.id == UNUSABLE:
                say(f"safeproj: error: {finding.message}")
    if checks.outcome.exit_code:
        raise typer.Exit(checks.outcome.exit_code)


def closing(
    warnings: Iterable[str],
    quiet: bool,
    result: str,
    profile: Profile | None = None,
    ending: Sequence[str] = (),
) -> None:
    """Say the warnings, what was written, what there is to know then, and where the time went."""
    if not quiet:
        for warning in warnings:
            say(f"safeproj: warning: {warning}")
        for line in filter(None, (result, *ending)):
            say(line)
    if profile is not None:
        for line in profile.render().splitlines():
            say(line)


def _send(record: Record, format_: str, output: Path | None, verbose: bool) -> None:
    from safeproj.report import render

    if output is not None:
        text = render(record, format_, width=WIDTH, verbose=verbose)
        place = output.resolve()
        if place.exists() and not place.is_file():  # such as /dev/null or a pipe
            place.write_bytes(text.encode())
        else:
            replace_file(place, text.encode())
    elif sys.stdout is None:
        raise OSError("it is closed")
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else WIDTH
        text = render(record, format_, width=width, color=terminal, verbose=verbose)
        sys.stdout.write(text)
        sys.stdout.flush()
    if format_ == "github":
        _send_summary(record, verbose)


def _send_summary(record: Record, verbose: bool) -> None:
    """Add the summary of a GitHub Actions step, where one runs this."""
    from safeproj.report import Checks
    from safeproj.report.github import SUMMARY_LIMIT, summary

    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if place and isinstance(record, Checks):
        with Path(place).open("a", encoding="utf-8", newline="\n") as file:
            left = SUMMARY_LIMIT - file.tell()  # the limit is that of the whole file
            file.write(summary(record, left, verbose=verbose))


@contextmanager
def observer(quiet: bool) -> Iterator[Observer | None]:
    """Show a progress bar on stderr, if that is a terminal."""
    # Settings of the Hub client, which is imported only if an input is on the Hub.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its hints would come between our lines
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        yield None
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        yield _Bar(bars)


@contextmanager
def steps(quiet: bool, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar over steps on stderr, if that is a terminal.

    Yields what is told how many steps are done and how many there are.
    """
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        bar = bars.add_task("", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


@contextmanager
def observed_steps(
    quiet: bool, what: str
) -> Iterator[tuple[Observer | None, Callable[[int, int], None]]]:
    """Show a bar over the bytes to read and, from the first of some steps on, one over the steps.

    Yields what is told of the one and of the other.
    """
    with ExitStack() as shown:
        first = shown.enter_context(observer(quiet))
        second: list[Callable[[int, int], None] | None] = []

        def step(done: int, total: int) -> None:
            if not second:
                shown.close()  # two at a time would draw over each other
                second.append(shown.enter_context(steps(quiet, what)))
            if second[0] is not None:
                second[0](done, total)

        yield first, step


class _Bar:
    """One bar over the bytes to read."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._finished = self._modules = self._nbytes = 0
        self._task = bars.add_task("", total=None, visible=False)

    def start(self, modules: int, nbytes: int) -> None:
        self._modules += modules
        self._nbytes += nbytes
        text = f"{self._finished}/{self._modules} weights"
        self._bars.update(self._task, total=self._nbytes, description=text, visible=True)

    def ran(self, done: int, total: int) -> None:
        text = f"batch {done}/{total} of the data"
        self._bars.update(self._task, description=text, visible=done < total)

    def progress(self, event: Progress) -> None:
        self._finished += event.finished
        text = f"{self._finished}/{self._modules} weights"
        self._bars.update(self._task, advance=event.nbytes, description=text)
