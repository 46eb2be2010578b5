"""What Safe LoRA says of an update beside its cosine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safeproj.methods.detail import NORM, Blank, Column, Detail, Fact
from safeproj.records.scores import Report
from safeproj.text import natural_order, shorten


@dataclass(frozen=True)
class Alignment(Detail):
    """How far alignment moved the weight of an update, and what is known of its `C`.

    Attributes:
        norm: `‖V‖_F`.
        rank: k of a truncated projector, None where it is not truncated.
        truncation: upper bound of `‖C - C_K‖_F / ‖C‖_F` where a file holds part of `C`.
        residual: upper bound of `‖C - C_K‖₂`.
        is_determined: whether it is certain which directions a projector of rank k keeps.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("scale", "scale", "scale ‖CB‖/‖B‖"),
        NORM,
        Column("truncation_error", "relative error of C", "", ".3f", is_aside=True),
        Column("projector_rank", "rank of C", "", "d", is_aside=True),
    )
    blank: ClassVar[Blank] = Blank(
        note="V = 0: base and aligned are equal here, no alignment signal; kept",
        finding="base and aligned are equal here, so there is no alignment signal",
        warning=(
            "{count} modules have no alignment signal (base and aligned are equal there) and are "
            "kept: {names}"
        ),
        refusal=(
            "{base} and {aligned} are the same model: all weights that the adapter changes are "
            "equal in both; --base must be the model before alignment"
        ),
    )

    norm: float
    rank: int | None = None
    truncation: float | None = None
    residual: float = 0.0
    is_determined: bool = True

    @property
    def length(self) -> float:
        return self.norm

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"alignment_norm": self.norm}
        if self.rank is not None:
            found["projector_rank"] = self.rank
        if self.truncation is not None:
            found["truncation_error"] = self.truncation
        return found

    @classmethod
    def facts(cls, report: Report) -> tuple[Fact, ...]:
        errors = report.values("truncation_error")
        if not errors:
            return ()
        worst = f"up to {max(errors):.3f}"
        widths = [each.bounds[1] - each.bounds[0] for each in report.modules if each.bounds]
        known = f"cosine known to within {max(widths):.3f} at worst"
        legend = (
            "? = the alignment file keeps too little of C to be certain whether it is to be "
            "projected"
        )
        return (
            Fact(
                ("truncated C", f"relative error {worst}, {known}"),
                ("relative error of the truncated C", worst),
                legend=legend if any(each.uncertain for each in report.modules) else "",
            ),
        )

    @classmethod
    def warnings(
        cls, details: Mapping[str, Detail], chosen: Collection[str], uncertain: Collection[str]
    ) -> Iterator[str]:
        unsure = [
            name
            for name, each in details.items()
            if isinstance(each, Alignment) and not each.is_determined
        ]
        if unsure:
            yield (
                f"{len(unsure)} modules have singular values of V that are as good as equal before "
                "and after the cut, so that rounding decides which directions the exact projector "
                f"keeps there: {shorten(sorted(unsure, key=natural_order))}; choose another --rank "
                "or --energy"
            )
        if uncertain:
            yield (
                f"{len(uncertain)} decisions are not certain: the alignment file keeps part of C, "
                "and within the bound of that error these cosines may lie on the other side: "
                f"{shorten(sorted(uncertain, key=natural_order))}; use the checkpoints, or a file "
                "with more of C"
            )
        errors = [
            each.truncation
            for each in map(details.__getitem__, chosen)
            if isinstance(each, Alignment) and each.truncation
        ]
        if errors:
            yield (
                f"{len(errors)} modules are projected with a truncated C, which differs from C by "
                f"up to {max(errors):.1%}"
            )
