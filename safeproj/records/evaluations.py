"""The record of one evaluation: what a model does without and with adapters, set by set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.records.rates import Difference, Rate
from safeproj.records.rendered import Rendered
from safeproj.records.scores import Failure
from safeproj.records.verdicts import Marks

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""`--dtype` of a model that is run: `auto` is what it is stored in, on the CPU float32 for half
precision."""

SCHEMA = "safeproj.eval/1"

WORDS = {"exact": "complied exactly"}
"""What tables call an outcome, where not by its name."""


@dataclass(frozen=True)
class Subject:
    """What was measured: the model without an adapter, or with one.

    Attributes:
        name: `no adapter`, or the adapter's.
        adapter: its identity, None for the model alone.
        sets: set to outcome to share of the answers.
        differences: set to outcome to how much that is above the model without an adapter, over the
            same prompts; None where there is nothing to compare to.
        tasks: task of lm-eval to metric to `value` and `stderr`.
        unfinished: set to how many answers were cut off inside thoughts.
        verdicts: set to a letter for each prompt, from which all shares follow.
    """

    name: str
    adapter: Mapping[str, Any] | None
    sets: Mapping[str, Mapping[str, Rate]]
    differences: Mapping[str, Mapping[str, Difference]] | None = None
    tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    unfinished: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, Marks] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return one item of `subjects` in the JSON report."""
        differences = None
        if self.differences is not None:
            differences = {
                name: {outcome: each.to_dict() for outcome, each in found.items()}
                for name, found in self.differences.items()
            }
        return {
            "name": self.name,
            "adapter": None if self.adapter is None else dict(self.adapter),
            "sets": {
                name: {outcome: rate.to_dict() for outcome, rate in found.items()}
                for name, found in self.sets.items()
            },
            "differences": differences,
            "tasks": {
                name: {metric: dict(value) for metric, value in found.items()}
                for name, found in self.tasks.items()
            },
            "unfinished": dict(self.unfinished),
            "verdicts": {name: dict(letters) for name, letters in self.verdicts.items()},
        }


@dataclass(frozen=True)
class Evaluation(Rendered):
    """One run of `safeproj eval`.

    Attributes:
        version: of safeproj.
        versions: of the libraries that ran the model.
        model: its identity.
        judge: its identity.
        options: how answers were generated.
        sets: name, kind, source and digest of each file, how many prompts it has (`lines`) and how
            many were used, as how many different inputs, and the digest of those.
        subjects: the model without an adapter, unless that was left out, then the adapters.
        warnings: what the user should know.
        failures: adapters that do not fit the model, by name.
    """

    version: str
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    judge: Mapping[str, Any]
    options: Mapping[str, Any]
    sets: tuple[Mapping[str, Any], ...]
    subjects: tuple[Subject, ...]
    warnings: tuple[str, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)

    def outcomes(self, name: str) -> tuple[str, ...]:
        """Return the outcomes of a set, in the order of the tables."""
        return tuple(self.subjects[0].sets[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "safeproj", "version": self.version},
            "versions": dict(self.versions),
            "model": dict(self.model),
            "judge": dict(self.judge),
            "options": dict(self.options),
            "sets": [dict(each) for each in self.sets],
            "subjects": [each.to_dict() for each in self.subjects],
            "warnings": list(self.warnings),
            "failures": {name: asdict(failure) for name, failure in self.failures.items()},
        }


def embedded(evaluation: Evaluation, name: str, before: str | None = None) -> dict[str, Any]:
    """Return what safeproj.json says under `behaviour`: the report, of one adapter alone.

    The model without an adapter stays in it, for comparison.

    Args:
        evaluation: the run, in which the adapter was measured as it is published.
        name: the adapter's among its subjects.
        before: that of the adapter before it was repaired, if it was measured too.

    Raises:
        SafeprojError: it was not measured.
    """
    kept = [each for each in evaluation.subjects if each.adapter is None or each.name == before]
    own = [each for each in evaluation.subjects if each.adapter is not None and each.name == name]
    if not own:
        raise SafeprojError(f"{name}: is not among the adapters that were measured")
    subjects = (*(each for each in kept if each is not own[0]), own[0])
    return replace(evaluation, subjects=subjects, failures={}).to_dict()


def percent(value: float, *, sign: bool = False) -> str:
    """Return a share in per cent.

    >>> percent(1.0), percent(-0.0004), percent(0.25, sign=True)
    ('100', '0', '+25.0')
    """
    rounded = round(100 * value, 1) + 0.0  # no -0.0
    digits = 0 if rounded in (-100.0, 0.0, 100.0) else 1
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}"


def shown(rate: Rate) -> str:
    """Return a share and its interval in per cent, as tables show them."""
    low, high = rate.interval
    return f"{percent(rate.value)} [{percent(low)}, {percent(high)}]"


def shown_difference(difference: Difference) -> str:
    """Return a difference and its interval in points, as tables show them."""
    low, high = (percent(each, sign=True) for each in difference.interval)
    return f"{percent(difference.value, sign=True)} [{low}, {high}]"


def rows(evaluation: Evaluation, name: str) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of one set: subjects, and below an adapter its change."""
    found = []
    for subject in evaluation.subjects:
        rates = subject.sets[name]
        found.append((subject.name, [shown(rates[each]) for each in rates]))
        if subject.differences is not None:
            changes = subject.differences[name]
            found.append(("", [shown_difference(changes[each]) for each in rates]))
    return found


def title_of(found: Mapping[str, Any]) -> str:
    """Return what the table of one set is called."""
    count = found["prompts"]
    return f"{found['name']} ({found['kind']}, {count} prompt{'' if count == 1 else 's'})"


def task_rows(evaluation: Evaluation) -> list[tuple[str, str, list[str]]]:
    """Return a row per task and metric: the value of each subject."""
    first = evaluation.subjects[0].tasks
    return [
        (task, metric, [_value(subject.tasks[task].get(metric)) for subject in evaluation.subjects])
        for task, metrics in first.items()
        for metric in metrics
    ]


def _value(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return "n/a"
    error = found.get("stderr")
    return f"{found['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


LEGEND = (
    "Shares of the answers in per cent with 95 % intervals (Wilson); below each adapter its change "
    "from the model without one, in points, over the same prompts (Newcombe, paired)."
)


def judge_words(judge: Mapping[str, Any]) -> str:
    """Return the judge in words."""
    kind = judge["kind"]
    if kind in ("keywords", "prefix"):
        count = len(judge["phrases"]) + len(judge.get("opening", ()))
        return f"{kind}, {count} phrases"
    named = {"command": "command", "url": "model", "guard": "guard"}[kind]
    value = judge[named]
    return f"{kind}: {value if isinstance(value, str) else _source(value)}"


def _source(value: Any) -> str:
    return str(value["source"]) if isinstance(value, Mapping) else " ".join(map(str, value))
