"""How two updates are merged, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

EXACT, LOW_RANK, FACTOR_WISE = "exact", "low-rank", "factor-wise"
FORMS = (EXACT, LOW_RANK, FACTOR_WISE)
"""How the merged update is written: as it is, as its best approximation of a rank, or as the
factors merged one by one, which is another update."""

VECTOR = "safety-vector"
"""To a whole change a multiple of what alignment moved the weight by is added."""


@dataclass(frozen=True)
class Merging:
    """How two updates are merged.

    Attributes:
        weight: `λ`, that of the safe one; or `γ`, that of the safety vector.
        form: one of `FORMS`, or `VECTOR`.
        rank: of the best approximation; that of the update if None.
    """

    weight: float
    form: str = EXACT
    rank: int | None = None

    def written_rank(self, own: int, safe: int) -> int:
        """Return r' by the ranks of both updates; that of a safe one which is zero is 0."""
        if self.form == EXACT:
            return own + safe
        return own if self.rank is None or self.form == FACTOR_WISE else min(self.rank, own + safe)
