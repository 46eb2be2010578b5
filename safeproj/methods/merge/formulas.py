"""What merging two updates of one weight computes, in float64.

`ΔW' = (1-λ) ΔW + λ ΔW_safe` (SafeMERGE, arXiv 2503.17239), with `ΔW = s · B A` and
`ΔW_safe = s_safe · B_safe A_safe`. What is written is scaled by `s`, as before, so the second
update counts `ratio = s_safe / s` times. `ΔW` (m, n) is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy

from safeproj.adapter.low_rank import balanced, decomposed
from safeproj.methods.factors import norm
from safeproj.methods.merge.forms import EXACT, LOW_RANK, Merging
from safeproj.storage.arrays import Array, double

Factors: TypeAlias = tuple[Array, Array]
"""`A` (r, n) and `B` (m, r)."""

NOISE = 1e-13
"""Errors that are rounding, and none."""


@dataclass(frozen=True)
class Merged:
    """What merging makes of one update.

    Attributes:
        A: (r', n).
        B: (m, r').
        error: `‖B' A' - M‖_F / ‖M‖_F` of the update `M` that the formula says; 0 where it is that.
    """

    A: Array
    B: Array
    error: float


def exact(own: Factors, safe: Factors | None, weight: float, ratio: float) -> Factors:
    """Return `A' = [A; A_safe]` and `B' = [(1-λ) B, λ ratio B_safe]`, of rank r + r_safe.

    Args:
        own: of the update.
        safe: of the safe one, None where that is zero.
        weight: `λ`.
        ratio: `s_safe / s`.

    >>> one, two = numpy.array([[1.0]]), numpy.array([[2.0]])
    >>> A, B = exact((one, one), (two, one), 0.25, 2.0)
    >>> A.tolist(), B.tolist()
    ([[1.0], [2.0]], [[0.75, 0.5]])
    """
    A, B = double(own[0]), (1.0 - weight) * double(own[1])
    if safe is None:
        return A, B
    return (
        numpy.concatenate([A, double(safe[0])]),
        numpy.concatenate([B, weight * ratio * double(safe[1])], axis=1),
    )


def factor_wise(own: Factors, safe: Factors | None, weight: float, ratio: float) -> Factors:
    """Return `√(1-λ) X + √(λ ratio) X_safe` for both factors `X`: PEFT's `linear`.

    Its product is `M` and the cross terms `√(λ (1-λ) ratio) (B A_safe + B_safe A)`.

    Args:
        own: of the update.
        safe: of the safe one, of the same rank; None where that is zero.
        weight: `λ`.
        ratio: `s_safe / s`, not negative.
    """
    A, B = (math.sqrt(1.0 - weight) * double(each) for each in own)
    if safe is None:
        return A, B
    A_safe, B_safe = (math.sqrt(weight * ratio) * double(each) for each in safe)
    return A + A_safe, B + B_safe


def merged(how: Merging, own: Factors, safe: Factors | None, ratio: float, rank: int) -> Merged:
    """Return what takes the place of an update.

    Args:
        how: they are merged.
        own: its factors, in whose product no terms cancel.
        safe: those of the safe one, likewise.
        ratio: `s_safe / s`.
        rank: r', from `written_rank`.
    """
    A, B = exact(own, safe, how.weight, ratio)
    if how.form == EXACT:
        return Merged(A, B, 0.0)
    if how.form == LOW_RANK:
        U, S, V = decomposed(A, B)
        return Merged(*balanced(U, S, V, rank), _share(S[rank:], S))
    A_new, B_new = factor_wise(own, safe, how.weight, ratio)
    size = norm(A, B)
    off = norm(numpy.concatenate([A_new, A]), numpy.concatenate([B_new, -B], axis=1))
    return Merged(A_new, B_new, off / size if size else 0.0)


def _share(left: Array, whole: Array) -> float:
    """Return how much of singular values some of them are, as norms; 0 where it is rounding."""
    size = float(numpy.linalg.norm(whole))
    found = float(numpy.linalg.norm(left)) / size if size else 0.0
    return found if found > NOISE else 0.0
