"""The command line: parse, call the API, render, exit. Heavy imports happen inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from safeproj import __version__
from safeproj.cli import align, check, inspect, patch, salora, sign, stats, sweep, verify
from safeproj.cli.eval import eval_command

app = typer.Typer(
    name="safeproj",
    help="Repair the safety of fine-tuned LoRA adapters after training.",
    epilog="SRC is a local directory, a local file, or a Hugging Face Hub id "
    "org/name[/subfolder][@revision].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safeproj {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Repair the safety of fine-tuned LoRA adapters after training."""


app.command("inspect")(inspect.inspect_command)
app.command("patch")(patch.patch_command)
app.command("align")(align.align_command)
app.command("check")(check.check_command)
app.command("verify")(verify.verify_command)
app.command("stats")(stats.stats_command)
app.command("eval")(eval_command)
app.command("sweep")(sweep.sweep_command)
app.command("sign")(sign.sign_command)
app.add_typer(salora.app, name="salora")
