"""`safeproj stats`: statistics of data, for the covariance-weighted correction."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import DATA, Aligned, Overwrite, Reading, Talking, out_option
from safeproj.cli.usage import INPUTS, SELECTION, examples
from safeproj.errors import SafeprojError


class Positions(str, Enum):
    """Choices of `--positions`."""

    all = "all"
    prompt = "prompt"
    response = "response"


@examples(
    "docs/covariance.md",
    "safeproj stats --aligned MODEL --data safety.jsonl --out safety.stats.safetensors",
    "safeproj stats --aligned MODEL --random-tokens 256 --out random.stats.safetensors",
)
@command
def stats_command(
    aligned: Aligned,
    out: Annotated[Path, out_option("The file, such as safety.stats.safetensors.", "FILE")],
    data: Annotated[Path | None, DATA] = None,
    random_tokens: Annotated[
        int | None,
        typer.Option(
            "--random-tokens",
            metavar="N",
            help="In place of --data: so many samples of random tokens.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    positions: Annotated[
        Positions,
        typer.Option(
            "--positions", help="Which positions of the data count.", rich_help_panel=SELECTION
        ),
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
    feed = reading.feed
    from safeproj import Covariance

    signals.interruptible()
    given = random_tokens if data is None else data
    assert given is not None
    with terminal.steps(talking.quiet, "batches") as step:
        made = Covariance.make(
            out, aligned, given, positions.value, feed, on_batch=step, overwrite=overwrite
        )
    signals.done()
    terminal.closing(made.warnings, talking.quiet, f"wrote {out} ({made.describe()})")
