"""`safeproj eval`: what a model does without and with adapters."""

from __future__ import annotations

from pathlib import Path
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
    Seed,
    Skill,
    ThoughtTag,
    sets_of,
)
from safeproj.cli.options import (
    Date,
    Device,
    Format,
    Output,
    Quiet,
    TemplateArgument,
    Verbose,
    names_of,
    outputs_of,
)
from safeproj.errors import SafeprojError


def eval_command(
    model: Annotated[
        str, typer.Option("--model", metavar="SRC", help="The model that the adapters belong to.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="SRC",
            help="PEFT adapter. Repeatable; a directory of adapters or a .txt file with one SRC "
            "per line stands for many.",
        ),
    ] = None,
    harmful: Harmful = None,
    skill: Skill = None,
    adapters_only: Annotated[
        bool, typer.Option("--adapters-only", help="Leave out the model without an adapter.")
    ] = False,
    judge: JudgeChoice = None,
    phrase: Phrase = None,
    phrases: Phrases = None,
    judge_command: JudgeCommand = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_guard: JudgeGuard = None,
    judge_timeout: JudgeTimeout = 600.0,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-eval, separated by commas."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option("--lm-eval-path", metavar="DIR", help="Directory with tasks of your own."),
    ] = None,
    chat: Chat = False,
    date: Date = None,
    chat_template_arg: TemplateArgument = None,
    thought_tag: ThoughtTag = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 16,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: ModelDtype = "auto",
    responses: Annotated[
        Path | None,
        typer.Option(
            "--responses",
            metavar="DIR",
            help="Keep the answers there; an interrupted run goes on with them.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the answers that are in --responses.")
    ] = False,
    format_: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure refusals and skills of a model without and with adapters.

    Lets the model answer harmful prompts, which a judge calls refused or complied, and prompts of
    skills, which have one right answer. All shares come with 95 % intervals.
    """
    with terminal.command(verbose):
        asked = JudgeOptions(
            judge,
            phrase or (),
            phrases,
            judge_command,
            judge_url,
            judge_model,
            judge_guard,
            judge_timeout,
        )
        if not harmful and not skill and lm_eval is None:
            raise SafeprojError("nothing to measure; give --harmful, --skill or --lm-eval")
        if lm_eval_path is not None and lm_eval is None:
            raise SafeprojError("--lm-eval-path needs --lm-eval")
        outputs = outputs_of(format_, output)
        sets = sets_of(harmful, skill, limit)
        inputs = [("--model", model), *(("--adapter", each) for each in adapter or ())]
        files = [(f"--{each.kind}", each.source) for each in sets]
        terminal.check_outputs(outputs, None, [*inputs, *files])
        from safeproj.evaluate.thoughts import parse_tags
        from safeproj.lm.chat import chat_options
        from safeproj.lm.models import require_extra

        options, tags = chat_options(date, chat_template_arg), parse_tags(thought_tag or ())
        require_extra()
        from safeproj.adapter.collection import collect
        from safeproj.evaluate.responses import make_directory
        from safeproj.evaluate.run import Settings, evaluate
        from safeproj.evaluate.tasks import Tasks, require_lm_eval

        if lm_eval is not None:
            require_lm_eval()
        signals.interruptible()
        members = collect(adapter or (), written=False).members
        named = [("--model", model), *(("--adapter", each.source) for each in members)]
        terminal.check_outputs(outputs, None, named)
        if responses is not None:
            make_directory(responses, named)
        settings = Settings(
            batch_size,
            max_new_tokens,
            chat,
            device,
            dtype,
            seed,
            responses,
            overwrite,
            options,
            tags,
        )
        tasks = None
        if lm_eval is not None:
            tasks = Tasks(names_of(lm_eval), lm_eval_path, batch_size, limit, seed)
        with terminal.steps(quiet, "answers") as step:
            found = evaluate(
                model,
                members,
                sets,
                asked.build(device, batch_size),
                settings,
                alone=not adapters_only,
                tasks=tasks,
                on_batch=step,
            )
        terminal.finish(found, outputs, quiet, "")
