"""`safeproj verify`: whether an adapter is what patching another one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.options import (
    Aligned,
    AlignmentSource,
    Base,
    Device,
    Energy,
    GateFormat,
    Map,
    Mu,
    Output,
    Projector,
    Quiet,
    Rank,
    SafetyData,
    SafetyModuleSource,
    ShowProfile,
    TaskData,
    Verbose,
    Workers,
    against_of,
    check_projector,
    options_of,
    outputs_of,
    projector_of,
)
from safeproj.engine.profile import Profile


def verify_command(
    patched: Annotated[
        str, typer.Argument(metavar="PATCHED", help="SRC of the adapter that patch wrote.")
    ],
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="SRC", help="The adapter that was patched."),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", metavar="FILE", help="The key that the directory must be signed by."
        ),
    ] = None,
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    safety_module: SafetyModuleSource = None,
    safety_data: SafetyData = None,
    task_data: TaskData = None,
    projector: Projector = None,
    rank: Rank = None,
    energy: Energy = None,
    mu: Mu = None,
    map_: Map = None,
    device: Device = "auto",
    workers: Workers = None,
    format_: GateFormat = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a patched adapter with its original, or its signature.

    Projects every module of the original again and compares what was written: bit for bit where
    safeproj.json records the same hardware and versions, within rounding elsewhere. Everything else
    must be the original's. The projector is the recorded one unless options say otherwise. With
    --public-key alone the files are compared with the signature and safeproj.json, and no model is
    read. Exit code 0: it is. 1: it is not. 2: that could not be decided.
    """
    with terminal.command(verbose):
        given = [("--base", base), ("--aligned", aligned), ("--alignment", alignment)]
        given += [("--safety-module", safety_module), ("--original", original)]
        given += [("--safety-data", safety_data), ("--task-data", task_data)]
        outputs = outputs_of(format_, output)
        terminal.check_outputs(outputs, None, [*given, ("--adapter", patched)])
        against = None
        if original is not None:
            against = against_of(
                None, base, aligned, alignment, safety_module, safety_data, task_data
            )
        check_projector(against, projector, rank, energy, mu)
        profile = Profile()
        with profile.phase("import"):
            chosen = None
            if any(each is not None for each in (projector, rank, mu)):
                chosen = projector_of(against, projector, rank, energy, mu)
            options = options_of(None, chosen, device=device, workers=workers, maps=map_)
            from safeproj import api

        signals.interruptible()
        with terminal.observer(quiet) as observer:
            checks = api.verify(
                base,
                aligned,
                patched,
                original,
                options,
                alignment=alignment,
                safety_module=safety_module,
                safety_data=safety_data,
                task_data=task_data,
                public_key=public_key,
                observer=observer,
                profile=profile,
            )
        terminal.finish(checks, outputs, quiet, "", profile if show_profile else None)
