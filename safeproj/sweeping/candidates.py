"""Which interventions on an adapter are tried, and the one reading that all of them need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from safeproj import engine
from safeproj.adapter import AdaptedModule, Adapter
from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Source, Task, Update
from safeproj.errors import SafeprojError
from safeproj.lm.adapters import require_peft
from safeproj.methods.interface import Method
from safeproj.methods.reference import Reference
from safeproj.methods.score import Score, required
from safeproj.plan.match import Plan
from safeproj.plan.select import Selection
from safeproj.plan.updates import update_of
from safeproj.records.scores import Report
from safeproj.run.decide import Decision
from safeproj.run.job import Job, Loaded, Run
from safeproj.run.options import Options
from safeproj.storage.arrays import Array, single
from safeproj.sweeping import controls
from safeproj.sweeping.apart import apart
from safeproj.sweeping.rotation import Rotation
from safeproj.text import natural_order

By = Literal["layers", "threshold"]
"""What is varied: the number of projected modules, or tau."""

Replaced = Mapping[str, Array]
"""The tensors that take the place of the adapter's, by key."""


@dataclass(frozen=True)
class Place:
    """One intervention, where it is on the axis, and its controls.

    Attributes:
        value: on the axis; None for a threshold below every cosine.
        threshold: the highest cosine of a changed module, None where there is none.
        modules: the names of the changed modules, in the order in which they are chosen.
        method: makes the tensors of the intervention itself.
        run: does the same as `patch` does it, with what is to be recorded.
        controls: make those of what it is compared with, by name; a uniform shrink is added to
            them when they are measured.
        factor: of that; None for one that leaves the `‖ΔW‖` of the intervention.
    """

    value: float | None
    threshold: float | None
    modules: tuple[str, ...]
    method: Callable[[], Replaced]
    run: Callable[[], Run]
    controls: Mapping[str, Callable[[], Replaced]]
    factor: float | None = None


class Candidates(Protocol):
    """The interventions of one kind on one adapter: what `sweep` measures.

    One implementation per kind of axis.
    """

    @property
    def axis(self) -> str:
        """What is varied, `layers` for one."""

    @property
    def job(self) -> Job:
        """What read and scored the adapter, and writes it."""

    @property
    def adapter(self) -> Adapter:
        """The adapter."""

    @property
    def modules(self) -> tuple[AdaptedModule, ...]:
        """All of its updates, those that are left out too."""

    @property
    def report(self) -> Report:
        """The record of the strongest intervention: for the inputs, the method and the warnings."""

    def places(self, most: int) -> list[Place]:
        """Return at most so many interventions, from none to all of it.

        Raises:
            SafeprojError: there is nothing to vary.
        """


def candidates(
    method: Method,
    adapter: str,
    options: Options | None = None,
    *,
    by: By = "layers",
    seed: int = 0,
    hashes: Collection[Hash] = (),
) -> Projections:
    """Score an adapter, and with a random projector of each weight, in one reading.

    Args:
        method: what is done, prepared.
        adapter: SRC of the adapter.
        options: how; of the selection only what it leaves out counts.
        by: what is varied.
        seed: of the random projectors.
        hashes: by which what is read is hashed, for what is written to record.

    Raises:
        SafeprojError: an input cannot be used.
    """
    options = options or Options()
    profile = options.profile
    job = Job(method, options, hashes=hashes)
    if method.formulas is None:
        raise SafeprojError(
            f"a sweep over modules needs a method that projects, found {method.name}"
        )
    both = apart(method.formulas)
    loaded = runnable(job, adapter)
    reading = _Reading(loaded.adapter, loaded.plan, job.reference, seed)
    with profile.phase("score"):
        scores, turned = reading.scores(method, both, options, hashes)
    return Projections(job, loaded, options.selection, by, scores, turned)


def runnable(job: Job, adapter: str) -> Loaded:
    """Return an adapter that PEFT can put on the model, read and matched.

    Raises:
        SafeprojError: it is none, or cannot be used.
    """
    read = job.read(adapter)
    require_peft(read.folder)
    return job.runnable(read)


@dataclass(frozen=True)
class _Reading:
    """The one pass over the weights: every update beside the same update turned by `Qᵀ`."""

    adapter: Adapter
    plan: Plan
    reference: Reference
    seed: int

    def scores(
        self, method: Method, formulas: Any, options: Options, hashes: Collection[Hash]
    ) -> tuple[dict[str, Score], dict[str, Score]]:
        """Return the scores by module, and those with `Q C Qᵀ` in the place of `C`."""
        groups: dict[Hashable, dict[str, Update]] = {}
        origins: dict[Hashable, Source] = {}
        for item in self.plan.modules:
            key = self.reference.group(item)
            if key not in groups:
                groups[key], origins[key] = {}, self.reference.origin(item)
            groups[key][item.module.name] = update_of(self.adapter, item)
        tasks = [
            Task(next(iter(updates)), origins[key], tuple(self._beside(updates)))
            for key, updates in groups.items()
        ]
        observer = options.observer
        if observer is not None:
            observer.start(len(tasks), sum(task.origin.nbytes for task in tasks))
        found = engine.run(
            tasks,
            method.scorer(formulas=formulas, hashes=hashes),
            device=options.device,
            wide=method.is_wide,
            workers=options.workers,
            on_progress=None if observer is None else observer.progress,
            usage=options.profile.usage,
        )
        scores, turned = {}, {}
        for updates, results in zip(groups.values(), found, strict=True):
            count = len(updates)
            own, others = required(results[:count]), required(results[count:])
            for name, score, other in zip(updates, own, others, strict=True):
                scores[name], turned[name] = score, self._turned(name, score, other)
        return scores, turned

    def _beside(self, updates: Mapping[str, Update]) -> list[Update]:
        """Return the updates, and behind all of them each with `Qᵀ B` and `Qᵀ b`."""
        turned = []
        for name, update in updates.items():
            Q = Rotation(len(update.B), self.seed, name)
            bias = None if update.bias is None else single(Q.turn_back(update.bias))
            turned.append(replace(update, B=single(Q.turn_back(update.B)), bias=bias))
        return [*updates.values(), *turned]

    def _turned(self, name: str, score: Score, other: Score) -> Score:
        """Return the score with `Q C Qᵀ B` in the place of `C B`, from `C Qᵀ B`."""
        if other.factor is None:
            return score
        Q = Rotation(len(other.factor), self.seed, name)
        bias = None if other.bias is None else single(Q.turn(other.bias))
        return replace(score, factor=single(Q.turn(other.factor)), bias=bias)


class Projections:
    """The interventions of methods that project: `ΔW` becomes `C ΔW` in the modules chosen.

    A variant is made by `decide`, as `patch` does it, so that it has the tensors that `patch` would
    write; the controls go the same way with another factor in the place of `C B`.
    """

    def __init__(
        self,
        job: Job,
        loaded: Loaded,
        selection: Selection,
        by: By,
        scores: dict[str, Score],
        turned: dict[str, Score],
    ) -> None:
        self.job, self.adapter = job, loaded.adapter
        self.axis: str = by
        self._loaded, self._given = loaded, selection
        self._scores, self._turned = scores, turned
        plan = loaded.plan
        self.modules = (*(item.module for item in plan.modules), *plan.excluded)
        self.report = self._decided(scores, self._selection(all_modules=True)).report

    def places(self, most: int) -> list[Place]:
        """Return at most so many interventions, from no module to all that have a cosine.

        They are spread evenly over the number of modules, or over the distinct cosines.

        Raises:
            SafeprojError: no module has a cosine.
        """
        ranked = self._ranked()
        if not ranked:
            raise SafeprojError(
                f"{self.adapter.source}: no module has a cosine, so there is nothing to sweep"
            )
        counts = [0, *range(1, len(ranked) + 1)]
        if self.axis == "threshold":  # behind each last one of equal cosines
            cosines = [self._cosine(name) for name in ranked]
            ends = zip(cosines, [*cosines[1:], None], strict=True)
            counts = [0, *(i for i, (one, then) in enumerate(ends, start=1) if one != then)]
        return [self._place(ranked[:count]) for count in spread(counts, most)]

    def _place(self, names: tuple[str, ...]) -> Place:
        tau = self._cosine(names[-1]) if names else None
        by_threshold = self.axis == "threshold"
        selection = (
            self._selection(threshold=tau)
            if by_threshold and tau is not None
            else self._selection(layers=len(names))
        )

        def made(scores: dict[str, Score]) -> Replaced:
            return self._decided(scores, selection).replaced

        return Place(
            tau if by_threshold else len(names),
            tau,
            names,
            partial(made, self._scores),
            partial(self.job.decided, self._loaded, self._scores, selection),
            {
                controls.SHRINK: lambda: made(self._each(controls.shrunk)),
                controls.RANDOM: partial(made, self._turned),
                controls.COMPLEMENT: lambda: made(self._each(controls.complement)),
            },
        )

    def _each(self, change: Callable[[Update, Score], Score]) -> dict[str, Score]:
        """Return the scores with what a control puts in the place of `C B`."""
        return {
            item.module.name: change(update_of(self.adapter, item), self._scores[item.module.name])
            for item in self._loaded.plan.modules
        }

    def _ranked(self) -> tuple[str, ...]:
        """Return the modules that have a cosine in the order in which `--layers` takes them."""
        cosines = {name: score.cosine for name, score in self._scores.items()}
        scored = {name: cosine for name, cosine in cosines.items() if cosine is not None}
        return tuple(sorted(scored, key=lambda name: (scored[name], natural_order(name))))

    def _cosine(self, name: str) -> float:
        cosine = self._scores[name].cosine
        assert cosine is not None
        return cosine

    def _selection(
        self,
        *,
        layers: int | None = None,
        threshold: float | None = None,
        all_modules: bool = False,
    ) -> Selection:
        return replace(self._given, layers=layers, threshold=threshold, all=all_modules)

    def _decided(self, scores: dict[str, Score], selection: Selection) -> Decision:
        return self.job.decided(self._loaded, scores, selection, compare=False).decision


def spread(values: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the values, evenly spread, the first and the last among them.

    >>> spread(range(15), 4)
    [0, 5, 9, 14]
    """
    last = len(values) - 1
    count = min(most, len(values))
    if count < 2:
        return list(values[:count])
    return [values[round(i * last / (count - 1))] for i in range(count)]
