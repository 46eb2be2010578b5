"""`safeproj salora`: make a safety module, start an adapter for training, fold a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.app import SETTINGS
from safeproj.cli.bundles import command
from safeproj.cli.options import (
    DATA,
    Aligned,
    OneAdapter,
    Overwrite,
    Reading,
    Talking,
    Targets,
    out_option,
    require_positive,
)
from safeproj.cli.usage import INPUTS, METHOD, Command, Group, examples

app = typer.Typer(add_completion=False, cls=Group, **SETTINGS)

MODULE, INIT, FOLD = (
    "safeproj salora module --aligned MODEL --data safety.jsonl --out model.safety.safetensors",
    "safeproj salora init --aligned MODEL --module model.safety.safetensors "
    "--data task.jsonl --out start",
    "safeproj salora fold trained --module model.safety.safetensors --out my-lora-safe",
)


@app.callback()
@examples("docs/salora.md", MODULE, INIT, FOLD)
def _group() -> None:
    """Train adapters that keep clear of safety features (SaLoRA)."""


Module = Annotated[
    str,
    typer.Option(
        "--module",
        metavar="SRC",
        help="Safety module that salora module made.",
        rich_help_panel=INPUTS,
    ),
]
Data = Annotated[Path, DATA]
SafetyRank = Annotated[
    int | None,
    typer.Option(
        "--safety-rank",
        metavar="K",
        help="Use the first K directions of the safety module.  [default: all]",
        rich_help_panel=METHOD,
    ),
]


@dataclass(frozen=True)
class Starting(Reading):
    """The same where the targets are those of the safety module."""

    targets: Targets = None


@app.command("module", cls=Command)
@examples("docs/salora.md", MODULE)
@command
def module_command(
    aligned: Aligned,
    data: Data,
    out: Annotated[Path, out_option("The file, such as model.safety.safetensors.", "FILE")],
    rank: Annotated[
        int,
        typer.Option(
            "--rank",
            metavar="K",
            help="Directions of each layer that are kept.",
            rich_help_panel=METHOD,
        ),
    ] = 32,
    overwrite: Overwrite = False,
    *,
    reading: Reading,
    talking: Talking,
) -> None:
    """Find in which directions the outputs of layers lie on safety data.

    Runs the aligned model over harmful prompts with safe responses and keeps, for each layer, the
    leading directions of its outputs at the responses. Training, or patch --safety-module, keeps
    updates out of them.
    """
    require_positive(("--rank", rank))
    feed = reading.feed
    from safeproj import Salora

    signals.interruptible()
    with terminal.steps(talking.quiet, "batches") as step:
        made = Salora.make(out, aligned, data, rank, feed, on_batch=step, overwrite=overwrite)
    signals.done()
    terminal.closing(made.warnings, talking.quiet, f"wrote {out} ({made.describe()})")


@app.command("init", cls=Command)
@examples("docs/salora.md", INIT)
@command
def init_command(
    aligned: Aligned,
    module: Module,
    data: Data,
    out: Annotated[Path, out_option("Directory of the adapter to train from.")],
    rank: Annotated[
        int,
        typer.Option("--rank", metavar="R", help="Rank of the adapter.", rich_help_panel=METHOD),
    ] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            metavar="A",
            help="lora_alpha.  [default: the rank]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    task_rank: Annotated[
        int,
        typer.Option(
            "--task-rank",
            metavar="K",
            help="Directions of the task's outputs that B starts in.",
            rich_help_panel=METHOD,
        ),
    ] = 32,
    safety_rank: SafetyRank = None,
    overwrite: Overwrite = False,
    *,
    reading: Starting,
    talking: Talking,
) -> None:
    """Write an adapter with the task-specific initialisation.

    It belongs to changed frozen weights, which safeproj.salora.attach sets when training begins;
    salora fold makes of the trained adapter one for the unmodified model.
    """
    require_positive(("--rank", rank), ("--task-rank", task_rank))
    feed = reading.feed
    from safeproj.adapter.write import check_out
    from safeproj.lm.models import quietly
    from safeproj.methods.interface import local_path
    from safeproj.methods.salora.module import SafetyModule
    from safeproj.methods.salora.start import write_start

    signals.interruptible()
    given = [("--aligned", aligned), ("--module", module), ("--data", str(data))]
    check_out(out, overwrite, [(option, local_path(source)) for option, source in given])
    found = SafetyModule.load(module).cut(safety_rank)
    with quietly(), terminal.steps(talking.quiet, "batches") as step:
        fed = feed.load(aligned, data)
        initial = write_start(
            fed.model,
            found,
            fed.batches,
            out,
            rank=rank,
            alpha=alpha,
            task_rank=task_rank,
            targets=feed.targets,
            base_model=aligned,
            inputs=fed.inputs,
            memory=feed.memory,
            on_batch=step,
            overwrite=overwrite,
        )
    signals.done()
    result = f"wrote {out} ({len(initial.A)} layers, rank {rank})"
    terminal.closing(fed.data.warnings, talking.quiet, result)


class Trained(OneAdapter):
    """The adapter that is folded."""

    what = "PEFT adapter that was trained."


@app.command("fold", cls=Command)
@examples("docs/salora.md", FOLD)
@command
def fold_command(
    adapters: Trained,
    module: Module,
    out: Annotated[Path, out_option("Directory of the adapter to serve.")],
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="DIR",
            help="What salora init wrote, where the initial factors are not beside the adapter.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    safety_rank: SafetyRank = None,
    overwrite: Overwrite = False,
    *,
    talking: Talking,
) -> None:
    """Make of a trained adapter a plain one that serves on the unmodified model.

    Removes the safety subspace from its updates, and subtracts the initial factors where it was
    trained from them, which doubles its rank.
    """
    from safeproj.methods.salora.folding import fold
    from safeproj.methods.salora.initialisation import Initial
    from safeproj.methods.salora.module import SafetyModule

    signals.interruptible()
    adapter = adapters.source
    with terminal.steps(talking.quiet, "modules"):
        folded = fold(
            adapter,
            SafetyModule.load(module),
            out,
            rank=safety_rank,
            initial=None if init is None else Initial.load(init),
            overwrite=overwrite,
        )
    signals.done()
    result = f"wrote {out} ({folded.describe()})"
    terminal.closing(folded.warnings, talking.quiet, result)
