"""The command line: parse, call the API, render, exit. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.main

from safeproj import __version__
from safeproj.cli.usage import Command, Group, examples, write_list

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

COMMANDS = {
    "repair": "Correct an adapter in every way that is given for, and write what does best.",
    "inspect": "Report how similar each update is to its projection.",
    "patch": "Project selected updates and write the adapter, or the full model.",
    "align": "Make an alignment file, which stands for two checkpoints.",
    "extract": "Write a full fine-tune as a LoRA adapter.",
    "check": "Tell whether adapters pass a policy: the gate before publishing.",
    "verify": "Compare a patched adapter with its original, or its signature.",
    "rule": "Explain a finding of check or verify; list all without ID.",
    "data": "Make the data that corrections need.",
    "stats": "Gather what layers read on data, for patch --safety-data and --task-data.",
    "eval": "Measure refusals and skills of a model without and with adapters.",
    "sweep": "Measure refusals and skill for every useful number of projected modules.",
    "sign": "Sign an adapter directory.",
    "salora": "Train adapters that keep clear of safety features (SaLoRA).",
}
"""The commands, each in the module of its name, and what each says of itself first: their list is
shown without importing them."""


class Commands(Mapping[str, Any]):
    """The commands by name, each imported and made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            if name not in COMMANDS:
                raise KeyError(name)
            module = import_module(f"safeproj.cli.{name}")
            app = getattr(module, "app", None)
            if app is None:
                app = typer.Typer(add_completion=False, **{**SETTINGS, "no_args_is_help": False})
                app.command(name, cls=Command)(getattr(module, f"{name}_command"))
            self._made[name] = typer.main.get_command(app)
            self._made[name].name = name
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        yield from COMMANDS

    def __len__(self) -> int:
        return len(COMMANDS)


class Root(Group):
    """The group of `Commands`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a usage error is an annotation too, where those were asked for."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Of a class of click, or of what typer has in its place, which differs by its version.
            message = getattr(error, "format_message", None)
            given = " ".join(ctx.meta[__name__]).replace("=", " ")
            if message is not None and "--format github" in given:
                from safeproj.cli import terminal

                terminal.annotate(message())
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands."""
        del ctx
        write_list(formatter, "Commands", list(COMMANDS.items()))

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(self.commands)


app = typer.Typer(
    name="safeproj",
    cls=Root,
    **SETTINGS,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safeproj {__version__}")
        raise typer.Exit


@app.callback()
@examples(
    "`safeproj COMMAND --help`, docs/repair.md, docs/faq.md",
    "safeproj repair --aligned MODEL --adapter my-lora --harmful harmful.csv "
    "--task task.jsonl --out my-lora-safe",
    "safeproj check my-lora-safe --base BASE --aligned MODEL",
)
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Repair the safety of fine-tuned LoRA adapters after training.

    SRC, BASE and MODEL are each a local directory, a local file, or a Hugging Face Hub id
    org/name[/subfolder][@revision].
    """
