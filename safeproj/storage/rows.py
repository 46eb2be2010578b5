"""Rows of prompts and responses, out of the files that people have: JSON, CSV, or plain text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.storage.documents import parse
from safeproj.storage.nearby import given_text, read_given
from safeproj.storage.source import StrPath
from safeproj.text import first_line, shorten

CHATS = ("messages", "conversations")
"""Fields with a chat: of the usual name, and of ShareGPT's."""

PROMPTS = ("prompt", "instruction", "question", "goal", "behavior", "forbidden_prompt")
"""Fields with a prompt; of several in one row the first counts. JailbreakBench has `Goal`, and a
`Behavior` that is only its name."""

FURTHER: Mapping[str, tuple[tuple[str, str], ...]] = {
    "instruction": (("input", "{prompt}\n\n{text}"), ("context", "{prompt}\n\n{text}")),
    "behavior": (("contextstring", "{text}\n\n---\n\n{prompt}"),),
}
"""Fields that belong to a prompt where they are filled, and how they are put together: Alpaca's and
Dolly's below the instruction, HarmBench's above the behaviour, as its `DirectRequest` does."""

RESPONSES = ("response", "output", "completion", "answer")
"""Fields with a response; of several in one row the first counts."""

COMPLYING = "target"
"""AdvBench's and JailbreakBench's beginning of an answer that complies: never a response."""

IMAGE = "imagefilename"
"""HarmBench's name of the image that a prompt is about."""

EXPECTED = {
    False: '{"prompt": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}',
    True: '{"prompt": "…", "response": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}',
}
"""What a line of JSON should be, without and with a response."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""ShareGPT's names of who speaks."""

_JSON = re.compile(r'\s*(\[\s*)?\{\s*["}]')
"""How JSON of rows begins, whatever the file is called; the group is there for an array."""

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Text that the model continues, or the messages of a chat, which go through its template."""


@dataclass(frozen=True)
class Row:
    """A prompt, and what goes with it.

    Attributes:
        where: what messages about the row begin with: option, file, and line or item.
        prompt: text, or the messages of a chat before the response.
        response: what follows, where responses are read.
        compliance: the answer that would comply, where responses are not read and the file has it.
        chat: of a chat the messages as the file has them, with further keys and the response.
    """

    where: str
    prompt: Prompt
    response: str | None = None
    compliance: str | None = None
    chat: tuple[Mapping[str, Any], ...] | None = None

    def answered(self, response: str | None, *, chat: bool) -> Row:
        """Return the row with another response, or with none.

        Args:
            response: what follows; the answer that would comply is left out then.
            chat: whether a plain prompt becomes a user's message; chats are chats anyway.
        """
        compliance = self.compliance if response is None else None
        row = replace(self, response=response, compliance=compliance)
        if isinstance(self.prompt, str) and not chat:
            return row
        prompt = self.prompt
        if isinstance(prompt, str):
            prompt = (Message("user", prompt),)
        before = tuple({"role": each.role, "content": each.content} for each in prompt)
        messages = before if self.chat is None else self.chat[: len(prompt)]
        if response is not None:
            messages = (*messages, {"role": "assistant", "content": response})
        return replace(row, prompt=prompt, chat=messages)

    def line(self) -> bytes:
        """Return the row as a line of JSON, which `read_rows` reads as what it is."""
        fields: dict[str, Any] = {"messages": self.chat}
        if self.chat is None:
            fields = {"prompt": self.prompt, "response": self.response}
        fields["compliance"] = self.compliance
        given = {name: value for name, value in fields.items() if value is not None}
        return (json.dumps(given, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Attributes:
        source: its path as it was given.
        sha256: of the file.
        rows: in its order, at least one.
    """

    source: str
    sha256: str
    rows: tuple[Row, ...]


def read_rows(path: StrPath, option: str, *, responses: bool) -> Rows:
    """Return the rows of a file.

    What begins as JSON does is an object in each line, or one array of objects; else a name that
    ends in `.csv` or `.tsv` stands for a table with a header, and `.txt` for one prompt in each
    line. Empty lines, and fields that are not known, are left out.

    Args:
        path: the file, in UTF-8.
        option: what messages call the option that named the file.
        responses: whether rows need a response, and have no `compliance`.

    Raises:
        SafeprojError: the file cannot be read, or a row cannot be used; it is named.
    """
    source = os.fspath(path)
    file = f"{option} {source}"
    place = Path(source).expanduser()
    expected = "JSON lines in UTF-8, or a JSON array, CSV or text"
    content = read_given(place, file, expected)
    if content.startswith(b"PAR1"):
        raise SafeprojError(
            f"{file}: is Parquet, which is not read here; write it as JSON lines, such as with "
            "to_json of datasets"
        )
    text = io.StringIO(given_text(content, file, expected), newline=None).read()
    rows = tuple(
        _Fields.of(where, found, responses).row()
        for where, found in _found(file, place, text, responses)
    )
    if not rows:
        raise SafeprojError(f"{file}: no lines; expected {EXPECTED[responses]} in each")
    return Rows(source, hashlib.sha256(content).hexdigest(), rows)


def _found(file: str, place: Path, text: str, responses: bool) -> Iterator[tuple[str, Any]]:
    """Yield what messages call each row, and what it is: fields, if nothing is wrong with it."""
    begins, ending = _JSON.match(text), place.suffix.lower()
    if begins is not None and begins[1] is not None:
        for number, item in enumerate(_parsed(file, text), start=1):
            yield f"{file}, item {number}", item
    elif begins is None and ending in _SEPARATORS:
        yield from _table(file, text, _SEPARATORS[ending], responses)
    elif begins is None and ending == ".txt":
        if responses:
            raise SafeprojError(
                f"{file}: is plain text, which has prompts alone; expected {EXPECTED[True]} in "
                "each line, such as `safeproj data refusals` writes"
            )
        for number, line in _lines(text):
            yield f"{file}:{number}", {"prompt": line}
    else:
        for number, line in _lines(text):
            yield f"{file}:{number}", _parsed(f"{file}:{number}", line)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parsed(where: str, text: str) -> Any:
    try:
        return parse(text.encode())
    except (ValueError, RecursionError) as error:
        raise SafeprojError(
            f"{where}: not JSON ({first_line(error)}); expected an object in each line, one array "
            "of objects, or a file whose name ends in .csv, .tsv or .txt"
        ) from error


def _table(
    file: str, text: str, separator: str, responses: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table by the names of its columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [name.strip() for name in cells]
                _require_columns(where, header, responses)
            elif len(cells) != len(header):
                raise SafeprojError(
                    f"{where}: {len(cells)} fields, but the header has {len(header)}; expected as "
                    "many, with quotes around text that has separators or line ends in it"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise SafeprojError(
            f"{file}:{start}: not CSV ({first_line(error)}); expected quotes around text that has "
            'separators, line ends or quotes in it, and "" for a quote'
        ) from error


def _require_columns(where: str, header: Sequence[str], responses: bool) -> None:
    """Refuse a table without a column that is needed, or with two of one name.

    Raises:
        SafeprojError: it is such a table.
    """
    known = {name.lower() for name in header}
    listed = shorten(map(repr, header), 12)
    if len(known) < len(header):
        raise SafeprojError(f"{where}: two columns of one name among {listed}; rename one")
    for what, names in (("prompts", PROMPTS), *([("responses", RESPONSES)] if responses else [])):
        if not known & set(names):
            raise SafeprojError(
                f"{where}: no column with {what} among {listed}; expected one of "
                f"{', '.join(names)}{_refusals(known)}"
            )


def _refusals(known: Iterable[str]) -> str:
    """Return what the user is told where there is only an answer that complies."""
    if COMPLYING not in known:
        return ""
    return f" ({COMPLYING!r} complies; `safeproj data refusals` makes refusals to such prompts)"


@dataclass(frozen=True)
class _Fields:
    """The fields of one row.

    Attributes:
        where: what messages about the row begin with.
        given: name to value.
        names: name in lower case to name; a name that is in lower case itself counts before others.
        responses: whether a response is needed.
    """

    where: str
    given: Mapping[str, Any]
    names: Mapping[str, str]
    responses: bool

    @classmethod
    def of(cls, where: str, given: Any, responses: bool) -> _Fields:
        if not isinstance(given, dict):
            found = f"a {type(given).__name__}"
            raise SafeprojError(f"{where}: {found}, expected {EXPECTED[responses]}")
        names = {**{name.lower(): name for name in given}, **{name: name for name in given}}
        return cls(where, given, names, responses)

    def row(self) -> Row:
        """Return the row.

        Raises:
            SafeprojError: it cannot be used.
        """
        if self.optional(IMAGE) is not None:
            raise SafeprojError(
                f"{self.where}: is about an image ({self.names[IMAGE]}), and images are not read; "
                "leave such rows out"
            )
        compliance = None if self.responses else self.optional("compliance")
        chat = next((name for name in CHATS if name in self.names), None)
        if chat is not None:
            return self.chat(self.names[chat], compliance)
        prompt = self.prompt()
        response = self.response() if self.responses else None
        return Row(self.where, prompt, response, compliance)

    def prompt(self) -> str:
        """Return the prompt, with what belongs to it."""
        name = self.first(PROMPTS)
        prompt = self.text(name)
        for further, form in FURTHER.get(name, ()):
            text = self.optional(further)
            if text is not None:
                prompt = form.format(prompt=prompt, text=text)
        return prompt

    def response(self) -> str:
        """Return the response."""
        name = self.first(RESPONSES)
        if name not in self.names and COMPLYING in self.names:
            raise SafeprojError(f"{self.where}: {name!r} is missing{_refusals(self.names)}")
        return self.text(name)

    def chat(self, name: str, compliance: str | None) -> Row:
        """Return the row that a chat is."""
        given = self.given[name]
        messages = [_usual(each) for each in given] if isinstance(given, list) else []
        chat = tuple(each for each in messages if each is not None)
        before = tuple(Message(each["role"], each["content"]) for each in chat)
        answer = None
        if before and before[-1].role == "assistant":
            *rest, last = before
            before, answer = tuple(rest), last.content
        fits = len(chat) == len(messages) and before
        if not fits or (self.responses and not (answer or "").strip()):
            wanted = (
                "two or more objects with 'role' and 'content', the last of the role 'assistant' "
                "and not empty"
                if self.responses
                else "objects with 'role' and 'content', at least one of them before an "
                "assistant's at the end"
            )
            raise SafeprojError(f"{self.where}: {name!r} must be {wanted}")
        return Row(self.where, before, answer if self.responses else None, compliance, chat)

    def first(self, names: Sequence[str]) -> str:
        """Return the first of some names that is there, the very first if none is."""
        return next((name for name in names if name in self.names), names[0])

    def optional(self, name: str) -> str | None:
        """Return the text of a field, None where it is not there or empty."""
        found = self.given.get(self.names.get(name, name))
        if found is None or (isinstance(found, str) and not found.strip()):
            return None
        return self.text(name)

    def text(self, name: str) -> str:
        """Return the text of a field that is needed."""
        name = self.names.get(name, name)
        found = self.given.get(name)
        if not isinstance(found, str) or not found.strip():
            problem = "is missing" if found is None else "is no text, or empty"
            raise SafeprojError(
                f"{self.where}: {name!r} {problem}; expected {EXPECTED[self.responses]}"
            )
        return found


def _usual(message: Any) -> dict[str, Any] | None:
    """Return a message with `role` and `content`, None if it is none."""
    if not isinstance(message, dict):
        return None
    if "from" in message and "role" not in message:
        role = _ROLES.get(str(message["from"]))
        message = {"role": role, "content": message.get("value")}
    fits = all(isinstance(message.get(key), str) for key in ("role", "content"))
    return message if fits else None
