"""`safeproj rule`: what a finding means, and what to do about it."""

from __future__ import annotations

import shutil
import textwrap
from difflib import get_close_matches
from typing import Annotated

import typer

from safeproj.cli import terminal
from safeproj.cli.usage import INPUTS, examples
from safeproj.errors import SafeprojError
from safeproj.gate.policy import ALLOWANCES, ALLOWED
from safeproj.records.rules import RULES, Rule
from safeproj.report import WIDTH
from safeproj.text import located


@examples("docs/gate.md", "safeproj rule", "safeproj rule SP001")
def rule_command(
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            help="Of a finding, such as SP001, or its name.",
            show_default=False,
            rich_help_panel=INPUTS,
        ),
    ] = None,
) -> None:
    """Explain a finding of check or verify; list all without ID."""
    with terminal.command(verbose=False):
        if wanted is None:
            for rule in RULES.values():
                typer.echo(f"{rule.id}  {rule.level.value:9s}  {rule.name}")
        else:
            typer.echo(explained(_rule(wanted)))


def explained(rule: Rule) -> str:
    """Return what is known of a rule, in lines that fit the terminal."""
    paragraphs = [f"{rule.id} {rule.name}", rule.text, f"What to do: {rule.remedy}"]
    for name in (name for name, id_ in ALLOWANCES.items() if id_ == rule.id):
        if name in ALLOWED:
            text = (
                f"The default policy allows it, so that it is a note; `--forbid {name}` fails it."
            )
        else:
            text = f"`--allow {name}` makes it a note."
        paragraphs.append(text)
    if rule.can_be_ignored:
        paragraphs.append(f"`--ignore {rule.id}` leaves it out.")
    width = min(shutil.get_terminal_size().columns, WIDTH)
    return "\n\n".join(
        textwrap.fill(located(each), width, break_long_words=False, break_on_hyphens=False)
        for each in paragraphs
    )


def _rule(wanted: str) -> Rule:
    names = {rule.name: rule for rule in RULES.values()}
    found = RULES.get(wanted.upper()) or names.get(wanted.lower())
    if found is None:
        near = get_close_matches(wanted.lower(), names, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise SafeprojError(
            f"no finding is called {wanted!r}; {meant}expected an id such as SP001, or a name: "
            "`safeproj rule` lists all"
        )
    return found
