"""One evaluation: the model without an adapter, then with each, all on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeproj import __version__
from safeproj.adapter import open_adapter
from safeproj.adapter.collection import Member
from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generation, Generator, OnBatch
from safeproj.evaluation.judges import Judge
from safeproj.evaluation.measure import (
    outcomes,
    prompt_warnings,
    unfinished,
    unfinished_warnings,
)
from safeproj.evaluation.responses import Key, Responses, file_names
from safeproj.evaluation.sets import PromptSet
from safeproj.evaluation.tasks import Tasks
from safeproj.evaluation.thoughts import Spoken, Thoughts
from safeproj.lm.adapters import Host, UnfitError, adapter_identity, require_peft, unfit
from safeproj.lm.models import load_tokenizer, model_identity
from safeproj.records.evaluations import Evaluation, Subject
from safeproj.records.scores import Failure
from safeproj.records.verdicts import CORRECT, EXACT, Outcomes, differences, marks, rates
from safeproj.storage.source import Folder, open_folder

ALONE = "no adapter"
"""What the model without an adapter is called in reports."""


@dataclass(frozen=True)
class Settings(Generation):
    """How answers are generated, and where they are kept.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        seed: of torch, set before each subject.
        responses: directory for the answers, None to keep none.
        overwrite: forget the answers that are there.
    """

    device: str = "auto"
    seed: int = 0
    responses: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Opened:
    """An adapter whose folder is open.

    Attributes:
        name: what it is called in reports.
        folder: of its files.
    """

    name: str
    folder: Folder

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What a record says of it."""
        return adapter_identity(self.folder)


def evaluate(
    model: str,
    adapters: Sequence[Member | Opened],
    sets: Sequence[PromptSet],
    judge: Judge,
    settings: Settings | None = None,
    *,
    host: Host | None = None,
    alone: bool = True,
    tasks: Tasks | None = None,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Measure a model without and with adapters.

    Args:
        model: SRC of a causal language model with its tokenizer.
        adapters: PEFT adapters of it.
        sets: with names that differ.
        judge: of the answers to harmful prompts.
        settings: how answers are generated, and where they are kept.
        host: the model, if it is loaded already.
        alone: whether the model without an adapter is measured.
        tasks: of lm-eval, measured beside the sets.
        on_batch: told how many answers there are, and how many there will be.

    Raises:
        SafeprojError: an input cannot be used; adapters of other formats are refused before
            anything is run, and so is the run where no adapter fits the model.
    """
    settings = settings or Settings()
    if not adapters and not alone:
        raise SafeprojError("no adapter, and the model itself is left out; give --adapter")
    folder = open_folder(model)
    given = [each if isinstance(each, Opened) else _opened(each) for each in adapters]
    tokenizer = load_tokenizer(folder)
    misfits = unfit(folder, [each.folder for each in given])
    found = [each for position, each in enumerate(given) if position not in misfits]
    if misfits and not found:
        raise misfits[0]
    generator = settings.generator(tokenizer)
    run = _Run(
        identity=model_identity(folder),
        host=host or Host(folder, settings.device, settings.dtype),
        generator=generator,
        sets=tuple(sets),
        inputs=_inputs(generator, sets),
        judge=judge,
        settings=settings,
        tasks=tasks,
        total=sum(len(each.prompts) for each in sets) * (len(found) + alone),
        on_batch=on_batch,
        failures={
            given[position].name: Failure(given[position].folder.source, error.message)
            for position, error in misfits.items()
        },
    )
    subjects = tuple(run.subjects(found, alone))
    return Evaluation(
        __version__,
        {name: version(name) for name in ("torch", "transformers", "peft")},
        run.identity,
        judge.identity(),
        _options(settings),
        tuple(_described(each, run.inputs) for each in sets),
        subjects,
        (*prompt_warnings(generator, sets), *_cut_off(subjects, sets)),
        run.failures,
    )


@dataclass
class _Run:
    """What all subjects share."""

    identity: Mapping[str, Any]
    host: Host
    generator: Generator
    sets: tuple[PromptSet, ...]
    inputs: Mapping[Key, str]
    judge: Judge
    settings: Settings
    tasks: Tasks | None
    total: int
    on_batch: OnBatch | None
    failures: dict[str, Failure] = field(default_factory=dict)
    done: int = 0

    def subjects(self, adapters: Sequence[Opened], alone: bool) -> Iterator[Subject]:
        """Yield each subject, measured; an adapter that does not fit is kept as a failure.

        Raises:
            SafeprojError: none of the adapters fits.
        """
        files = file_names([ALONE, *(each.name for each in adapters)])
        reference = None
        if alone:
            subject, reference = self._measured(None, files[0], None)
            yield subject
        for adapter, file in zip(adapters, files[1:], strict=True):
            try:
                subject = self._measured(adapter, file, reference)[0]
            except UnfitError as error:
                self.failures[adapter.name] = Failure(adapter.folder.source, error.message)
                if len(adapters) == 1:
                    raise
                continue
            yield subject

    def _measured(
        self, adapter: Opened | None, file: str, reference: Mapping[str, Outcomes] | None
    ) -> tuple[Subject, Mapping[str, Outcomes]]:
        torch.manual_seed(self.settings.seed)
        kept = Responses(self._place(file), self._made_of(adapter), self._digests, self.inputs)
        kept.open(self.settings.overwrite)
        with self._model(adapter) as load:
            try:
                self._answer(load, kept)
            finally:
                kept.close()
            reached = {} if self.tasks is None else self.tasks.run(load(), self.generator.tokenizer)
        said = {each.name: self._said(each, kept) for each in self.sets}
        found = self._outcomes(said)
        kept.judged(self.judge.identity(), _said(found))
        changes = None
        if reference is not None:
            changes = {name: differences(found[name], reference[name]) for name in found}
        subject = Subject(
            ALONE if adapter is None else adapter.name,
            None if adapter is None else adapter.identity,
            {name: rates(each) for name, each in found.items()},
            changes,
            reached,
            {name: unfinished(each) for name, each in said.items()},
            {
                name: marks(each, [one.unfinished for one in said[name]])
                for name, each in found.items()
            },
        )
        return subject, found

    @contextmanager
    def _model(self, adapter: Opened | None) -> Iterator[Callable[[], Any]]:
        """Give what returns the model of a subject, which is loaded when it is first asked for."""
        if adapter is None:
            yield lambda: self.host.model
            return
        with self.host.lazily(adapter.folder) as load:
            yield load

    def _answer(self, load: Callable[[], Any], kept: Responses) -> None:
        """Generate the answers that are not there yet, keeping each batch as it comes."""
        for each in self.sets:
            missing = [i for i in range(len(each.prompts)) if (each.name, i) not in kept.answers]
            self._tell(len(each.prompts) - len(missing))
            if not missing:
                continue
            prompts = [each.prompts[i] for i in missing]
            for batch in self.generator.batches(load(), prompts):
                kept.add(each.name, [(missing[i], prompts[i], answer) for i, answer in batch])
                self._tell(len(batch))

    def _tell(self, count: int) -> None:
        self.done += count
        if self.on_batch is not None:
            self.on_batch(self.done, self.total)

    def _said(self, prompts: PromptSet, kept: Responses) -> list[Spoken]:
        """Return the answers to a set without thoughts."""
        return [
            self.generator.spoken(prompt, kept.answers[prompts.name, i])
            for i, prompt in enumerate(prompts.prompts)
        ]

    def _outcomes(self, said: Mapping[str, Sequence[Spoken]]) -> dict[str, Outcomes]:
        return {
            each.name: outcomes(
                each,
                [one.text for one in said[each.name]],
                self.judge,
                self.generator.thoughts,
            )
            for each in self.sets
        }

    def _place(self, file: str) -> Path | None:
        return None if self.settings.responses is None else self.settings.responses / file

    @property
    def _digests(self) -> dict[str, str]:
        return {each.name: each.sha256 for each in self.sets}

    def _made_of(self, adapter: Opened | None) -> dict[str, Any]:
        """Return what the answers depend on; not where files are, nor what only costs time."""
        return {
            "model": _content(self.identity),
            "adapter": None if adapter is None else _content(adapter.identity),
            "options": {
                "chat": self.settings.chat,
                "dtype": self.settings.dtype,
                "max_new_tokens": self.settings.max_new_tokens,
            },
        }


def _inputs(generator: Generator, sets: Sequence[PromptSet]) -> dict[Key, str]:
    """Return the digest of what the model gets, of each prompt.

    Raises:
        SafeprojError: a prompt cannot be used.
    """
    return {
        (each.name, i): generator.rendered(prompt).sha256
        for each in sets
        for i, prompt in enumerate(each.prompts)
    }


def _opened(member: Member) -> Opened:
    folder = open_adapter(member.source)
    require_peft(folder)
    return Opened(member.name, folder)


def _content(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an identity says of the content: the commit, or the digests of the files."""
    if "revision" in identity:
        return {"revision": identity["revision"]}
    return dict(identity["sha256"]["files"])


def _said(found: Mapping[str, Outcomes]) -> dict[Key, dict[str, Any]]:
    """Return what a line of the answers gets: the verdict, or whether it is right."""
    said: dict[Key, dict[str, Any]] = {}
    for name, values in found.items():
        for outcome, each in values.items():
            for index, holds in enumerate(each):
                row = said.setdefault((name, index), {})
                if outcome in (CORRECT, EXACT):
                    row[outcome] = holds
                elif holds:
                    row["verdict"] = outcome
    return said


def _described(prompts: PromptSet, inputs: Mapping[Key, str]) -> dict[str, Any]:
    asked = [inputs[prompts.name, i] for i in range(len(prompts.prompts))]
    return {
        "name": prompts.name,
        "kind": prompts.kind,
        "source": prompts.source,
        "sha256": prompts.sha256,
        "prompts": len(asked),
        "lines": prompts.lines or len(asked),
        "distinct": len(set(asked)),
        "inputs_sha256": sha256("\n".join(asked).encode()).hexdigest(),
    }


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "batch_size": settings.batch_size,
        "chat": settings.chat,
        "decoding": "greedy",
        "device": settings.device,
        "dtype": settings.dtype,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        **settings.options.to_dict(),
        "thought_tags": Thoughts(settings.tags).names,
    }


def _cut_off(subjects: Sequence[Subject], sets: Sequence[PromptSet]) -> tuple[str, ...]:
    return tuple(
        warning
        for each in subjects
        for warning in unfinished_warnings(each.unfinished, sets, each.name)
    )
