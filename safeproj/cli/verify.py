"""`safeproj verify`: whether an adapter is what patching another one gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import Without, command
from safeproj.cli.options import GateReporting, GateTalking, Given, Running, Subjects
from safeproj.cli.usage import INPUTS, POLICY, examples
from safeproj.errors import SafeprojError
from safeproj.methods.registry import inputs_of


class Patched(Subjects):
    """The adapter that is compared with its original."""

    metavar = "PATCHED"
    what = "SRC of the adapter that patch wrote."
    full = "The full model that patch wrote, in place of an adapter."
    many = False


@examples(
    "docs/gate.md, docs/signing.md, docs/full-models.md",
    "safeproj verify my-lora-safe --original my-lora --base BASE --aligned MODEL",
    "safeproj verify --model my-finetune-safe --original my-finetune --base BASE --aligned MODEL",
    "safeproj verify my-lora-safe --public-key key.pub",
)
@command
def verify_command(
    adapters: Patched,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="SRC",
            help="The adapter, or the full fine-tune, that was patched.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key",
            metavar="FILE",
            help="The key that the directory must be signed by.",
            rich_help_panel=POLICY,
        ),
    ] = None,
    *,
    given: Annotated[Given, Without("reconstruct")],
    running: Running,
    reporting: GateReporting,
    talking: GateTalking,
) -> None:
    """Compare a patched adapter with its original, or its signature.

    Projects every module of the original again and compares what was written: bit for bit where
    safeproj.json records the same hardware and versions, within rounding elsewhere. Everything else
    must be the original's. The projector is the recorded one unless options say otherwise. With
    --public-key alone the files are compared with the signature and safeproj.json, and no model is
    read. Exit code 0: it is. 1: it is not. 2: that could not be decided.
    """
    outputs = reporting.outputs
    read = [*inputs_of(given.values), ("--original", original)]
    if adapters.model is None:
        read.append(("--adapter", adapters.source))
    else:
        read.append(("--model", adapters.model))
    terminal.check_outputs(outputs, None, read)
    if original is None and given.values:
        raise SafeprojError(
            "nothing is scored without --original; give it, or leave out the models"
        )
    method, aligned = (None, None) if original is None else adapters.method(given)
    with running.profile.phase("import"):
        from safeproj import api
        from safeproj.plan.full import FullModel

        options = running.options(talking)
    full = None if adapters.model is None else FullModel(adapters.model, aligned)
    signals.interruptible()
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        subject = adapters.source if full is None else full
        checks = api.verify(subject, original, method, options, public_key=public_key)
    terminal.finish(checks, reporting, talking, "", running.shown)
