"""`safeproj stats`: statistics of data, for the covariance-weighted correction."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import Overwrite, Reading, Talking
from safeproj.errors import SafeprojError


class Positions(str, Enum):
    """Choices of `--positions`."""

    all = "all"
    prompt = "prompt"
    response = "response"


@command
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
    positions: Annotated[
        Positions, typer.Option("--positions", help="Which positions of the data count.")
    ] = Positions.all,
    overwrite: Overwrite = False,
    *,
    reading: Reading,
    talking: Talking,
) -> None:
    """Gather what layers read on data, for patch --safety-data and --task-data.

    Runs the aligned model over the data and keeps, for each input that layers share, its second
    moment over prompts and responses. Adapters of the model are corrected by such files without
    running it again.
    """
    if (data is None) == (random_tokens is None):
        raise SafeprojError("give either --data or --random-tokens")
    from safeproj.lm import models

    chat = reading.options
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
        samples = read_data(data, tokenizer, max_length=reading.max_length, chat=chat)
    else:
        assert random_tokens is not None
        samples = random_data(tokenizer, random_tokens)
    batches = samples.batches(reading.batch_size)
    model = models.load_model(folder, reading.device, reading.dtype)
    with models.quietly(), terminal.steps(talking.quiet, "batches") as step:
        size = make_statistics(
            model,
            batches,
            out,
            reading.names,
            models.recorded_inputs(folder, samples),
            positions=positions.value,
            memory=reading.bound,
            on_batch=step,
            overwrite=overwrite,
        )
    signals.done()
    result = f"wrote {out} ({len(samples.samples)} samples, {size / 1e6:.1f} MB)"
    terminal.closing(samples.warnings, talking.quiet, result)
