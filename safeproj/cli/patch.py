"""`safeproj patch`: score adapters, project, and write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.options import (
    Adapters,
    Aligned,
    AlignmentSource,
    All,
    Base,
    Device,
    Dtype,
    Energy,
    Exclude,
    Format,
    Include,
    Layers,
    Map,
    MethodOption,
    Mu,
    Output,
    Projector,
    Quiet,
    Rank,
    SafetyData,
    SafetyModuleSource,
    ShowProfile,
    TaskData,
    Threshold,
    Verbose,
    Workers,
    against_of,
    check_projector,
    options_of,
    outputs_of,
    projector_of,
    selection_of,
)
from safeproj.engine.profile import Profile

if TYPE_CHECKING:
    from safeproj.report import Report, Reports


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
    method: MethodOption = None,
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    safety_module: SafetyModuleSource = None,
    safety_data: SafetyData = None,
    task_data: TaskData = None,
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    map_: Map = None,
    projector: Projector = None,
    rank: Rank = None,
    energy: Energy = None,
    mu: Mu = None,
    device: Device = "auto",
    workers: Workers = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Dtype of the factors of projected modules.")
    ] = Dtype.keep,
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="Write an adapter that all readers compute alike: scalings inside the factors, "
            "alpha equal to one rank for all modules, and one dtype.",
        ),
    ] = False,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct",
            help="Correct layer by layer, with the model and the adapter run on the safety and the "
            "task data: slower, and better where that was measured.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is at DIR.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the writing.")
    ] = False,
    copy_weights: Annotated[
        bool,
        typer.Option(
            "--copy-weights",
            help="Copy other weights that lie beside the adapter's, such as a merged model or "
            "checkpoints; they are not patched, and left out otherwise.",
        ),
    ] = False,
    format_: Format = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Project selected updates and write the adapter.

    Scores every adapted module as inspect does, projects the selected ones, and writes a
    PEFT adapter directory that loads as before. It appears complete or not at all.
    """
    with terminal.command(verbose):
        against = against_of(
            method, base, aligned, alignment, safety_module, safety_data, task_data
        )
        outputs = outputs_of(format_, output)
        terminal.check_outputs(outputs, out, against.inputs(adapter))
        selection = selection_of(threshold, layers, all_modules, include, exclude)
        check_projector(against, projector, rank, energy, mu)
        profile = Profile()
        with profile.phase("import"):
            chosen = projector_of(against, projector, rank, energy, mu, reconstruct=reconstruct)
            options = options_of(
                selection,
                chosen,
                device=device,
                workers=workers,
                maps=map_,
                dtype=dtype.value,
                portable=portable,
            )
            from safeproj import api
            from safeproj.adapter.collection import collect

        signals.interruptible()
        report: Report | Reports
        adapters = collect(adapter)
        terminal.check_outputs(
            outputs, out, [("--adapter", each.source) for each in adapters.members]
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
                    safety_module=safety_module,
                    safety_data=safety_data,
                    task_data=task_data,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    copy_weights=copy_weights,
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
                    safety_module=safety_module,
                    safety_data=safety_data,
                    task_data=task_data,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    copy_weights=copy_weights,
                    observer=observer,
                    profile=profile,
                )
                what = f"{report.projected} modules projected"
                written = not dry_run
        result = f"wrote {out}" if written else "nothing written"
        result = f"dry run: {result}" if dry_run else result
        shown = profile if show_profile else None
        terminal.finish(report, outputs, quiet, f"{result} ({what})", shown)
