"""What Safe Delta made of a weight, and of an update."""

from __future__ import annotations

from dataclasses import dataclass

from safeproj.checkpoint import Weight
from safeproj.methods.differences import Difference


@dataclass(frozen=True)
class Delta(Difference):
    """`ΔW'` as the difference of the corrected weight, which is in memory, and the aligned one.

    Attributes:
        kept: the share of the weight's entries that are the fine-tune's.
    """

    kept: float = 0.0


@dataclass(frozen=True)
class Nothing:
    """What is read for an update: it was made beforehand."""

    nbytes: int = 0
    weights: tuple[Weight, ...] = ()
