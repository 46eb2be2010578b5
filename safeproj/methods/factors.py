"""Products of two factors `B A` whose terms may cancel.

`‖B A‖_F² = Σ (BᵀB) ∘ (A Aᵀ)` is what the formulas use: it never forms the product. Where its terms
cancel, what is left of them in float64 may be noise. Factors as training makes them cancel hardly
at all (the terms' magnitudes add up to 1.0 to 1.6 times their sum); two further columns `K e, -K e`
beside one row twice can hide any update from such a sum. There the product is taken in an
orthonormal basis of the rows of `A`, whose error is relative to the root of those magnitudes, and
what even that cannot tell from zero is told by whole numbers.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from safeproj.storage import arrays
from safeproj.storage.arrays import Array, double

CANCELS = 100.0
"""From which `cancellation` on the plain sums are left: an order of magnitude in `C B`, which is
computed in float32, is lost."""

RESOLVED = 1e-3
"""Largest relative error with which a product still counts as known."""

EPS = float(numpy.finfo(numpy.float64).eps)


class CancellationError(Exception):
    """A product is not zero, and so small beside its terms that float64 does not tell it.

    Attributes:
        bound: what its norm is at most.
    """

    def __init__(self, bound: float) -> None:
        super().__init__(
            "the terms of B A cancel so far that double precision does not tell what is left; "
            "no training makes such factors: save the adapter again from the model it was trained "
            "on"
        )
        self.bound = bound


@dataclass(frozen=True)
class Core:
    """`B A = M Q` with orthonormal rows of `Q`, so that nothing cancels in `M`.

    Attributes:
        M: (m, k), float64, k at most r.
        Q: (k, n), float64.
        ratio: the `cancellation` of `A` and `B`.
        scales: (r,), and
        L: (r, k): `A = diag(scales) L Q`.
    """

    M: Array
    Q: Array
    ratio: float
    scales: Array
    L: Array

    def coordinates(self, X: Array) -> Array:
        """Return `Y` (p, k) with `X A = Y Q` for `X` (p, r)."""
        return (double(X) * self.scales) @ self.L

    def factor(self, Y: Array) -> Array:
        """Return the smallest `X` (p, r) with `X A = Y Q` for `Y` (p, k), float64.

        Where rows of `A` depend on each other there are many; in the smallest nothing cancels.
        """
        return (double(Y) @ numpy.linalg.pinv(self.L, rcond=1e-11)) / self.scales


def cancellation(A: Array, B: Array) -> float:
    """Return `Σ |BᵀB ∘ A Aᵀ| / ‖B A‖_F²`: 1 where no terms cancel, infinite where all do.

    Args:
        A: (r, n).
        B: (m, r).

    >>> B, row = numpy.array([[1.0, 8.0, -8.0]]), numpy.ones((1, 4))
    >>> cancellation(row, B[:, :1]), cancellation(numpy.ones((3, 4)), B)
    (1.0, 289.0)
    """
    A, B = double(A), double(B)
    terms = (B.T @ B) * (A @ A.T)
    square, magnitude = float(terms.sum()), float(numpy.abs(terms).sum())
    if magnitude == 0.0:
        return 1.0
    return magnitude / square if square > 0.0 else math.inf


def core(A: Array, B: Array) -> Core | None:
    """Return `B A` as `M Q`, None where it is exactly zero.

    The rows of `A` are scaled to lengths of about 1 first, so that those that are short beside
    others do not drown.

    Args:
        A: (r, n), any dtype.
        B: (m, r), any dtype.

    Raises:
        CancellationError: the product is not zero, and `M` is not known.
    """
    A, B = double(A), double(B)
    lengths = numpy.linalg.norm(A, axis=1)
    scales = numpy.exp2(numpy.round(numpy.log2(numpy.where(lengths > 0.0, lengths, 1.0))))
    Q, R = numpy.linalg.qr((A / scales[:, None]).T)
    M = (B * scales) @ R.T
    size = arrays.norm(M)
    noise = 4.0 * A.shape[0] * EPS * arrays.norm(B * scales) * arrays.norm(R)
    if not noise <= RESOLVED * size:
        if is_zero(A, B):
            return None
        raise CancellationError(size + noise)
    return Core(M, Q.T, cancellation(A, B), scales, R.T)


def settled(A: Array, B: Array, *others: Array) -> tuple[Array, ...]:
    """Return factors in float64 with the same products, in whose sums no terms cancel.

    Args:
        A: (r, n).
        B: (m, r).
        *others: (p, r), which are multiplied by `A` too.

    Returns:
        All of them; as they are where the terms of `B A` do not cancel. `B` is zero where `B A` is.

    Raises:
        CancellationError: `B A` is not known.
    """
    if not cancellation(A, B) > CANCELS:
        return tuple(double(each) for each in (A, B, *others))
    found = core(A, B)
    if found is None:
        return double(A), numpy.zeros(B.shape), *(double(X) for X in others)
    return found.Q, found.M, *map(found.coordinates, others)


def norm(A: Array, B: Array) -> float:
    """Return `‖B A‖_F`, also where terms cancel; what it is at most where that is not known.

    >>> rows, B = numpy.array([[3.0, 4.0]] * 3), numpy.array([[1.0, 2e9, -2e9]])
    >>> round(norm(rows, B), 5)
    5.0
    """
    try:
        A, B = settled(A, B)
    except CancellationError as error:
        return error.bound
    return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


def cosine(own: Sequence[Array], other: Sequence[Array]) -> float:
    """Return `⟨B A, B' A'⟩ / (‖B A‖ ‖B' A'‖)`, 0 where one of them is zero.

    Args:
        own: `A` (r, n) and `B` (m, r), in whose product no terms cancel.
        other: `A'` (r', n) and `B'` (m, r'), likewise.
    """
    (A, B), (A_other, B_other) = (tuple(map(double, each)) for each in (own, other))
    inner = float(((B.T @ B_other) * (A @ A_other.T)).sum())
    size = norm(A, B) * norm(A_other, B_other)
    return min(max(inner / size, -1.0), 1.0) if size else 0.0


def is_zero(A: Array, B: Array) -> bool:
    """Tell whether `B A` is exactly zero, in whole numbers.

    By `B (A x)` for a random `x` (Freivalds): wrong with a probability of 2⁻⁶⁴. Nobody who chose
    the factors knows `x`.

    >>> big = numpy.array([[1e30, -1e30]])
    >>> is_zero(numpy.ones((2, 3)), big)
    True
    >>> is_zero(numpy.ones((3, 3)), numpy.array([[1e30, 1, -1e30]]))
    False
    """
    x = [secrets.randbits(64) for _ in range(A.shape[1])]
    y = [sum(map(int.__mul__, row, x)) for row in _integers(A)]
    return not any(sum(map(int.__mul__, row, y)) for row in _integers(B))


def _integers(X: Array) -> list[list[int]]:
    """Return finite floating-point numbers as whole numbers, all times one power of two."""
    mantissas, exponents = numpy.frexp(double(X))
    shifts = exponents - int(exponents.min()) if X.size else exponents
    whole = (mantissas * 2.0**53).astype(numpy.int64)
    return [
        [number << shift for number, shift in zip(*rows, strict=True)]
        for rows in zip(whole.tolist(), shifts.tolist(), strict=True)
    ]
