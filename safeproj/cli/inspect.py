"""`safeproj inspect`: score adapters, write none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeproj.cli import signals, terminal
from safeproj.cli.options import (
    Adapters,
    Aligned,
    AlignmentSource,
    All,
    Base,
    Device,
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


def inspect_command(
    adapter: Adapters,
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
    format_: Format = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the projection of it, by Safe LoRA;
    with a safety module by SaLoRA; with safety data of its update and what the covariance-weighted
    correction makes of it. Writes no adapter; the selection only marks what patch would project.
    """
    with terminal.command(verbose):
        against = against_of(
            method, base, aligned, alignment, safety_module, safety_data, task_data
        )
        outputs = outputs_of(format_, output)
        terminal.check_outputs(outputs, None, against.inputs(adapter))
        selection = selection_of(threshold, layers, all_modules, include, exclude)
        check_projector(against, projector, rank, energy, mu)
        profile = Profile()
        with profile.phase("import"):
            chosen = projector_of(against, projector, rank, energy, mu)
            options = options_of(selection, chosen, device=device, workers=workers, maps=map_)
            from safeproj import api
            from safeproj.adapter.collection import collect

        signals.interruptible()
        report: Report | Reports
        adapters = collect(adapter)
        terminal.check_outputs(
            outputs, None, [("--adapter", each.source) for each in adapters.members]
        )
        with terminal.observer(quiet) as observer:
            if adapters.many:
                found = api.inspect_many(
                    base,
                    aligned,
                    adapter,
                    options,
                    alignment=alignment,
                    safety_module=safety_module,
                    safety_data=safety_data,
                    task_data=task_data,
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
                    safety_module=safety_module,
                    safety_data=safety_data,
                    task_data=task_data,
                    observer=observer,
                    profile=profile,
                )
        terminal.finish(report, outputs, quiet, "", profile if show_profile else None)
