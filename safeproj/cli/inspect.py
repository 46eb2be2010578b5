"""`safeproj inspect`: score adapters, write none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeproj import terminal
from safeproj.against import Against
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
    Output,
    Projector,
    Quiet,
    Rank,
    SafetyModuleSource,
    ShowProfile,
    Threshold,
    Verbose,
    Workers,
    check_projector,
    options_of,
    outputs_of,
    projector_of,
    selection_of,
)
from safeproj.profile import Profile

if TYPE_CHECKING:
    from safeproj.report import Report, Reports


def inspect_command(
    adapter: Adapters,
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    safety_module: SafetyModuleSource = None,
    threshold: Threshold = None,
    layers: Layers = None,
    all_modules: All = False,
    include: Include = None,
    exclude: Exclude = None,
    map_: Map = None,
    projector: Projector = None,
    rank: Rank = None,
    energy: Energy = None,
    device: Device = "auto",
    workers: Workers = None,
    format_: Format = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the projection of it, by Safe LoRA
    or, with a safety module, by SaLoRA. Writes no adapter; the selection only marks what patch
    would project.
    """
    with terminal.command(verbose):
        against = Against(base, aligned, alignment, safety_module)
        outputs = outputs_of(format_, output)
        terminal.check_outputs(outputs, None, against.inputs(adapter))
        selection = selection_of(threshold, layers, all_modules, include, exclude)
        check_projector(safety_module, projector, rank, energy)
        profile = Profile()
        with profile.phase("import"):
            chosen = projector_of(safety_module, projector, rank, energy)
            options = options_of(selection, chosen, device=device, workers=workers, maps=map_)
            from safeproj import api
            from safeproj.adapter.collection import collect

        terminal.interruptible()
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
                    observer=observer,
                    profile=profile,
                )
        terminal.finish(report, outputs, quiet, "", profile if show_profile else None)
