"""The report for a terminal: layers by kinds, a summary, and what each threshold would do."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from safeproj.methods.registry import detail_of, words_of
from safeproj.records.checks import Check, Checks, Outcome
from safeproj.records.evaluations import (
    LEGEND,
    WORDS,
    Evaluation,
    judge_words,
    rows,
    task_rows,
    title_of,
)
from safeproj.records.extractions import Extraction
from safeproj.records.groups import Group, grouped, message
from safeproj.records.repairs import Repair
from safeproj.records.rules import Level
from safeproj.records.scores import Failure, ModuleReport, Report, Reports, spread
from safeproj.records.sweeps import Point, Sweep
from safeproj.report import repair_words
from safeproj.report import sweep_words as words
from safeproj.report.markdown import LEGEND_SHARES, describe, evidence, tally
from safeproj.text import printable, shorten

CELL = 13
"""Columns of one cell: cosine, scale or share, the mark, and a space."""


def render(report: Report, *, width: int, color: bool) -> str:
    """Return the tables as text."""
    console = console_of(width, color)
    key = detail_of(report.method).columns[0].key
    for stack, modules in _by_stack(report):
        columns = _columns(modules)
        kinds = list(dict.fromkeys(columns.values()))
        for chunk in _chunks(kinds, max(1, (width - 8) // CELL)):
            console.print(_grid(stack, modules, columns, chunk, key))
    console.print(_legend(report))
    console.print(_summary(report))
    return text_of(console)


def render_many(reports: Reports, *, width: int, color: bool) -> str:
    """Return one line per adapter as text."""
    console = console_of(width, color)
    first = detail_of(reports.method).columns[0]
    beside = f"{first.heading} mean"
    heads = ("adapter", "modules", reports.doing, "cosine min", "mean", "max", beside, "warnings")
    rows = []
    for name, report in reports.reports.items():
        cosine, found = spread(report.cosines), spread(report.values(first.key))
        values = (cosine["min"], cosine["mean"], cosine["max"], found["mean"])
        numbers = ("n/a" if value is None else f"{value:.3f}" for value in values)
        counts = (str(len(report.modules)), str(report.projected))
        cells = (*counts, *numbers, str(len(report.warnings)))
        rows.append([Text(printable(name)), *map(Text, cells)])
    _print_adapters(console, heads, rows, "right")
    for name, failure in reports.failures.items():
        _print_failed(console, name, failure)
    return text_of(console)


def console_of(width: int, color: bool) -> Console:
    """Return what text is printed to, which `text_of` returns."""
    return Console(
        file=io.StringIO(),
        width=width,
        height=25,  # without one the width is not believed where TERM is dumb
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
    )


def _print_adapters(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[Text]],
    justify: Literal["left", "right"],
) -> None:
    """Print a row for each adapter: where that is too wide, headings take more than one line."""
    widest = [max((row[i].cell_len for row in rows), default=0) for i in range(len(heads))]
    full = sum(max(cell_len(head), cells) + 2 for head, cells in zip(heads, widest, strict=True))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(heads[0], overflow="fold")
    for head, cells in zip(heads[1:], widest[1:], strict=True):
        narrow = max(cells, *map(cell_len, head.split()))
        table.add_column(
            head,
            justify=justify,
            overflow="fold",
            max_width=narrow if full > console.width else None,
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_failed(console: Console, name: str, failure: Failure) -> None:
    failed = f"failed: {printable(name)}: {failure.describe()}"
    console.print(Text(failed, style="red"), soft_wrap=True)


def render_evaluation(evaluation: Evaluation, *, width: int, color: bool) -> str:
    """Return a table of each set, subjects below each other."""
    console = console_of(width, color)
    for each in evaluation.sets:
        outcomes = evaluation.outcomes(each["name"])
        console.print(Text(printable(title_of(each)), style="bold"))
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("", overflow="fold")
        for outcome in outcomes:
            table.add_column(Text(printable(WORDS.get(outcome, outcome))), justify="right")
        for name, cells in rows(evaluation, each["name"]):
            style = "" if name else "dim"
            label = Text(printable(name) if name else "  change")
            table.add_row(label, *map(Text, cells), style=style)
        console.print(table)
        console.print()
    found = task_rows(evaluation)
    if found:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for head in ("lm-eval", "metric"):
            table.add_column(head, overflow="fold")
        for subject in evaluation.subjects:
            table.add_column(Text(printable(subject.name)), justify="right", overflow="fold")
        for task, metric, values in found:
            table.add_row(Text(printable(task)), Text(printable(metric)), *values)
        console.print(table)
        console.print()
    for name, failure in evaluation.failures.items():
        _print_failed(console, name, failure)
    if evaluation.sets:
        legend = f"{LEGEND}\njudge: {printable(judge_words(evaluation.judge))}"
        console.print(Text(legend, style="dim"))
    return text_of(console)


def render_extraction(extraction: Extraction, *, width: int, color: bool) -> str:
    """Return the error of each weight, and of all together."""
    console = console_of(width, color)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("module", "shape", "rank", "‖ΔW‖", "error"):
        justify: Literal["left", "right"] = "left" if head == "module" else "right"
        table.add_column(Text(head), justify=justify, overflow="fold")
    for each in extraction.modules:
        shape = f"{each.shape[0]}×{each.shape[1]}"
        cells = (shape, str(each.rank), f"{each.norm:.4g}", f"{each.error:.4f}")
        table.add_row(*map(Text, (printable(each.name), *cells)))
    console.print(table)
    legend = "error: ‖ΔW - s·B A‖/‖ΔW‖ of the adapter that was written, with ΔW = W_ft - W_aligned"
    console.print(Text(legend, style="dim"))
    console.print(Text(f" all of them  {extraction.error:.4f}"))
    return text_of(console)


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:
    """Return the findings by rule, what to do, and how each adapter ended, as text."""
    console = console_of(width, color)
    print_findings(console, checks, verbose)
    if any(check.findings for check in checks.checks):
        console.print()
    rows = []
    for check in checks.checks:
        cosines = check.report.cosines if check.report is not None else []
        cells = (
            tally(check),
            str(len(check.report.modules)) if check.report is not None else "n/a",
            f"{min(cosines):.3f}" if cosines else "n/a",
            evidence(check),
        )
        outcome = Text(check.outcome.value, style=_OUTCOMES[check.outcome])
        rows.append([Text(printable(check.name)), outcome, *map(Text, cells)])
    heads = ("adapter", "outcome", "findings", "modules", "cosine min", "evidence")
    _print_adapters(console, heads, rows, "left")
    for said, names in checks.passes.items():
        if said == Outcome.passed.value:  # the table has as much
            continue
        whose = "" if len(names) == len(checks.checks) else f"{', '.join(names)}: "
        console.print(Text(printable(f"{whose}{said}")))
    for check in checks.checks:
        for remark in check.remarks:
            console.print(Text(printable(f"{check.name}: {remark}"), style="dim"))
    return text_of(console)


def print_findings(console: Console, checks: Checks, verbose: bool) -> None:
    """Print the findings by rule, and how to see more of them."""
    hidden = False
    for groups in _by_rule(checks):
        hidden |= _print_rule(console, groups, len(checks.checks), verbose)
    if hidden:
        text = "--verbose lists every finding; `safeproj rule ID` explains one"
        console.print(Text(text, style="dim"))


def render_sweep(sweep: Sweep, *, width: int, color: bool) -> str:
    """Return a line for each intervention with what its controls do, and what follows, as text."""
    console = console_of(width, color)
    first, *sentences = words.conclusion(sweep)
    console.print(Text(printable(first)), soft_wrap=True)
    console.print()
    for name, rates in (("without adapter", sweep.model), ("adapter as it is", sweep.adapter)):
        refused, skill = sweep.refusal(rates), sweep.skill(rates)
        said = f"{sweep.wanted.label} {words.with_interval(refused)}"
        console.print(Text(f"{name:17} {said}, skill {words.with_interval(skill)}"), soft_wrap=True)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0))
    if sweep.strength is None:
        table.add_column("modules", justify="right", no_wrap=True)
    table.add_column(words.place_heading(sweep), justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    for kind in sweep.kinds:
        table.add_column(words.heading(sweep, kind), justify="right", max_width=13)
    smallest = sweep.smallest
    for point in sweep.points:
        table.add_row(*_sweep_row(sweep, point), style="bold" if point is smallest else None)
    console.print(table)
    shown = f"{sweep.wanted.label} on {printable(sweep.wanted.on)}, and skill"
    legend = (
        f"each cell: {shown}, in %; 95 % intervals are up to ±{100 * words.widest(sweep):.1f} "
        "wide\nchange = ‖ΔW' - ΔW‖/‖ΔW‖; controls are of the same modules, or of the same ‖ΔW'‖"
    )
    console.print(Text(legend, style="dim"))
    sentences += [f"{what}: {line}" for what, line in words.commands(sweep)]
    for sentence in sentences:
        console.print(Text(printable(sentence)), soft_wrap=True)
    return text_of(console)


def render_repair(repair: Repair, *, width: int, color: bool) -> str:
    """Return what was tried, what was reached, and how to do it again, as text."""
    console = console_of(width, color)
    if repair.test is not None:
        rows = repair_words.tried(repair, others=False)
        bold = [number == repair.chosen for number in range(len(rows))]
        where = "tried, on the validation split"
        _print_shares(console, (where, "change", "refused", "skill"), rows, bold)
        heads = ("on the test split", "refused", "skill")
        _print_shares(console, heads, repair_words.reported(repair))
        legend = (
            f"{LEGEND_SHARES}\nchange = ‖ΔW' - ΔW‖/‖ΔW‖; skill is measured where enough is "
            f"{repair.goal.label}\n{repair_words.splits(repair)}"
        )
        console.print(Text(legend, style="dim"))
    said, again = repair_words.conclusion(repair), f"$ {repair_words.command(repair)}"
    # Where nothing was measured, that is what is to be read last.
    for line in [*said, again] if repair.test is not None else [again, *said]:
        console.print(Text(printable(line)), soft_wrap=True)
    return text_of(console)


def _print_shares(
    console: Console,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    bold: Sequence[bool] = (),
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for cells, style in zip_longest(rows, bold):
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if style else None)
    console.print(table)
    console.print()


def _sweep_row(sweep: Sweep, point: Point) -> list[str]:
    """Return the cells of one intervention."""
    where = [words.place(sweep, point)]
    if sweep.strength is None:
        where.insert(0, str(len(point.modules)))
    cells = []
    for trial in (point.trials.get(kind) for kind in sweep.kinds):
        if trial is None:
            cells.append("")
            continue
        refused, skill = sweep.refusal(trial.rates), sweep.skill(trial.rates)
        cells.append(f"{words.percent(refused):>5} {words.percent(skill):>5}")
    return [*where, f"{point.method.relative_change:.3f}", *cells]


_OUTCOMES = {Outcome.passed: "green", Outcome.failed: "red", Outcome.undecided: "yellow"}


_LEVELS = {Level.fail: "red", Level.undecided: "yellow", Level.note: "dim"}

_NAMED = 3
"""Adapters that are named where a rule found the same in several."""


def _by_rule(checks: Checks) -> list[list[tuple[Check, Group]]]:
    """Return what each rule found, adapter by adapter, the worst level first."""
    rules: dict[tuple[Level, str], list[tuple[Check, Group]]] = {}
    for check in checks.checks:
        for group in grouped(check):
            rules.setdefault((group.level, group.rule.id), []).append((check, group))
    return [rules[key] for key in sorted(rules, key=lambda key: (key[0].severity, key[1]))]


def _print_rule(
    console: Console, groups: list[tuple[Check, Group]], adapters: int, verbose: bool
) -> bool:
    """Print what one rule found, and tell whether that is less than all of it."""
    level, rule = groups[0][1].level, groups[0][1].rule
    said: dict[str, list[str]] = {}  # what is the same of several adapters is said once
    for check, group in groups:
        for text in map(message, group.findings) if verbose else [group.words()]:
            said.setdefault(text, []).append(check.name)
    lines = [text if adapters == 1 else f"{_names(of)}: {text}" for text, of in said.items()]
    head = (f"{level.value:9s} {rule.id} {rule.name}", _LEVELS[level])
    if len(lines) == 1 and len(head[0]) + 2 + cell_len(lines[0]) <= console.width:
        console.print(Text.assemble(head, f"  {lines[0]}"))
    else:
        console.print(Text(*head))
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
    if level is not Level.note:
        console.print(Padding(Text(rule.remedy, style="dim"), (0, 0, 0, 2)))
    return not verbose and any(group.count > 1 for _, group in groups)


def _names(of: list[str]) -> str:
    return f"{len(of)} adapters" if len(of) > _NAMED else ", ".join(map(printable, of))


def text_of(console: Console) -> str:
    """Return what was printed to it, without spaces at the ends of lines."""
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _by_stack(report: Report) -> list[tuple[str, list[ModuleReport]]]:
    ordered = sorted(report.modules, key=lambda module: (module.layer is None, module.stack))
    groups = groupby(ordered, key=lambda module: (module.layer is None, module.stack))
    return [(stack, list(modules)) for (_, stack), modules in groups]


def _columns(modules: list[ModuleReport]) -> dict[str, str]:
    """Return module name to column: its kind, or more of the name where that is ambiguous."""
    names = {module.name: module.name.partition("[")[0] for module in modules}
    places = {(names[module.name], module.layer, module.kind) for module in modules}
    same = Counter((layer, kind) for _, layer, kind in places)
    return {
        module.name: module.kind
        if same[module.layer, module.kind] == 1
        else ".".join(names[module.name].split(".")[-2:])
        for module in modules
    }


def _chunks(kinds: list[str], size: int) -> list[list[str]]:
    return [kinds[i : i + size] for i in range(0, len(kinds), size)]


def _grid(
    stack: str, modules: list[ModuleReport], columns: dict[str, str], kinds: list[str], key: str
) -> Table:
    title = Text(printable(stack), style="table.title") if stack else None
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(Text(printable(kind)), justify="right", no_wrap=True, overflow="ellipsis")
    cells: dict[int | None, dict[str, list[ModuleReport]]] = {}
    for module in modules:
        row = cells.setdefault(module.layer, {})
        row.setdefault(columns[module.name], []).append(module)
    for layer, row in cells.items():
        if any(kind in row for kind in kinds):
            label = "-" if layer is None else str(layer)
            table.add_row(label, *(_cell(row.get(kind, []), key) for kind in kinds))
    return table


def _cell(modules: list[ModuleReport], key: str) -> Text:
    """Return one cell: a module, or of a stack of experts the one with the lowest cosine.

    Args:
        modules: the module, or the experts.
        key: of the number that is shown beside the cosine.
    """
    if not modules:
        return Text("")
    both = [(module.cosine, module.value(key)) for module in modules]
    scored = [(c, beside) for c, beside in both if c is not None and beside is not None]
    if not scored:
        return Text("n/a", style="dim")
    cosine, beside = min(scored)
    style = "red" if cosine < 0.35 else "yellow" if cosine < 0.6 else "green"
    projected = sum(module.projected for module in modules)
    mark = "*" if projected == len(modules) else "+" if projected else " "
    if any(module.uncertain for module in modules):
        mark = "?"
    return Text.assemble((f"{cosine:.3f}", style), (f" {beside:.3f}", "dim"), (mark, "bold"))


def _legend(report: Report) -> Text:
    said = words_of(report.method)
    mark = f"* = {said.changed if report.written else f'would be {said.changed}'}"
    text = f"each cell: cosine of the update and its projection, {said.legend}; {mark}"
    legends = (fact.legend for fact in detail_of(report.method).facts(report))
    text += "".join(f"\n{legend}" for legend in legends if legend)
    if any("[" in module.name for module in report.modules):
        text += (
            "\nof a stack of experts the lowest cosine is shown; + = the same of some of its "
            "experts"
        )
    return Text(text, style="dim")


def _summary(report: Report) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold")
    table.add_column()
    counts = f"{report.projected} of {len(report.modules)} modules"
    table.add_row(report.doing, f"{counts} ({describe(report.selection)})")
    table.add_row("projector", describe(report.projector))
    detail = detail_of(report.method)
    first = detail.columns[0]
    beside = (first.heading, report.values(first.key))
    for label, values in (("cosine", report.cosines), beside):
        found = spread(values)
        if found["mean"] is not None:
            table.add_row(
                label, f"min {found['min']:.3f}  mean {found['mean']:.3f}  max {found['max']:.3f}"
            )
    for fact in detail.facts(report):
        table.add_row(*fact.short)
    if report.pdst is not None:
        table.add_row("pdst", f"{report.pdst:.4f}")
    would = "  ".join(f"{tau:g}:{count}" for tau, count in report.would_project().items())
    table.add_row("tau: projects", would)
    notes: dict[str, list[str]] = {}
    for module in report.modules:
        if module.note is not None:
            notes.setdefault(module.note, []).append(module.name)
    for note, names in notes.items():
        table.add_row("note", Text(printable(f"{shorten(names)}: {note}")))
    return table
