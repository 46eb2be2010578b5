"""The report as GitHub-flavoured Markdown, for pull requests and model cards."""

from __future__ import annotations

from safeproj.report.record import Report, spread


def render(report: Report, *, width: int, color: bool) -> str:  # noqa: ARG001 - the interface
    """Return the report as Markdown."""
    return "\n".join([*_summary(report), "", *_modules(report)]) + "\n"


def _summary(report: Report) -> list[str]:
    lines = [
        "## Safe LoRA report",
        "",
        f"- adapter: `{report.inputs['adapter']['source']}`",
        f"- aligned: `{report.inputs['aligned']['source']}`",
        f"- base: `{report.inputs['base']['source']}`",
        f"- projector: {describe(report.projector)}; selection: {describe(report.selection)}",
        f"- projected: {report.projected} of {len(report.modules)} modules",
        f"- cosine: {span(report.cosines)}",
        f"- scale ‖CB‖/‖B‖: {span(report.scales)}",
    ]
    return lines + [f"- warning: {warning}" for warning in report.warnings]


def _modules(report: Report) -> list[str]:
    lines = [
        "| module | shape | r | cosine | scale | ‖V‖ | projected | note |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for module in report.modules:
        cells = (
            f"`{module.name}`",
            f"{module.shape[0]}×{module.shape[1]}",
            str(module.rank),
            _number(module.cosine),
            _number(module.scale),
            "" if module.alignment_norm is None else f"{module.alignment_norm:.4g}",
            "yes" if module.projected else "",
            module.note or "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def describe(options: dict[str, object]) -> str:
    """Return the projector or selection object as words: `threshold 0.35`, `exact, rank 8`."""
    items = dict(options)
    kind = str(items.pop("kind", items.pop("mode", "")))
    head = f"{kind} {items.pop(kind)}" if kind in items else kind
    return ", ".join([head, *(f"{name} {value}" for name, value in items.items())])


def span(values: list[float]) -> str:
    """Return the range and the mean of cosines or scales as words."""
    found = spread(values)
    if found["mean"] is None:
        return "none defined"
    return f"{found['min']:.4f} to {found['max']:.4f}, mean {found['mean']:.4f}"
