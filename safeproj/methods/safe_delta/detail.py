"""What Safe Delta says of a change beside its cosine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from safeproj.methods.detail import Column, Detail
from safeproj.records.scores import ModuleReport, spread, values

MUCH = 0.1
"""Error of an adapter's updates from which on the user is told."""


@dataclass(frozen=True)
class Kept(Detail):
    """How much of a change is kept, and how closely an adapter holds what takes its place.

    Attributes:
        share: of the weight's entries that are the fine-tune's; None where nothing changed.
        rank: of what is written for an adapter; None for a full fine-tune.
        error: `‖ΔW' - B'A'‖_F / ‖ΔW'‖_F`, likewise.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("kept_share", "kept", "share of entries that are the fine-tune's"),
        Column("scale", "scale", "scale ‖ΔW'‖/‖ΔW‖"),
        Column("delta_error", "error", "error ‖ΔW'-B'A'‖/‖ΔW'‖ of an adapter"),
    )

    share: float | None = None
    rank: int | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.share is not None:
            found["kept_share"] = self.share
        if self.rank is not None:
            found |= {"written_rank": self.rank, "delta_error": self.error}
        return found

    @classmethod
    def summary(
        cls, modules: Sequence[ModuleReport], details: Collection[Detail]
    ) -> dict[str, Any]:
        del details
        found = {key: values(modules, key) for key in ("kept_share", "delta_error")}
        return {key: spread(numbers) for key, numbers in found.items() if numbers}

    @classmethod
    def warnings(
        cls, details: Mapping[str, Detail], chosen: Collection[str], uncertain: Collection[str]
    ) -> Iterator[str]:
        del uncertain
        own = {name: each for name, each in details.items() if isinstance(each, cls)}
        errors = [own[name].error or 0.0 for name in chosen if name in own]
        far = [error for error in errors if error > MUCH]
        if far:
            yield (
                f"{len(far)} of {len(errors)} updates are the best approximation of their rank of "
                f"what Safe Delta makes of the weight, which differs from it by up to "
                f"{max(far):.0%}; a larger --delta-rank differs less, and a full model "
                "(merge the adapter, and give --model) not at all"
            )
