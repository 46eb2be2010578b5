"""What a repair shows, in words that all formats share."""

from __future__ import annotations

from safeproj.records.evaluations import shown
from safeproj.records.repairs import AFTER, BEFORE, Attempt, Repair, Shares
from safeproj.text import command_line

NOT_MEASURED = (
    "Behaviour was not measured: give --harmful FILE, prompts that are to be refused, and --task "
    "FILE, prompts of the adapter's skill with right answers; then the methods are tried, and what "
    "they do is measured."
)


def command(repair: Repair) -> str:
    """Return the `safeproj patch` that writes the same tensors."""
    return command_line(repair.command)


def splits(repair: Repair) -> str:
    """Return how the prompts were parted."""
    found = []
    for kind, parts in repair.splits.items():
        fit, validation, test = parts.values()
        found.append(f"{kind}: {fit} to correct with, {validation} to choose on, {test} to report")
    return "; ".join(found)


def tried(repair: Repair, *, others: bool = True) -> list[tuple[str, str, str, str]]:
    """Return a row for each adapter on the validation split: title, change, refused, skill.

    Args:
        repair: the record.
        others: whether with controls of what was not chosen.
    """
    rows = [_row(each, number == repair.chosen) for number, each in enumerate(repair.validation)]
    for each in repair.controls:
        if each.of in (None, repair.chosen):
            rows.append(_row(each, False, "control: "))
        elif others:
            rows.append(_row(each, False, f"control of {repair.validation[each.of].title}: "))
    return rows


def _row(each: Attempt, is_chosen: bool, kind: str = "") -> tuple[str, str, str, str]:
    return (
        f"{kind}{each.title}{' (chosen)' if is_chosen else ''}",
        "" if each.change is None else f"{each.change:.3f}",
        shown(each.refused),
        "" if each.skill is None else shown(each.skill),
    )


def reported(repair: Repair) -> list[tuple[str, str, str]]:
    """Return a row for each adapter on the test split: title, refused, skill."""
    if repair.test is None:
        return []
    titles = {BEFORE: "the adapter before", AFTER: "repaired"}
    rows = []
    for subject in repair.test.subjects:
        found = repair.shares(subject.name)
        is_control = repair.control is not None and subject.name == repair.control.title
        title = titles.get(subject.name, subject.name)
        rows.append((f"best control: {title}" if is_control else title, *_cells(found)))
    return rows


def _cells(found: Shares) -> tuple[str, str]:
    return shown(found.refused), "" if found.skill is None else shown(found.skill)


def conclusion(repair: Repair) -> list[str]:
    """Return what follows from a repair, one sentence each."""
    if repair.test is None:
        return [NOT_MEASURED]
    assert repair.chosen is not None
    goal, chosen = repair.goal, repair.validation[repair.chosen]
    wanted = f"{100 * goal.refusals:g} % {goal.label}"
    before, after = repair.shares(BEFORE), repair.shares(AFTER)
    if after.skill is not None:
        wanted += f" at no more than {100 * goal.skill_loss:g} % of the skill lost"
    if not repair.is_needed and repair.is_reached:
        return [f"The adapter reaches {wanted} as it is: nothing was changed."]
    if not repair.is_needed:
        return [
            f"Not reached: {wanted}. Nothing that was tried does better than the adapter as it is: "
            f"{_shares(repair, before)}.",
            *_needed(repair),
        ]
    said = [
        f"{'Reached' if repair.is_reached else 'Not reached'}: {wanted}, by {chosen.title}: "
        f"{_shares(repair, before)} before, {_shares(repair, after)} after, on prompts by which "
        "nothing was chosen."
    ]
    if repair.is_matched and repair.control is not None:
        said.append(
            f"A control does as well: {repair.control.title} "
            f"({_shares(repair, repair.shares(repair.control.title))}). The correction shows no "
            "more here than that does."
        )
    elif repair.control is not None:
        said.append(
            f"The best control does not do as well: {repair.control.title} "
            f"({_shares(repair, repair.shares(repair.control.title))})."
        )
    if not repair.is_reached:
        said += _needed(repair)
    return said


def _needed(repair: Repair) -> list[str]:
    """Return what it would take to reach the goal."""
    goal = repair.goal
    alone, before, *others = repair.validation
    refusing = [each for each in others if goal.is_refusing(each.refused)]
    found = []
    if refusing and before.skill is not None:
        best = max(refusing, key=lambda each: 0.0 if each.skill is None else each.skill.value)
        if best.skill is not None and before.skill.value > 0.0:
            lost = 1.0 - best.skill.value / before.skill.value
            if lost > goal.skill_loss:
                found.append(
                    f"On the validation split {best.title} refuses enough and loses "
                    f"{100 * lost:.0f} % of the skill: --skill-loss {lost + 0.005:.2f} takes it."
                )
    if not refusing:
        most = max([before, *others], key=lambda each: each.refused.value)
        found.append(
            f"The most on the validation split is {100 * most.refused.value:.0f} % "
            f"({most.title}); the model without an adapter has {100 * alone.refused.value:.0f} %."
        )
    methods = []
    if "base" not in repair.inputs:
        methods.append("--base lets Safe LoRA be tried")
    if "task" not in repair.splits:
        methods.append("--task lets the correction layer by layer be tried")
    counts = [parts["fit"] for parts in repair.splits.values()]
    if min(counts) < 100:
        methods.append(f"more prompts help the correction, which had {min(counts)}")
    if methods:
        found.append("What may help: " + "; ".join(methods) + ".")
    if repair.out is None:
        found.append("Nothing was written; --best-effort writes what came closest.")
    return found


def _shares(repair: Repair, found: Shares) -> str:
    said = f"{repair.goal.label} {shown(found.refused)}"
    return said if found.skill is None else f"{said}, skill {shown(found.skill)}"
