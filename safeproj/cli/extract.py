"""`safeproj extract`: write a full fine-tune as an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.options import Overwrite, PlainReporting, Running, WritingTalking, names_of
from safeproj.cli.usage import INPUTS, METHOD, OUTPUT, SELECTION, examples


@examples(
    "docs/extracting.md",
    "safeproj extract --model my-finetune --aligned MODEL --rank 32 --out my-lora",
    "safeproj check my-lora --base BASE --aligned MODEL",
)
@command
def extract_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="SRC",
            help="Checkpoint of the full fine-tune.",
            rich_help_panel=INPUTS,
        ),
    ],
    aligned: Annotated[
        str,
        typer.Option(
            "--aligned",
            metavar="SRC",
            help="Checkpoint of the model that was fine-tuned.",
            rich_help_panel=INPUTS,
        ),
    ],
    rank: Annotated[
        int,
        typer.Option("--rank", metavar="R", help="Rank of the adapter.", rich_help_panel=METHOD),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Directory of the adapter.", rich_help_panel=OUTPUT
        ),
    ],
    targets: Annotated[
        str,
        typer.Option(
            "--targets",
            metavar="NAMES",
            help="Modules to take, by name or last part of it, separated by commas; or all-linear.",
            rich_help_panel=SELECTION,
        ),
    ] = "all-linear",
    overwrite: Overwrite = False,
    *,
    running: Annotated[Running, Without("engine", "ray_address")],
    reporting: PlainReporting,
    talking: WritingTalking,
) -> None:
    """Write a full fine-tune as a LoRA adapter.

    Takes of every weight that it changed the best approximation of a rank, says how far each is
    from the change, and writes a PEFT adapter of the model that was tuned.
    """
    outputs = reporting.outputs
    terminal.check_outputs(outputs, out, [("--model", model), ("--aligned", aligned)])
    with running.profile.phase("import"):
        from safeproj import api

        options = running.options(talking)
    signals.interruptible()
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        record = api.extract(
            model, aligned, rank, out, names_of(targets), options, overwrite=overwrite
        )
    result = f"wrote {out} ({len(record.modules)} modules, relative error {record.error:.4f})"
    terminal.finish(record, reporting, talking, result, running.shown)
