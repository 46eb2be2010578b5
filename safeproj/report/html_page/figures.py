"""The charts of the HTML report, as plotly figures, with what they show in words."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from safeproj.errors import SafeprojError
from safeproj.methods.registry import detail_of
from safeproj.records.scores import ModuleReport, Report
from safeproj.report.html_page import NO_PLOTLY
from safeproj.report.markdown import span
from safeproj.text import printable

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")
"""Lines differ in these beside their colour. The counts share no divisor, so that pairs repeat
late, and each symbol has a variant `-open`."""

_BRIGHT = 0.47
"""From here the colour scale is so bright that black text has the higher contrast."""
_TICKS = 28
"""Labels that fit beside each other below a chart."""
_LABEL = 28
"""Characters of a name on an axis or in a legend; hovering and the tables give all of it."""
_LINE = 72
"""Characters of a line of hover text."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        kind: what page.js does with it: `curve`, `heatmap`, `measure` or `tradeoff`.
        figure: data and layout for plotly.js.
        alternative: the facts it shows, in words.
        rows: its numbers, with their headings first, which page.js saves as CSV.
    """

    kind: str
    figure: dict[str, Any]
    alternative: str
    rows: list[list[Any]]


@dataclass(frozen=True)
class Grid:
    """Modules by row and column.

    Attributes:
        rows: labels, in natural order.
        columns: kinds.
        cells: (row, column) to the modules there: more than one where experts share a name.
    """

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], list[ModuleReport]]


def libraries() -> tuple[Any, str]:
    """Return plotly's graph objects, and plotly.js as text.

    Raises:
        SafeprojError: plotly is not installed.
    """
    try:
        graphs, offline = import_module("plotly.graph_objects"), import_module("plotly.offline")
    except ImportError:
        raise SafeprojError(NO_PLOTLY) from None
    return graphs, offline.get_plotlyjs()


def curve(graphs: Any, adapters: dict[str, Report], tau: float) -> Chart:
    """Return the cosines of each adapter in ascending order, and tau: the figure of the paper."""
    figure = graphs.Figure()
    told = []
    rows: list[list[Any]] = [["adapter", "place", "module", "cosine"]]
    for i, (name, report) in enumerate(adapters.items()):
        scored = [(module.cosine, module) for module in report.modules if module.cosine is not None]
        scored.sort(key=lambda item: item[0])
        values = [cosine for cosine, _ in scored]
        rows += ([name, place, each.name, value] for place, (value, each) in enumerate(scored, 1))
        figure.add_scatter(
            x=list(range(1, len(scored) + 1)),
            y=values,
            name=plain(name, _LABEL),
            mode="lines+markers",
            hoverinfo="text",
            hovertext=[
                "<br>".join(_wrapped(f"adapter {name}") + _details(module, report))
                for _, module in scored
            ],
            meta=i,
            **_line(i),
        )
        below = sum(value <= tau for value in values)
        told.append(f"{name}: {span(values)}, {below} of {len(values)} at or below {tau:g}")
    figure.update_layout(
        template="none",
        height=440,
        showlegend=len(adapters) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis={"title": {"text": "modules, by ascending cosine"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "cosine"}, "range": [min(0.0, _lowest(adapters)), 1.03]},
        hovermode="closest",
    )
    figure.add_hline(y=tau, line={"dash": "dash", "width": 2})
    return Chart(
        "curve",
        figure.to_plotly_json(),
        f"Sorted cosines by adapter, with the threshold tau. {'. '.join(told)}.",
        rows,
    )


def heatmap(graphs: Any, report: Report, tau: float) -> Chart:
    """Return the cosine of each module, layers by kinds."""
    grid = arrange(report.modules)
    shown = {where: _lowest_of(modules) for where, modules in grid.cells.items()}
    values, hover = _matrix(grid), _matrix(grid)
    for (row, column), module in shown.items():
        values[row][column] = module.cosine
        hover[row][column] = _hover(grid.cells[row, column], module, report)
    figure = graphs.Figure()
    figure.add_heatmap(
        z=values,
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=True,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "cosine"},
            "thickness": 14,
            "lenmode": "pixels",
            "y": 1,
            "yanchor": "top",
            "len": min(300, 60 + 19 * len(grid.rows)),
        },
    )
    figure.add_scatter(  # page.js fills in the cells at or below tau
        x=[],
        y=[],
        mode="markers",
        hoverinfo="skip",
        marker={
            "symbol": "square", "size": 7, "color": "#fff", "line": {"color": "#000", "width": 1.5},
        },
    )  # fmt: skip
    figure.add_scatter(
        x=[column for _, column in shown],
        y=[row for row, _ in shown],
        mode="text",
        text=["n/a" if each.cosine is None else f"{each.cosine:.2f}" for each in shown.values()],
        textfont={"color": [_ink(each.cosine or 0.0) for each in shown.values()], "size": 11},
        hoverinfo="skip",
    )
    figure.update_layout(
        template="none",
        height=120 + 19 * len(grid.rows),
        showlegend=False,
        margin={"l": 20, "r": 20, "t": 10, "b": 20},
        xaxis=_ticks(grid.columns) | {"showgrid": False, "zeroline": False, "side": "top"},
        yaxis=_ticks(grid.rows)
        | {
            "showgrid": False, "zeroline": False, "range": [len(grid.rows) - 0.5, -0.5],
            "title": {"text": "layer"},
        },
        meta=260 + 110 * len(grid.columns),
    )  # fmt: skip
    words = _heatmap_words(report, grid, tau)
    return Chart("heatmap", figure.to_plotly_json(), words, _rows(grid, "cosine"))


def measure(graphs: Any, report: Report) -> Chart:
    """Return what the method shows beside the cosine: the first of its columns."""
    first = detail_of(report.method).columns[0]
    grid = arrange(report.modules)
    points: dict[int, list[tuple[int, ModuleReport]]] = {}
    for (row, column), modules in grid.cells.items():
        points.setdefault(column, []).extend((row, each) for each in modules)
    figure = graphs.Figure()
    for column, name in enumerate(grid.columns):
        known = [each for each in points.get(column, []) if each[1].value(first.key) is not None]
        known.sort(key=lambda each: each[0])
        rows = [row for row, _ in known]
        figure.add_scatter(
            x=rows,
            y=[module.value(first.key) for _, module in known],
            name=plain(name, _LABEL),
            # A line between the experts of one layer would mean nothing.
            mode="lines+markers" if len(set(rows)) == len(rows) else "markers",
            hoverinfo="text",
            hovertext=["<br>".join(_details(module, report)) for _, module in known],
            meta=column,
            **_line(column),
        )
    figure.update_layout(
        template="none",
        height=380,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        xaxis=_ticks(grid.rows, _TICKS) | {"title": {"text": "layer"}, "zeroline": False},
        yaxis={"title": {"text": first.meaning}, "rangemode": "tozero"},
        hovermode="closest",
    )
    told = span(report.values(first.key))
    alternative = f"{first.meaning} of each module by layer and kind: {told}."
    return Chart("measure", figure.to_plotly_json(), alternative, _rows(grid, first.key))


def _rows(grid: Grid, key: str) -> list[list[Any]]:
    """Return a number of each module, layer by layer, with headings."""
    rows: list[list[Any]] = [["layer", "kind", "module", key]]
    for (row, column), modules in sorted(grid.cells.items(), key=lambda cell: cell[0]):
        where = grid.rows[row], grid.columns[column]
        for each in modules:
            value = each.cosine if key == "cosine" else each.value(key)
            rows.append([*where, each.name, value])
    return rows


def arrange(modules: Iterable[ModuleReport]) -> Grid:
    """Return modules as a grid: a row per layer of each stack, one more for those outside layers.

    A column is a kind, or more of the name where a layer has several of that kind.
    """
    listed = list(modules)
    homes: dict[tuple[str, int | None, str], set[str]] = {}
    for each in listed:
        bare = each.name.partition("[")[0]
        homes.setdefault((*_row(each), each.kind), set()).add(bare)
    ambiguous = {kind for (_, _, kind), names in homes.items() if len(names) > 1}
    stacks = list(dict.fromkeys(each.stack for each in listed if each.layer is not None))
    order = {stack: i for i, stack in enumerate(stacks)}
    keys = sorted(
        {_row(each) for each in listed},
        key=lambda key: (key[1] is None, order.get(key[0], 0), key[1] or 0),
    )
    kinds = {each.name: _column(each, ambiguous) for each in listed}
    columns = list(dict.fromkeys(kinds.values()))
    row_of = {key: i for i, key in enumerate(keys)}
    column_of = {column: i for i, column in enumerate(columns)}
    cells: dict[tuple[int, int], list[ModuleReport]] = {}
    for each in listed:
        cells.setdefault((row_of[_row(each)], column_of[kinds[each.name]]), []).append(each)
    return Grid([_row_label(key, len(stacks) > 1) for key in keys], columns, cells)


def plain(value: str, limit: int | None = None) -> str:
    """Return text as plotly's own markup, which knows a few HTML elements and entities.

    >>> plain("<a href='x'>&amp;")
    "&lt;a href='x'&gt;&amp;amp;"
    """
    shown = printable(value)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[: limit // 2 - 1]}…{shown[-limit // 2 :]}"
    return html.escape(shown, quote=False)


def _row(module: ModuleReport) -> tuple[str, int | None]:
    return ("", None) if module.layer is None else (module.stack, module.layer)


def _row_label(key: tuple[str, int | None], several: bool) -> str:
    stack, layer = key
    if layer is None:
        return "-"
    return f"{stack}.{layer}" if several else str(layer)


def _column(module: ModuleReport, ambiguous: set[str]) -> str:
    if module.kind not in ambiguous:
        return module.kind
    return ".".join(module.name.partition("[")[0].split(".")[-2:])


def _matrix(grid: Grid) -> list[list[Any]]:
    return [[None] * len(grid.columns) for _ in grid.rows]


def _lowest_of(modules: Sequence[ModuleReport]) -> ModuleReport:
    return min(modules, key=lambda each: math.inf if each.cosine is None else each.cosine)


def _lowest(adapters: dict[str, Report]) -> float:
    return min((cosine for report in adapters.values() for cosine in report.cosines), default=0.0)


def _ticks(labels: Sequence[str], most: int | None = None) -> dict[str, Any]:
    """Return an axis with a number per label: names as categories could be taken for dates.

    Args:
        labels: of all positions.
        most: how many are written, None for all.
    """
    step = 1 if most is None else max(1, -(-len(labels) // most))
    return {
        "tickmode": "array",
        "tickvals": list(range(0, len(labels), step)),
        "ticktext": [plain(label, _LABEL) for label in labels[::step]],
        "range": [-0.5, len(labels) - 0.5],
        "automargin": True,
    }


def _ink(cosine: float) -> str:
    """Return the colour of text on a cell: of black and white the one with more contrast."""
    return "#ffffff" if cosine < _BRIGHT else "#000000"


def _line(i: int) -> dict[str, Any]:
    return {
        "line": {"dash": DASHES[i % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 6},
    }


def _hover(modules: Sequence[ModuleReport], shown: ModuleReport, report: Report) -> str:
    lines = _details(shown, report)
    if len(modules) > 1:
        projected = sum(each.projected for each in modules)
        chosen = f"{projected} of them {_done(report)}"
        lines.insert(0, f"lowest of {len(modules)} modules, {chosen}")
    return "<br>".join(lines)


def _details(module: ModuleReport, report: Report) -> list[str]:
    """Return what is known of a module, as lines of hover text."""
    lines = _wrapped(module.name)
    lines.append("no cosine" if module.cosine is None else f"cosine {module.cosine:.4f}")
    if module.bounds is not None:
        unsure = ", either side of the threshold" if module.uncertain else ""
        lines.append(f"between {module.bounds[0]:.4f} and {module.bounds[1]:.4f}{unsure}")
    columns = [each for each in detail_of(report.method).columns if not each.is_aside]
    values = [(each.meaning, each.text(module)) for each in columns]
    first, *others = (f"{meaning} {value}" if value else "" for meaning, value in values)
    shape = f"shape {module.shape[0]}×{module.shape[1]}, rank {module.rank}"
    lines += filter(None, [first, shape, *others])
    lines.append(_done(report) if module.projected else "not projected")
    return lines if module.note is None else lines + _wrapped(f"note: {module.note}")


def _done(report: Report) -> str:
    return "projected" if report.written else "would be projected"


def _wrapped(value: str) -> list[str]:
    shown = printable(value)
    return [plain(shown[i : i + _LINE]) for i in range(0, len(shown), _LINE)] or [""]


def _heatmap_words(report: Report, grid: Grid, tau: float) -> str:
    cosines = report.cosines
    words = [
        f"Cosine of each module, {len(grid.rows)} layers by {len(grid.columns)} kinds: "
        f"{span(cosines)}; {sum(each <= tau for each in cosines)} of {len(report.modules)} modules "
        f"at or below {tau:g}, {len(report.modules) - len(cosines)} without a cosine."
    ]
    scored = [each for each in report.modules if each.cosine is not None]
    if scored:
        words.append(f"Lowest: {_lowest_of(scored).name}.")
    if any(len(modules) > 1 for modules in grid.cells.values()):
        words.append("Where modules share a cell, such as experts, it shows their lowest cosine.")
    return " ".join(words)
