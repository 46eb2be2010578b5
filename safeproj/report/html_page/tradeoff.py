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


def tradeoff(graphs: Any, sweep: Sweep) -> Chart:
    """Return refusals against skill, with intervals: one line for the method, one per control."""
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
            mu = f"mu {words.place(sweep, point)}, " if sweep.axis == "mu" else ""
            where = f"{mu}{len(point.modules)} modules{factor}, change {trial.relative_change:.3f}"
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
    figure.update_layout(
        template="none",
        height=520,
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
    # page.js gives the lines their colours, as it does for `measure`; intervals take the line's.
    return Chart("measure", figure.to_plotly_json(), alternative)


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
