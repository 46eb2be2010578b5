"""`safeproj sweep`: measure every useful intervention on one adapter, beside controls."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.eval_options import Answering, Judging, Prompting
from safeproj.cli.options import (
    Choosing,
    Given,
    MeasuringTalking,
    OneAdapter,
    Reporting,
    Running,
    seed_option,
)
from safeproj.cli.usage import GOAL, INPUTS, METHOD, examples
from safeproj.errors import SafeprojError


class Axis(str, Enum):
    """Choices of `--by`."""

    layers = "layers"
    threshold = "threshold"


@examples(
    "docs/sweep.md",
    "safeproj sweep my-lora --base BASE --aligned MODEL --harmful harmful.csv --skill task.jsonl",
    "safeproj sweep my-lora --aligned MODEL --safety-data safety.jsonl "
    "--harmful harmful.csv --skill task.jsonl --format html --output sweep.html",
)
@command
def sweep_command(
    adapters: OneAdapter,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SRC",
            help="The model that is run, where it is not --aligned: needed with --alignment and "
            "--safety-module.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    by: Annotated[
        Axis | None,
        typer.Option(
            "--by",
            help="What is varied: the number of projected modules, or the threshold; with "
            "--safety-data always mu, with --safe-adapter always its weight.  [default: layers]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="K",
            help="Interventions that are tried, from none to all.",
            rich_help_panel=METHOD,
        ),
    ] = 9,
    wanted_refusal: Annotated[
        float,
        typer.Option(
            "--wanted-refusal",
            metavar="SHARE",
            help="The share of refusals that is to be reached, 0 < SHARE <= 1.",
            rich_help_panel=GOAL,
        ),
    ] = 0.9,
    wanted_on: Annotated[
        str | None,
        typer.Option(
            "--wanted-on",
            metavar="NAME",
            help="The --harmful set on which.  [default: the first]",
            rich_help_panel=GOAL,
        ),
    ] = None,
    seed: Annotated[int, seed_option("Seed of the random projectors.")] = 0,
    *,
    given: Annotated[
        Given, Without("mu", "reconstruct", "weight", "safe_model", "strength", "delta_rank")
    ],
    choosing: Annotated[Choosing, Without("threshold", "layers", "all_modules")],
    prompting: Prompting,
    judging: Judging,
    answering: Annotated[Answering, Without("device")],
    running: Annotated[Running, Without("engine", "ray_address")],
    reporting: Reporting,
    talking: MeasuringTalking,
) -> None:
    """Measure refusals and skill for every useful number of projected modules.

    Scores the adapter in one pass over the checkpoints, then runs the model with each variant of
    the adapter, and with controls: each module shrunk, all of it shrunk, a random projector, and
    what projection removes. With --safety-data the mu of the covariance-weighted correction is
    varied instead, with --safe-adapter the weight of that. Says the smallest intervention that
    reaches a wanted share of refusals, and whether a control does as well. Writes no adapter.
    """
    if model is not None and not adapters.given:
        raise SafeprojError(
            "no ADAPTER, and --model is the model that is run with it; of full fine-tunes compare "
            "what `safeproj patch --model` writes by `safeproj eval --model`"
        )
    method, outputs, adapter = given.method, reporting.outputs, adapters.source
    read = [*method.inputs([adapter]), *([] if model is None else [("--model", model)])]
    terminal.check_outputs(outputs, None, read)
    with running.profile.phase("import"):
        generation = answering.generation
        from safeproj import api

        options = running.options(talking, selection=choosing.selection)
    signals.interruptible()
    sets = prompting.sets()
    terminal.check_outputs(outputs, None, [(f"--{each.kind}", each.source) for each in sets])
    with terminal.observed_steps(talking.quiet, "adapters measured") as (observer, step):
        record = api.sweep(
            method,
            adapter,
            sets,
            partial(judging.build, running.device, answering.batch_size),
            replace(options, observer=observer),
            model=model,
            generation=generation,
            axis=None if by is None else by.value,
            points=points,
            wanted_refusal=wanted_refusal,
            wanted_on=wanted_on,
            seed=seed,
            on_step=step,
        )
    terminal.finish(record, reporting, talking, "", running.shown)
