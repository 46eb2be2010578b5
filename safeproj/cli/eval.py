"""`safeproj eval`: what a model does without and with adapters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.eval_options import Answering, Judging, Prompting
from safeproj.cli.options import Adapters, MeasuringTalking, Reporting, names_of, seed_option
from safeproj.cli.usage import INPUTS, OUTPUT, examples
from safeproj.errors import SafeprojError


class Measured(Adapters):
    """Those of which it is measured what the model does with them."""

    what = (
        "SRC of a PEFT adapter; a directory of adapters or a .txt file with one SRC per line "
        "stands for many."
    )


@dataclass(frozen=True)
class Benchmarks:
    """What is measured beside prompts.

    Raises:
        SafeprojError: a place of tasks is given, and no tasks.
    """

    group: ClassVar[str] = INPUTS

    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-eval, separated by commas."),
    ] = None
    lm_eval_path: Annotated[
        Path | None,
        typer.Option("--lm-eval-path", metavar="DIR", help="Directory with tasks of your own."),
    ] = None

    def __post_init__(self) -> None:
        if self.lm_eval_path is not None and self.lm_eval is None:
            raise SafeprojError("--lm-eval-path needs --lm-eval")


@dataclass(frozen=True)
class Keeping:
    """Where answers are kept."""

    group: ClassVar[str] = OUTPUT

    responses: Annotated[
        Path | None,
        typer.Option(
            "--responses",
            metavar="DIR",
            help="Keep the answers there; an interrupted run goes on with them.",
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Forget the answers that are in --responses."),
    ] = False


@examples(
    "docs/evaluation.md",
    "safeproj eval my-lora my-lora-safe --model MODEL --harmful harmful.csv --skill task.jsonl",
    "safeproj eval --model MODEL --harmful harmful.csv --judge-guard GUARD "
    "--format json --output eval.json",
)
@command
def eval_command(
    adapters: Measured,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="SRC",
            help="The model that the adapters belong to.",
            rich_help_panel=INPUTS,
        ),
    ],
    adapters_only: Annotated[
        bool,
        typer.Option(
            "--adapters-only",
            help="Leave out the model without an adapter.",
            rich_help_panel=INPUTS,
        ),
    ] = False,
    seed: Annotated[int, seed_option("Seed of torch; greedy answers need none.")] = 0,
    *,
    prompting: Prompting,
    benchmarks: Benchmarks,
    judging: Judging,
    answering: Answering,
    keeping: Keeping,
    reporting: Reporting,
    talking: MeasuringTalking,
) -> None:
    """Measure refusals and skills of a model without and with adapters.

    Lets the model answer harmful prompts, which a judge calls refused or complied, and prompts of
    skills, which have one right answer. All shares come with 95 % intervals.
    """
    lm_eval = benchmarks.lm_eval
    if not prompting.harmful and not prompting.skill and lm_eval is None:
        raise SafeprojError("nothing to measure; give --harmful, --skill or --lm-eval")
    outputs, sets = reporting.outputs, prompting.sets()
    inputs = [("--model", model), *(("--adapter", each) for each in adapters.given)]
    files = [(f"--{each.kind}", each.source) for each in sets]
    terminal.check_outputs(outputs, None, [*inputs, *files])
    generation = answering.generation
    from safeproj import api
    from safeproj.evaluation.tasks import Tasks, require_lm_eval

    if lm_eval is not None:
        require_lm_eval()
    signals.interruptible()
    found = adapters.collected(outputs, written=False)
    batch_size, device = answering.batch_size, answering.device
    tasks = None
    if lm_eval is not None:
        tasks = Tasks(names_of(lm_eval), benchmarks.lm_eval_path, batch_size, prompting.limit, seed)
    with terminal.steps(talking.quiet, "answers") as step:
        record = api.evaluate(
            model,
            found,
            sets,
            partial(judging.build, device, batch_size),
            generation,
            device=device,
            alone=not adapters_only,
            tasks=tasks,
            seed=seed,
            responses=keeping.responses,
            overwrite=keeping.overwrite,
            on_batch=step,
        )
    terminal.finish(record, reporting, talking, "")
