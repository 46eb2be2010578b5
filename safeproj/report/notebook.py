"""A record in a notebook: the table as a piece of HTML, without scripts and style sheets."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from safeproj.report import WIDTH, Record, render

_FRAME = '<pre style="line-height: 1.2; overflow-x: auto; white-space: pre">{code}</pre>\n'
"""Colours of the page stay, which may be dark."""


def fragment(record: Record) -> str:
    """Return a record as one element; what came out of files is escaped."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True)
    table = render(record, "table", color=True)
    console.print(Text.from_ansi(table.rstrip("\n")), soft_wrap=True)
    return console.export_html(code_format=_FRAME, inline_styles=True)
