"""What a method says of updates beside their cosines, and how every format shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from safeproj.records.scores import ModuleReport, Report


@dataclass(frozen=True)
class Column:
    """A value of a module's record that formats show.

    Attributes:
        key: in the record.
        heading: what it is, in one word.
        meaning: the same with its formula, or in more words.
        form: how it is written.
        is_aside: whether it is shown only where there is room for every value.
    """

    key: str
    heading: str
    meaning: str
    form: str = ".4f"
    is_aside: bool = False

    def text(self, module: ModuleReport) -> str:
        """Return its value as text, empty where it is not defined."""
        value = module.value(self.key)
        return "" if value is None else format(value, self.form)


NORM = Column("alignment_norm", "‖V‖", "‖V‖", ".4g")
"""How far alignment moved the weight."""


@dataclass(frozen=True)
class Fact:
    """What is said of all modules together.

    Attributes:
        short: a label and a text, for a terminal.
        whole: the same, for a page.
        line: the same in one line, for Markdown; empty where that does not have it.
        legend: what explains it below a table, if anything.
    """

    short: tuple[str, str]
    whole: tuple[str, str]
    line: str = ""
    legend: str = ""


@dataclass(frozen=True)
class Blank:
    """What is said where nothing is there to compare an update with: `Score.factor` is None.

    Attributes:
        note: of one module.
        finding: why it has no score.
        warning: of `{count}` modules, which are `{names}`.
        refusal: where that is so of all modules; inputs by role.
    """

    note: str = "nothing to compare it with here; kept"
    finding: str = "there is nothing to compare it with"
    warning: str = "{count} modules have nothing to compare them with and are kept: {names}"
    refusal: str = "no module has anything to compare it with"


@dataclass(frozen=True)
class Detail:
    """What a method says of one update beside what all do; a method's own has fields.

    Attributes:
        columns: what formats show of it; the first is shown wherever the cosine is.
        blank: what is said where there is nothing to compare an update with.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("scale", "scale", "scale ‖B'‖/‖B‖"),)
    blank: ClassVar[Blank] = Blank()

    @property
    def length(self) -> float | None:
        """`‖V‖_F`: how far alignment moved the weight; None where that is not known."""
        return None

    @property
    def residual(self) -> float:
        """Upper bound of how far the projector is from what it stands for, as `‖C - C_K‖₂`."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that it adds to a module's record."""
        return asdict(self)

    @classmethod
    def unscored(cls) -> dict[str, Any]:
        """Return those keys of a module that is not scored."""
        return {}

    @classmethod
    def summary(
        cls, modules: Sequence[ModuleReport], details: Collection[Detail]
    ) -> dict[str, Any]:
        """Return the keys that it adds to a report's summary.

        Args:
            modules: all, with their values.
            details: of those that are scored.
        """
        del modules, details
        return {}

    @classmethod
    def facts(cls, report: Report) -> tuple[Fact, ...]:
        """Return what is said of all modules together, from their record."""
        del report
        return ()

    @classmethod
    def warnings(
        cls, details: Mapping[str, Detail], chosen: Collection[str], uncertain: Collection[str]
    ) -> Iterator[str]:
        """Yield what the user should know of the modules that were scored.

        Args:
            details: of those, by name.
            chosen: those that are projected.
            uncertain: those that might be chosen otherwise within the bounds of their cosines.
        """
        del details, chosen, uncertain
        yield from ()
