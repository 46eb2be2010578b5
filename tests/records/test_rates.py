"""Intervals against what their papers say of them, and against simulation."""

from __future__ import annotations

import doctest
import math
from types import ModuleType

import numpy as np
import pytest

from safeproj.evaluation import judges, responses
from safeproj.records import evaluations, rates
from safeproj.records.rates import Rate, paired


@pytest.mark.parametrize(
    "module", [rates, judges, responses, evaluations], ids=lambda module: module.__name__
)
def test_the_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        pytest.param(81, 263, 0.2553, 0.3662, id="newcombe-81-of-263"),
        pytest.param(15, 148, 0.0624, 0.1605, id="newcombe-15-of-148"),
        pytest.param(0, 20, 0.0, 0.1611, id="newcombe-0-of-20"),
        pytest.param(1, 29, 0.0061, 0.1718, id="newcombe-1-of-29"),
    ],
)
def test_wilson_intervals_are_those_of_newcombes_table(
    hits: int, total: int, low: float, high: float
) -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    assert Rate(hits, total).interval == pytest.approx((low, high), abs=6e-5)


def test_independent_differences_are_those_of_newcombes_table() -> None:
    # Statistics in Medicine 17 (1998), 873-890, table II, method 10: 56/70 - 48/80.
    assert Rate(56, 70).minus(Rate(48, 80)) == pytest.approx((0.0524, 0.3339), abs=6e-5)


def oracle(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    """Return the paired interval from the four counts, written out as in the paper.

    `e` both, `f` the first only, `g` the second only, `h` neither.
    """
    n, z = e + f + g + h, 1.959963984540054

    def wilson(x: int) -> tuple[float, float]:
        root = z * math.sqrt(z * z + 4 * x * (n - x) / n)
        return (2 * x + z * z - root) / (2 * (n + z * z)), (2 * x + z * z + root) / (
            2 * (n + z * z)
        )

    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = wilson(e + f), wilson(e + g)
    product = (e + f) * (g + h) * (e + g) * (f + h)
    numerator = e * h - f * g
    if numerator > n / 2:
        corrected = numerator - n / 2
    elif numerator >= 0:
        corrected = 0.0
    else:
        corrected = float(numerator)
    phi = corrected / math.sqrt(product) if product else 0.0
    down = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    up = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    return p1 - p2 - math.sqrt(down), p1 - p2 + math.sqrt(up)


def pairs(e: int, f: int, g: int, h: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (e + f) + [False] * (g + h)
    second = [True] * e + [False] * f + [True] * g + [False] * h
    return first, second


@pytest.mark.parametrize(
    "counts",
    [(20, 12, 2, 16), (1, 10, 10, 1), (0, 30, 0, 0), (36, 0, 0, 14), (5, 3, 2, 90), (0, 0, 0, 8)],
    ids=str,
)
def test_paired_differences_are_those_of_the_formula(counts: tuple[int, int, int, int]) -> None:
    found = paired(*pairs(*counts))
    n = sum(counts)
    assert found.value == pytest.approx((counts[1] - counts[2]) / n)
    low, high = oracle(*counts)
    assert found.interval == pytest.approx((max(low, -1.0), min(high, 1.0)), abs=1e-12)
    assert found.total == n


def test_the_paired_interval_is_near_that_of_a_bootstrap_where_there_are_many_pairs() -> None:
    first, second = map(np.array, pairs(150, 90, 30, 130))
    draws = np.random.default_rng(0).integers(0, len(first), (4000, len(first)))
    means = (first.astype(int) - second)[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    found = paired(first.tolist(), second.tolist())
    assert found.interval == pytest.approx((low, high), abs=0.006)


def test_the_paired_interval_holds_the_truth_as_often_as_it_says() -> None:
    # 60 pairs that are drawn 3000 times; a bootstrap would have no width in many of them.
    chances = (0.05, 0.10, 0.02, 0.83)
    generator = np.random.default_rng(1)
    hits = 0
    for counts in generator.multinomial(60, chances, size=3000):
        low, high = oracle(*map(int, counts))
        hits += low <= chances[1] - chances[2] <= high
    assert 0.935 <= hits / 3000 <= 0.985


def test_differences_need_equally_many_answers() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match="0 of 0"):
        paired([], [])
