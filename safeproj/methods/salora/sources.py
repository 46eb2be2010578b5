"""What a safety module holds of one weight."""

from __future__ import annotations

from dataclasses import dataclass

from safeproj.checkpoint import Weight


@dataclass(frozen=True)
class SafetyBasis:
    """What a safety module holds of one weight.

    Attributes:
        weight: `U` (m, k), float32, orthonormal columns, the most important first.
        rank: how many of the columns are used.
        energies: for each of the k columns the share of the safety data's output energy that it
            and those before it hold.
    """

    weight: Weight
    rank: int
    energies: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.weight.shape[0] * self.weight.row_bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.weight,)
