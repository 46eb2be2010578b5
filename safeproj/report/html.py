"""The report as one HTML page that opens offline: charts, tables, inputs, and the gate's result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from safeproj.methods.detail import Column
from safeproj.methods.registry import detail_of, words_of
from safeproj.records.checks import Check, Checks
from safeproj.records.evaluations import (
    WORDS,
    Evaluation,
    judge_words,
    task_rows,
    title_of,
)
from safeproj.records.repairs import Repair
from safeproj.records.scores import ModuleReport, Report, Reports, doing, spread
from safeproj.records.sweeps import METHOD, Rates, Sweep, Trial
from safeproj.report import repair_words
from safeproj.report import sweep_words as words
from safeproj.report.html_page.behaviour import shares
from safeproj.report.html_page.document import document, text
from safeproj.report.html_page.figures import (
    Chart,
    curve,
    heatmap,
    libraries,
    measure,
)
from safeproj.report.html_page.findings import about, banner, by_rule, every, in_short
from safeproj.report.html_page.tables import Cell, Row, filled, number, pairs, table
from safeproj.report.html_page.tradeoff import tradeoff
from safeproj.report.markdown import LEGEND_SHARES, describe, span
from safeproj.report.text import Subject, subjects
from safeproj.text import printable

DEFAULT_TAU = 0.35
"""Where the slider starts if neither a selection nor a policy gives a threshold: the paper's."""

_SIDE_BY_SIDE = 6
"""Adapters whose cosines fit beside each other in one table."""

_CURVE = (
    "Cosine of each module's update and its projection, in ascending order. Filled and larger: at "
    "or below tau, so it would be projected."
)
_NO_SCRIPT = (
    "<noscript><p>Charts, sorting and the slider need JavaScript; every number is in the tables."
    "</p></noscript>"
)
_SHARES = (
    "Shares of the answers with 95 % intervals (Wilson). The table has the changes from the model "
    "without an adapter, in points, over the same prompts (Newcombe, paired)."
)
_HEATMAP = (
    "Cosine of each module's update and its projection; a white square marks what the chosen tau "
    "would project; n/a: no cosine, the table says why."
)


@dataclass(frozen=True)
class _Entry:
    """One adapter: its scores, what a gate found, or why there is neither."""

    name: str
    report: Report | None
    subject: Subject | None = None
    error: str | None = None

    @property
    def check(self) -> Check | None:
        """What a gate found."""
        return None if self.subject is None else self.subject.check


@dataclass(frozen=True)
class _Page:
    """What the page shows: the adapters, and the gate's run where there was one."""

    title: str
    version: str
    tau: float
    entries: tuple[_Entry, ...]
    checks: Checks | None = None

    @property
    def scored(self) -> dict[str, Report]:
        """Return the adapters that have scores, by name."""
        return {each.name: each.report for each in self.entries if each.report is not None}


def render(report: Report, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the page of one adapter."""
    name = str(report.subject["source"])
    title = f"{words_of(report.method).title} report: {name}"
    return _render(_Page(title, report.version, _tau([report]), (_Entry(name, report),)))


def render_many(reports: Reports, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return the page of several adapters, beside each other."""
    good = (_Entry(name, report) for name, report in reports.reports.items())
    bad = (_Entry(name, None, error=each.error) for name, each in reports.failures.items())
    title = f"{words_of(reports.method).title} reports: {len(reports.reports)} adapters"
    return _render(_Page(title, reports.version, _tau(reports.reports.values()), (*good, *bad)))


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return the page of what a gate found."""
    found = subjects(checks)
    entries = tuple(_Entry(each.check.name, each.check.report, each) for each in found)
    tau = _number(checks.policy.get("threshold"))
    if tau is None:
        tau = _tau(each.report for each in checks.checks if each.report is not None)
    title = f"safeproj check: {checks.words}"
    return _render(_Page(title, checks.version, tau, entries, checks))


def render_evaluation(evaluation: Evaluation, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return the page of an evaluation: a chart and a table of each set."""
    graphs, plotly = libraries()
    canvas = _Canvas(graphs)
    title = f"Evaluation: {evaluation.model['source']}"
    parts = [
        f"<header>\n<h1>{text(title)}</h1>\n</header>",
        '<main id="main" tabindex="-1">',
        _NO_SCRIPT,
    ]
    for i, each in enumerate(evaluation.sets):
        chart = canvas.place(shares(graphs, evaluation, each["name"]), f"shares-{i}", _SHARES)
        parts.append(_section(title_of(each), chart, _shares(evaluation, i)))
    if task_rows(evaluation):
        parts.append(_section("lm-eval", _tasks(evaluation)))
    inputs = [("model", str(evaluation.model["source"]))]
    inputs += [
        (f"adapter {each.name}", str(each.adapter["source"]))
        for each in evaluation.subjects
        if each.adapter is not None
    ]
    inputs += [(f"set {each['name']}", str(each["source"])) for each in evaluation.sets]
    inputs.append(("judge", judge_words(evaluation.judge)))
    inputs += [(name, str(value)) for name, value in evaluation.options.items()]
    inputs += [("warning", warning) for warning in evaluation.warnings]
    inputs += [
        (f"failed: {name}", failure.describe()) for name, failure in evaluation.failures.items()
    ]
    parts.append(_section("How it was measured", pairs(inputs)))
    parts.append(f"</main>\n<footer>safeproj {text(evaluation.version)}</footer>")
    record = {"tau": DEFAULT_TAU, "adapters": [], "figures": canvas.figures}
    return document(title, evaluation.version, "\n".join(parts), record, [plotly])


def _shares(evaluation: Evaluation, index: int) -> str:
    """Return the table of one set: shares, and changes from the model without an adapter."""
    described = evaluation.sets[index]
    listed = []
    for subject in evaluation.subjects:
        for outcome, rate in subject.sets[described["name"]].items():
            low, high = rate.interval
            values: list[float | None] = [rate.value, low, high, None, None, None]
            if subject.differences is not None:
                found = subject.differences[described["name"]][outcome]
                values[3:] = found.value, *found.interval
            cells = [number(None if each is None else 100 * each, ".1f") for each in values]
            count = Cell(f"{rate.hits} of {rate.total}", rate.value, numeric=True)
            word = Cell(WORDS.get(outcome, outcome))
            listed.append(Row([Cell(subject.name), word, count, *cells]))
    headings = ["subject", "outcome", "answers", "%", "from", "to", "change", "from", "to"]
    return table(f"set-{index}", title_of(described), headings, listed, tools=True)


def _tasks(evaluation: Evaluation) -> str:
    """Return the table of lm-eval's tasks."""
    listed = [
        Row([Cell(task), Cell(metric), *(Cell(value) for value in values)])
        for task, metric, values in task_rows(evaluation)
    ]
    names = [each.name for each in evaluation.subjects]
    return table("tasks", "Tasks of lm-eval", ["task", "metric", *names], listed, tools=True)


def render_sweep(sweep: Sweep, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return the page of a sweep: the curve, what follows, and every number."""
    graphs, plotly = libraries()
    canvas = _Canvas(graphs)
    title = f"Sweep: {words.heading(sweep, METHOD)} beside controls"
    said = "\n".join(f"<p>{text(sentence)}</p>" for sentence in words.conclusion(sweep))
    for what, line in words.commands(sweep):
        said += f"\n<p>{text(what)}: <code>{text(line)}</code></p>"
    caption = "Each point is one adapter; the bars are intervals of 95 %."
    sources = ((role, str(each["source"])) for role, each in sweep.inputs.items())
    sets = ((each.name, f"{each.source}, {each.prompts} prompts") for each in sweep.sets)
    warnings = "\n".join(f"<p>warning: {text(each)}</p>" for each in sweep.warnings)
    parts = [
        f"<header>\n<h1>{text(title)}</h1>\n</header>",
        '<main id="main" tabindex="-1">',
        _NO_SCRIPT,
        '<div class="beside">',
        _section("What follows", said),
        _section("Refusals and skill", canvas.place(tradeoff(graphs, sweep), "curve", caption)),
        "</div>",
        _section("Every measurement", _trials(sweep)),
        _section("Controls", pairs(words.meanings(sweep))),
        _section("Inputs", pairs([*sources, *sets, ("judge", _judge(sweep))]), warnings),
        f"</main>\n<footer>safeproj {text(sweep.version)}</footer>",
    ]
    record = {"tau": DEFAULT_TAU, "adapters": [], "figures": canvas.figures}
    return document(title, sweep.version, "\n".join(parts), record, [plotly])


def render_repair(repair: Repair, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return the page of a repair: what was reached, and all that was tried."""
    title = f"Repair: {repair.inputs['adapter']['source']}"
    said = "\n".join(f"<p>{text(sentence)}</p>" for sentence in repair_words.conclusion(repair))
    warnings = "\n".join(f"<p>warning: {text(each)}</p>" for each in repair.warnings)
    sources = [(role, str(each["source"])) for role, each in repair.inputs.items()]
    parts = [
        f"<header>\n<h1>{text(title)}</h1>\n</header>",
        '<main id="main" tabindex="-1">',
        _section("What was reached", said),
    ]
    for key, heading, heads, rows in (
        ("test", "The test split", ("adapter", "refused", "skill"), repair_words.reported(repair)),
        (
            "validation",
            "What was tried, on the validation split",
            ("adapter", "change", "refused", "skill"),
            repair_words.tried(repair),
        ),
    ):
        if rows:
            listed = [Row([Cell(cell) for cell in cells]) for cells in rows]
            parts.append(_section(heading, table(key, LEGEND_SHARES, heads, listed)))
    parts += [
        _section("Again", f"<pre>{text(repair_words.command(repair))}</pre>"),
        _section("Inputs", pairs([*sources, ("prompts", repair_words.splits(repair))]), warnings),
        f"</main>\n<footer>safeproj {text(repair.version)}</footer>",
    ]
    record = {"tau": DEFAULT_TAU, "adapters": [], "figures": []}
    return document(title, repair.version, "\n".join(parts), record, [])


def _judge(sweep: Sweep) -> str:
    return str(sweep.judge.get("kind", ""))


def _trials(sweep: Sweep) -> str:
    """Return the table of all that was measured."""
    outcomes = [(each.name, outcome) for each in sweep.sets for outcome in sweep.model[each.name]]
    headings = ["adapter", "modules", words.place_heading(sweep), "change", "factor"]
    headings += [part for each in outcomes for part in (": ".join(each), "from", "to")]

    def row(name: str, modules: int | None, tau: float | None, trial: Trial) -> Row:
        cells = [Cell(name), number(modules, "d"), number(tau)]
        cells += [number(trial.relative_change), number(trial.factor)]
        for key, outcome in outcomes:
            rate = trial.rates[key][outcome]
            cells += [number(each, ".3f") for each in (rate.value, *rate.interval)]
        return Row(cells)

    def alone(rates: Rates) -> Trial:
        return Trial(0.0, rates)

    rows = [
        row("no adapter", None, None, alone(sweep.model)),
        row("the adapter as it is", None, None, alone(sweep.adapter)),
    ]
    for point in (each for each in sweep.points if each.modules):
        for kind, trial in point.trials.items():
            name = words.heading(sweep, kind)
            rows.append(row(name, len(point.modules), words.place_value(sweep, point), trial))
    caption = "Shares of answers, each with the bounds of its interval of 95 %"
    return table("trials", caption, headings, rows, tools=True)


def _tau(reports: Iterable[Report]) -> float:
    found = (_number(report.selection.get("threshold")) for report in reports)
    return next((tau for tau in found if tau is not None), DEFAULT_TAU)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


class _Canvas:
    """Draws charts, and keeps what page.js draws them from."""

    def __init__(self, graphs: Any) -> None:
        self.graphs = graphs
        self.figures: list[dict[str, Any]] = []

    def place(self, chart: Chart, key: str, caption: str) -> str:
        """Return the element that a chart is drawn in."""
        self.figures.append({"id": key, "kind": chart.kind, "rows": chart.rows, **chart.figure})
        return _figure(chart, key, caption)


def _render(page: _Page) -> str:
    graphs, plotly = libraries()
    canvas = _Canvas(graphs)
    parts = [
        f"<header>\n<h1>{text(page.title)}</h1>\n</header>",
        '<main id="main" tabindex="-1">',
        _NO_SCRIPT,
    ]
    if page.checks is not None:
        parts.append(banner(page.checks))
    if len(page.entries) > 1:
        parts.append(_section("Adapters", _overview(page)))
    elif page.entries and page.entries[0].subject is not None:
        parts.append(_section("Findings", by_rule(page.entries[0].subject, 0)))
    if page.scored:
        drawn = canvas.place(curve(graphs, page.scored, page.tau), "curve", _CURVE)
        parts.append(_section("Similarity and threshold", _slider(page), drawn))
    if len(page.entries) > 1:
        parts.append(_selector(page))
    parts += [_adapter(page, i, canvas) for i in range(len(page.entries))]
    if 2 <= len(page.scored) <= _SIDE_BY_SIDE:
        parts.append(_section("Cosines side by side", _compared(page.scored)))
    if page.checks is not None:
        parts.append(_section("Policy", _policy(page.checks.policy)))
    parts.append(f"</main>\n<footer>safeproj {text(page.version)}</footer>")
    record = {"tau": page.tau, "adapters": _cosines(page.scored), "figures": canvas.figures}
    return document(page.title, page.version, "\n".join(parts), record, [plotly])


def _section(heading: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{text(heading)}</h2>", *parts, "</section>"])


def _figure(chart: Chart, key: str, caption: str) -> str:
    """Return the place of a chart: what it shows is said to those who do not see it, too."""
    return (
        f'<figure>\n<div id="{key}" class="plot" role="img" aria-label="{text(chart.alternative)}">'
        f"</div>\n<figcaption>{text(caption)} <span>{text(chart.alternative)}</span></figcaption>\n"
        "</figure>"
    )


def _slider(page: _Page) -> str:
    """Return the slider for tau, and how many modules of each adapter it would project."""
    at = min(max(page.tau, 0.0), 1.0)
    lines = (
        f"<span>{text(line)}</span>"
        for line in (
            _would_project(name if len(page.entries) > 1 else "", report.cosines, page.tau)
            for name, report in page.scored.items()
        )
    )
    return (
        '<p class="control"><label for="tau">Threshold tau: modules with a cosine at or below it '
        'are projected</label>\n<input type="range" id="tau" min="0" max="1" step="0.01" '
        f'value="{at:g}"></p>\n<p><output id="tau-output" for="tau">'
        f"<strong>tau {page.tau:g}</strong> {' '.join(lines)}</output></p>"
    )


def _would_project(name: str, cosines: list[float], tau: float) -> str:
    count = sum(cosine <= tau for cosine in cosines)
    head = f"{name}: " if name else ""
    return f"{head}would project {count} of {len(cosines)} modules with a cosine"


def _cosines(scored: dict[str, Report]) -> list[dict[str, Any]]:
    """Return what page.js counts for the slider."""
    return [{"name": printable(name), "cosines": each.cosines} for name, each in scored.items()]


def _overview(page: _Page) -> str:
    """Return one row per adapter."""
    if page.checks is not None:
        headings = ["adapter", "outcome", "findings", "modules", "to project", "cosine min"]
        headings.append("warnings")
        rows = [_checked_row(each.subject) for each in page.entries if each.subject is not None]
        return table("adapters", "The adapters", headings, rows, tools=True, stacked=True)
    method = next((each.method for each in page.scored.values()), None)
    beside = f"{detail_of(method).columns[0].heading} mean"
    chosen = doing(page.scored.values())
    headings = ["adapter", "modules", chosen, "cosine min", "mean", "max", beside, "warnings"]
    failed = any(each.error is not None for each in page.entries)
    rows = [_scored_row(each, failed) for each in page.entries]
    return table("adapters", "The adapters", headings + ["error"] * failed, rows, tools=True)


def _checked_row(subject: Subject) -> Row:
    check = subject.check
    cells = [Cell(check.name), Cell(check.outcome.value, mark=check.outcome.value)]
    cells.append(Cell(in_short(subject), mark="wide"))
    numbers = [number(None)] * 4
    if check.report is not None:
        report = check.report
        numbers = [_count(len(report.modules)), _count(report.projected)]
        numbers += [number(spread(report.cosines)["min"]), _count(len(report.warnings))]
    return Row([*cells, *(replace(each, mark="aside") for each in numbers)])


def _scored_row(entry: _Entry, failed: bool) -> Row:
    cells = [Cell(entry.name)]
    report = entry.report
    if report is None:
        cells += [number(None)] * 7
    else:
        cosine = spread(report.cosines)
        beside = spread(report.values(detail_of(report.method).columns[0].key))
        cells += [_count(len(report.modules)), _count(report.projected)]
        cells += [number(cosine[each]) for each in ("min", "mean", "max")]
        cells += [number(beside["mean"]), _count(len(report.warnings))]
    return Row(cells + [Cell(entry.error or "")] * failed)


def _count(value: int) -> Cell:
    return number(value, "d")


def _selector(page: _Page) -> str:
    options = (
        f'<option value="{i}">{text(entry.name)}</option>' for i, entry in enumerate(page.entries)
    )
    return (
        '<p class="control"><label for="adapter">Adapter shown below</label>\n'
        f'<select id="adapter">{"".join(options)}</select></p>'
    )


def _adapter(page: _Page, i: int, canvas: _Canvas) -> str:
    """Return everything about one adapter."""
    entry = page.entries[i]
    parts = [f'<section class="adapter" id="adapter-{i}">', f"<h2>{text(entry.name)}</h2>"]
    if entry.error is not None:
        parts.append(f'<p class="banner failed"><strong>Failed:</strong> {text(entry.error)}</p>')
    if entry.subject is not None:
        parts.append(about(entry.subject))
        if len(page.entries) > 1:
            parts += ["<h3>Findings</h3>", by_rule(entry.subject, i)]
    if entry.report is not None and entry.report.modules:
        parts += _charts(entry.report, i, page.tau, canvas)
    if entry.subject is not None:
        parts += every(entry.subject, i)
    if entry.report is not None:
        parts.append(_summary(entry.report))
        parts += [_modules(entry.report, i, page.tau, entry.check), *_rest(entry.report, i)]
    return "\n".join([*parts, "</section>"])


def _charts(report: Report, i: int, tau: float, canvas: _Canvas) -> list[str]:
    # The legend is written for a table, whose cells hold the cosine and then the first column.
    legend = " ".join(
        words_of(report.method).legend.partition(";")[0].removeprefix("then ").split()
    )
    return [
        "<h3>Cosine by layer and kind</h3>",
        canvas.place(heatmap(canvas.graphs, report, tau), f"heatmap-{i}", _HEATMAP),
        f"<h3>What projection removes: {text(detail_of(report.method).columns[0].heading)}</h3>",
        canvas.place(measure(canvas.graphs, report), f"measure-{i}", f"{legend}."),
    ]


def _summary(report: Report) -> str:
    """Return the facts about all modules together."""
    detail = detail_of(report.method)
    first = detail.columns[0]
    items = [
        (report.doing, f"{report.projected} of {len(report.modules)} modules"),
        ("selection", describe(report.selection)),
        ("projector", describe(report.projector)),
        ("cosine", span(report.cosines)),
        (first.meaning, span(report.values(first.key))),
    ]
    if report.pdst is not None:
        items.append(("pdst", f"{report.pdst:.4f}"))
    items += [fact.whole for fact in detail.facts(report)]
    return f"<h3>Summary</h3>\n{pairs(items)}"


def _modules(report: Report, i: int, tau: float, check: Check | None) -> str:
    """Return the table of modules, which holds every number of the charts."""
    listed = report.modules
    evidence = (
        {} if check is None else {k: f"projected ({v.value})" for k, v in check.evidence.items()}
    )
    own = detail_of(report.method).columns
    columns = {
        "module": [Cell(each.name, float(place)) for place, each in enumerate(listed)],
        "shape": [_shape(each) for each in listed],
        "rank": [_count(each.rank) for each in listed],
        "cosine": [number(each.cosine) for each in listed],
        **{each.heading: _values(each, listed) for each in own if not each.is_aside},
        "at or below tau": [_below(each, tau) for each in listed],
        report.doing if check is None else "to project": [
            Cell("yes" if each.projected else "") for each in listed
        ],
        "evidence": [Cell(evidence.get(each.name, "")) for each in listed],
        "bounds of the cosine": [_bounds(each) for each in listed],
        **{each.heading: _values(each, listed) for each in own if each.is_aside},
        "note": [Cell(each.note or "") for each in listed],
    }
    always = ("cosine", own[0].heading, "at or below tau", report.doing, "to project")
    caption = "Every module, with the numbers of the charts"
    cosines = [each.cosine for each in listed]
    shown = filled(f"modules-{i}", caption, columns, *always, cosines=cosines)
    return f"<h3>Modules</h3>\n{shown}"


def _shape(module: ModuleReport) -> Cell:
    rows, columns = module.shape
    return Cell(f"{rows}×{columns}", float(rows * columns), mark="short")


def _below(module: ModuleReport, tau: float) -> Cell:
    below = module.cosine is not None and module.cosine <= tau
    return Cell("yes" if below else "", mark="tau")


def _bounds(module: ModuleReport) -> Cell:
    if module.bounds is None:
        return Cell("")
    unsure = " uncertain" if module.uncertain else ""
    return Cell(f"{module.bounds[0]:.4f} to {module.bounds[1]:.4f}{unsure}", module.bounds[0])


def _values(column: Column, modules: Iterable[ModuleReport]) -> list[Cell]:
    return [number(each.value(column.key), column.form) for each in modules]


def _rest(report: Report, i: int) -> list[str]:
    """Return what the scores were computed from, and what they do not cover."""
    parts = ["<h3>Inputs</h3>", _inputs(report, i)]
    if report.unprojected:
        rows = (
            Row(
                [
                    Cell(each.parameter), Cell(each.tensor),
                    Cell(", ".join(text for text in (each.kind, each.rows) if text)),
                    number(each.relative_change, ".2g"),
                ]
            )
            for each in report.unprojected
        )  # fmt: skip
        headings = ("parameter", "tensor", "kind", "relative change")
        caption = "What the adapter changes past every projection"
        parts.append("<h3>Changes that no score covers</h3>")
        parts.append(table(f"unprojected-{i}", caption, headings, rows, tools=True))
    if report.warnings:
        listed = "\n".join(f"<li>{text(warning)}</li>" for warning in report.warnings)
        parts += ["<h3>Warnings</h3>", f"<ul>\n{listed}\n</ul>"]
    return parts


def _inputs(report: Report, i: int) -> str:
    further = any(identity.keys() - {"source", "revision"} for identity in report.inputs.values())
    rows = []
    for role, identity in report.inputs.items():
        known = dict(identity)
        cells = [Cell(str(known.pop(key, None) or "")) for key in ("source", "revision")]
        more = ", ".join(f"{key} {_plain(value)}" for key, value in known.items())
        rows.append(Row([Cell(role.replace("_", " ")), *cells, *[Cell(more)] * further]))
    headings = ["input", "source", "revision", *["further"] * further]
    return table(f"inputs-{i}", "What was scored, and against what", headings, rows)


def _compared(scored: dict[str, Report]) -> str:
    """Return the cosines of all adapters by module."""
    by_adapter = [{each.name: each.cosine for each in report.modules} for report in scored.values()]
    names = dict.fromkeys(name for cosines in by_adapter for name in cosines)
    rows = (
        Row([Cell(name, float(i)), *(number(cosines.get(name)) for cosines in by_adapter)])
        for i, name in enumerate(names)
    )
    caption = "Cosine of each module by adapter"
    return table("compared", caption, ["module", *scored], rows, tools=True)


def _policy(policy: dict[str, Any]) -> str:
    rows = (Row([Cell(name), Cell(_plain(value))]) for name, value in _flat(policy))
    return table("policy", "What the check was held to", ("field", "value"), rows)


def _flat(options: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in _flat(value))
        else:
            yield name, value


def _plain(value: object) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
