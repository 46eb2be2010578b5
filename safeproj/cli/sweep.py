"""`safeproj sweep`: measure every useful intervention on one adapter, beside controls."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.eval_options import Answering, Judging, Prompting
from safeproj.cli.options import Choosing, Given, Reporting, Running, Talking
from safeproj.errors import SafeprojError


class Axis(str, Enum):
    """Choices of `--by`."""

    layers = "layers"
    threshold = "threshold"


@command
def sweep_command(
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="SRC", help="The PEFT LoRA adapter.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SRC",
            help="The model that is run, where it is not --aligned: needed with --alignment and "
            "--safety-module.",
        ),
    ] = None,
    by: Annotated[
        Axis | None,
        typer.Option(
            "--by",
            help="What is varied: the number of projected modules, or the threshold; with "
            "--safety-data always mu.  [default: layers]",
        ),
    ] = None,
    points: Annotated[
        int,
        typer.Option(
            "--points", metavar="K", help="Interventions that are tried, from none to all."
        ),
    ] = 9,
    wanted_refusal: Annotated[
        float,
        typer.Option(
            "--wanted-refusal",
            metavar="SHARE",
            help="The share of refusals that is to be reached, 0 < SHARE <= 1.",
        ),
    ] = 0.9,
    wanted_on: Annotated[
        str | None,
        typer.Option(
            "--wanted-on",
            metavar="NAME",
            help="The --harmful set on which.  [default: the first]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of the random projectors.")
    ] = 0,
    *,
    given: Annotated[Given, Without("mu", "reconstruct")],
    choosing: Annotated[Choosing, Without("threshold", "layers", "all_modules")],
    prompting: Prompting,
    judging: Judging,
    answering: Annotated[Answering, Without("device")],
    running: Running,
    reporting: Reporting,
    talking: Talking,
) -> None:
    """Measure refusals and skill for every useful number of projected modules.

    Scores the adapter in one pass over the checkpoints, then runs the model with each variant of
    the adapter, and with controls: each module shrunk, all of it shrunk, a random projector, and
    what projection removes. With --safety-data the mu of the covariance-weighted correction is
    varied instead. Says the smallest intervention that reaches a wanted share of refusals, and
    whether a control does as well. Writes no adapter.
    """
    method, device = given.method, running.device
    if by is not None and by.value not in method.axes:
        varied = " or ".join(method.axes)
        raise SafeprojError(f"--by does not go with {method.mark}, with which {varied} is varied")
    source = model or method.sources.get("aligned")
    if source is None:
        raise SafeprojError(
            "--model is missing: a sweep runs the aligned model, which is not known from "
            "--alignment, --safety-module or statistics; give --model"
        )
    outputs = reporting.outputs
    terminal.check_outputs(outputs, None, [*method.inputs([adapter]), ("--model", source)])
    chats = answering.options
    _ = answering.tags  # what cannot be used is said before torch is imported
    profile = running.profile
    with profile.phase("import"):
        from safeproj.lm import models

        models.require_extra()
        import peft  # noqa: F401 - what is imported later could not be interrupted

        from safeproj.storage.source import identity, open_folder
        from safeproj.sweeping.axes import interventions
        from safeproj.sweeping.run import Settings, sweep

        options = running.options(selection=choosing.selection)
    signals.interruptible()
    settings = Settings(points, wanted_refusal, wanted_on)
    sets = prompting.sets()
    settings.check(sets)
    files = [(f"--{each.kind}", each.source) for each in sets]
    terminal.check_outputs(outputs, None, files)
    folder = open_folder(source)
    generator = answering.generator(models.load_tokenizer(folder))
    for each in sets:
        for prompt in each.prompts:
            generator.rendered(prompt)  # what cannot be used is said before anything is read
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        with method.prepared([adapter], options, chats) as ready:
            axis = None if by is None else by.value
            tried = interventions(ready, adapter, options, axis=axis, seed=seed)
    with profile.phase("load model"):
        judge = judging.build(device, answering.batch_size)
        loaded = models.load_model(folder, device, answering.dtype)
    with profile.phase("measure"), terminal.steps(talking.quiet, "adapters measured") as step:
        record = sweep(
            tried,
            loaded,
            sets,
            judge,
            generator,
            settings,
            inputs={"model": identity(folder)},
            generation={"dtype": str(loaded.dtype).removeprefix("torch.")},
            seed=seed,
            on_step=step,
        )
    terminal.finish(record, outputs, talking.quiet, "", running.shown)
