"""`safeproj inspect`: score adapters, write none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.options import (
    Chatting,
    Choosing,
    Given,
    MeasuringTalking,
    Reporting,
    Running,
    Subjects,
)
from safeproj.cli.usage import examples

if TYPE_CHECKING:
    from safeproj.report import Report, Reports


@examples(
    "docs/scores.md, docs/full-models.md",
    "safeproj inspect my-lora --base BASE --aligned MODEL",
    "safeproj inspect my-lora --alignment model.safealign.safetensors --layers 12",
    "safeproj inspect --model my-finetune --base BASE --aligned MODEL",
    "safeproj inspect adapters --base BASE --aligned MODEL --format json",
)
@command
def inspect_command(
    adapters: Subjects,
    given: Annotated[Given, Without("reconstruct")],
    choosing: Choosing,
    chatting: Chatting,
    running: Running,
    reporting: Reporting,
    talking: MeasuringTalking,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the projection of it, by Safe LoRA;
    with a safety module by SaLoRA; with safety data of its update and what the covariance-weighted
    correction makes of it. Writes no adapter; the selection only marks what patch would project.
    """
    method, aligned = adapters.method(given)
    outputs = reporting.outputs
    terminal.check_outputs(outputs, None, adapters.inputs(method, aligned))
    selection, chat = choosing.selection, chatting.of(method)
    with running.profile.phase("import"):
        from safeproj import api
        from safeproj.plan.full import FullModel

        options = running.options(talking, selection=selection, chat=chat)
    signals.interruptible()
    report: Report | Reports
    found = adapters.collected(outputs)
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        if adapters.model is not None:
            report = api.inspect(method, FullModel(adapters.model, aligned), options)
        elif found.many:
            report = api.reports(api.inspect_many(method, found, options))
        else:
            report = api.inspect(method, adapters.given[0], options)
    terminal.finish(report, reporting, talking, "", running.shown)
