"""`safeproj repair`: correct an adapter, measure what that does, and write what does best."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.eval_options import Answering, Judging
from safeproj.cli.options import (
    Aligned,
    Choosing,
    OneAdapter,
    Overwrite,
    Reporting,
    Running,
    WritingTalking,
)
from safeproj.cli.usage import ANSWERS, GOAL, INPUTS, OUTPUT, RUNNING, examples


@examples(
    "docs/repair.md, docs/data.md",
    "safeproj repair my-lora --aligned MODEL --harmful harmful.csv --task task.jsonl "
    "--out my-lora-safe",
    "safeproj repair my-lora --aligned MODEL --base BASE --harmful harmful.csv "
    "--task task.jsonl --refusals 0.99 --skill-loss 0.02 --out my-lora-safe",
)
@command
def repair_command(
    aligned: Aligned,
    adapters: OneAdapter,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Directory of the repaired adapter.",
            rich_help_panel=OUTPUT,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="SRC",
            help="Checkpoint of the unaligned base model: Safe LoRA is tried too.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    harmful: Annotated[
        str | None,
        typer.Option(
            "--harmful",
            metavar="[NAME=]FILE",
            help="Prompts that are to be refused; about 100.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="[NAME=]FILE",
            help="Prompts of the adapter's skill with the right responses; about 100.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    refusals: Annotated[
        float,
        typer.Option(
            "--refusals",
            metavar="SHARE",
            help="Share of the harmful prompts that is to be refused, 0 < SHARE <= 1.",
            rich_help_panel=GOAL,
        ),
    ] = 0.95,
    skill_loss: Annotated[
        float,
        typer.Option(
            "--skill-loss",
            metavar="SHARE",
            help="Share of the adapter's skill that may be lost, 0 <= SHARE <= 1.",
            rich_help_panel=GOAL,
        ),
    ] = 0.05,
    best_effort: Annotated[
        bool,
        typer.Option(
            "--best-effort",
            help="Write what comes closest if the goal is not reached; the exit code is still 1.",
            rich_help_panel=GOAL,
        ),
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Continue plain prompts as they are, though the model has a chat template.",
            rich_help_panel=ANSWERS,
        ),
    ] = False,
    data_out: Annotated[
        Path | None,
        typer.Option(
            "--data-out",
            metavar="DIR",
            help="Directory of the parts of the prompts: to correct with, to choose on, to report "
            "on.  [default: DIR of --out with .data behind it]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Of the parts, and of random controls.",
            rich_help_panel=RUNNING,
        ),
    ] = 0,
    overwrite: Overwrite = False,
    *,
    choosing: Annotated[Choosing, Without("threshold", "layers", "all_modules")],
    judging: Judging,
    answering: Annotated[Answering, Without("device", "dtype", "chat")],
    running: Annotated[Running, Without("engine", "ray_address")],
    reporting: Reporting,
    talking: WritingTalking,
) -> None:
    """Correct an adapter in every way that is given for, and write what does best.

    The prompts are parted in three. The methods correct with the first part, from the least
    intervention up; the one that refuses as much as is wanted with the most skill is chosen on the
    second, beside controls; and what it does is reported on the third. Exit code 1, and nothing
    written, if the goal is not reached. Without prompts Safe LoRA is done, and nothing is measured.
    """
    outputs, adapter = reporting.outputs, adapters.source
    read = [("--aligned", aligned), ("--adapter", adapter), ("--base", base)]
    terminal.check_outputs(outputs, out, read)
    with running.profile.phase("import"):
        from safeproj import api

        options = running.options(talking, selection=choosing.selection)
    signals.interruptible()
    sets, generation = {}, None
    if harmful is not None or task is not None:
        from safeproj.evaluation.sets import read_prompts

        if harmful is not None:
            sets["--harmful"] = read_prompts(harmful, "harmful", "--harmful")
        if task is not None:
            sets["--task"] = read_prompts(task, "skill", "--task")
        files = [(option, each.source) for option, each in sets.items()]
        terminal.check_outputs(outputs, None, files)
        generation = answering.generation
    with terminal.observed_steps(talking.quiet, "adapters measured") as (observer, step):
        record = api.repair(
            aligned,
            adapter,
            out,
            sets.get("--harmful"),
            sets.get("--task"),
            partial(judging.build, running.device, answering.batch_size),
            replace(options, observer=observer),
            base=base,
            refusals=refusals,
            skill_loss=skill_loss,
            generation=generation,
            plain=plain,
            data=data_out,
            seed=seed,
            best_effort=best_effort,
            overwrite=overwrite,
            on_step=step,
        )
    result = "nothing written" if record.out is None else f"wrote {record.out}"
    terminal.finish(record, reporting, talking, result, running.shown)
