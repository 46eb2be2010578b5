"""What an update is merged with."""

from __future__ import annotations

from dataclasses import dataclass

from safeproj.checkpoint import Weight
from safeproj.engine import Source, Update


@dataclass(frozen=True)
class Both:
    """What is read for a weight, and the safe adapter's update of it.

    Attributes:
        deciding: what Safe LoRA reads for its cosine; None without models.
        safe: the safe update with its scaling; None where it has none.
    """

    deciding: Source | None
    safe: Update | None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return 0 if self.deciding is None else self.deciding.nbytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return () if self.deciding is None else self.deciding.weights
