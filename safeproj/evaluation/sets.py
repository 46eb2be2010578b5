"""Prompt files to measure on: each row a prompt, and what would be a right answer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safeproj.errors import SafeprojError
from safeproj.storage.rows import Prompt, read_rows
from safeproj.storage.source import StrPath
from safeproj.text import is_plain

Kind = Literal["harmful", "skill"]
"""Answers to `harmful` prompts are judged, those to `skill` prompts compared with the right one."""

NAME = 64
"""Characters of the name of a set."""


@dataclass(frozen=True)
class PromptSet:
    """A file of prompts.

    Attributes:
        name: what it is called in reports.
        kind: how answers are measured.
        source: its path as it was given.
        sha256: of the file.
        prompts: one for each row that is asked.
        expected: for `skill`, the right answers; for `harmful`, the answers that comply, None where
            the file gives none.
        lines: how many prompts the file has; as many as are asked if None.
    """

    name: str
    kind: Kind
    source: str
    sha256: str
    prompts: tuple[Prompt, ...]
    expected: tuple[str | None, ...]
    lines: int | None = None

    def first(self, count: int | None) -> PromptSet:
        """Return the set with its first prompts only; all of them for None."""
        if count is None:
            return self
        lines = self.lines or len(self.prompts)
        return replace(
            self, prompts=self.prompts[:count], expected=self.expected[:count], lines=lines
        )


def read_prompts(spec: StrPath, kind: Kind, option: str | None = None) -> PromptSet:
    """Return the prompts of `[NAME=]FILE`; the name is the file's stem if none is given.

    Formats are those of `storage/rows.py`. Skills need the right answer: a response, or the
    assistant's message at the end of a chat. Harmful prompts may have `compliance`, the answer that
    would comply.

    Args:
        spec: `[NAME=]FILE`, or the path of a file, which is no `NAME=`.
        kind: how answers are measured.
        option: what messages call the option that named the file; `--` and the kind if None.

    Raises:
        SafeprojError: the file cannot be read, or a row cannot be used; it is named.
    """
    option = option or f"--{kind}"
    name, path = _named(os.fspath(spec), option, is_path=not isinstance(spec, str))
    found = read_rows(path, option, responses=kind == "skill")
    prompts = tuple(row.prompt for row in found.rows)
    expected = tuple(row.response or row.compliance for row in found.rows)
    return PromptSet(name, kind, found.source, found.sha256, prompts, expected)


def require_apart(sets: Iterable[PromptSet]) -> None:
    """Refuse two sets of one name.

    Raises:
        SafeprojError: there are.
    """
    taken: dict[str, PromptSet] = {}
    for each in sets:
        if each.name in taken:
            raise SafeprojError(
                f"--{each.kind} {each.source}: a set of the name {each.name} was given before "
                f"({taken[each.name].source}); give one of them as NAME=FILE"
            )
        taken[each.name] = each


def _named(spec: str, option: str, *, is_path: bool) -> tuple[str, Path]:
    """Return the name and the file; a file that has an `=` in its own name is found as it is."""
    name, separator, rest = spec.partition("=")
    if is_path or not separator or Path(spec).expanduser().is_file():
        rest = spec
        name = "".join(each if is_plain(each) else "_" for each in Path(spec).stem)[:NAME]
    if not name.strip() or not rest.strip():
        raise SafeprojError(f"{option} {spec!a}: expected FILE or NAME=FILE")
    if len(name) > NAME or not is_plain(name):
        raise SafeprojError(
            f"{option} {spec!a}: expected a name of at most {NAME} printable characters, without "
            "` < > |"
        )
    return name, Path(rest)
