"""What a sweep shows, in words that all formats share."""

from __future__ import annotations

from collections.abc import Mapping

from safeproj.methods.registry import METHODS, words_of
from safeproj.records.rates import Rate
from safeproj.records.sweeps import METHOD, Point, Rates, Sweep
from safeproj.text import command_line

_HALF = "at least half of the adapter's skill"
"""`safeproj.records.sweeps.KEPT` in words."""


def heading(sweep: Sweep, kind: str) -> str:
    """Return what a method or control is called at the head of a column."""
    if kind == METHOD:
        return words_of(sweep.method).title
    return _controls_of(sweep).get(kind, (kind, ""))[0]


def meanings(sweep: Sweep) -> list[tuple[str, str]]:
    """Return what the controls are called, and what they are."""
    return [_controls_of(sweep)[kind] for kind in sweep.controls if kind in _controls_of(sweep)]


def _controls_of(sweep: Sweep) -> Mapping[str, tuple[str, str]]:
    return words_of(sweep.method).controls


def conclusion(sweep: Sweep) -> list[str]:
    """Return what follows from a sweep, one sentence each."""
    goal = f"{100 * sweep.wanted.refusal:g} % refusals on {sweep.wanted.on}"
    smallest, chosen = sweep.smallest, sweep.chosen
    if smallest is not None and not smallest.modules:
        return [
            f"The adapter reaches {goal} as it is ({_shares(sweep, smallest.method.rates)}): no "
            "intervention is needed."
        ]
    if smallest is None:
        said = [
            f"No intervention tried reaches {goal}; the most is at {_point(sweep, sweep.best)}."
        ]
    elif chosen is None:
        left = max(sweep.reaching, key=lambda point: sweep.skill(point.method.rates).value)
        said = [
            f"No intervention tried that reaches {goal} keeps {_HALF}; the most is left at "
            f"{_point(sweep, left)}."
        ]
        if left is not smallest:
            said.append(f"The smallest that reaches them: {_point(sweep, smallest)}.")
    elif chosen is smallest:
        said = [f"Smallest intervention tried that reaches {goal}: {_point(sweep, smallest)}."]
    else:
        said = [
            f"Smallest intervention tried that reaches {goal} and keeps {_HALF}: "
            f"{_point(sweep, chosen)}.",
            f"A smaller one reaches them with less of it: {_point(sweep, smallest)}.",
        ]
    return [
        *said,
        f"The adapter as it is: {_shares(sweep, sweep.adapter)}.",
        *(_keepers(sweep) if chosen is None and smallest is not None else ()),
        _controls(sweep, smallest),
    ]


def commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Return what to run next: what each command does, and the command itself."""
    found = []
    point = sweep.chosen or sweep.smallest
    if point is not None and point.modules and sweep.patching:
        words = [*sweep.patching, *_strength(sweep, point), "--out", "DIR"]
        found.append(
            (f"To write the adapter with {intervention(sweep, point)}", command_line(words))
        )
    sources = {role: str(each["source"]) for role, each in sweep.inputs.items()}
    forms = [method.unswept for method in METHODS if method.unswept is not None]
    for what, options in forms if sweep.chosen is None else ():
        given = (sources.get("model", each) if each == "MODEL" else each for each in options)
        words = ["safeproj", "patch", *given, "--adapter", sources["adapter"], "--out", "DIR"]
        found.append((f"Not tried: {what}", command_line(words)))
    return found


def _strength(sweep: Sweep, point: Point) -> tuple[str, str]:
    """Return the option that makes `patch` do what was done at a point."""
    if sweep.axis == "layers":
        return "--layers", str(len(point.modules))
    return f"--{sweep.axis}", repr(point.value)


def _keepers(sweep: Sweep) -> list[str]:
    """Return which controls reach the refusals and keep the skill."""
    found = [(name, sweep.kept_by(name)) for name in sweep.controls]
    listed = [
        f"{_control(sweep, name, point)} ({_shares(sweep, point.trials[name].rates)})"
        for name, point in found
        if point is not None
    ]
    if not listed:
        return [f"Nothing that was measured reaches them and keeps {_HALF}."]
    return [f"Controls that reach them and keep {_HALF}: {'; '.join(listed)}."]


def _controls(sweep: Sweep, smallest: Point | None) -> str:
    found = [(name, sweep.as_well(name)) for name in sweep.controls]
    listed = [
        f"{_control(sweep, name, point)} ({_shares(sweep, point.trials[name].rates)})"
        for name, point in found
        if point is not None
    ]
    if smallest is None:
        head = "Controls that reach it" if listed else "No control reaches it either."
    elif listed:
        head = "Controls that do as well, within the 95 % interval of the difference in skill"
    else:
        return "No control reaches it with a skill that is not clearly lower."
    return f"{head}: {'; '.join(listed)}." if listed else head


def _point(sweep: Sweep, point: Point) -> str:
    return f"{intervention(sweep, point)} ({_shares(sweep, point.method.rates)})"


def intervention(sweep: Sweep, point: Point) -> str:
    """Return what is done at a point of the axis."""
    if not point.modules:
        return "the adapter as it is"
    if sweep.strength is not None:
        return f"{sweep.strength} {point.value:g}"
    tau = "" if point.threshold is None else f", tau {point.threshold:.3f}"
    return f"{len(point.modules)} of {sweep.modules} modules projected{tau}"


def _control(sweep: Sweep, name: str, point: Point) -> str:
    factor = point.trials[name].factor
    if factor is not None:
        return f"{heading(sweep, name)} to {factor:.2g}"
    if sweep.strength is not None:
        return f"{heading(sweep, name)} at {sweep.strength} {point.value:g}"
    return f"{heading(sweep, name)} of {len(point.modules)} modules"


def _shares(sweep: Sweep, rates: Rates) -> str:
    refused, skill = sweep.refusal(rates), sweep.skill(rates)
    return f"{sweep.wanted.label} {with_interval(refused)}, skill {with_interval(skill)}"


def with_interval(rate: Rate) -> str:
    """Return a share in percent, with its interval.

    >>> with_interval(Rate(9, 10))
    '90.0 % [59.6, 98.2]'
    """
    low, high = rate.interval
    return f"{percent(rate)} % [{100 * low:.1f}, {100 * high:.1f}]"


def percent(rate: Rate) -> str:
    """Return a share in percent."""
    return f"{100 * rate.value:.1f}"


def place_heading(sweep: Sweep) -> str:
    """Return what `place` is called: `tau`, or the parameter that is varied."""
    return sweep.strength or "tau"


def place_value(sweep: Sweep, point: Point) -> float | None:
    """Return the parameter, or the cosine that a point reaches; None where nothing is changed."""
    return point.threshold if sweep.strength is None else point.value


def place(sweep: Sweep, point: Point) -> str:
    """Return the same as text."""
    found = place_value(sweep, point)
    if found is None:
        return ""
    return f"{found:.4f}" if sweep.strength is None else f"{found:g}"


def widest(sweep: Sweep) -> float:
    """Return the largest half width of the intervals of the two shares that are shown."""
    trials = [trial for point in sweep.points for trial in point.trials.values()]
    shown = [rate for t in trials for rate in (sweep.refusal(t.rates), sweep.skill(t.rates))]
    return max((high - low) / 2 for low, high in (rate.interval for rate in shown))
