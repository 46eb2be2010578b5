"""`safeproj inspect`: score adapters, write none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.options import (
    Adapters,
    Choosing,
    Given,
    MeasuringTalking,
    Reporting,
    Running,
)
from safeproj.cli.usage import examples

if TYPE_CHECKING:
    from safeproj.report import Report, Reports


@examples(
    "docs/scores.md",
    "safeproj inspect my-lora --base BASE --aligned MODEL",
    "safeproj inspect my-lora --alignment model.safealign.safetensors --layers 12",
    "safeproj inspect adapters --base BASE --aligned MODEL --format json",
)
@command
def inspect_command(
    adapters: Adapters,
    given: Annotated[Given, Without("reconstruct")],
    choosing: Choosing,
    running: Running,
    reporting: Reporting,
    talking: MeasuringTalking,
) -> None:
    """Report how similar each update is to its projection.

    Scores every adapted module by the cosine of its update and the projection of it, by Safe LoRA;
    with a safety module by SaLoRA; with safety data of its update and what the covariance-weighted
    correction makes of it. Writes no adapter; the selection only marks what patch would project.
    """
    method, outputs, adapter = given.method, reporting.outputs, adapters.sources
    terminal.check_outputs(outputs, None, method.inputs(adapter))
    selection = choosing.selection
    with running.profile.phase("import"):
        from safeproj import api
        from safeproj.adapter.collection import collect

        options = running.options(talking, selection=selection)
    signals.interruptible()
    report: Report | Reports
    found = collect(adapter)
    terminal.check_outputs(outputs, None, [("--adapter", each.source) for each in found.members])
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        if found.many:
            report = api.reports(api.inspect_many(method, adapter, options))
        else:
            report = api.inspect(method, adapter[0], options)
    terminal.finish(report, reporting, talking, "", running.shown)
