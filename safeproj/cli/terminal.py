"""What the command says on the terminal and how it ends: progress, warnings, errors."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from safeproj.cli import signals
from safeproj.errors import SafeprojError, explained
from safeproj.records.rules import UNUSABLE
from safeproj.text import cut, first_line, fitted, located, printable

if TYPE_CHECKING:
    from safeproj.cli.options import Color, GateReporting, PlainReporting, Reporting, Talking
    from safeproj.records.profile import Profile
    from safeproj.report import Checks, Record
    from safeproj.run.options import Observer


_STYLES = {"error": "1;31", "warning": "33"}
"""Bold red, yellow."""


def say(text: str, kind: str = "") -> None:
    """Write one line to stderr, if there is one.

    Args:
        text: the line.
        kind: `error` or `warning`, which it then begins with.
    """
    if sys.stderr is None:
        return
    head = f"safeproj: {kind}: " if kind else ""
    line = cut(printable(head + located(text)))
    if sys.stderr.isatty():
        line = fitted(line, shutil.get_terminal_size().columns)
    if kind and is_colored(sys.stderr):
        line = f"\x1b[{_STYLES[kind]}m{head.rstrip()}\x1b[0m {line[len(head) :]}"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def is_colored(stream: TextIO) -> bool:
    """Tell whether colours are written to a stream: as the environment says, or to a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


@contextmanager
def _coloring(color: Color | None) -> Iterator[None]:
    """Let `--color` say in the environment what is read there, also by libraries and judges."""
    wanted = {"always": "FORCE_COLOR", "never": "NO_COLOR"}.get(color.value if color else "")
    names = ("FORCE_COLOR", "NO_COLOR") if wanted else ()
    before = {name: os.environ.pop(name, None) for name in names}
    if wanted:
        os.environ[wanted] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def command(
    verbose: bool, *, annotated: bool = False, color: Color | None = None
) -> Iterator[None]:
    """End in one line and with the exit code of the contract, whatever happens inside.

    A signal ends the process at once until `signals.interruptible` is called.

    Args:
        verbose: whether an error shows where it came up.
        annotated: whether it is said as an annotation of a GitHub workflow as well.
        color: what `--color` says.
    """
    signals.at_once()
    if sys.stdout is not None:
        with suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with _coloring(color), _ending(verbose, annotated):
        yield


@contextmanager
def _ending(verbose: bool, annotated: bool) -> Iterator[None]:
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
    say(message, "error")
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
    reporting: Reporting | GateReporting | PlainReporting,
    talking: Talking,
    result: str,
    profile: Profile | None = None,
    *,
    ending: Sequence[str] = (),
    errors: Sequence[str] = (),
) -> None:
    """Send the reports where they were asked for, the warnings, result and profile to stderr.

    Args:
        record: of the run: scores of one adapter or of many, or what a gate found.
        reporting: which reports go where.
        talking: how much is said beside those that were asked for.
        result: what was written, for the last lines and for errors; empty if nothing was.
        profile: where the time went, if that was asked for.
        ending: what there is to know after it, and what is to be done next.
        errors: why this run failed, although the report could be made.

    Raises:
        SafeprojError: a report cannot be written.
        Exit: with exit code 1, if one of many adapters failed, a gate did, or there are errors;
            with 2, if a gate could not decide.
    """
    from safeproj.report import FAILING, Checks, Evaluation, Repair, Reports

    signals.done()
    is_shown = reporting.asked or talking.quiet < talking.reports_until
    for format_, output in reporting.outputs if is_shown else ():
        _send(record, format_, output, talking.verbose, result)
    if isinstance(record, Checks) and not is_shown and talking.quiet == 1:
        _send(record, FAILING, None, talking.verbose, result)
    closing(record.warnings, talking.quiet, result, profile, ending)
    failures = record.failures if isinstance(record, Reports | Evaluation) else {}
    why = [f"{name}: {' '.join(each.error.split())}" for name, each in failures.items()]
    why += errors
    if isinstance(record, Repair) and record.is_reached is False:
        from safeproj.report.repair_words import conclusion

        why += [] if is_shown else conclusion(record)[:1]
    for line in why if talking.quiet < 2 else ():
        say(line, "error")
    if why or (isinstance(record, Repair) and record.is_reached is False):
        raise typer.Exit(1)
    if isinstance(record, Checks):
        _end(record)


def _end(checks: Checks) -> None:
    """End a gate; why an adapter cannot be read is also said on stderr."""
    for check in checks.checks:
        for finding in check.findings:
            if finding.id == UNUSABLE:
                say(finding.message, "error")
    if checks.outcome.exit_code:
        raise typer.Exit(checks.outcome.exit_code)


def closing(
    warnings: Iterable[str],
    quiet: int,
    result: str,
    profile: Profile | None = None,
    ending: Sequence[str] = (),
) -> None:
    """Say the warnings, what was written, what there is to know then, and where the time went."""
    if not quiet:
        for warning in warnings:
            say(warning, "warning")
        for line in filter(None, (result, *ending)):
            say(line)
    if profile is not None:
        for line in profile.render().splitlines():
            say(line)


def _send(
    record: Record,
    format_: str,
    output: Path | None,
    verbose: bool,
    result: str,
) -> None:
    try:
        _write(record, format_, output, verbose)
    except BrokenPipeError:
        # The reader has gone. Python would report that again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except OSError as error:
        where = "stdout" if output is None else f"--output {output}"
        reason = error.strerror or str(error)
        written = f"; {result}" if result else ""
        raise SafeprojError(f"{where}: the report cannot be written ({reason}){written}") from error


def _write(record: Record, format_: str, output: Path | None, verbose: bool) -> None:
    from safeproj.report import FAILING, WIDTH, render, write

    if output is not None:
        write(record, format_, output, verbose=verbose)
    elif sys.stdout is None:
        raise OSError("it is closed")
    else:
        is_terminal, color = sys.stdout.isatty(), is_colored(sys.stdout)
        width = shutil.get_terminal_size().columns if is_terminal else WIDTH
        text = render(record, format_, width=width, color=color, verbose=verbose)
        if is_terminal and format_ in ("table", FAILING):
            text = "".join(f"{fitted(line, width)}\n" for line in text.splitlines())
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


def quiet_hub(quiet: int) -> None:
    """Set what the Hub's client says, before it is imported: that is only if it is needed."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its hints would come between our lines
    if quiet or not _is_terminal():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@contextmanager
def observer(quiet: int, interval: float | None = None) -> Iterator[Observer | None]:
    """Show how far a run is on stderr: a progress bar on a terminal, else lines now and then.

    Args:
        quiet: show nothing.
        interval: seconds between two lines.
    """
    from safeproj.cli.progress import Lines, Run

    quiet_hub(quiet)
    if quiet:
        yield None
    elif not _is_terminal():
        run = Run()
        with Lines(run, say, interval):
            yield run
    else:
        from rich import progress

        sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
        with _bars(progress.TextColumn("{task.description}"), *sizes) as bars:
            task = bars.add_task("", total=None, visible=False)
            yield Run(lambda run: bars.update(task, **run.bar))


@contextmanager
def steps(
    quiet: int, what: str, interval: float | None = None
) -> Iterator[Callable[[int, int], None] | None]:
    """Show likewise how many steps are done.

    Yields what is told how many steps are done and how many there are.

    Args:
        quiet: show nothing.
        what: is counted, such as `answers`.
        interval: seconds between two lines.
    """
    from safeproj.cli.progress import Lines, Steps

    if quiet:
        yield None
    elif not _is_terminal():
        counted = Steps(what)
        with Lines(counted, say, interval):
            yield counted.told
    else:
        from rich import progress

        with _bars(progress.TextColumn(what), progress.MofNCompleteColumn()) as bars:
            bar = bars.add_task("", total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)


@contextmanager
def observed_steps(
    quiet: int, what: str, interval: float | None = None
) -> Iterator[tuple[Observer | None, Callable[[int, int], None]]]:
    """Show the bytes to read and, from the first of some steps on, the steps.

    Yields what is told of the one and of the other.
    """
    with ExitStack() as shown:
        first = shown.enter_context(observer(quiet, interval))
        second: list[Callable[[int, int], None] | None] = []

        def step(done: int, total: int) -> None:
            if not second:
                shown.close()  # two at a time would draw over each other
                second.append(shown.enter_context(steps(quiet, what, interval)))
            if second[0] is not None:
                second[0](done, total)

        yield first, step


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _bars(first: Any, *others: Any) -> AbstractContextManager[Any]:
    """Return bars on stderr, with a column before and others behind them."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        first,
        progress.BarColumn(),
        *others,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
