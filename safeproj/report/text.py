"""What formats for other programs share: the words of a finding, its place, what comes first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from safeproj.records.checks import Check, Checks, Finding
from safeproj.records.groups import Group, grouped
from safeproj.text import printable


@dataclass(frozen=True)
class Subject:
    """An adapter that was checked, and how it is called where results are published.

    Attributes:
        check: what was found about it.
        parts: of the path that stands for its SRC.
        is_file: whether that is a file, not a directory.
    """

    check: Check
    parts: tuple[str, ...]
    is_file: bool

    def describe(self, finding: Finding) -> str:
        """Return one printable line that says what was found, and of what.

        The adapter's absolute path is shortened: the text is published with the results of a build.
        """
        text = printable(finding.message)
        about = printable(finding.module or finding.tensor or finding.file or "")
        if about not in text:
            text = f"{about}: {text}"
        source = self.check.source.rstrip("/\\")
        if source and Path(source).is_absolute():
            text = text.replace(printable(source), printable(_joined(self.parts)))
        return text

    def groups(self, findings: Iterable[Finding] | None = None) -> list[tuple[Group, str]]:
        """Return what was found by rule, the worst first, each with its words.

        Args:
            findings: some of it; what counts if None.
        """
        return [(each, each.words(self.describe)) for each in grouped(self.check, findings)]

    def place(self, finding: Finding) -> str:
        """Return the file that a finding is about, as a relative path with forward slashes."""
        file = finding.file or self.check.weights_file or ""
        if self.is_file and finding.file is None:
            return _joined(self.parts)
        parent = self.parts[:-1] if self.is_file else self.parts
        # The name of an unsafe file may be absolute or lead upwards: it is only a label here.
        return _joined([*parent, *_names(file.split("/"))])


def subjects(checks: Checks) -> list[Subject]:
    """Return the adapters of a run in their order."""
    return [Subject(check, _parts(check.source), _is_file(check.source)) for check in checks.checks]


def by_severity(found: Sequence[Subject]) -> list[tuple[Subject, Finding]]:
    """Return what counts, the worst first, and otherwise in the order in which it was found."""
    pairs = [(subject, finding) for subject in found for finding in subject.check.findings]
    return sorted(pairs, key=lambda pair: pair[1].level.severity)


def relative(text: str) -> str:
    """Return an absolute path in the form that is published, and any other text as it is."""
    return _joined(_parts(text)) if Path(text).is_absolute() else text


def _parts(source: str) -> tuple[str, ...]:
    """Return the parts of the relative path that stands for an adapter's SRC.

    It starts at the current directory where the adapter lies below that. An adapter elsewhere is
    called by its directory's name alone, and one on the Hub by its id, so that no path of the
    machine is published.
    """
    path, exists = Path(source), False
    with suppress(OSError, ValueError, RuntimeError):
        path = path.expanduser()
        exists = path.exists()
        current = Path.cwd()
        # As it is spelled, and as the current directory may be spelled: without links.
        for each in (Path(os.path.abspath(path)), path.resolve()) if exists else ():  # noqa: PTH100
            if each.is_relative_to(current):
                return each.relative_to(current).parts
    if exists or path.is_absolute():
        return _names([PurePath(os.path.abspath(path)).name])  # noqa: PTH100 - keeps links
    return _names(source.partition("@")[0].replace("\\", "/").split("/"))[-2:]


def _is_file(source: str) -> bool:
    with suppress(OSError, ValueError, RuntimeError):
        return Path(source).expanduser().is_file()
    return False


def _names(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part not in ("", ".", ".."))


def _joined(parts: Iterable[str]) -> str:
    return "/".join(parts) or "."
