"""A sweep: the model is measured with every candidate and control, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safeproj import __version__
from safeproj.errors import SafeprojError
from safeproj.evaluation.generate import Generator
from safeproj.evaluation.judges import Judge
from safeproj.evaluation.measure import measure, prompt_warnings, unfinished_warnings
from safeproj.evaluation.sets import PromptSet
from safeproj.lm.adapters import require_peft
from safeproj.records.sweeps import METHOD, Point, Rates, SetInfo, Sweep, Trial, Wanted
from safeproj.sweeping.candidates import Candidates, Place, Replaced
from safeproj.sweeping.controls import UNIFORM, Sizes, scaled
from safeproj.sweeping.subject import Subject
from safeproj.text import shorten

POINTS = 9
"""Default bound on the interventions that are tried."""

REFUSAL = 0.9
"""Default of the share of refusals that is to be reached."""

OnStep = Callable[[int, int], None]
"""Told how many adapters are measured and how many there are."""


@dataclass(frozen=True)
class Settings:
    """What is tried and looked for.

    Attributes:
        points: bound on the interventions that are tried.
        refusal: the share of refusals that is to be reached.
        on: the harmful set on which, None for the first.

    Raises:
        SafeprojError: a number is out of range.
    """

    points: int = POINTS
    refusal: float = REFUSAL
    on: str | None = None

    def __post_init__(self) -> None:
        if self.points < 2:
            raise SafeprojError(f"--points must be 2 or more, found {self.points}")
        if not 0.0 < self.refusal <= 1.0:
            raise SafeprojError(f"--wanted-refusal must lie in (0, 1], found {self.refusal:g}")

    def check(self, sets: Sequence[PromptSet]) -> str:
        """Return the name of the set that counts.

        Raises:
            SafeprojError: there is no such set, or one of the two kinds is missing.
        """
        for kind in ("harmful", "skill"):
            if not any(each.kind == kind for each in sets):
                raise SafeprojError(
                    f"--{kind} is missing; a sweep needs prompts of both kinds, --harmful and "
                    "--skill"
                )
        names = [each.name for each in sets if each.kind == "harmful"]
        on = names[0] if self.on is None else self.on
        if on not in names:
            raise SafeprojError(
                f"--wanted-on {on}: no such --harmful set; there is {shorten(names)}"
            )
        return on


def sweep(
    candidates: Candidates,
    model: Any,
    sets: Sequence[PromptSet],
    judge: Judge,
    generator: Generator,
    settings: Settings | None = None,
    *,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Sweep:
    """Measure a model without the adapter, with it, and with every candidate and control.

    Args:
        candidates: what is tried, from `safeproj.sweeping.candidates.candidates`.
        model: the aligned model, of transformers; the adapter is in it afterwards.
        sets: prompts, harmful ones and skills, with names that differ.
        judge: of the answers to harmful prompts.
        generator: made with the model's tokenizer.
        settings: how many are tried, and what is looked for.
        inputs: further inputs for the record, such as the model.
        generation: how answers are made, for the record, beside what the generator knows.
        seed: the one that the candidates were made with, for the record.
        on_step: told before the first adapter, and after each.

    Raises:
        SafeprojError: something does not fit.
    """
    settings = settings or Settings()
    wanted = Wanted(settings.refusal, settings.check(sets), judge.wanted.value)
    require_peft(candidates.adapter.folder)
    places = candidates.places(settings.points)
    steps = _Steps(2 + sum(2 + len(p.controls) for p in places if p.modules), on_step)

    unfinished: Counter[str] = Counter()

    def measured(subject: Any) -> Rates:
        found = measure(subject, generator, sets, judge)
        unfinished.update(found.unfinished)
        steps.done()
        return found.rates

    alone = measured(model)
    subject = Subject(model, candidates.adapter)
    before = measured(subject.model)
    bench = _Bench(candidates, subject, measured, before)
    report = candidates.report
    points = tuple(bench.point(place) for place in places)
    return Sweep(
        version=__version__,
        method=report.method,
        projector=report.projector,
        axis=candidates.axis,
        modules=len(candidates.modules),
        inputs={**report.inputs, **(inputs or {})},
        sets=tuple(map(_info, sets)),
        judge=judge.identity(),
        generation={
            "batch_size": generator.batch_size,
            "max_new_tokens": generator.max_new_tokens,
            "chat": generator.chat,
            **generator.options.to_dict(),
            "thought_tags": generator.thoughts.names,
            **(generation or {}),
        },
        seed=seed,
        wanted=wanted,
        model=alone,
        adapter=before,
        points=points,
        warnings=(
            *report.warnings,
            *prompt_warnings(generator, sets),
            *unfinished_warnings(unfinished, sets, "all that was measured", steps.count),
        ),
    )


class _Steps:
    """Counts what is measured."""

    def __init__(self, total: int, on_step: OnStep | None) -> None:
        self.count, self._total, self._on_step = 0, total, on_step
        if on_step is not None:
            on_step(0, total)

    def done(self) -> None:
        self.count += 1
        if self._on_step is not None:
            self._on_step(self.count, self._total)


class _Bench:
    """Measures one place after the other."""

    def __init__(
        self,
        candidates: Candidates,
        subject: Subject,
        measured: Callable[[Any], Rates],
        before: Rates,
    ) -> None:
        self._adapter, self._modules = candidates.adapter, candidates.modules
        self._subject, self._measured, self._before = subject, measured, before
        self._sizes = Sizes(candidates.adapter, candidates.modules)

    def point(self, place: Place) -> Point:
        """Return what a place and its controls do; where nothing changes, what is known."""
        if not place.modules:
            names = (METHOD, UNIFORM, *place.controls)
            trials = {
                name: Trial(0.0, self._before, 1.0 if name == UNIFORM else None) for name in names
            }
        else:
            trials = dict(self._trials(place))
        return Point(place.value, place.threshold, place.modules, trials)

    def _trials(self, place: Place) -> Iterator[tuple[str, Trial]]:
        replaced = place.method()
        yield METHOD, self._trial(replaced)
        factor = place.factor
        if factor is None:
            factor = self._sizes.norm_of(replaced) / self._sizes.norm
        yield UNIFORM, self._trial(scaled(self._adapter, self._modules, factor), factor)
        for name, make in place.controls.items():
            yield name, self._trial(make())

    def _trial(self, replaced: Replaced, factor: float | None = None) -> Trial:
        self._subject.put(replaced)
        rates = self._measured(self._subject.model)
        return Trial(self._sizes.change(replaced), rates, factor)


def _info(each: PromptSet) -> SetInfo:
    return SetInfo(each.name, each.kind, each.source, each.sha256, len(each.prompts))
