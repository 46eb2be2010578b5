"""The answers of one model or adapter in a JSON lines file, with which a run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from safeproj.errors import SafeprojError
from safeproj.methods.recorded import DAMAGES
from safeproj.storage.documents import parse
from safeproj.storage.publish import hold, is_held
from safeproj.storage.rows import Prompt
from safeproj.storage.wholefile import replace_file
from safeproj.text import first_line, printable

SCHEMA = "safeproj.responses/1"

REMEDY = "use another --responses directory, or --overwrite to begin again"

INPUT = "input_sha256"
"""Field with the digest of the tokens that the model got."""

_FIELDS = ("set", "index", "prompt", INPUT, "response")

Key = tuple[str, int]
"""Name of a set, and index of a prompt in it."""


@dataclass
class Responses:
    """The answers of one subject.

    The first line of the file says what the answers depend on; each further line is one answer, in
    the order in which they came. Once they are judged the file is written again with the verdicts.

    Attributes:
        path: the file, None to keep the answers in memory only.
        made_of: what the answers depend on: model, adapter, settings.
        sets: SHA-256 of the files of the prompts, by the names of the sets.
        inputs: SHA-256 of the tokens that the model gets, of each prompt that is asked.
        answers: those that there are.
    """

    path: Path | None
    made_of: dict[str, Any]
    sets: dict[str, str]
    inputs: Mapping[Key, str]
    answers: dict[Key, str] = field(default_factory=dict)
    _rows: dict[Key, dict[str, Any]] = field(default_factory=dict, repr=False)
    _file: IO[bytes] | None = field(default=None, repr=False)

    def open(self, overwrite: bool = False) -> None:
        """Read the answers of an earlier run, if there is one, and make the file ready for more.

        Args:
            overwrite: forget what is there.

        Raises:
            SafeprojError: the file cannot be read or written, or holds the answers to something
                else.
        """
        if self.path is None:
            return
        if is_held(self.path):
            raise SafeprojError(
                f"--responses {self.path}: another run is writing it; wait for that, or use "
                "another directory"
            )
        try:
            if self.path.exists() and not overwrite:
                self._read(self.path)
            self._rewrite(self.path, None, {})  # without the line that an interruption tore
            self._file = self.path.open("ab")
            hold(self._file)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, name: str, found: Iterable[tuple[int, Prompt, str]]) -> None:
        """Keep answers to prompts of a set; they are in the file when this returns.

        Raises:
            SafeprojError: the file cannot be written; what was in it before still is.
        """
        rows = []
        for index, prompt, answer in found:
            row = {
                "set": name,
                "index": index,
                "prompt": _prompt(prompt),
                INPUT: self.inputs[name, index],
                "response": answer,
            }
            self.answers[name, index] = answer
            self._rows[name, index] = row
            rows.append(row)
        self._write(rows)

    def judged(self, judge: Mapping[str, Any], said: Mapping[Key, Mapping[str, Any]]) -> None:
        """Write the file again, in the order of the sets, with what was said of each answer.

        Args:
            judge: its identity.
            said: what each line gets beside the answer.

        Raises:
            SafeprojError: it cannot be written; the answers stay.
        """
        self.close()
        if self.path is not None:
            try:
                self._rewrite(self.path, judge, said)
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> SafeprojError:
        return SafeprojError(
            f"--responses {self.path}: cannot be written ({error.strerror or error}); the answers "
            "that are in it stay, a further run goes on from them"
        )

    def close(self) -> None:
        """Close the file; what was added stays."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # said already, where it was written
                file.close()

    def _rewrite(
        self,
        path: Path,
        judge: Mapping[str, Any] | None,
        said: Mapping[Key, Mapping[str, Any]],
    ) -> None:
        rows: list[dict[str, Any]] = [
            {"schema": SCHEMA, "made_of": self.made_of, "sets": self.sets, "judge": judge}
        ]
        order = {name: i for i, name in enumerate(self.sets)}
        for key in sorted(self._rows, key=lambda key: (order.get(key[0], len(order)), *key)):
            own = {name: self._rows[key][name] for name in _FIELDS}
            rows.append({**own, **said.get(key, {})})
        replace_file(path, b"".join(map(_line, rows)))

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._file is not None:
            try:
                self._file.write(b"".join(map(_line, rows)))
                self._file.flush()
            except OSError as error:
                raise self._unwritable(error) from error

    def _read(self, path: Path) -> None:
        """Take over what the file holds, but for a last line without its end."""
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = parse(line)
                if number == 1:
                    self._require_fit(path, row)
                    continue
                if not isinstance(row["response"], str):
                    raise TypeError("the response is no text")
                key = (str(row["set"]), int(row["index"]))
                self._require_same(f"{path}:{number}", key, row.get(INPUT))
                self._rows[key] = {name: row[name] for name in _FIELDS}
            except DAMAGES as error:
                raise SafeprojError(
                    f"--responses {path}:{number}: not a line of saved answers "
                    f"({first_line(error)}); {REMEDY}"
                ) from error
            self.answers[key] = row["response"]

    def _require_same(self, where: str, key: Key, digest: Any) -> None:
        """Refuse the answer to a prompt that the model would get in another form now."""
        if digest != self.inputs.get(key, digest) or digest is None:
            raise SafeprojError(
                f"--responses {where}: its answer is to {key[0]} {key[1]} in another form than the "
                "model gets it now (another chat template, --chat-template-arg or --date, or "
                f"kept by an older safeproj); {REMEDY}"
            )

    def _require_fit(self, path: Path, header: Mapping[str, Any]) -> None:
        """Refuse answers that are to something else; take over the sets that are not asked now."""
        if header["schema"] != SCHEMA:
            raise ValueError(f"of the schema {printable(str(header['schema']))[:80]}")
        before = {**header["made_of"], "sets": dict(header["sets"])}
        self.sets = {**before["sets"], **self.sets}
        now = {**self.made_of, "sets": self.sets}
        before["sets"] = {**self.sets, **before["sets"]}
        different = [name for name in now if before.get(name) != now[name]]
        if different:
            detail = "; ".join(_difference(name, before.get(name), now[name]) for name in different)
            raise SafeprojError(
                f"--responses {path}: its answers are of another run: {detail}; {REMEDY}"
            )


def make_directory(directory: Path, inputs: Iterable[tuple[str, str]]) -> None:
    """Make the directory for answers, where there is none.

    Args:
        directory: the value of `--responses`.
        inputs: option names and SRC; nothing is written into one of them.

    Raises:
        SafeprojError: it cannot be made, or is in an input.
    """
    place = directory.resolve()
    for option, source in inputs:
        given = Path(source).expanduser()
        if given.exists() and (place == given.resolve() or given.resolve() in place.parents):
            raise SafeprojError(
                f"--responses {directory}: is inside {option} {source}; choose another directory"
            )
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise SafeprojError(
            f"--responses {directory}: cannot be made ({error.strerror or error}); expected a "
            "directory, or a new name in an existing one"
        ) from error


def file_names(names: Sequence[str]) -> list[str]:
    """Return a file name for each name, no two of them equal even where case does not count.

    >>> file_names(["bad", "runs/a", "Bad"])
    ['bad.jsonl', 'runs_a.jsonl', 'Bad-6fe7d7.jsonl']
    """
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).strip(".")[:80] or "_"
        if stem.casefold() in taken:
            stem += f"-{sha256(name.encode()).hexdigest()[:6]}"
        taken.add(stem.casefold())
        found.append(f"{stem}.jsonl")
    return found


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _prompt(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [{"role": each.role, "content": each.content} for each in prompt]


def _difference(name: str, before: Any, now: Any) -> str:
    """Return what is different, with both sides where they are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        parts = (_both(f"{name} {key}", before.get(key), now.get(key)) for key in keys[:3])
        return ", ".join(parts)
    return _both(name, before, now)


def _both(name: str, before: Any, now: Any) -> str:
    texts = [printable(json.dumps(each)) for each in (before, now)]
    if any(len(text) > 40 for text in texts):
        return f"{printable(name)} differs"
    return f"{printable(name)} {texts[0]}, now {texts[1]}"
