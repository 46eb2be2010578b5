"""The model card's section about what was done to the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from safeproj.methods.registry import words_of
from safeproj.records.scores import ModuleReport, Report
from safeproj.report.markdown import code, describe, escaped, measured, span


def section(report: Report) -> str:
    """Return the Markdown that says what was done; nothing where no update was changed.

    An adapter of a changed base that was converted is another one than before.
    """
    if not (report.changed or "converted_from" in report.inputs.get("adapter", {})):
        return ""
    lines = [
        "## Safety projection",
        "",
        f"safeproj {report.version} {_done(report)}.",
        "",
        f"- projector: {describe(report.projector)}",
        f"- selection: {describe(report.selection)}",
        f"- cosine of an update and its projection, before: {span(report.cosines)}",
        *measured(report),
        "- every module, its score and the digests of the inputs: `safeproj.json`",
        "",
        *_kinds(report),
        "",
        "Projection is no proof of safety: evaluate the patched "
        f"{'model' if report.is_model else 'adapter'} before you publish it.",
    ]
    return "\n".join([*lines, *(f"\n> Warning: {escaped(warning)}" for warning in report.warnings)])


def _kinds(report: Report) -> Iterator[str]:
    """Yield a table of what was changed, by the kinds of layers."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in report.modules:
        kinds.setdefault(module.kind, []).append(module)
    yield "| layers | changed | cosine before |"
    yield "|---|---:|---|"
    for kind, modules in kinds.items():
        changed = sum(module.projected for module in modules)
        cosines = [module.cosine for module in modules if module.cosine is not None]
        yield f"| {code(kind)} | {changed} of {len(modules)} | {span(cosines)} |"


def _done(report: Report) -> str:
    """Return what was done, in one sentence."""
    names = {role: _published_name(identity) for role, identity in report.inputs.items()}
    known = {"changed", "all", *names}
    done = next(text for text in words_of(report.method).all_done if fields_of(text) <= known)
    if report.is_model:
        done = done.replace("adapted modules", "weights")
    return done.format(changed=report.projected, all=len(report.modules), **names)


def fields_of(text: str) -> set[str]:
    """Return what is put into a text.

    >>> sorted(fields_of("{changed} of {all} modules"))
    ['all', 'changed']
    """
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def _published_name(identity: Mapping[str, Any]) -> str:
    """Return the source, as code, without the directories of the machine it was patched on."""
    source = str(identity["source"])
    name = Path(source).name if Path(source).is_absolute() else source
    revision = identity.get("revision")
    return code(name if revision is None or "@" in name else f"{name}@{revision}")
