"""`safeproj salora`: make a safety module, start an adapter for training, fold a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import Overwrite, Reading, Talking, Targets, require_positive

app = typer.Typer(
    help="Train adapters that keep clear of safety features (SaLoRA).",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Aligned = Annotated[
    str, typer.Option("--aligned", metavar="SRC", help="The aligned model, which is run.")
]
Module = Annotated[
    str, typer.Option("--module", metavar="SRC", help="Safety module that salora module made.")
]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FILE",
        help="JSON lines with prompt and response, or chat messages for the model's template.",
    ),
]
SafetyRank = Annotated[
    int | None,
    typer.Option(
        "--safety-rank",
        metavar="K",
        help="Use the first K directions of the safety module.  [default: all]",
    ),
]


@dataclass(frozen=True)
class Starting(Reading):
    """The same where the targets are those of the safety module."""

    targets: Targets = None


@app.command("module")
@command
def module_command(
    aligned: Aligned,
    data: Data,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The file, such as model.safety.safetensors."),
    ],
    rank: Annotated[
        int, typer.Option("--rank", metavar="K", help="Directions of each layer that are kept.")
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
    from safeproj.lm import models

    chat = reading.options
    models.require_extra()
    from safeproj.lm.data import read_data
    from safeproj.methods.recorded import check_file
    from safeproj.methods.salora.file import KIND
    from safeproj.methods.salora.module import safety_module
    from safeproj.storage.source import open_folder

    signals.interruptible()
    check_file(out, overwrite, KIND)
    folder = open_folder(aligned)
    samples = read_data(
        data, models.load_tokenizer(folder), max_length=reading.max_length, chat=chat
    )
    batches = samples.batches(reading.batch_size)
    model = models.load_model(folder, reading.device, reading.dtype)
    with terminal.steps(talking.quiet, "batches") as step:
        found = safety_module(
            model,
            batches,
            reading.names,
            rank,
            memory=reading.bound,
            on_batch=step,
            inputs=models.recorded_inputs(folder, samples),
        )
    nbytes = found.save(out, overwrite=overwrite)
    signals.done()
    shares = found.captured().values()
    result = (
        f"wrote {out} ({len(found.directions)} layers, {found.rank} directions, "
        f"{nbytes / 1e6:.1f} MB, {min(shares):.1%} to {max(shares):.1%} of the energy)"
    )
    terminal.closing(samples.warnings, talking.quiet, result)


@app.command("init")
@command
def init_command(
    aligned: Aligned,
    module: Module,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of the adapter to train from.")
    ],
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="A", help="lora_alpha.  [default: the rank]"),
    ] = None,
    task_rank: Annotated[
        int,
        typer.Option(
            "--task-rank", metavar="K", help="Directions of the task's outputs that B starts in."
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
    from safeproj.lm import models

    chat = reading.options
    models.require_extra()
    from safeproj.adapter.write import check_out
    from safeproj.lm.data import read_data
    from safeproj.methods.interface import local_path
    from safeproj.methods.salora.module import SafetyModule
    from safeproj.methods.salora.start import write_start
    from safeproj.storage.source import open_folder

    signals.interruptible()
    given = [("--aligned", aligned), ("--module", module), ("--data", str(data))]
    check_out(out, overwrite, [(option, local_path(source)) for option, source in given])
    found = SafetyModule.load(module).cut(safety_rank)
    folder = open_folder(aligned)
    samples = read_data(
        data, models.load_tokenizer(folder), max_length=reading.max_length, chat=chat
    )
    batches = samples.batches(reading.batch_size)
    model = models.load_model(folder, reading.device, reading.dtype)
    with models.quietly(), terminal.steps(talking.quiet, "batches") as step:
        initial = write_start(
            model,
            found,
            batches,
            out,
            rank=rank,
            alpha=alpha,
            task_rank=task_rank,
            targets=reading.names,
            base_model=aligned,
            inputs=models.recorded_inputs(folder, samples),
            memory=reading.bound,
            on_batch=step,
            overwrite=overwrite,
        )
    signals.done()
    result = f"wrote {out} ({len(initial.A)} layers, rank {rank})"
    terminal.closing(samples.warnings, talking.quiet, result)


@app.command("fold")
@command
def fold_command(
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="DIR", help="PEFT adapter that was trained.")
    ],
    module: Module,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of the adapter to serve.")
    ],
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="DIR",
            help="What salora init wrote, where the initial factors are not beside the adapter.",
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
