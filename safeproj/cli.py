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
    str, typer.Option("--base", metavar="SRC", help="Checkpoint of the unaligned base model.")
]
Aligned = Annotated[
    str, typer.Option("--aligned", metavar="SRC", help="Checkpoint of the aligned model.")
]
AdapterSource = Annotated[
    str,
    typer.Option("--adapter", metavar="SRC", help="LoRA adapter trained on it: PEFT, MLX or GGUF."),
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
    base: Base,
    aligned: Aligned,
    adapter: AdapterSource,
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
        inputs = {"--base": base, "--aligned": aligned, "--adapter": adapter}
        terminal.check_output(output, None, inputs)
        selection = _selection(threshold, layers, all_modules, include, exclude)
        profile = Profile()
        with profile.phase("import"):
            options = _options(selection, map_, projector, rank, energy, device, workers)
            from safeproj import api

        terminal.interruptible()
        with terminal.observer(quiet) as observer:
            report = api.inspect(
                base, aligned, adapter, options, observer=observer, profile=profile
            )
        terminal.finish(report, format_.value, output, quiet, "", profile if show_profile else None)


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
        inputs = {"--base": base, "--aligned": aligned, "--adapter": adapter}
        terminal.check_output(output, out, inputs)
        selection = _selection(threshold, layers, all_modules, include, exclude)
        profile = Profile()
        with profile.phase("import"):
            options = _options(
                selection, map_, projector, rank, energy, device, workers, dtype.value
            )
            from safeproj import api

        terminal.interruptible()
        with terminal.observer(quiet) as observer:
            report = api.patch(
                base,
                aligned,
                adapter,
                out,
                options,
                overwrite=overwrite,
                dry_run=dry_run,
                observer=observer,
                profile=profile,
            )
        result = "dry run: nothing written" if dry_run else f"wrote {out}"
        result += f" ({report.projected} modules projected)"
        shown = profile if show_profile else None
        terminal.finish(report, format_.value, output, quiet, result, shown)


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


def main() -> None:
    """Run the command."""
    app()
