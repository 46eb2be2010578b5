"""`safeproj patch`: score adapters, project, and write them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import (
    Chatting,
    Choosing,
    Given,
    Reporting,
    Running,
    Subjects,
    WritingTalking,
)
from safeproj.cli.publishing import Publishing
from safeproj.cli.usage import OUTPUT, examples
from safeproj.errors import SafeprojError

if TYPE_CHECKING:
    from safeproj.report import Report, Reports


class Dtype(str, Enum):
    """Choices of `--dtype`."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Writing:
    """What is written, and how."""

    group: ClassVar[str] = OUTPUT

    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Directory of the patched adapter or model; of many adapters, the directory that "
            "gets one for each.",
        ),
    ]
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Dtype of the factors of projected modules.")
    ] = Dtype.keep
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="Write an adapter that all readers compute alike: scalings inside the factors, "
            "alpha equal to one rank for all modules, and one dtype.",
        ),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left at DIR.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but the writing.")] = (
        False
    )
    copy_weights: Annotated[
        bool,
        typer.Option(
            "--copy-weights",
            help="Copy other weights that lie beside the adapter's, such as a merged model or "
            "checkpoints; they are not patched, and left out otherwise.",
        ),
    ] = False
    keep_training_state: Annotated[
        bool,
        typer.Option(
            "--keep-training-state",
            help="Copy what trainers keep beside the adapter, such as training_args.bin and "
            "optimizer.pt: pickles, which run code when loaded, and left out otherwise.",
        ),
    ] = False
    restore_others: Annotated[
        bool,
        typer.Option(
            "--restore-others",
            help="Of a full fine-tune: let norms, embeddings, biases and all else that no "
            "projection touches take the aligned model's values.",
        ),
    ] = False
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Of a full fine-tune: go on with the files that an interrupted run left beside "
            "DIR, and leave them where this one is interrupted.",
        ),
    ] = False
    fail_if_unchanged: Annotated[
        bool,
        typer.Option(
            "--fail-if-unchanged",
            help="Write nothing and end with exit code 1 where no update would be changed; of many "
            "adapters the others are written.",
        ),
    ] = False


@examples(
    "docs/scores.md, docs/covariance.md, docs/full-models.md",
    "safeproj patch my-lora --base BASE --aligned MODEL --layers 12 --out my-lora-safe",
    "safeproj patch my-lora --aligned MODEL --safety-data safety.jsonl "
    "--task-data task.jsonl --reconstruct --out my-lora-safe",
    "safeproj patch --model my-finetune --base BASE --aligned MODEL --out my-finetune-safe",
    "safeproj patch my-lora --safety-module model.safety.safetensors --out safe --dry-run",
)
@command
def patch_command(
    adapters: Subjects,
    given: Given,
    choosing: Choosing,
    writing: Writing,
    publishing: Publishing,
    chatting: Chatting,
    running: Running,
    reporting: Reporting,
    talking: WritingTalking,
) -> None:
    """Project selected updates and write the adapter, or the full model.

    Scores every adapted module as inspect does, projects the selected ones, and writes a
    PEFT adapter directory that loads as before. It appears complete or not at all.
    """
    if adapters.model is None and (writing.restore_others or writing.resume):
        raise SafeprojError("--restore-others and --resume go with a full fine-tune; give --model")
    method, aligned = adapters.method(given)
    outputs, out = reporting.outputs, writing.out
    terminal.check_outputs(outputs, out, adapters.inputs(method, aligned))
    selection, chat = choosing.selection, chatting.of(method)
    with running.profile.phase("import"):
        from safeproj import api
        from safeproj.cli.patched import Ending
        from safeproj.plan.full import FullModel

        options = running.options(
            talking,
            selection=selection,
            dtype=writing.dtype.value,
            portable=writing.portable,
            chat=chat,
        )
    signals.interruptible()
    report: Report | Reports
    found = adapters.collected(outputs, out)
    publishing.begin(talking, many=found.many, dry_run=writing.dry_run)
    how = {
        "overwrite": writing.overwrite,
        "dry_run": writing.dry_run,
        "copy_weights": writing.copy_weights,
        "keep_training_state": writing.keep_training_state,
        "only_if_changed": writing.fail_if_unchanged,
    }
    with terminal.observer(talking.quiet) as observer:
        options = replace(options, observer=observer)
        if adapters.model is not None:
            full = FullModel(adapters.model, aligned)
            own = {"restore_others": writing.restore_others, "resume": writing.resume}
            report = api.patch(method, full, out, options, **how, **own)
        elif found.many:
            report = api.reports(api.patch_many(method, found, out, options, **how))
        else:
            report = api.patch(method, adapters.given[0], out, options, **how)
    end = Ending(method, adapters.given, out, report, writing.dry_run)
    terminal.finish(
        report,
        reporting,
        talking,
        end.result,
        running.shown,
        ending=(end.left, end.next),
        errors=end.unchanged if writing.fail_if_unchanged else (),
    )
    written = out if adapters.model is None else FullModel(str(out), aligned)
    publishing.publish(method, written, options, talking)
