"""A model's own refusals to harmful prompts: safety data that is true of this model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generation, Generator, OnBatch, has_template
from safeproj.evaluation.judges import Judge, Keywords
from safeproj.evaluation.measure import date_warnings, judged
from safeproj.evaluation.thoughts import unfinished_words
from safeproj.lm import models
from safeproj.lm.data import sample_of
from safeproj.storage.publish import refused_in_one_line
from safeproj.storage.rows import Row, read_rows
from safeproj.storage.source import open_folder
from safeproj.storage.wholefile import write_file

FEW = 20
"""Refusals below which the user is told that they are few; docs/data.md has what was measured."""

SUFFIX = ".jsonl"
"""End of the name of the file, which is JSON lines."""


@dataclass(frozen=True)
class Refusals:
    """The refusals of a model.

    Attributes:
        rows: the prompts that were refused, with the refusal as the response.
        dropped: how many other answers there were, by verdict.
        warnings: what the user should know about them.
    """

    rows: tuple[Row, ...]
    dropped: Mapping[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """How many prompts the model was given."""
        return len(self.rows) + sum(self.dropped.values())

    def describe(self) -> str:
        """Return how many there are, in words."""
        dropped = ", ".join(f"{count} {verdict}" for verdict, count in self.dropped.items())
        return f"{len(self.rows)} of {self.asked} answers kept; dropped: {dropped}"


def refusals(
    model: Any,
    generator: Generator,
    judge: Judge,
    rows: Sequence[Row],
    on_batch: OnBatch | None = None,
) -> Refusals:
    """Let a model answer prompts, and keep what it refuses.

    Where the generator puts plain prompts through the chat template, the rows that are kept are
    chats; chats always are. Thoughts are left out of the responses.

    Args:
        model: a causal language model of transformers.
        generator: made with the model's tokenizer.
        judge: of the answers; its `wanted` verdict is what is kept.
        rows: with harmful prompts; their responses do not count.
        on_batch: told after each batch how many prompts are done, and how many there are.

    Raises:
        SafeprojError: a prompt cannot be used, or the judge cannot be asked.
    """
    prompts = [row.prompt for row in rows]
    answers = generator.answers(model, prompts, on_batch)
    said = [generator.spoken(*pair) for pair in zip(prompts, answers, strict=True)]
    verdicts = judged(judge, prompts, [each.text for each in said])
    kept = tuple(
        row.answered(each.text, chat=generator.chat)
        for row, each, verdict in zip(rows, said, verdicts, strict=True)
        if verdict is judge.wanted
    )
    others = [label for label in judge.labels if label is not judge.wanted]
    dropped = {label.value: verdicts.count(label) for label in others}
    warnings: list[str] = []
    if any(row.chat is not None for row in kept):
        warnings += date_warnings(generator)
    unfinished = sum(each.unfinished for each in said)
    if unfinished:
        warnings.append(unfinished_words(unfinished, len(rows), "the model"))
    return Refusals(kept, dropped, tuple(warnings))


@dataclass(frozen=True)
class Asking:
    """Who is asked what.

    Attributes:
        aligned: SRC of the model.
        prompts: file with harmful prompts.
        limit: only so many, the first.

    Raises:
        SafeprojError: the limit is none.
    """

    aligned: str
    prompts: str
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise SafeprojError(f"--limit must be 1 or more, found {self.limit}")

    def refusals(
        self,
        judge: Judge | Callable[[], Judge] | None,
        generation: Generation,
        device: str,
        on_batch: OnBatch | None,
    ) -> Refusals:
        """Let the model answer, and keep what it refuses: at least one.

        Raises:
            SafeprojError: an input cannot be used, or no answer is a refusal.
        """
        rows = read_rows(self.prompts, "--prompts", responses=False).rows[: self.limit]
        folder = open_folder(self.aligned)
        tokenizer = models.load_tokenizer(folder)
        generator = replace(generation, chat=has_template(tokenizer)).generator(tokenizer)
        for row in rows:
            generator.rendered(row.prompt)  # what cannot be used is said before anything is run
        made = judge() if callable(judge) else judge or Keywords()
        model = models.load_model(folder, device, generation.dtype)
        found = refusals(model, generator, made, rows, on_batch)
        if not found.rows:
            raise SafeprojError(
                f"--prompts {self.prompts}: the model refused none of {found.asked} prompts "
                f"({found.describe()}), and nothing was written; expected an aligned model, or a "
                "judge that knows how it refuses: see --phrase"
            )
        for row in found.rows:
            sample_of(row, tokenizer, generator.options)  # what is written can be read as data
        return found

    def check_out(self, out: Path, overwrite: bool) -> None:
        """Refuse a place that cannot be written, before the model is loaded.

        Raises:
            SafeprojError: it is one.
        """
        check_out(out, overwrite, [("--aligned", self.aligned), ("--prompts", self.prompts)])

    def write(self, found: Refusals, out: Path, overwrite: bool) -> Refusals:
        """Write refusals as JSON lines, and return them with what the user should know.

        Raises:
            SafeprojError: they cannot be written.
        """
        look = (lambda: self.check_out(out, True)) if overwrite else None
        with refused_in_one_line(out):
            write_file(out.resolve(), b"".join(row.line() for row in found.rows), look)
        if len(found.rows) >= FEW:
            return found
        few = (
            f"{out}: {len(found.rows)} refusals are few, expected {FEW} or more; give more prompts "
            "(docs/data.md has what was measured)"
        )
        return replace(found, warnings=(*found.warnings, few))


def check_out(out: Path, overwrite: bool, inputs: Sequence[tuple[str, str]]) -> None:
    """Refuse an `--out` that cannot be written, before the model is loaded.

    Args:
        out: the file.
        overwrite: whether a file of prompts with responses that is there may be replaced.
        inputs: option names and what they were given.

    Raises:
        SafeprojError: it exists and is not to be replaced, is an input, or is in no directory.
    """
    place = out.resolve()
    if out.suffix != SUFFIX:
        raise SafeprojError(f"--out {out}: expected a name such as safety{SUFFIX} for the file")
    if not place.parent.is_dir():
        raise SafeprojError(f"--out {out}: {place.parent} is no directory; create it")
    for option, given in inputs:
        if place == Path(given).expanduser().resolve():
            raise SafeprojError(f"--out {out}: is {option} {given}; choose another name")
    if os.path.lexists(out):
        if not overwrite:
            raise SafeprojError(f"--out {out}: exists; give --overwrite to replace it")
        if out.is_symlink() or not out.is_file():
            raise SafeprojError(f"--out {out}: is no file; choose a name that does not exist")
        read_rows(out, "--out", responses=True)  # nothing else is replaced
