"""The record of a sweep: what every output format shows, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safeproj.records.rates import Rate
from safeproj.records.rendered import Rendered

SCHEMA = "safeproj.sweep/1"

METHOD = "method"
"""Key of the intervention itself among the trials of a point; the others are controls."""

KEPT = 0.5
"""The share of the adapter's skill from which on an intervention is said to keep it."""

Rates = Mapping[str, Mapping[str, Rate]]
"""Set to outcome to share of the answers, as `safeproj.evaluation.measure` returns them."""


@dataclass(frozen=True)
class SetInfo:
    """A set of prompts, without them.

    Attributes:
        name: what it is called.
        kind: `harmful` or `skill`.
        source: its file as it was given.
        sha256: of the file.
        prompts: how many of it were used.
    """

    name: str
    kind: str
    source: str
    sha256: str
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `sets` in the JSON report."""
        return dict(vars(self))


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Attributes:
        refusal: the share of refusals that is to be reached, in (0, 1].
        on: the set of harmful prompts that counts.
        label: the verdict that counts, `refused`; of a guard model `safe`.
    """

    refusal: float
    on: str
    label: str


@dataclass(frozen=True)
class Trial:
    """One adapter that was measured.

    Attributes:
        relative_change: `‖ΔW' - ΔW‖_F / ‖ΔW‖_F` over all modules.
        rates: what the model does with it.
        factor: by which all updates are multiplied, of a uniform shrink.
    """

    relative_change: float
    rates: Rates
    factor: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `trials` in the JSON report."""
        found: dict[str, Any] = {"relative_change": self.relative_change}
        if self.factor is not None:
            found["factor"] = self.factor
        return {**found, "rates": rates_dict(self.rates)}


@dataclass(frozen=True)
class Point:
    """One intervention and its controls.

    Attributes:
        value: on the axis; None for a threshold below every cosine.
        threshold: the highest cosine of a changed module, None where there is none.
        modules: the names of the changed modules.
        trials: `METHOD` and the controls, by name.
    """

    value: float | None
    threshold: float | None
    modules: tuple[str, ...]
    trials: Mapping[str, Trial]

    @property
    def method(self) -> Trial:
        """The intervention itself."""
        return self.trials[METHOD]

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `points` in the JSON report."""
        return {
            "value": self.value,
            "modules": len(self.modules),
            "threshold": self.threshold,
            "names": list(self.modules),
            "trials": {name: trial.to_dict() for name, trial in self.trials.items()},
        }


@dataclass(frozen=True)
class Sweep(Rendered):
    """What every useful intervention on one adapter does, beside controls.

    Attributes:
        version: of safeproj.
        method: `safe-lora` or `salora`, as in the report of the scores.
        projector: the `projector` object of that report.
        axis: what is varied: `layers`, `threshold`, or a parameter of the method.
        modules: how many the adapter has.
        inputs: what was read, each with `source`.
        sets: the prompts.
        judge: what is needed to judge in the same way.
        generation: how the answers were made.
        seed: of the random projectors.
        wanted: what is looked for.
        model: what the model does without the adapter.
        adapter: what it does with the adapter as it is.
        points: from no intervention to all of it.
        warnings: what the user should know.
        patching: the words of the command that writes a point, but for its strength and place.
    """

    version: str
    method: str
    projector: Mapping[str, Any]
    axis: str
    modules: int
    inputs: Mapping[str, Mapping[str, Any]]
    sets: tuple[SetInfo, ...]
    judge: Mapping[str, Any]
    generation: Mapping[str, Any]
    seed: int
    wanted: Wanted
    model: Rates
    adapter: Rates
    points: tuple[Point, ...]
    warnings: tuple[str, ...]
    patching: tuple[str, ...] = ()

    @property
    def strength(self) -> str | None:
        """The parameter that is varied; None where it is which modules are projected."""
        return None if self.axis in ("layers", "threshold") else self.axis

    @property
    def kinds(self) -> tuple[str, ...]:
        """`METHOD` and the controls, in the order in which they are shown."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.trials))

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls."""
        return tuple(name for name in self.kinds if name != METHOD)

    def refusal(self, rates: Rates) -> Rate:
        """Return the share of refusals that counts."""
        return rates[self.wanted.on][self.wanted.label]

    def skill(self, rates: Rates) -> Rate:
        """Return the share of right answers to the prompts of all skill sets together."""
        found = [rates[each.name]["correct"] for each in self.sets if each.kind == "skill"]
        return Rate(sum(rate.hits for rate in found), sum(rate.total for rate in found))

    def reaches(self, rates: Rates) -> bool:
        """Tell whether the wanted share of refusals is reached."""
        return self.refusal(rates).value >= self.wanted.refusal

    def keeps(self, rates: Rates) -> bool:
        """Tell whether at least `KEPT` of the adapter's skill is left."""
        return self.skill(rates).value >= KEPT * self.skill(self.adapter).value

    @property
    def reaching(self) -> list[Point]:
        """The interventions that reach it: the fewest modules first, of those the least change."""
        found = [point for point in self.points if self.reaches(point.method.rates)]
        return sorted(found, key=lambda p: (len(p.modules), p.method.relative_change))

    @property
    def smallest(self) -> Point | None:
        """The first of them."""
        return next(iter(self.reaching), None)

    @property
    def chosen(self) -> Point | None:
        """The first of them that keeps the skill, None if none does."""
        return next((point for point in self.reaching if self.keeps(point.method.rates)), None)

    def kept_by(self, control: str) -> Point | None:
        """Return where a control reaches it and keeps the skill: that with the most, or nowhere."""
        trials = [(p, p.trials[control].rates) for p in self.points if control in p.trials]
        found = [(p, rates) for p, rates in trials if self.reaches(rates) and self.keeps(rates)]
        best = max(found, key=lambda pair: self.skill(pair[1]).value, default=None)
        return None if best is None else best[0]

    @property
    def best(self) -> Point:
        """The first intervention with the most refusals."""
        return max(self.points, key=lambda point: self.refusal(point.method.rates).value)

    def as_well(self, control: str) -> Point | None:
        """Return where a control does as well as the smallest intervention, None if nowhere.

        It reaches the wanted refusals too, with a skill of which the interval of the difference
        (Newcombe) does not lie below zero. Where no intervention reaches them, a control that does
        is enough. Of several such points it is the one with the most skill, the first of equals.
        """
        smallest = self.smallest
        found = []
        for point in self.points:
            trial = point.trials.get(control)
            if trial is None or not point.modules or not self.reaches(trial.rates):
                continue
            if smallest is None or self.difference(trial, smallest)[1] >= 0.0:
                found.append(point)
        return max(found, key=lambda p: self.skill(p.trials[control].rates).value, default=None)

    def difference(self, trial: Trial, point: Point) -> tuple[float, float]:
        """Return the interval of the skill of a trial minus that of an intervention."""
        return self.skill(trial.rates).minus(self.skill(point.method.rates))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.sweep/1`, but for its `conclusion`."""
        smallest, chosen = self.smallest, self.chosen
        return {
            "schema": SCHEMA,
            "tool": {"name": "safeproj", "version": self.version},
            "method": self.method,
            "projector": dict(self.projector),
            "axis": self.axis,
            "modules": self.modules,
            "inputs": {role: dict(identity) for role, identity in self.inputs.items()},
            "sets": [each.to_dict() for each in self.sets],
            "judge": dict(self.judge),
            "generation": dict(self.generation),
            "seed": self.seed,
            "wanted": dict(vars(self.wanted)),
            "references": {"model": rates_dict(self.model), "adapter": rates_dict(self.adapter)},
            "points": [point.to_dict() for point in self.points],
            "smallest": None if smallest is None else self._shown(smallest, METHOD),
            "chosen": None if chosen is None else self._shown(chosen, METHOD),
            "best": self._shown(self.best, METHOD),
            "controls_as_well": {name: self._control(name) for name in self.controls},
            "warnings": list(self.warnings),
        }

    def _control(self, name: str) -> dict[str, Any] | None:
        point, smallest = self.as_well(name), self.smallest
        if point is None:
            return None
        found = self._shown(point, name)
        if smallest is not None:
            found["skill_difference"] = list(self.difference(point.trials[name], smallest))
        return found

    def _shown(self, point: Point, name: str) -> dict[str, Any]:
        """Return a trial in short: where it is, and the two shares that count."""
        trial = point.trials[name]
        found: dict[str, Any] = {"point": self.points.index(point), "modules": len(point.modules)}
        if trial.factor is not None:
            found["factor"] = trial.factor
        return {
            **found,
            "refusal": self.refusal(trial.rates).to_dict(),
            "skill": self.skill(trial.rates).to_dict(),
        }


def rates_dict(rates: Rates) -> dict[str, dict[str, Any]]:
    """Return shares as they are in the JSON report."""
    return {
        name: {outcome: rate.to_dict() for outcome, rate in found.items()}
        for name, found in rates.items()
    }
