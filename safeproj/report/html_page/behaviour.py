"""The chart of an evaluation: shares of answers with their intervals, subject by subject."""

from __future__ import annotations

from typing import Any

from safeproj.records.evaluations import WORDS, Evaluation, shown, title_of
from safeproj.report.html_page.figures import Chart, plain

_LABEL = 28
"""Characters of a subject's name beside the chart; the table gives all of it."""

_ROW = 44
"""Pixels for each subject."""


def shares(graphs: Any, evaluation: Evaluation, name: str) -> Chart:
    """Return the shares of each outcome of one set, a row per subject."""
    outcomes = evaluation.outcomes(name)
    figure = graphs.Figure()
    for i, outcome in enumerate(outcomes):
        rates = [subject.sets[name][outcome] for subject in evaluation.subjects]
        word = plain(WORDS.get(outcome, outcome))
        figure.add_scatter(
            x=[100 * rate.value for rate in rates],
            y=[row + 0.16 * (i - (len(outcomes) - 1) / 2) for row in range(len(rates))],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * (rate.interval[1] - rate.value) for rate in rates],
                "arrayminus": [100 * (rate.value - rate.interval[0]) for rate in rates],
            },
            name=word,
            mode="markers",
            line={"width": 2},
            marker={"symbol": ("circle", "square", "diamond", "cross")[i % 4], "size": 9},
            hoverinfo="text",
            hovertext=[
                f"{plain(subject.name)}<br>{word} {shown(rate)} %"
                for subject, rate in zip(evaluation.subjects, rates, strict=True)
            ],
            meta=i,
        )
    count = len(evaluation.subjects)
    figure.update_layout(
        template="none",
        height=130 + _ROW * count,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        xaxis={"title": {"text": "% of the answers"}, "range": [-3, 103], "zeroline": False},
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(count)),
            "ticktext": [plain(each.name, _LABEL) for each in evaluation.subjects],
            "range": [count - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
        },
        hovermode="closest",
    )
    rows: list[list[Any]] = [["subject", "outcome", "hits", "total", "share", "from", "to"]]
    rows += (
        [subject.name, outcome, rate.hits, rate.total, rate.value, *rate.interval]
        for subject in evaluation.subjects
        for outcome, rate in subject.sets[name].items()
    )
    return Chart("measure", figure.to_plotly_json(), _words(evaluation, name), rows)


def _words(evaluation: Evaluation, name: str) -> str:
    described = next(each for each in evaluation.sets if each["name"] == name)
    told = []
    for subject in evaluation.subjects:
        values = (
            f"{WORDS.get(outcome, outcome)} {shown(rate)} %"
            for outcome, rate in subject.sets[name].items()
        )
        told.append(f"{subject.name}: {', '.join(values)}")
    return f"{title_of(described)}. {'. '.join(told)}."
