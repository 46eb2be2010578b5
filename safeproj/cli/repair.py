"""`safeproj repair`: correct an adapter, measure what that does, and write what does best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

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
    out_option,
    seed_option,
)
from safeproj.cli.publishing import Publishing
from safeproj.cli.usage import ANSWERS, GOAL, INPUTS, OUTPUT, examples
from safeproj.methods.registry import method_of

if TYPE_CHECKING:
    from safeproj.evaluation.sets import PromptSet


@dataclass(frozen=True)
class Data:
    """What is to be refused, and what is to be kept."""

    group: ClassVar[str] = INPUTS

    harmful: Annotated[
        str | None,
        typer.Option(
            "--harmful",
            metavar="[NAME=]FILE",
            help="Prompts that are to be refused; about 100.",
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="[NAME=]FILE",
            help="Prompts of the adapter's skill with the right responses; about 100.",
        ),
    ] = None

    def sets(self) -> dict[str, PromptSet]:
        """Return the prompts by their options.

        Raises:
            SafeprojError: a file cannot be used.
        """
        found: dict[str, PromptSet] = {}
        if self.harmful is not None or self.task is not None:
            from safeproj.evaluation.sets import read_prompts

            if self.harmful is not None:
                found["--harmful"] = read_prompts(self.harmful, "harmful", "--harmful")
            if self.task is not None:
                found["--task"] = read_prompts(self.task, "skill", "--task")
        return found


@dataclass(frozen=True)
class Aims:
    """What is to be reached."""

    group: ClassVar[str] = GOAL

    refusals: Annotated[
        float,
        typer.Option(
            "--refusals",
            metavar="SHARE",
            help="Share of the harmful prompts that is to be refused, 0 < SHARE <= 1.",
        ),
    ] = 0.95
    skill_loss: Annotated[
        float,
        typer.Option(
            "--skill-loss",
            metavar="SHARE",
            help="Share of the adapter's skill that may be lost, 0 <= SHARE <= 1.",
        ),
    ] = 0.05
    best_effort: Annotated[
        bool,
        typer.Option(
            "--best-effort",
            help="Write what comes closest if the goal is not reached; the exit code is still 1.",
        ),
    ] = False


@dataclass(frozen=True)
class Writing:
    """Where it goes."""

    group: ClassVar[str] = OUTPUT

    out: Annotated[Path, out_option("Directory of the repaired adapter.")]
    data_out: Annotated[
        Path | None,
        typer.Option(
            "--data-out",
            metavar="DIR",
            help="Directory of the parts of the prompts: to correct with, to choose on, to report "
            "on.  [default: DIR of --out with .data behind it]",
        ),
    ] = None
    overwrite: Overwrite = False


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
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="SRC",
            help="Checkpoint of the unaligned base model: Safe LoRA is tried too.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Continue plain prompts as they are, though the model has a chat template.",
            rich_help_panel=ANSWERS,
        ),
    ] = False,
    seed: Annotated[int, seed_option("Of the parts, and of random controls.")] = 0,
    *,
    data: Data,
    aims: Aims,
    writing: Writing,
    publishing: Publishing,
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
    outputs, out, adapter = reporting.outputs, writing.out, adapters.source
    read = [("--aligned", aligned), ("--adapter", adapter), ("--base", base)]
    terminal.check_outputs(outputs, out, read)
    with running.profile.phase("import"):
        from safeproj import api

        options = running.options(talking, selection=choosing.selection)
    publishing.begin(talking)
    signals.interruptible()
    sets, generation = data.sets(), None
    if sets:
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
            generation=generation,
            plain=plain,
            data=writing.data_out,
            seed=seed,
            overwrite=writing.overwrite,
            on_step=step,
            **vars(aims),
        )
    result = "nothing written" if record.out is None else f"wrote {record.out}"
    terminal.finish(record, reporting, talking, result, running.shown)
    if record.out is not None and publishing.push_to_hub is not None:
        from safeproj.repairing.split import SAFETY, TASK

        parts = writing.data_out or out.with_name(f"{out.name}.data")
        given = {"aligned": aligned, "base": base}
        if base is None:  # then the prompts are what a gate can score by
            given["safety_data"] = str(parts / SAFETY)
            given["task_data"] = None if data.task is None else str(parts / TASK)
        publishing.publish(method_of(given), out, options, talking)
