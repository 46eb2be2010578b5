"""`safeproj align`: make an alignment file of two checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import Running, Talking, names_of
from safeproj.cli.usage import INPUTS, METHOD, OUTPUT, SELECTION, examples


@examples(
    "docs/alignment.md",
    "safeproj align --base BASE --aligned MODEL --out model.safealign.safetensors",
    "safeproj check my-lora --alignment model.safealign.safetensors",
)
@command
def align_command(
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="SRC",
            help="Checkpoint of the unaligned base model.",
            rich_help_panel=INPUTS,
        ),
    ],
    aligned: Annotated[
        str,
        typer.Option(
            "--aligned",
            metavar="SRC",
            help="Checkpoint of the aligned model.",
            rich_help_panel=INPUTS,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The file, such as model.safealign.safetensors.",
            rich_help_panel=OUTPUT,
        ),
    ],
    targets: Annotated[
        str,
        typer.Option(
            "--targets",
            metavar="NAMES",
            help="Modules to keep, by name or last part of it, separated by commas; or all-linear.",
            rich_help_panel=SELECTION,
        ),
    ] = "all-linear",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="K",
            help="Keep the K leading eigenpairs of each C.  [default: 64]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="E",
            help="Keep the fewest eigenpairs that hold this share of |V|_F^2, 0 < E <= 1.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Keep all: C or V, whichever is smaller.", rich_help_panel=METHOD
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an alignment file that is at FILE.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    *,
    running: Running,
    talking: Talking,
) -> None:
    """Make an alignment file, which stands for two checkpoints.

    Keeps of every weight what the projection needs, so that adapters can be inspected and patched
    with --alignment, without downloading two models.
    """
    with running.profile.phase("import"):
        from safeproj import Form, api

        options = running.options(talking)
    form = None
    if rank is not None or energy is not None or exact:
        form = Form(rank, energy, exact)
    signals.interruptible()
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        made = api.align(base, aligned, out, form, names_of(targets), options, overwrite=overwrite)
    signals.done()
    result = f"wrote {out} ({made.describe()})"
    terminal.closing(made.warnings, talking.quiet, result, running.shown)
