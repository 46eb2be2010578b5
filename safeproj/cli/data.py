"""`safeproj data`: make the data that corrections need."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.app import SETTINGS
from safeproj.cli.bundles import Without, command
from safeproj.cli.eval_options import Answering, Judging
from safeproj.cli.options import Aligned, Overwrite, Talking, out_option
from safeproj.cli.usage import INPUTS, Command, Group, examples

app = typer.Typer(add_completion=False, cls=Group, **SETTINGS)

REFUSALS = "safeproj data refusals --aligned MODEL --prompts harmful.csv --out safety.jsonl"


@app.callback()
@examples("docs/data.md", REFUSALS)
def _group() -> None:  # without it the one command would stand for the group
    """Make the data that corrections need."""


@app.command("refusals", cls=Command)
@examples(
    "docs/data.md",
    REFUSALS,
    "safeproj patch my-lora --aligned MODEL --safety-data safety.jsonl "
    "--task-data task.jsonl --reconstruct --out my-lora-safe",
)
@command
def refusals_command(
    aligned: Aligned,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Harmful prompts: JSON lines, a JSON array, CSV, or text with one in each line.",
            rich_help_panel=INPUTS,
        ),
    ],
    out: Annotated[Path, out_option("The file, such as safety.jsonl.", "FILE")],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", help="Only the first N prompts.", rich_help_panel=INPUTS
        ),
    ] = None,
    overwrite: Overwrite = False,
    *,
    judging: Judging,
    answering: Annotated[Answering, Without("chat")],
    talking: Talking,
) -> None:
    """Let the aligned model answer harmful prompts, and keep its refusals as safety data.

    Prompts go through the model's chat template, if it has one. A judge tells refusals; other
    answers are dropped and counted. What is written fits --safety-data, --data and --harmful.
    """
    generation = answering.generation
    from safeproj import api

    signals.interruptible()
    with terminal.steps(talking.quiet, "answers") as step:
        found = api.refusals(
            aligned,
            prompts,
            out,
            partial(judging.build, answering.device, answering.batch_size),
            generation,
            device=answering.device,
            limit=limit,
            overwrite=overwrite,
            on_batch=step,
        )
    signals.done()
    terminal.closing(found.warnings, talking.quiet, f"wrote {out} ({found.describe()})")
