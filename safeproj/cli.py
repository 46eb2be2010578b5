"""The command line: parse, call the API, render, exit. Heavy imports happen inside the commands."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from safeproj import __version__
from safeproj.errors import SafeprojError, first_line

if TYPE_CHECKING:
    from safeproj.api import Observer, Options
    from safeproj.engine import Progress
    from safeproj.report import Report

app = typer.Typer(
    name="safeproj",
    help="Repair the safety of fine-tuned LoRA adapters after training.",
    epilog="SRC is a local directory, a local file, or a Hugging Face Hub id org/name[@revision].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ProjectorKind(str, Enum):
    """Choices of `--projector`."""

    approx = "approx"
    exact = "exact"


class Dtype(str, Enum):
    """Choices of `--dtype`."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ReportFormat(str, Enum):
    """Choices of `--format`."""

    table = "table"
    json = "json"
    markdown = "markdown"


Base = Annotated[
    str, typer.Option("--base", metavar="SRC", help="Checkpoint of the unaligned base model.")
]
Aligned = Annotated[
    str, typer.Option("--aligned", metavar="SRC", help="Checkpoint of the aligned model.")
]
AdapterSource = Annotated[
    str, typer.Option("--adapter", metavar="SRC", help="PEFT LoRA adapter trained on it.")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="T",
        help="Project the modules whose cosine is at most T, 0 <= T <= 1.  [default: 0.35]",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", metavar="N", help="Project the N modules with the lowest cosine."),
]
All = Annotated[bool, typer.Option("--all", help="Project every module.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="RE",
        help="Only the modules whose name matches this regular expression; repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="RE",
        help="Not the modules whose name matches this regular expression; repeatable.",
    ),
]
Projector = Annotated[
    ProjectorKind,
    typer.Option(
        "--projector",
        help="C = V V^T / |V|_F of the paper (approx), or the orthogonal projector onto the top "
        "left singular vectors of V (exact).",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="K", help="Rank of the exact projector."),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="E",
        help="Smallest rank that holds this share of |V|_F^2, 0 < E <= 1, for exact.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where the arithmetic runs: auto, cpu, cuda, cuda:N or mps.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Threads over modules on the CPU; the result does not depend on it.  "
        "[default: one per core, at most 8]",
    ),
]
Format = Annotated[ReportFormat, typer.Option("--format", help="What the report looks like.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Write the report to FILE instead of stdout."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show a traceback on errors.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safeproj {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Repair the safety of fine-tuned LoRA adapters after training."""


@app.command("inspect")
def inspect_command(
    base: Base,
    aligned: Aligned,
    adapter: AdapterSource,
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    projector: Projector = ProjectorKind.approx,
    rank: Rank = None,
    energy: Energy = None,
    device: Device = "auto",
    workers: Workers = None,
    format_: Format = ReportFormat.table,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the Safe LoRA projection of it. Writes
    no adapter; the selection only marks what patch would project.
    """
    with _errors(verbose), _observer(quiet) as observer:
        _check_output(output)
        options = _options(
            threshold,
            layers,
            all_modules,
            include,
            exclude,
            projector,
            rank,
            energy,
            device,
            workers,
        )
        from safeproj import api

        report = api.inspect(base, aligned, adapter, options, observer=observer)
        _finish(report, format_, output, quiet)


@app.command("patch")
def patch_command(
    base: Base,
    aligned: Aligned,
    adapter: AdapterSource,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of the patched adapter.")
    ],
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    projector: Projector = ProjectorKind.approx,
    rank: Rank = None,
    energy: Energy = None,
    device: Device = "auto",
    workers: Workers = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Dtype of the projected tensors that are written.")
    ] = Dtype.keep,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is at DIR.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the writing.")
    ] = False,
    format_: Format = ReportFormat.table,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Project selected updates and write the adapter.

    Scores every adapted module as inspect does, projects the selected ones by Safe LoRA, and writes a
    PEFT adapter directory that loads as before. It appears complete or not at all.
    """
    with _errors(verbose), _observer(quiet) as observer:
        _check_output(output)
        options = _options(
            threshold,
            layers,
            all_modules,
            include,
            exclude,
            projector,
            rank,
            energy,
            device,
            workers,
            dtype.value,
        )
        from safeproj import api

        report = api.patch(
            base,
            aligned,
            adapter,
            out,
            options,
            overwrite=overwrite,
            dry_run=dry_run,
            observer=observer,
        )
        _finish(report, format_, output, quiet)
        if not quiet:
            done = "dry run: nothing written" if dry_run else f"wrote {out}"
            typer.echo(f"{done} ({report.projected} modules projected)", err=True)


def _options(
    threshold: float | None,
    layers: int | None,
    all_modules: bool,
    include: list[str] | None,
    exclude: list[str] | None,
    projector: ProjectorKind,
    rank: int | None,
    energy: float | None,
    device: str,
    workers: int | None,
    dtype: str = "keep",
) -> Options:
    from safeproj.select import Selection

    # Before torch is imported: a wrong option is reported at once.
    selection = Selection(
        threshold, layers, all_modules, tuple(include or ()), tuple(exclude or ())
    )
    if projector is ProjectorKind.approx and (rank is not None or energy is not None):
        raise SafeprojError("--rank and --energy need --projector exact")
    if projector is ProjectorKind.exact and (rank is None) == (energy is None):
        raise SafeprojError("--projector exact needs either --rank or --energy")

    from safeproj.api import Options
    from safeproj.projection import Approx, Exact

    try:
        chosen = Approx() if projector is ProjectorKind.approx else Exact(rank, energy)
    except ValueError as error:
        raise SafeprojError(f"--{error}") from error
    return Options(selection, chosen, device, workers, dtype)


def _check_output(output: Path | None) -> None:
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise SafeprojError(f"--output {output}: not a file in an existing directory")


def _finish(report: Report, format_: ReportFormat, output: Path | None, quiet: bool) -> None:
    """Send the report where it was asked for, and the warnings to stderr."""
    import shutil

    from safeproj.report import render

    if output is not None:
        try:
            output.write_bytes(render(report, format_.value).encode())
        except OSError as error:
            raise SafeprojError(f"--output {output}: cannot be written ({error})") from error
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        sys.stdout.write(render(report, format_.value, width=width, color=sys.stdout.isatty()))
        sys.stdout.flush()
    if not quiet:
        for warning in report.warnings:
            typer.echo(f"safeproj: warning: {warning}", err=True)


@contextmanager
def _errors(verbose: bool) -> Iterator[None]:
    """End in one line and the exit code of the contract, whatever happens."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        yield
    except SafeprojError as error:
        _fail(str(error), verbose)
    except KeyboardInterrupt:
        typer.echo("safeproj: interrupted, nothing written", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        where = "" if verbose else "; --verbose shows where, please report it"
        _fail(f"unexpected {type(error).__name__}: {first_line(error)}{where}", verbose)


def _fail(message: str, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exc()
    typer.echo(f"safeproj: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def _observer(quiet: bool) -> Iterator[Observer | None]:
    """Show progress bars on stderr, if that is a terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    hub_logging.set_verbosity_error()  # its hints would come between our lines
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
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


class _Bar:
    """One bar over the bytes to read."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._done = 0

    def start(self, modules: int, nbytes: int) -> None:
        self._modules = modules
        self._task = self._bars.add_task(f"0/{modules} modules", total=nbytes)

    def progress(self, event: Progress) -> None:
        self._done += event.finished
        text = f"{self._done}/{self._modules} modules"
        self._bars.update(self._task, advance=event.nbytes, description=text)


def main() -> None:
    """Run the command."""
    app()
