"""What SaLoRA says of an update beside its cosine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from safeproj.methods.detail import Column, Detail, Fact
from safeproj.records.scores import ModuleReport, Report, spread, values


@dataclass(frozen=True)
class Safety(Detail):
    """How much of an update lies in the safety subspace of its layer.

    Attributes:
        rank: how many directions of the subspace are used.
        share: `‖Uᵀ ΔW‖_F² / ‖ΔW‖_F²`, None where it is undefined.
        energies: share of the safety data's output energy that the first 1, 2, … directions hold.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("safety_share", "share", "share ‖UᵀΔW‖²/‖ΔW‖²"),
        Column("safety_energy", "energy", "energy of the directions in use"),
        Column("projector_rank", "rank of C", "", "d", is_aside=True),
    )

    rank: int
    share: float | None
    energies: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "projector_rank": self.rank,
            "safety_share": self.share,
            "safety_energy": self.energies[self.rank - 1],
        }

    @classmethod
    def unscored(cls) -> dict[str, Any]:
        return {"safety_share": None, "safety_energy": None}

    @classmethod
    def summary(
        cls, modules: Sequence[ModuleReport], details: Collection[Detail]
    ) -> dict[str, Any]:
        energies = [each.energies for each in details if isinstance(each, Safety)]
        return {
            "safety_share": spread(values(modules, "safety_share")),
            "safety_energy": _mean_energies(energies),
        }

    @classmethod
    def facts(cls, report: Report) -> tuple[Fact, ...]:
        found = report.summary.get("safety_energy")
        if not found:
            return ()
        shares = {int(rank): share for rank, share in found.items()}
        title = "share of the safety data's output energy by rank"
        said = ", ".join(f"{rank}: {share:.2f}" for rank, share in shares.items())
        label = "energy by rank"
        return (
            Fact(
                (label, "  ".join(f"{rank}:{share:.2f}" for rank, share in shares.items())),
                (title, said),
                f"{title}, mean over modules: {said}",
                f"{label} = how much of the safety data's output energy so many directions hold, "
                "mean over modules",
            ),
        )


def _mean_energies(energies: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """Return for ranks the mean share of the safety data's energy that so many directions hold.

    The ranks are the powers of two up to the largest stored one, and that. A module that has fewer
    directions counts with all of them.
    """
    largest = max(map(len, energies), default=0)
    ranks = {1 << power for power in range(largest.bit_length())} | {largest}
    return {
        str(rank): sum(each[min(rank, len(each)) - 1] for each in energies) / len(energies)
        for rank in sorted(ranks)
        if largest
    }
