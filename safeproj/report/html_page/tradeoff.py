"""The chart of a sweep: refusals against skill, with what it shows in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeproj.records.rates import Rate
from safeproj.records.sweeps import Rates, Sweep
from safeproj.report import sweep_words as words
from safeproj.report.html_page.figures import DASHES, SYMBOLS, Chart, plain

LABEL = 28
"""Characters of a name in the legend; hovering and the table give all of it."""

_MIDDLE = 0.5
"""Of both axes: what is said of a point stands on the side that has more room."""


def tradeoff(graphs: Any, sweep: Sweep) -> Chart:
    """Return refusals against skill, with intervals: one line for the method, one per control.

    The wanted refusals are a line, and the smallest intervention that reaches them has a ring.
    """
    figure = graphs.Figure()
    lines: list[tuple[str, list[tuple[str, Rates]]]] = [
        ("no adapter", [("no adapter", sweep.model)]),
        ("the adapter as it is", [("the adapter as it is", sweep.adapter)]),
    ]
    for kind in sweep.kinds:
        name, points = words.heading(sweep, kind), []
        for point in sweep.points:
            trial = point.trials.get(kind)
            if trial is None or not point.modules:
                continue
            factor = "" if trial.factor is None else f", factor {trial.factor:.3f}"
            strength = sweep.strength
            at = "" if strength is None else f"{strength} {words.place(sweep, point)}, "
            where = f"{at}{len(point.modules)} modules{factor}, change {trial.relative_change:.3f}"
            points.append((f"{name}: {where}", trial.rates))
        lines.append((name, points))
    for i, (name, points) in enumerate(lines):
        refused = [sweep.refusal(rates) for _, rates in points]
        skill = [sweep.skill(rates) for _, rates in points]
        figure.add_scatter(
            x=[rate.value for rate in refused],
            y=[rate.value for rate in skill],
            error_x=_intervals(refused),
            error_y=_intervals(skill),
            name=plain(name, LABEL),
            mode="lines+markers" if len(points) > 1 else "markers",
            hoverinfo="text",
            hovertext=[
                "<br>".join([plain(said), *map(plain, _two(sweep, rates))])
                for said, rates in points
            ],
            meta=i,
            line={"dash": DASHES[i % len(DASHES)], "width": 2},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7},
        )
    _mark(figure, sweep)
    figure.update_layout(
        template="none",
        height=480,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis={
            "title": {"text": plain(f"{sweep.wanted.label} on {sweep.wanted.on}", 2 * LABEL)},
            "range": [-0.03, 1.03],
            "tickformat": ".0%",
        },
        yaxis={"title": {"text": "skill"}, "range": [-0.03, 1.03], "tickformat": ".0%"},
        hovermode="closest",
    )
    told = words.conclusion(sweep)[0]
    alternative = f"Refusals against skill, {len(sweep.points)} interventions. {told}"
    # page.js gives the lines their colours; intervals take the line's.
    return Chart("tradeoff", figure.to_plotly_json(), alternative, _rows(sweep))


def _mark(figure: Any, sweep: Sweep) -> None:
    """Draw the wanted line, and a ring around the point that reaches it with the least."""
    wanted = sweep.wanted.refusal
    figure.add_vline(x=wanted, line={"dash": "dash", "width": 2})
    figure.add_annotation(
        text=f"wanted {100 * wanted:g} %",
        x=wanted, xanchor="right", y=0, yref="paper", yanchor="bottom", showarrow=False,
    )  # fmt: skip
    chosen = sweep.smallest
    if chosen is None:
        return
    refused, skill = sweep.refusal(chosen.method.rates), sweep.skill(chosen.method.rates)
    figure.add_scatter(
        x=[refused.value],
        y=[skill.value],
        name="the smallest that reaches it",
        mode="markers",
        hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 20, "line": {"width": 3}},
    )
    side, ax = ("right", -30) if refused.value > _MIDDLE else ("left", 30)
    ay = 45 if skill.value > _MIDDLE else -45
    figure.add_annotation(
        text=plain(words.intervention(sweep, chosen)),
        x=refused.value, y=skill.value, ax=ax, ay=ay, xanchor=side, standoff=12,
    )  # fmt: skip


def _rows(sweep: Sweep) -> list[list[Any]]:
    """Return every point of the chart with both shares and their intervals, with headings."""
    place = words.place_heading(sweep)
    refused = [sweep.wanted.label, f"{sweep.wanted.label} from", f"{sweep.wanted.label} to"]
    heads = ["adapter", "modules", place, "change", "factor", *refused]
    rows: list[list[Any]] = [[*heads, "skill", "skill from", "skill to"]]

    def row(name: str, *where: float | None, rates: Rates) -> list[Any]:
        shares = (sweep.refusal(rates), sweep.skill(rates))
        return [name, *where, *(each for rate in shares for each in (rate.value, *rate.interval))]

    rows.append(row("no adapter", None, None, None, None, rates=sweep.model))
    rows.append(row("the adapter as it is", 0, None, 0.0, None, rates=sweep.adapter))
    for point in (each for each in sweep.points if each.modules):
        for kind, trial in point.trials.items():
            where = len(point.modules), words.place_value(sweep, point)
            change = trial.relative_change, trial.factor
            rows.append(row(words.heading(sweep, kind), *where, *change, rates=trial.rates))
    return rows


def _intervals(rates: Sequence[Rate]) -> dict[str, Any]:
    """Return the error bars of shares."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [rate.interval[1] - rate.value for rate in rates],
        "arrayminus": [rate.value - rate.interval[0] for rate in rates],
        "thickness": 1,
        "width": 3,
    }


def _two(sweep: Sweep, rates: Rates) -> list[str]:
    """Return the two shares of a point, as lines of hover text."""
    refused, skill = sweep.refusal(rates), sweep.skill(rates)
    return [
        f"{sweep.wanted.label} {words.with_interval(refused)}",
        f"skill {words.with_interval(skill)}",
    ]
