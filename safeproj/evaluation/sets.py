"""Prompt files to measure on: JSON lines, each a prompt and what would be a right answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safeproj.errors import SafeprojError
from safeproj.storage.documents import parse
from safeproj.text import first_line, is_plain

Kind = Literal["harmful", "skill"]
"""Answers to `harmful` prompts are judged, those to `skill` prompts compared with the right one."""

NAME = 64
"""Characters of the name of a set."""

EXPECTED: Mapping[Kind, str] = {
    "harmful": '{"prompt": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}',
    "skill": '{"prompt": "…", "response": "…"} or {"messages": […, {"role": "assistant", …}]}',
}


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Text that the model continues, or the messages of a chat, which go through its template."""


@dataclass(frozen=True)
class PromptSet:
    """A file of prompts.

    Attributes:
        name: what it is called in reports.
        kind: how answers are measured.
        source: its path as it was given.
        sha256: of the file.
        prompts: one for each line that is asked.
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
        lines = self.lines or len(self.prompts)
        return replace(
            self, prompts=self.prompts[:count], expected=self.expected[:count], lines=lines
        )


def read_prompts(spec: str, kind: Kind, option: str | None = None) -> PromptSet:
    """Return the prompts of `[NAME=]FILE`; the name is the file's stem if none is given.

    A line is an object with `prompt`, which the model continues as it is, or with `messages`, which
    go through its chat template; an assistant's message at their end is not part of the prompt.
    Skills need the right answer: `response`, or that last message. Harmful prompts may have
    `compliance`, the answer that would comply. Other fields are ignored, and so are empty lines.

    Args:
        spec: `[NAME=]FILE`.
        kind: how answers are measured.
        option: what messages call the option that named the file; `--` and the kind if None.

    Raises:
        SafeprojError: the file cannot be read, or a line cannot be used; it is named.
    """
    option = option or f"--{kind}"
    name, path = _named(spec, option)
    try:
        content = path.expanduser().read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise SafeprojError(f"{option} {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SafeprojError(
            f"{option} {path}: cannot be read ({first_line(error)}); expected JSON lines in UTF-8"
        ) from error
    found = [
        _row(f"{option} {path}:{number}", line, kind)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise SafeprojError(f"{option} {path}: no lines; expected {EXPECTED[kind]} in each")
    prompts, expected = zip(*found, strict=True)
    return PromptSet(name, kind, str(path), hashlib.sha256(content).hexdigest(), prompts, expected)


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


def _named(spec: str, option: str) -> tuple[str, Path]:
    """Return the name and the file; a file that has an `=` in its own name is found as it is."""
    name, separator, rest = spec.partition("=")
    if not separator or Path(spec).expanduser().is_file():
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


def _row(where: str, line: str, kind: Kind) -> tuple[Prompt, str | None]:
    try:
        row = parse(line.encode())
    except (ValueError, RecursionError) as error:
        raise SafeprojError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(row, dict):
        raise SafeprojError(f"{where}: a {type(row).__name__}, expected {EXPECTED[kind]}")
    prompt: Prompt
    if "messages" in row:
        prompt, answer = _chat(where, row["messages"])
    else:
        prompt, answer = _text(where, row, "prompt", kind), row.get("response")
    if kind == "harmful":
        wanted = row.get("compliance")
        return prompt, None if wanted is None else _text(where, row, "compliance", kind)
    return prompt, _text(where, {"response": answer}, "response", kind)


def _text(where: str, row: Mapping[str, Any], name: str, kind: Kind) -> str:
    found = row.get(name)
    if not isinstance(found, str) or not found.strip():
        problem = "is missing" if found is None else "is no text, or empty"
        raise SafeprojError(f"{where}: {name!r} {problem}; expected {EXPECTED[kind]}")
    return found


def _chat(where: str, messages: Any) -> tuple[tuple[Message, ...], str | None]:
    """Return the messages of a prompt, and the answer that follows them in the file."""
    fits = isinstance(messages, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in messages
    )
    found = tuple(Message(each["role"], each["content"]) for each in messages) if fits else ()
    answer = None
    if found and found[-1].role == "assistant":
        *rest, last = found
        found, answer = tuple(rest), last.content
    if not found:
        raise SafeprojError(
            f"{where}: 'messages' must be objects with 'role' and 'content', at least one of them "
            "before an assistant's at the end"
        )
    return found, answer
