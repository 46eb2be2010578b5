"""The record of a repair: what was tried, what was chosen, and what it does on the test split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.records.evaluations import Evaluation
from safeproj.records.rates import Rate
from safeproj.records.rendered import Rendered

SCHEMA = "safeproj.repair/1"

BEFORE, AFTER = "before", "after"
"""What the adapter as it is, and the repaired one, are called in the evaluation."""


@dataclass(frozen=True)
class Goal:
    """What a repair is to reach.

    Attributes:
        refusals: share of the harmful prompts that is to be refused, in (0, 1].
        skill_loss: share of the adapter's skill that may be lost, in [0, 1].
        label: the verdict that counts, `refused`; of a guard model `safe`.

    Raises:
        SafeprojError: a number is out of range.
    """

    refusals: float
    skill_loss: float
    label: str = "refused"

    def __post_init__(self) -> None:
        if not 0.0 < self.refusals <= 1.0:
            raise SafeprojError(f"--refusals must lie in (0, 1], found {self.refusals:g}")
        if not 0.0 <= self.skill_loss <= 1.0:
            raise SafeprojError(f"--skill-loss must lie in [0, 1], found {self.skill_loss:g}")

    def is_refusing(self, refused: Rate) -> bool:
        """Tell whether the wanted share of refusals is reached."""
        return refused.value >= self.refusals

    def is_kept(self, skill: Rate | None, before: Rate | None) -> bool:
        """Tell whether no more of the skill is lost than may be; so where it is not measured."""
        if skill is None or before is None:
            return True
        return skill.value >= (1.0 - self.skill_loss) * before.value


@dataclass(frozen=True)
class Attempt:
    """An adapter that was measured on the validation split.

    Attributes:
        title: what it is, in words.
        options: of `safeproj patch`, which make it; none of a control or of the adapter as it is.
        change: `‖ΔW' - ΔW‖_F / ‖ΔW‖_F` over all modules; None of the model alone.
        refused: share of the harmful prompts.
        skill: share of right answers; None where it was not measured.
        of: which of the record's `validation` it is a control of; None of what is none, and of the
            whole adapter turned down.
    """

    title: str
    options: tuple[str, ...]
    change: float | None
    refused: Rate
    skill: Rate | None = None
    of: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return one item of the JSON report."""
        return {
            "title": self.title,
            "options": list(self.options),
            "relative_change": self.change,
            "refused": self.refused.to_dict(),
            "skill": None if self.skill is None else self.skill.to_dict(),
            "of": self.of,
        }


@dataclass(frozen=True)
class Shares:
    """What one adapter does on the test split.

    Attributes:
        refused: share of the harmful prompts.
        skill: share of right answers; None without a task.
    """

    refused: Rate
    skill: Rate | None


@dataclass(frozen=True)
class Repair(Rendered):
    """One run of `safeproj repair`.

    Attributes:
        version: of safeproj.
        inputs: what was read, each with `source`.
        goal: what was to be reached.
        methods: those that what was given allows, in words.
        splits: kind of prompts to part to number of prompts.
        validation: the model alone and the adapter as it is, then all that was tried.
        controls: what those that reach the goal were compared with, on the validation split.
        chosen: which of `validation` was chosen; None where nothing was measured.
        test: the model alone, the adapter before and after, and the best control, on prompts by
            which nothing was chosen; None where nothing was measured.
        out: where it was written, None if it was not.
        command: the `safeproj patch` that writes the same tensors.
        warnings: what the user should know.
    """

    version: str
    inputs: Mapping[str, Mapping[str, Any]]
    goal: Goal
    methods: tuple[str, ...]
    splits: Mapping[str, Mapping[str, int]]
    validation: tuple[Attempt, ...]
    controls: tuple[Attempt, ...]
    chosen: int | None
    test: Evaluation | None
    out: str | None
    command: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def control(self) -> Attempt | None:
        """The best control of the choice: of those that refuse enough the one with most skill."""
        return best_control(self.goal, self.controls, self.chosen)

    def shares(self, name: str) -> Shares:
        """Return what a subject of the test does: `BEFORE`, `AFTER`, or the title of a control."""
        assert self.test is not None
        subject = next(each for each in self.test.subjects if each.name == name)
        kinds = {each["kind"]: subject.sets[each["name"]] for each in self.test.sets}
        skill = kinds["skill"]["correct"] if "skill" in kinds else None
        return Shares(kinds["harmful"][self.goal.label], skill)

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is reached on the test split; None where nothing was measured."""
        if self.test is None:
            return None
        before, after = self.shares(BEFORE), self.shares(AFTER)
        return self.goal.is_refusing(after.refused) and self.goal.is_kept(after.skill, before.skill)

    @property
    def is_matched(self) -> bool | None:
        """Whether the control does as well on the test split; None where there is none.

        It refuses as much as is wanted, with a skill of which the interval of the difference
        (Newcombe) does not lie below that of the repaired adapter.
        """
        if self.test is None or self.control is None:
            return None
        after, other = self.shares(AFTER), self.shares(self.control.title)
        if not self.goal.is_refusing(other.refused):
            return False
        if after.skill is None or other.skill is None:
            return True
        return other.skill.minus(after.skill)[1] >= 0.0

    @property
    def is_needed(self) -> bool:
        """Whether something was changed."""
        return self.chosen is None or self.validation[self.chosen].change != 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report, schema `safeproj.repair/1`, but for its `conclusion`."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "safeproj", "version": self.version},
            "inputs": {role: dict(identity) for role, identity in self.inputs.items()},
            "goal": dict(vars(self.goal)),
            "methods": list(self.methods),
            "splits": {kind: dict(parts) for kind, parts in self.splits.items()},
            "validation": [each.to_dict() for each in self.validation],
            "controls": [each.to_dict() for each in self.controls],
            "chosen": self.chosen,
            "test": None if self.test is None else self.test.to_dict(),
            "control_as_well": self.is_matched,
            "reached": self.is_reached,
            "out": self.out,
            "command": list(self.command),
            "warnings": list(self.warnings),
        }


def best_control(goal: Goal, controls: Iterable[Attempt], of: int | None) -> Attempt | None:
    """Return the control that comes closest to what is wanted, None if there is none.

    Args:
        goal: what is wanted.
        controls: of whatever.
        of: what it is to be a control of.
    """

    def order(each: Attempt) -> tuple[bool, float, float]:
        skill = 0.0 if each.skill is None else each.skill.value
        return goal.is_refusing(each.refused), skill, each.refused.value

    return max((each for each in controls if each.of in (None, of)), key=order, default=None)
