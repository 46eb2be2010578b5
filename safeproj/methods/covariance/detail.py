"""What the covariance-weighted correction says of an update beside its cosine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from safeproj.methods.detail import NORM, Column, Detail
from safeproj.records.scores import ModuleReport, spread, values


@dataclass(frozen=True)
class Effects:
    """How strongly an update acts on what a layer reads, without its scaling.

    Attributes:
        safety: `E ‖ΔW x‖²` on safety data.
        benign: the same on benign data, with the ridge.
    """

    safety: float
    benign: float

    @property
    def ratio(self) -> float:
        """`E_safety ‖ΔW x‖² / E_benign ‖ΔW x‖²`."""
        return self.safety / self.benign if self.benign > 0.0 else 0.0


@dataclass(frozen=True)
class Acting(Detail):
    """How strongly an update acts, and what takes its place; an update that is zero has none.

    Attributes:
        before: of the update.
        after: of the corrected one.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("safety_ratio", "ratio", "ratio E_safety‖ΔWx‖²/E_benign‖ΔWx‖²"),
        NORM,  # its Markdown has that column, empty
    )

    before: Effects
    after: Effects

    def to_dict(self) -> dict[str, Any]:
        return {"safety_ratio": self.before.ratio, "safety_ratio_after": self.after.ratio}

    @classmethod
    def summary(
        cls, modules: Sequence[ModuleReport], details: Collection[Detail]
    ) -> dict[str, Any]:
        del details
        found = {key: values(modules, key) for key in ("safety_ratio", "safety_ratio_after")}
        return {key: spread(ratios) for key, ratios in found.items() if ratios}
