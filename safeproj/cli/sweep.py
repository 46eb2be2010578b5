"""`safeproj sweep`: measure every useful intervention on one adapter, beside controls."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.eval_options import (
    BatchSize,
    Chat,
    Harmful,
    JudgeChoice,
    JudgeCommand,
    JudgeGuard,
    JudgeModel,
    JudgeOptions,
    JudgeTimeout,
    JudgeUrl,
    Limit,
    MaxNewTokens,
    ModelDtype,
    Phrase,
    Phrases,
    Skill,
    ThoughtTag,
    generator_of,
    sets_of,
)
from safeproj.cli.options import (
    Aligned,
    AlignmentSource,
    Base,
    Date,
    Device,
    Energy,
    Exclude,
    Format,
    Include,
    Map,
    MethodOption,
    Output,
    Projector,
    Quiet,
    Rank,
    SafetyData,
    SafetyModuleSource,
    ShowProfile,
    TaskData,
    TemplateArgument,
    Verbose,
    Workers,
    against_of,
    check_projector,
    options_of,
    outputs_of,
    projector_of,
    selection_of,
)
from safeproj.engine.profile import Profile
from safeproj.errors import SafeprojError
from safeproj.methods.given import COVARIANCE


class Axis(str, Enum):
    """Choices of `--by`."""

    layers = "layers"
    threshold = "threshold"


def sweep_command(
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="SRC", help="The PEFT LoRA adapter.")
    ],
    method: MethodOption = None,
    base: Base = None,
    aligned: Aligned = None,
    alignment: AlignmentSource = None,
    safety_module: SafetyModuleSource = None,
    safety_data: SafetyData = None,
    task_data: TaskData = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SRC",
            help="The model that is run, where it is not --aligned: needed with --alignment and "
            "--safety-module.",
        ),
    ] = None,
    harmful: Harmful = None,
    skill: Skill = None,
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
    include: Include = None,
    exclude: Exclude = None,
    map_: Map = None,
    projector: Projector = None,
    rank: Rank = None,
    energy: Energy = None,
    limit: Limit = None,
    judge: JudgeChoice = None,
    phrase: Phrase = None,
    phrases: Phrases = None,
    judge_command: JudgeCommand = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_guard: JudgeGuard = None,
    judge_timeout: JudgeTimeout = 600.0,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 128,
    chat: Chat = False,
    date: Date = None,
    chat_template_arg: TemplateArgument = None,
    thought_tag: ThoughtTag = None,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    workers: Workers = None,
    format_: Format = None,
    output: Output = None,
    show_profile: ShowProfile = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure refusals and skill for every useful number of projected modules.

    Scores the adapter in one pass over the checkpoints, then runs the model with each variant of
    the adapter, and with controls: each module shrunk, all of it shrunk, a random projector, and
    what projection removes. With --safety-data the mu of the covariance-weighted correction is
    varied instead. Says the smallest intervention that reaches a wanted share of refusals, and
    whether a control does as well. Writes no adapter.
    """
    with terminal.command(verbose):
        against = against_of(
            method, base, aligned, alignment, safety_module, safety_data, task_data
        )
        if by is not None and against.method == COVARIANCE:
            raise SafeprojError("--by does not go with --safety-data, with which mu is varied")
        source = model or aligned
        if source is None:
            raise SafeprojError(
                "--model is missing: a sweep runs the aligned model, which is not known from "
                "--alignment, --safety-module or statistics; give --model"
            )
        outputs = outputs_of(format_, output)
        inputs = [*against.inputs([adapter]), ("--model", source)]
        terminal.check_outputs(outputs, None, inputs)
        check_projector(against, projector, rank, energy, None)
        asked = JudgeOptions(
            judge,
            tuple(phrase or ()),
            phrases,
            judge_command,
            judge_url,
            judge_model,
            judge_guard,
            judge_timeout,
        )
        from safeproj.evaluate.thoughts import parse_tags
        from safeproj.lm.chat import chat_options

        chats, tags = chat_options(date, chat_template_arg), parse_tags(thought_tag or ())
        profile = Profile()
        with profile.phase("import"):
            from safeproj.lm import models

            models.require_extra()
            import peft  # noqa: F401 - what is imported later could not be interrupted

            from safeproj.methods.covariance.prepare import with_statistics
            from safeproj.storage.source import identity, open_folder
            from safeproj.sweep.candidates import Candidates, candidates
            from safeproj.sweep.run import Settings, sweep
            from safeproj.sweep.strengths import strengths

            chosen = projector_of(against, projector, rank, energy, None)
            selection = selection_of(None, None, False, include, exclude)
            options = options_of(selection, chosen, device=device, workers=workers, maps=map_)
        signals.interruptible()
        settings = Settings(points, wanted_refusal, wanted_on)
        sets = sets_of(harmful, skill, limit)
        settings.check(sets)
        files = [(f"--{each.kind}", each.source) for each in sets]
        terminal.check_outputs(outputs, None, files)
        folder = open_folder(source)
        generator = generator_of(
            models.load_tokenizer(folder), batch_size, max_new_tokens, chat, chats, tags
        )
        for each in sets:
            for prompt in each.prompts:
                generator.rendered(prompt)  # what cannot be used is said before anything is read
        with terminal.observer(quiet) as observer:
            on_batch = None if observer is None else observer.ran
            tried: Candidates
            with with_statistics(against, [adapter], device, on_batch, chats) as ready:
                if against.method == COVARIANCE:
                    tried = strengths(
                        ready, adapter, options, seed=seed, observer=observer, profile=profile
                    )
                else:
                    tried = candidates(
                        ready,
                        adapter,
                        options,
                        by="layers" if by is None else by.value,
                        seed=seed,
                        observer=observer,
                        profile=profile,
                    )
        with profile.phase("load model"):
            judging = asked.build(device, batch_size)
            loaded = models.load_model(folder, device, dtype)
        with profile.phase("measure"), terminal.steps(quiet, "adapters measured") as step:
            record = sweep(
                tried,
                loaded,
                sets,
                judging,
                generator,
                settings,
                inputs={"model": identity(folder)},
                generation={"dtype": str(loaded.dtype).removeprefix("torch.")},
                seed=seed,
                on_step=step,
            )
        terminal.finish(record, outputs, quiet, "", profile if show_profile else None)
