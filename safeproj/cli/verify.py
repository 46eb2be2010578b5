"""`safeproj verify`: whether an adapter is what patching another one gives."""

from __future__ import annotations

from typing import Annotated

import typer

from safeproj import terminal
from safeproj.against import Against
from safeproj.cli.options import (
    Aligned,
    AlignmentSource,
    Base,
    Device,
    Energy,
    GateFormat,
    Map,
    Output,
    Projector,
    Quiet,
    Rank,
    SafetyModuleSource,
    ShowProfile,
    Verbose,
    Workers,
    check_projector,
    options_of,
    outputs_of,
    projector_of,
)
from safeproj.profile import Profile


def verify_command(
    patched: Annotated[
        str, typer.Argument(metavar="PATCHED", help="SRC of the adapter that patch wrote.")
    ],
    original: Annotated[
        str, typer.Option("--original", metavar="SRC", help="The adapter that was patched.")
    ],
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    safety_module: SafetyModuleSource = None,
    projector: Projector = None,
    rank: Rank = None,
    energy: Energy = None,
    map_: Map = None,
    device: Device = "auto",
    workers: Workers = None,
    format_: GateFormat = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell whether an adapter is what patching another one gives.

    Projects every module of the original again and compares what was written: bit for bit where
    safeproj.json records the same hardware and versions, within rounding elsewhere. Everything else
    must be the original's. The projector is the recorded one unless options say otherwise. Exit
    code 0: it is. 1: it is not. 2: that could not be decided.
    """
    with terminal.command(verbose):
        against = Against(base, aligned, alignment, safety_module)
        outputs = outputs_of(format_, output)
        terminal.check_outputs(
            outputs, None, [*against.inputs([patched]), ("--original", original)]
        )
        check_projector(safety_module, projector, rank, energy)
        profile = Profile()
        with profile.phase("import"):
            given = projector is not None or rank is not None
            chosen = projector_of(safety_module, projector, rank, energy) if given else None
            options = options_of(None, chosen, device=device, workers=workers, maps=map_)
            from safeproj import api

        terminal.interruptible()
        with terminal.observer(quiet) as observer:
            checks = api.verify(
                base,
                aligned,
                patched,
                original,
                options,
                alignment=alignment,
                safety_module=safety_module,
                observer=observer,
                profile=profile,
            )
        terminal.finish(checks, outputs, quiet, "", profile if show_profile else None)
