"""Shares of a number of responses, with 95 % intervals, and whether two differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.959963984540054
"""97.5 % point of the standard normal distribution."""


@dataclass(frozen=True)
class Rate:
    """`hits` of `total` responses.

    Raises:
        ValueError: there are none, or more hits than responses.
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise ValueError(f"{self.hits} of {self.total}")

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval of 95 %.

        >>> low, high = Rate(0, 10).interval
        >>> round(low, 4), round(high, 4)
        (0.0, 0.2775)
        """
        n, p = self.total, self.value
        centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        low = 0.0 if self.hits == 0 else max(centre - half, 0.0)
        high = 1.0 if self.hits == n else min(centre + half, 1.0)
        return low, high

    def minus(self, other: Rate) -> tuple[float, float]:
        """Return the interval of 95 % of the difference of two independent shares.

        Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10).
        """
        difference = self.value - other.value
        (low, high), (other_low, other_high) = self.interval, other.interval
        down = math.hypot(self.value - low, other_high - other.value)
        up = math.hypot(high - self.value, other.value - other_low)
        return difference - down, difference + up

    def to_dict(self) -> dict[str, Any]:
        """Return the rate in a JSON report."""
        low, high = self.interval
        return {
            "hits": self.hits,
            "total": self.total,
            "rate": self.value,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True)
class Difference:
    """How much one share is above another one of the same prompts.

    Attributes:
        value: the first minus the second.
        interval: of 95 %.
        total: prompts that have an answer of both.
    """

    value: float
    interval: tuple[float, float]
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Return the difference in a JSON report."""
        low, high = self.interval
        return {"difference": self.value, "low": low, "high": high, "total": self.total}


def paired(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Return the difference of two shares of the same prompts, with its interval of 95 %.

    Newcombe's hybrid score interval for paired data (Statistics in Medicine 17, 1998, pages
    2635 to 2650, method 10): as for independent shares, but for the correlation of the pairs. A
    bootstrap over the prompts would have no width where all of them changed, or none did, which
    is common here.

    Args:
        first: of each prompt, whether its answer counts.
        second: the same with another model.

    Raises:
        ValueError: there are none, or not equally many.

    >>> found = paired([True] * 10, [False] * 10)
    >>> found.value, round(found.interval[0], 4), found.interval[1]
    (1.0, 0.6075, 1.0)
    """
    both = sum(a and b for a, b in zip(first, second, strict=True))
    mine, other = Rate(sum(first), len(first)), Rate(sum(second), len(second))
    correlation = _correlation(mine, other, both)
    (low, high), (other_low, other_high) = mine.interval, other.interval
    difference = mine.value - other.value
    down = _joined(mine.value - low, other_high - other.value, correlation)
    up = _joined(high - mine.value, other.value - other_low, correlation)
    return Difference(
        difference, (max(difference - down, -1.0), min(difference + up, 1.0)), len(first)
    )


def _correlation(mine: Rate, other: Rate, both: int) -> float:
    """Return the correlation of the pairs, taken towards zero as method 10 does."""
    n = mine.total
    only, others_only = mine.hits - both, other.hits - both
    neither = n - both - only - others_only
    margins = mine.hits * (n - mine.hits) * other.hits * (n - other.hits)
    if margins == 0:
        return 0.0
    excess = float(both * neither - only * others_only)
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    return excess / math.sqrt(margins)


def _joined(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))
