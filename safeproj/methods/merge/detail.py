"""What merging says of an update beside its cosine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from safeproj.methods.detail import NORM, Blank, Column, Detail, Fact
from safeproj.methods.merge.forms import EXACT, FACTOR_WISE
from safeproj.methods.safe_lora.detail import Alignment
from safeproj.records.scores import ModuleReport, Report, spread, values


@dataclass(frozen=True)
class Mixed(Detail):
    """How far merging moves an update, and how closely it is written.

    Attributes:
        deciding: what Safe LoRA says of it, by whose cosine it is chosen.
        form: how it is written.
        rank: r' of what is written; None of an update that is zero, was not merged, or
            is of a full fine-tune.
        change: `‖ΔW' - ΔW‖_F / ‖ΔW‖_F`.
        error: `‖ΔW' - M‖_F / ‖M‖_F`, with `M` what the formula says.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("scale", "scale", "scale ‖ΔW'‖/‖ΔW‖"),
        Column("merge_change", "change", "change ‖ΔW'-ΔW‖/‖ΔW‖"),
        Column("merge_error", "error", "error ‖ΔW'-M‖/‖M‖, M = (1-λ)ΔW + λΔW_safe"),
        Column("written_rank", "rank", "rank of ΔW'", "d", is_aside=True),
        NORM,
    )
    blank: ClassVar[Blank] = Alignment.blank

    deciding: Detail = field(default_factory=Detail)
    form: str = EXACT
    rank: int | None = None
    change: float | None = None
    error: float | None = None

    @property
    def length(self) -> float | None:
        return self.deciding.length

    @property
    def residual(self) -> float:
        return self.deciding.residual

    def to_dict(self) -> dict[str, Any]:
        found = self.deciding.to_dict()
        if self.change is not None:
            found |= {"merge_change": self.change, "merge_error": self.error}
        if self.rank is not None:
            found["written_rank"] = self.rank
        return found

    @classmethod
    def summary(
        cls, modules: Sequence[ModuleReport], details: Collection[Detail]
    ) -> dict[str, Any]:
        del details
        found = {key: values(modules, key) for key in ("merge_change", "merge_error")}
        return {key: spread(numbers) for key, numbers in found.items() if numbers}

    @classmethod
    def facts(cls, report: Report) -> tuple[Fact, ...]:
        errors = [error for error in report.values("merge_error") if error]
        if not errors:
            return Alignment.facts(report)
        text = f"up to {max(errors):.4f}, mean {sum(errors) / len(errors):.4f}"
        said = Fact(("merge error", text), ("relative error of the merged updates", text))
        return (said, *Alignment.facts(report))

    @classmethod
    def warnings(
        cls, details: Mapping[str, Detail], chosen: Collection[str], uncertain: Collection[str]
    ) -> Iterator[str]:
        own = {name: each for name, each in details.items() if isinstance(each, cls)}
        yield from Alignment.warnings(
            {name: each.deciding for name, each in own.items()}, chosen, uncertain
        )
        errors = [own[name].error or 0.0 for name in chosen if name in own]
        if not any(errors):
            return
        if any(each.form == FACTOR_WISE for each in own.values()):
            yield (
                "the factors are merged one by one, as the reference code does: that adds the "
                "cross terms B A_safe and B_safe A, so that what is written differs from "
                f"(1-λ)ΔW + λΔW_safe by up to {max(errors):.1%}; --merge-form exact has none"
            )
        else:
            yield (
                f"{sum(error > 0.0 for error in errors)} modules are written as the best "
                "approximation of their rank, which differs from (1-λ)ΔW + λΔW_safe by up to "
                f"{max(errors):.1%}; a larger --merge-rank, or --merge-form exact, differs less"
            )
