"""The second moments of what one or several weights read."""

from __future__ import annotations

from dataclasses import dataclass

from safeproj.checkpoint import Weight


@dataclass(frozen=True)
class StoredMoment:
    """A second moment of a layer's inputs in a file.

    Attributes:
        weight: the moment (n, n), or `X` (k, n) with `XᵀX` the moment; float32.
        whole: which of the two.
    """

    weight: Weight
    whole: bool


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs that one or several weights read.

    Attributes:
        safety: on safety data, `H`.
        benign: on benign data, `S`.
    """

    safety: StoredMoment
    benign: StoredMoment

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(weight.shape[0] * weight.row_bytes for weight in self.weights)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.safety.weight, self.benign.weight)
