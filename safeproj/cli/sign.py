"""`safeproj sign`: sign an adapter directory with a private key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeproj.cli import signals, terminal
from safeproj.cli.bundles import command
from safeproj.cli.options import OneAdapter, Talking
from safeproj.cli.usage import METHOD, OUTPUT, examples
from safeproj.errors import SafeprojError


class Signed(OneAdapter):
    """The directory that is signed."""

    metavar = "DIR"
    what = "The adapter directory."


@examples(
    "docs/signing.md",
    "safeproj sign my-lora-safe --private-key key.pem",
    "safeproj check my-lora-safe --base BASE --aligned MODEL --public-key key.pub",
)
@command
def sign_command(
    adapters: Signed,
    private_key: Annotated[
        Path,
        typer.Option(
            "--private-key",
            metavar="FILE",
            help="PEM file with an elliptic curve key: P-256, P-384 or P-521.",
            rich_help_panel=METHOD,
        ),
    ],
    password_env: Annotated[
        str | None,
        typer.Option(
            "--password-env",
            metavar="NAME",
            help="Environment variable that holds the password of an encrypted key.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a signature that is there.", rich_help_panel=OUTPUT
        ),
    ] = False,
    *,
    talking: Talking,
) -> None:
    """Sign an adapter directory.

    Writes model.sig in it, which covers every file, so that check --public-key can tell whether the
    directory is as whoever holds the key left it.
    """
    directory = Path(adapters.source)
    password = None if password_env is None else os.environ.get(password_env)
    if password_env is not None and not password:
        raise SafeprojError(
            f"--password-env {password_env}: no such environment variable, or an empty one; "
            "expected the password of the key"
        )
    from safeproj.gate import signing

    signing.require_library()
    signals.interruptible()
    with terminal.steps(talking.quiet, "files"):
        place = signing.sign(directory, private_key, password, overwrite)
        number = len(signing.covered_files(directory))
    signals.done()
    files = "1 file" if number == 1 else f"{number} files"
    terminal.closing((), talking.quiet, f"signed {directory} ({files}, {place.name})")
