"""What `safeproj patch` says at its end: what it did, what it left, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeproj.adapter.peft import SAFETENSORS
from safeproj.methods.interface import Method
from safeproj.records.scores import ModuleReport, Report, Reports
from safeproj.text import command_line, shorten

_PROMPTS = ("--harmful", "HARMFUL.jsonl", "--skill", "SKILL.jsonl")


@dataclass(frozen=True)
class Ending:
    """The last lines of a run.

    Attributes:
        method: what was done.
        adapters: the SRC as they were given.
        out: the directory that was written, or would be.
        record: of one adapter, or of many.
        dry_run: whether nothing was to be written.
    """

    method: Method
    adapters: Sequence[str]
    out: Path
    record: Report | Reports
    dry_run: bool

    @property
    def result(self) -> str:
        """What was written, and how much was changed."""
        reports = self._reports
        written = any(report.written for report in reports.values())
        head = f"wrote {self.out}" if written else "nothing written"
        head = f"dry run: {head}" if self.dry_run else head
        unchanged = [name for name, report in reports.items() if not report.changed]
        if isinstance(self.record, Report):
            if unchanged:
                head += ": nothing was changed" if written else ", and nothing would be changed"
            return f"{head} ({_count(self.record)})"
        what = f"{len(reports)} of {len(reports) + len(self.record.failures)} adapters"
        if unchanged:
            changed = "would be" if self.dry_run else "was"
            what += f"; nothing {changed} changed in {len(unchanged)}: {shorten(unchanged)}"
        return f"{head} ({what})"

    @property
    def left(self) -> str:
        """Which modules are as they were, empty where that was said."""
        reports = self._reports.values()
        modules = [module for report in reports for module in report.modules]
        if not any(report.changed for report in reports):
            return ""
        kept = [module for module in modules if not module.projected]
        are = "would stay as they are" if self.dry_run else "are as they were"
        if not kept:
            return f"left: none of {len(modules)} modules is as it was"
        return f"left: {len(kept)} of {len(modules)} modules {are}{_lowest(kept, ' among them')}"

    @property
    def next(self) -> str:
        """What to do now, with the command for it."""
        reports = self._reports.values()
        if not reports:
            return ""
        if not any(report.changed for report in reports):
            all_of_them = all(report.selection.get("mode") == "all" for report in reports)
            more = "--layers N, --all or a higher --threshold changes more"
            more = "no other selection changes more" if all_of_them else more
            what = "model" if self._is_model else "adapter"
            return f"next: {more}; as it is, the {what} does what it did before"
        if self.dry_run:
            return "next: the same without --dry-run"
        if self._is_model:
            words = ["safeproj", "eval", "--model", str(self.out), *_PROMPTS]
            return f"next: {command_line(words)}"
        if not any((self.out / name / SAFETENSORS).is_file() for name in self._reports):
            return "next: measure it where it is served; safeproj eval runs PEFT adapters alone"
        many = isinstance(self.record, Reports)
        subjects = [str(self.out)] if many else [self.adapters[0], str(self.out)]
        model = self.method.sources.get("aligned", "MODEL")
        words = ["safeproj", "eval", "--model", model]
        words += [part for each in subjects for part in ("--adapter", each)]
        words += _PROMPTS
        return f"next: {command_line(words)}"

    @property
    def unchanged(self) -> list[str]:
        """Why nothing was written, for each adapter of which no update would be changed."""
        return [
            f"{f'{name}: ' if name else ''}nothing would be changed, so nothing was written "
            f"({_count(report)})"
            for name, report in self._reports.items()
            if not report.changed
        ]

    @property
    def _is_model(self) -> bool:
        return isinstance(self.record, Report) and self.record.is_model

    @property
    def _reports(self) -> dict[str, Report]:
        return {"": self.record} if isinstance(self.record, Report) else self.record.reports


def _count(report: Report) -> str:
    """Return how many modules were changed, or would be, and why none."""
    doing = "projected" if report.written else "would be projected"
    if report.changed:
        return f"{report.projected} modules {doing}"
    if report.projected:
        return f"the projection of {report.projected} modules is what they were"
    return f"0 of {len(report.modules)} modules {doing}{_lowest(report.modules)}"


def _lowest(modules: Sequence[ModuleReport], among: str = "") -> str:
    cosines = [module.cosine for module in modules if module.cosine is not None]
    return f", the lowest cosine{among} is {min(cosines):.3f}" if cosines else ""
