"""The report as GitHub-flavoured Markdown, for pull requests and model cards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from safeproj.methods.registry import detail_of, words_of
from safeproj.records.checks import Check, Checks, Evidence
from safeproj.records.evaluations import (
    LEGEND,
    WORDS,
    Evaluation,
    judge_words,
    rows,
    task_rows,
    title_of,
)
from safeproj.records.repairs import Repair
from safeproj.records.rules import RULES, Level
from safeproj.records.scores import ModuleReport, Report, Reports, spread
from safeproj.records.sweeps import METHOD, Rates, Sweep
from safeproj.report import repair_words
from safeproj.report import sweep_words as words
from safeproj.report.text import Subject, subjects
from safeproj.text import printable


def render(report: Report, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the report as Markdown."""
    title = words_of(report.method).title
    return "\n".join([f"## {title} report", "", *_body(report)]) + "\n"


def render_many(reports: Reports, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return a table of the adapters, and the report of each below it."""
    first = detail_of(reports.method).columns[0]
    lines = [
        f"## {words_of(reports.method).title} reports",
        "",
        f"| adapter | modules | {reports.doing} | cosine | {first.heading} | warnings |",
        "|---|---:|---:|---|---|---:|",
    ]
    for name, report in reports.reports.items():
        cells = (
            code(name),
            str(len(report.modules)),
            str(report.projected),
            span(report.cosines),
            span(report.values(first.key)),
            str(len(report.warnings)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name, failure in reports.failures.items():
        lines.append(f"- failed: {code(name)}: {escaped(failure.describe())}")
    for name, report in reports.reports.items():
        lines += ["", f"### {code(name)}", "", *_body(report)]
    return "\n".join(lines) + "\n"


def render_evaluation(evaluation: Evaluation, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return a table of each set, and what was run."""
    lines = ["## Evaluation", "", f"- model: {code(str(evaluation.model['source']))}"]
    for subject in evaluation.subjects:
        if subject.adapter is not None:
            source = code(str(subject.adapter["source"]))
            lines.append(f"- adapter {code(subject.name)}: {source}")
    lines.append(f"- judge: {code(judge_words(evaluation.judge))}")
    lines += [f"- warning: {escaped(warning)}" for warning in evaluation.warnings]
    for name, failure in evaluation.failures.items():
        lines.append(f"- failed: {code(name)}: {escaped(failure.describe())}")
    for each in evaluation.sets:
        outcomes = evaluation.outcomes(each["name"])
        headings = [WORDS.get(outcome, outcome) for outcome in outcomes]
        lines += ["", f"### {escaped(title_of(each))}", ""]
        lines.append(f"| | {' | '.join(map(escaped, headings))} |")
        lines.append(f"|---|{'---:|' * len(outcomes)}")
        for name, cells in rows(evaluation, each["name"]):
            lines.append(f"| {code(name) if name else 'change'} | {' | '.join(cells)} |")
    if evaluation.sets:
        lines += ["", LEGEND]
    found = task_rows(evaluation)
    if found:
        names = " | ".join(code(each.name) for each in evaluation.subjects)
        lines += ["", "### lm-eval", "", f"| task | metric | {names} |"]
        lines.append(f"|---|---|{'---:|' * len(evaluation.subjects)}")
        for task, metric, values in found:
            lines.append(f"| {code(task)} | {code(metric)} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def render_checks(checks: Checks, *, width: int, color: bool, verbose: bool) -> str:  # noqa: ARG001
    """Return the outcome, the findings by rule with what to do, and the scores folded below."""
    found = subjects(checks)
    lines = [
        f"## safeproj check: {checks.words}",
        "",
        "| adapter | outcome | findings | projected, with evidence |",
        "|---|---|---|---|",
    ]
    for check in checks.checks:
        cells = (code(check.name), check.words, tally(check), evidence(check))
        lines.append(f"| {' | '.join(cells)} |")
    remarks = [(check, remark) for check in checks.checks for remark in check.remarks]
    if remarks:
        lines += ["", *(f"- {code(check.name)}: {escaped(remark)}" for check, remark in remarks)]
    rows = [row for subject in found for row in _findings(subject)]
    if rows:
        lines += ["", "| adapter | finding | level | what was found |", "|---|---|---|---|", *rows]
    rules = dict.fromkeys(
        each.id for check in checks.checks for each in check.at(Level.fail, Level.undecided)
    )
    if rules:
        lines += ["", *(f"- **{id_}** {RULES[id_].remedy}" for id_ in rules)]
    for subject in found:
        lines += _folded(subject, verbose)
    return "\n".join(lines).rstrip("\n") + "\n"


def render_sweep(sweep: Sweep, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return what follows from a sweep, and a table of all that was measured."""
    sets = [each.name for each in sweep.sets]
    outcomes = [(name, outcome) for name in sets for outcome in sweep.model[name]]
    heads = [
        "adapter",
        "modules",
        words.place_heading(sweep),
        "change",
        *(f"{n}: {outcome}" for n, outcome in outcomes),
    ]

    def row(name: str, modules: str, tau: str, change: str, rates: Rates) -> str:
        shares = (words.with_interval(rates[each][outcome]) for each, outcome in outcomes)
        return f"| {' | '.join([escaped(name), modules, tau, change, *shares])} |"

    lines = [
        f"## Sweep: {words.heading(sweep, METHOD)} beside controls",
        "",
        *(f"{escaped(sentence)}\n" for sentence in words.conclusion(sweep)),
        *(f"{escaped(what)}: {code(line)}\n" for what, line in words.commands(sweep)),
        *(
            f"- {role.replace('_', ' ')}: {code(str(identity['source']))}"
            for role, identity in sweep.inputs.items()
        ),
        *(f"- {name}: {meaning}" for name, meaning in words.meanings(sweep)),
        *(f"- warning: {escaped(warning)}" for warning in sweep.warnings),
        "",
        f"| {' | '.join(map(escaped, heads))} |",
        f"|---|---:|---:|---:|{'---|' * len(outcomes)}",
        row("no adapter", "", "", "", sweep.model),
        row("the adapter as it is", "", "", "", sweep.adapter),
    ]
    for point in (each for each in sweep.points if each.modules):
        for kind, trial in point.trials.items():
            name = words.heading(sweep, kind)
            if trial.factor is not None:
                name += f" ({trial.factor:.3f})"
            count, change = str(len(point.modules)), f"{trial.relative_change:.3f}"
            lines.append(row(name, count, words.place(sweep, point), change, trial.rates))
    return "\n".join(lines) + "\n"


def render_repair(repair: Repair, *, width: int, color: bool) -> str:  # noqa: ARG001
    """Return what was reached on the test split, and what was tried on the validation split."""
    lines = ["## Repair", "", *(f"{escaped(each)}\n" for each in repair_words.conclusion(repair))]
    if repair.test is not None:
        lines += ["| test split | refused | skill |", "|---|---:|---:|"]
        lines += [_row(each) for each in repair_words.reported(repair)]
        lines += ["", "| validation split | change | refused | skill |", "|---|---:|---:|---:|"]
        lines += [_row(each) for each in repair_words.tried(repair)]
        lines += ["", f"{LEGEND_SHARES} {escaped(repair_words.splits(repair))}."]
    lines += ["", f"The same tensors: {code(repair_words.command(repair))}"]
    lines += [f"- warning: {escaped(each)}" for each in repair.warnings]
    return "\n".join(lines) + "\n"


LEGEND_SHARES = "Shares of the answers in per cent with 95 % intervals (Wilson)."
"""What the tables of a repair hold."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _findings(subject: Subject) -> list[str]:
    """Return a row for each rule that found something in an adapter."""
    name, check = code(subject.check.name), subject.check
    listed = [(each.level.value, each, words) for each, words in subject.groups()]
    listed += [("ignored", each, words) for each, words in subject.groups(check.ignored)]
    return [
        f"| {name} | {each.rule.id} {each.rule.name} | {level} | {escaped(words)} |"
        for level, each, words in listed
    ]


def _folded(subject: Subject, verbose: bool) -> list[str]:
    """Return the scores of an adapter, and every finding, each to be unfolded."""
    check, lines = subject.check, []
    every = [*check.findings, *check.ignored] if verbose else []
    if every:
        listed = (f"- {each.id} {escaped(subject.describe(each))}" for each in every)
        lines += _details("Every finding", listed)
    if check.report is not None:
        lines += _details(f"Scores of {len(check.report.modules)} modules", _body(check.report))
    return ["", f"### {code(check.name)}: {check.words}", *lines] if lines else []


def _details(heading: str, lines: Iterable[str]) -> list[str]:
    return ["", f"<details><summary>{heading}</summary>", "", *lines, "", "</details>"]


def tally(check: Check) -> str:
    """Return how many findings there are of each level in words."""
    counts = [(sum(each.count for each in check.at(level)), level.value) for level in Level]
    counts.append((sum(each.count for each in check.ignored), "ignored"))
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "none"


def evidence(check: Check) -> str:
    """Return how many modules are shown to be projected, by what, in words."""
    counts = Counter(check.evidence.values())
    return ", ".join(f"{counts[kind]} {kind.value}" for kind in Evidence if counts[kind]) or "none"


_LINKED = re.compile(r"://|\bwww\.|@", re.IGNORECASE)
"""What makes a word a link, an address or a mention wherever Markdown is shown."""


def escaped(text: str) -> str:
    r"""Return a line of text that comes from files, so that it can be nothing but text.

    What GitHub makes a link or a mention of by itself, whatever is escaped in it, becomes code.

    >>> print(escaped("# [a](b) <i> see https://example.org"))
    \# \[a\](b) \<i\> see `https://example.org`
    """
    words = printable(text).split()
    plain = " ".join(code(word) if _LINKED.search(word) else _marked(word) for word in words)
    # What begins a list, a rule or a heading does so only at the beginning of a line.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", plain)


def _marked(word: str) -> str:
    # A single _ between letters or digits is nothing but that, and names of settings have many.
    return re.sub(r"([\\`*\[\]<>|#!&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", word)


def code(name: str) -> str:
    """Return a name as code, which breaks neither a table nor the line, nor ends a comment."""
    return f"`{re.sub('[`|<>]', '?', printable(name)) or ' '}`"


def _body(report: Report) -> list[str]:
    return [*_summary(report), "", *_modules(report)]


def _summary(report: Report) -> list[str]:
    lines = [
        f"- {'model' if report.is_model else 'adapter'}: {code(str(report.subject['source']))}",
        *(
            f"- {role.replace('_', ' ')}: {code(str(report.inputs[role]['source']))}"
            for role in ("aligned", "base", "alignment", "data", "safety_module")
            if role in report.inputs
        ),
        f"- projector: {describe(report.projector)}; selection: {describe(report.selection)}",
        f"- {report.doing}: {report.projected} of {len(report.modules)} modules",
        f"- cosine: {span(report.cosines)}",
        *measured(report),
    ]
    return lines + [f"- warning: {escaped(warning)}" for warning in report.warnings]


def _modules(report: Report) -> list[str]:
    columns = [each for each in detail_of(report.method).columns if not each.is_aside]
    headings = " | ".join(each.heading for each in columns)
    lines = [
        f"| module | shape | r | cosine | {headings} | {report.doing} | note |",
        f"|---|---|---:|---:|{'---:|' * len(columns)}---|---|",
    ]
    for module in report.modules:
        cells = (
            code(module.name),
            f"{module.shape[0]}×{module.shape[1]}",
            str(module.rank),
            _cosine(module),
            *(each.text(module) for each in columns),
            "yes" if module.projected else "",
            escaped(module.note or ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cosine(module: ModuleReport) -> str:
    if module.bounds is None:
        return _number(module.cosine)
    mark = "?" if module.uncertain else ""
    return f"{_number(module.cosine)}{mark} [{module.bounds[0]:.4f}, {module.bounds[1]:.4f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def describe(options: dict[str, object]) -> str:
    """Return the projector or selection object as words: `threshold 0.35`, `exact, rank 8`."""
    items = dict(options)
    kind = str(items.pop("kind", items.pop("mode", "")))
    head = f"{kind} {items.pop(kind)}" if kind in items else kind
    return ", ".join([head, *(f"{name} {value}" for name, value in items.items())])


def measured(report: Report) -> list[str]:
    """Return what the method says of all modules beside their cosines, a line each."""
    detail = detail_of(report.method)
    first = detail.columns[0]
    lines = [f"{first.meaning}: {span(report.values(first.key))}"]
    return [f"- {line}" for line in (*lines, *(fact.line for fact in detail.facts(report))) if line]


def span(values: list[float]) -> str:
    """Return the range and the mean of cosines or scales as words."""
    found = spread(values)
    if found["mean"] is None:
        return "none defined"
    return f"{found['min']:.4f} to {found['max']:.4f}, mean {found['mean']:.4f}"
