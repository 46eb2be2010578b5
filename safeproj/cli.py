"""The command line: parse, call the API, render, exit. Heavy imports happen inside the commands."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeproj import __version__, terminal
from safeproj.errors import SafeprojError
from safeproj.profile import Profile

if TYPE_CHECKING:
    from safeproj.api import Options
    from safeproj.report import Report, Reports
    from safeproj.select import Selection

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
    str | None,
    typer.Option("--base", metavar="SRC", help="Checkpoint of the unaligned base model."),
]
Aligned = Annotated[
    str | None, typer.Option("--aligned", metavar="SRC", help="Checkpoint of the aligned model.")
]
AlignmentSource = Annotated[
    str | None,
    typer.Option(
        "--alignment",
        metavar="SRC",
        help="Alignment file that align made of both, in place of --base and --aligned.",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="SRC",
        help="LoRA adapter trained on it: PEFT, MLX or GGUF. Repeatable; a directory of adapters "
        "or a .txt file with one SRC per line stands for many.",
    ),
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
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="RUNTIME=CHECKPOINT",
        help="Where the checkpoints keep a module or parameter that they call something else; "
        "* stands for any text; repeatable.",
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
ShowProfile = Annotated[
    bool, typer.Option("--profile", help="Say on stderr where time and memory went.")
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
    adapter: Adapters,
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    map_: Map = None,
    projector: Projector = ProjectorKind.approx,
    rank: Rank = None,
    energy: Energy = None,
    device: Device = "auto",
    workers: Workers = None,
    format_: Format = ReportFormat.table,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the Safe LoRA projection of it.
    Writes no adapter; the selection only marks what patch would project.
    """
    with terminal.command(verbose):
        terminal.check_output(output, None, _inputs(base, aligned, alignment, adapter))
        selection = _selection(threshold, layers, all_modules, include, exclude)
        profile = Profile()
        with profile.phase("import"):
            options = _options(selection, map_, projector, rank, energy, device, workers)
            from safeproj import api
            from safeproj.adapter.collection import collect

        terminal.interruptible()
        report: Report | Reports
        adapters = collect(adapter)
        terminal.check_output(
            output, None, [("--adapter", each.source) for each in adapters.members]
        )
        with terminal.observer(quiet) as observer:
            if adapters.many:
                found = api.inspect_many(
                    base,
                    aligned,
                    adapter,
                    options,
                    alignment=alignment,
                    observer=observer,
                    profile=profile,
                )
                report = api.reports(found)
            else:
                report = api.inspect(
                    base,
                    aligned,
                    adapter[0],
                    options,
                    alignment=alignment,
                    observer=observer,
                    profile=profile,
                )
        terminal.finish(report, format_.value, output, quiet, "", profile if show_profile else None)


@app.command("patch")
def patch_command(
    adapter: Adapters,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Directory of the patched adapter; of many, the directory that gets one for each.",
        ),
    ],
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    map_: Map = None,
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
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Project selected updates and write the adapter.

    Scores every adapted module as inspect does, projects the selected ones by Safe LoRA, and
    writes a PEFT adapter directory that loads as before. It appears complete or not at all.
    """
    with terminal.command(verbose):
        terminal.check_output(output, out, _inputs(base, aligned, alignment, adapter))
        selection = _selection(threshold, layers, all_modules, include, exclude)
        profile = Profile()
        with profile.phase("import"):
            options = _options(
                selection, map_, projector, rank, energy, device, workers, dtype.value
            )
            from safeproj import api
            from safeproj.adapter.collection import collect

        terminal.interruptible()
        report: Report | Reports
        adapters = collect(adapter)
        terminal.check_output(
            output, out, [("--adapter", each.source) for each in adapters.members]
        )
        with terminal.observer(quiet) as observer:
            if adapters.many:
                found = api.patch_many(
                    base,
                    aligned,
                    adapter,
                    out,
                    options,
                    alignment=alignment,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    observer=observer,
                    profile=profile,
                )
                report = api.reports(found)
                what = f"{len(report.reports)} of {len(found)} adapters"
                written = bool(report.reports) and not dry_run
            else:
                report = api.patch(
                    base,
                    aligned,
                    adapter[0],
                    out,
                    options,
                    alignment=alignment,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    observer=observer,
                    profile=profile,
                )
                what = f"{report.projected} modules projected"
                written = not dry_run
        result = f"wrote {out}" if written else "nothing written"
        result = f"dry run: {result}" if dry_run else result
        shown = profile if show_profile else None
        terminal.finish(report, format_.value, output, quiet, f"{result} ({what})", shown)


@app.command("align")
def align_command(
    base: Annotated[
        str, typer.Option("--base", metavar="SRC", help="Checkpoint of the unaligned base model.")
    ],
    aligned: Annotated[
        str, typer.Option("--aligned", metavar="SRC", help="Checkpoint of the aligned model.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="The file, such as model.safealign.safetensors."
        ),
    ],
    targets: Annotated[
        str,
        typer.Option(
            "--targets",
            metavar="NAMES",
            help="Modules to keep, by name or last part of it, separated by commas; or all-linear.",
        ),
    ] = "all-linear",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="K", help="Keep the K leading eigenpairs of each C.  [default: 64]"
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="E",
            help="Keep the fewest eigenpairs that hold this share of |V|_F^2, 0 < E <= 1.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep all: C or V, whichever is smaller.")
    ] = False,
    map_: Map = None,
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an alignment file that is at FILE.")
    ] = False,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make an alignment file, which stands for two checkpoints.

    Keeps of every weight what the projection needs, so that adapters can be inspected and patched
    with --alignment, without downloading two models.
    """
    with terminal.command(verbose):
        profile = Profile()
        with profile.phase("import"):
            selection = _selection(None, None, True, None, None)
            options = _options(selection, map_, ProjectorKind.approx, None, None, device, workers)
            from safeproj import api

        form = api.Form(
            64 if rank is None and energy is None and not exact else rank, energy, exact
        )
        names = [name.strip() for name in targets.split(",") if name.strip()]
        terminal.interruptible()
        with terminal.observer(quiet) as observer:
            made = api.align(
                base,
                aligned,
                out,
                form,
                names,
                options,
                overwrite=overwrite,
                observer=observer,
                profile=profile,
            )
        terminal.done()
        result = f"wrote {out} ({made.describe()})"
        terminal.closing(made.warnings, quiet, result, profile if show_profile else None)


def _inputs(
    base: str | None, aligned: str | None, alignment: str | None, adapters: list[str]
) -> list[tuple[str, str | None]]:
    given = [("--base", base), ("--aligned", aligned), ("--alignment", alignment)]
    return [*given, *(("--adapter", adapter) for adapter in adapters)]


def _selection(
    threshold: float | None,
    layers: int | None,
    all_modules: bool,
    include: list[str] | None,
    exclude: list[str] | None,
) -> Selection:
    from safeproj.select import Selection

    return Selection(threshold, layers, all_modules, tuple(include or ()), tuple(exclude or ()))


def _options(
    selection: Selection,
    maps: list[str] | None,
    projector: ProjectorKind,
    rank: int | None,
    energy: float | None,
    device: str,
    workers: int | None,
    dtype: str = "keep",
) -> Options:
    # What can be refused is refused before torch is imported, which takes a second.
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
    return Options(selection, chosen, device, workers, dtype, tuple(maps or ()))
