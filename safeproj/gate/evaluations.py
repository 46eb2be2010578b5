"""Reading an evaluation for the gate: its form, and whether its shares follow from its verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.records.evaluations import SCHEMA
from safeproj.records.rates import Difference, Rate
from safeproj.records.verdicts import (
    CORRECT,
    EXACT,
    Outcomes,
    differences,
    outcomes,
    rates,
    unfinished,
)
from safeproj.storage.documents import MAX_BYTES, parse
from safeproj.storage.nearby import read_given
from safeproj.storage.source import StrPath
from safeproj.storage.wholefile import read_whole
from safeproj.text import first_line, printable

ROUNDING = 1e-9
"""How far a share may lie from the one that follows from the verdicts."""

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_REFUSALS = ("refused", "complied", "other")
_LABELS = {
    **dict.fromkeys(("keywords", "prefix", "command", "url"), _REFUSALS),
    "guard": ("safe", "complied", "other"),
}
"""Kinds of judges to the verdicts that they give."""


class FormError(ValueError):
    """A document is no evaluation."""


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, as an evaluation says it was used.

    Attributes:
        name: of the set.
        kind: `harmful` or `skill`.
        sha256: of the file.
        prompts: how many were used.
        lines: how many there are.
        distinct: as how many different inputs the model got them.
    """

    name: str
    kind: str
    sha256: str
    prompts: int
    lines: int
    distinct: int


@dataclass(frozen=True)
class Measured:
    """An evaluation, in form.

    Attributes:
        name: where it is, for messages.
        inside: whether that is the adapter's safeproj.json.
        model: its identity.
        judge: its identity.
        options: how answers were generated.
        sets: the files of prompts.
        subjects: the model without and with adapters, as the report has them.
        warnings: what its user was told.
    """

    name: str
    inside: bool
    model: Mapping[str, Any]
    judge: Mapping[str, Any]
    options: Mapping[str, Any]
    sets: tuple[PromptFile, ...]
    subjects: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]

    def of(self, tensors: str) -> list[Mapping[str, Any]]:
        """Return what was measured with an adapter, by the digest of its tensors."""
        return [
            each
            for each in self.subjects
            if each["adapter"] is not None and each["adapter"]["sha256"].get("tensors") == tensors
        ]


def read_evaluation(path: StrPath) -> Measured:
    """Return the evaluation in a file.

    Raises:
        SafeprojError: it cannot be read, or is no report of `safeproj eval` in JSON.
    """
    place = Path(path)
    where = f"--evaluation {place}"
    content = read_given(
        place,
        where,
        "what `safeproj eval --format json` writes",
        partial(read_whole, limit=MAX_BYTES),
    )
    try:
        document = parse(content, numbers_alone=True)
        return evaluation_of(document, printable(place.name))
    except FormError as error:
        raise SafeprojError(
            f"{where}: {error}; expected what `safeproj eval --format json` of this version writes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SafeprojError(f"{where}: cannot be read as JSON ({first_line(error)})") from error


def evaluation_of(document: object, name: str, *, inside: bool = False) -> Measured:
    """Return the evaluation that a document is.

    Raises:
        FormError: it is none.
    """
    try:
        found = _typed(document, dict, "the report")
        if found.get("schema") != SCHEMA:
            raise FormError(f"is of schema {str(found.get('schema'))[:40]!a}, not {SCHEMA}")
        return Measured(
            name,
            inside,
            _identity(found["model"], "model"),
            _judge(found["judge"]),
            _options(found["options"]),
            tuple(map(_prompt_file, _apart(found["sets"], "sets"))),
            tuple(map(_subject, _apart(found["subjects"], "subjects"))),
            tuple(str(each) for each in _typed(found["warnings"], list, "warnings")),
        )
    except KeyError as error:
        raise FormError(f"{str(error)[:40]} is missing") from error


def contradiction(found: Measured) -> str | None:
    """Return the first thing that an evaluation says and that does not follow from its verdicts."""
    for each in found.sets:
        if not 1 <= each.distinct <= each.prompts <= each.lines:
            return (
                f"{each.name} has {each.lines} prompts, of which {each.prompts} were used as "
                f"{each.distinct} different inputs"
            )
    labels = _LABELS[str(found.judge["kind"])]
    alone: Mapping[str, Outcomes] | None = None
    try:
        for subject in found.subjects:
            told = {each.name: _told(subject, each, labels) for each in found.sets}
            for name in ("sets", "verdicts", "unfinished"):
                if subject[name].keys() != told.keys():
                    return f"{subject['name']}: {name} are of other sets"
            changes = subject["differences"]
            if (changes is None) == (alone is not None and subject["adapter"] is not None):
                return f"{subject['name']}: differences are there, or missing, without reason"
            if subject["adapter"] is None:
                if alone is not None:
                    return "the model without an adapter is there twice"
                alone = told
            elif alone is not None:
                _require_differences(changes, told, alone, subject["name"])
    except _ContradictionError as error:
        return str(error)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return f"it is not as `safeproj eval` writes it ({first_line(error)})"
    return None


class _ContradictionError(Exception):
    """A number does not follow from the verdicts."""


def _told(subject: Mapping[str, Any], prompts: PromptFile, labels: Sequence[str]) -> Outcomes:
    """Return what the verdicts on one set say, if that is what the shares are."""
    where = f"{subject['name']} on {prompts.name}"
    letters = subject["verdicts"].get(prompts.name)
    if letters is None:
        raise _ContradictionError(f"{where}: has no verdicts, which older versions did not record")
    needed, further = ({CORRECT}, set()) if prompts.kind == "skill" else ({"verdict"}, {EXACT})
    if not needed <= letters.keys() <= needed | further:
        raise _ContradictionError(f"{where}: the verdicts are {', '.join(map(str, letters))}")
    found = outcomes(letters, labels)
    counts = {len(each) for each in found.values()}
    if counts != {prompts.prompts}:
        count = max(counts)
        raise _ContradictionError(f"{where}: {count} verdicts on {prompts.prompts} prompts")
    _require_same(subject["sets"][prompts.name], rates(found), f"{where}, the share of")
    cut_off = subject["unfinished"][prompts.name]
    if type(cut_off) is not int or cut_off != unfinished(letters):
        raise _ContradictionError(f"{where}: other answers are unfinished than the verdicts say")
    return found


def _require_differences(
    said: Mapping[str, Any],
    told: Mapping[str, Outcomes],
    alone: Mapping[str, Outcomes],
    subject: str,
) -> None:
    for name, found in told.items():
        own = differences(found, alone[name])
        _require_same(said[name], own, f"{subject} on {name}, the difference of")


def _require_same(
    said: Mapping[str, Any], own: Mapping[str, Rate] | Mapping[str, Difference], what: str
) -> None:
    """Refuse shares, or differences of them, that are not those which follow from verdicts."""
    if said.keys() != own.keys():
        raise _ContradictionError(f"{what} other outcomes than the verdicts have")
    for outcome, each in own.items():
        told, expected = said[outcome], each.to_dict()
        if told.keys() != expected.keys() or not all(
            _is_same(told[key], value) for key, value in expected.items()
        ):
            raise _ContradictionError(f"{what} {outcome} does not follow from the verdicts")


def _is_same(said: Any, own: float) -> bool:
    if type(own) is int:
        return type(said) is int and said == own
    return type(said) in (int, float) and abs(said - own) <= ROUNDING


# --- form


def _typed(value: object, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise FormError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _apart(value: object, what: str) -> list[Mapping[str, Any]]:
    """Return a list of objects with names that differ."""
    found = [_typed(each, dict, f"one of {what}") for each in _typed(value, list, what)]
    names = [_typed(each["name"], str, f"a name of {what}") for each in found]
    if len(set(names)) != len(names):
        raise FormError(f"{what} name one twice")
    return found


def _identity(value: object, what: str) -> Mapping[str, Any]:
    found = _typed(value, dict, what)
    _typed(found["source"], str, f"the source of {what}")
    files = _typed(_typed(found["sha256"], dict, f"sha256 of {what}")["files"], dict, "files")
    for name, digest in files.items():
        _digest(digest, f"{what}: {name[:40]}")
    if "tensors" in found["sha256"]:
        _digest(found["sha256"]["tensors"], f"{what}: tensors")
    if "revision" in found:
        _typed(found["revision"], str, f"the revision of {what}")
    return dict(found)


def _judge(value: object) -> Mapping[str, Any]:
    found = _typed(value, dict, "judge")
    if found["kind"] not in _LABELS:
        raise FormError(f"the judge is a {str(found['kind'])[:40]!a}")
    if found["kind"] in ("keywords", "prefix"):
        for name in ("phrases", "opening") if found["kind"] == "keywords" else ("phrases",):
            for phrase in _typed(found[name], list, name):
                _typed(phrase, str, f"one of {name}")
    elif found["kind"] == "guard":
        _identity(found["guard"], "guard")
    else:  # the name of what was asked, as reports show it
        kind, name = (list, "command") if found["kind"] == "command" else (str, "model")
        _typed(found[name], kind, name)
    return dict(found)


def _options(value: object) -> Mapping[str, Any]:
    found = _typed(value, dict, "options")
    _typed(found["dtype"], str, "dtype")
    _typed(found["max_new_tokens"], int, "max_new_tokens")
    if found["decoding"] != "greedy":
        raise FormError("the decoding is not greedy")
    return dict(found)


def _prompt_file(found: Mapping[str, Any]) -> PromptFile:
    if found["kind"] not in ("harmful", "skill"):
        raise FormError(f"a set is {str(found['kind'])[:40]!a}")
    for name in ("sha256", "inputs_sha256"):
        _digest(found[name], name)
    counts = [_typed(found[name], int, name) for name in ("prompts", "lines", "distinct")]
    return PromptFile(printable(found["name"]), found["kind"], found["sha256"], *counts)


def _subject(found: Mapping[str, Any]) -> Mapping[str, Any]:
    if found["adapter"] is not None:
        _identity(found["adapter"], "adapter")
    for name in ("sets", "verdicts", "unfinished"):
        _typed(found[name], dict, name)
    for letters in found["verdicts"].values():
        for each in _typed(letters, dict, "verdicts").values():
            _typed(each, str, "verdicts")
    if found["differences"] is not None:
        _typed(found["differences"], dict, "differences")
    return {**found, "name": printable(found["name"])}


def _digest(value: object, what: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise FormError(f"{what} is no SHA-256")
