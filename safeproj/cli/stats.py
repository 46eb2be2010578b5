"""`safeproj stats`: statistics of data, for the covariance-weighted correction."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.options import (
    BatchSize,
    Date,
    Device,
    MaxLength,
    Memory,
    ModelDtype,
    Overwrite,
    Quiet,
    Targets,
    TemplateArgument,
    Verbose,
    bytes_of_gigabytes,
    names_of,
    require_positive,
)
from safeproj.errors import SafeprojError


class Positions(str, Enum):
    """Choices of `--positions`."""

    all = "all"
    prompt = "prompt"
    response = "response"


def stats_command(
    aligned: Annotated[
        str, typer.Option("--aligned", metavar="SRC", help="The aligned model, which is run.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The file, such as safety.stats.safetensors."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines with prompt and response, or chat messages for the model's template.",
        ),
    ] = None,
    random_tokens: Annotated[
        int | None,
        typer.Option(
            "--random-tokens",
            metavar="N",
            help="In place of --data: so many samples of random tokens.",
        ),
    ] = None,
    targets: Targets = "all-linear",
    positions: Annotated[
        Positions, typer.Option("--positions", help="Which positions of the data count.")
    ] = Positions.all,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 2048,
    date: Date = None,
    chat_template_arg: TemplateArgument = None,
    memory: Memory = 4.0,
    device: Device = "auto",
    dtype: ModelDtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Gather what layers read on data, for patch --safety-data and --task-data.

    Runs the aligned model over the data and keeps, for each input that layers share, its second
    moment over prompts and responses. Adapters of the model are corrected by such files without
    running it again.
    """
    with terminal.command(verbose):
        require_positive(("--batch-size", batch_size), ("--max-length", max_length))
        bound = bytes_of_gigabytes(memory)
        if (data is None) == (random_tokens is None):
            raise SafeprojError("give either --data or --random-tokens")
        from safeproj.lm import models
        from safeproj.lm.chat import chat_options

        chat = chat_options(date, chat_template_arg)
        models.require_extra()
        from safeproj.lm.data import random_data, read_data
        from safeproj.methods.covariance.file import KIND
        from safeproj.methods.covariance.make import make_statistics
        from safeproj.methods.recorded import check_file
        from safeproj.storage.source import open_folder

        signals.interruptible()
        check_file(out, overwrite, KIND)
        folder = open_folder(aligned)
        tokenizer = models.load_tokenizer(folder)
        if data is not None:
            samples = read_data(data, tokenizer, max_length=max_length, chat=chat)
        else:
            assert random_tokens is not None
            samples = random_data(tokenizer, random_tokens)
        batches = samples.batches(batch_size)
        model = models.load_model(folder, device, dtype)
        with models.quietly(), terminal.steps(quiet, "batches") as step:
            size = make_statistics(
                model,
                batches,
                out,
                names_of(targets or ""),
                models.recorded_inputs(folder, samples),
                positions=positions.value,
                memory=bound,
                on_batch=step,
                overwrite=overwrite,
            )
        signals.done()
        result = f"wrote {out} ({len(samples.samples)} samples, {size / 1e6:.1f} MB)"
        terminal.closing(samples.warnings, quiet, result)
