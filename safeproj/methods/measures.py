"""What methods say of an update and of what they make of it.

The names are the papers': `A` (r, n) and `B` (m, r) are the factors, the update is `ΔW = s · B A`,
and `C` (m, m) is what it is projected with. Neither `C` nor `ΔW` is ever formed.
"""

from __future__ import annotations

import math

import numpy

from safeproj.methods.factors import settled
from safeproj.storage.arrays import Array, double, norm

NEGLIGIBLE = 1e-3
"""Singular values of an update below this, relative to the largest, are too close to the rounding
of `C B` for a direction of their own."""


def similarity(A: Array, B: Array, CB: Array) -> float | None:
    """Return `cos = ⟨ΔW, C ΔW⟩_F / (‖ΔW‖_F ‖C ΔW‖_F)`, which lies in [0, 1].

    The scale of the update cancels. `⟨X A, Y A⟩ = Σ (Xᵀ Y) ∘ (A Aᵀ)`, summed in float64.

    Args:
        A: (r, n).
        B: (m, r).
        CB: (m, r).

    Returns:
        None where `ΔW` is exactly zero. Where `C ΔW = 0` but `ΔW` is not, 0: all of the update lies
        outside the safety-aligned subspace.

    Raises:
        CancellationError: the terms of `ΔW` cancel further than float64 can tell.

    >>> A, B = numpy.eye(2), numpy.array([[3.0, 0.0], [0.0, 4.0]])
    >>> similarity(A, B, numpy.array([[3.0, 0.0], [0.0, 0.0]]))
    0.6
    """
    A, B, CB = settled(A, B, CB)
    G = A @ A.T

    def inner(X: Array, Y: Array) -> float:
        return float(((X.T @ Y) * G).sum())

    before, after = inner(B, B), inner(CB, CB)
    if before <= 0.0:
        return None
    if after <= 0.0:
        return 0.0
    return min(max(inner(CB, B) / math.sqrt(after * before), 0.0), 1.0)


def share(A: Array, B: Array, XB: Array) -> float | None:
    """Return `‖X ΔW‖_F² / ‖ΔW‖_F²`, which lies in [0, 1] for `X = Uᵀ` or `X = I - U Uᵀ`.

    For an orthogonal projector `C` it is the square of the cosine, since `⟨ΔW, C ΔW⟩ = ‖C ΔW‖²`;
    and unlike that it is not noise where next to nothing of the update is left.

    Args:
        A: (r, n).
        B: (m, r).
        XB: `X B`, any number of rows.

    Returns:
        None where `ΔW` is exactly zero.

    Raises:
        CancellationError: the terms of `ΔW` cancel further than float64 can tell.

    >>> A, B = numpy.eye(2), numpy.array([[3.0, 0.0], [0.0, 4.0]])
    >>> share(A, B, numpy.array([[3.0, 0.0]]))
    0.36
    """
    A, B, XB = settled(A, B, XB)
    G = A @ A.T

    def square(X: Array) -> float:
        return float(((X.T @ X) * G).sum())

    before = square(B)
    if before <= 0.0:
        return None
    return min(max(square(XB) / before, 0.0), 1.0)


def gains(A: Array, B: Array, CB: Array) -> tuple[Array, Array]:
    """Return how much `C` sees of an update's output directions, and how much of it lies in each.

    The directions `u` (m,) are an orthonormal basis of the column space of `ΔW = B A` in which `C`
    is diagonal: what alignment sees and what it does not see come apart, whatever is added to the
    update along the former. Directions of less than `NEGLIGIBLE` of the largest are left out.

    Args:
        A: (r, n).
        B: (m, r), `ΔW` not zero.
        CB: (m, r).

    Returns:
        `⟨u, C u⟩`, ascending, and `‖uᵀ ΔW‖`.

    Raises:
        CancellationError: the terms of `ΔW` cancel further than float64 can tell.

    >>> A, B = numpy.eye(2), numpy.array([[3.0, 3.0], [4.0, -4.0]])
    >>> seen, sizes = gains(A, B, numpy.array([[3.0, 3.0], [0.0, 0.0]]))
    >>> [round(abs(value), 4) for value in (*seen.tolist(), *sizes.tolist())]
    [0.0, 1.0, 5.6569, 4.2426]
    """
    A, B, CB = settled(A, B, CB)
    L = numpy.linalg.qr(A.T)[1]
    U, S, W = numpy.linalg.svd(B @ L.T, full_matrices=False)
    k = int((NEGLIGIBLE * S[0] < S).sum())
    CU = (CB @ L.T) @ (W[:k].T / S[:k])
    seen, E = numpy.linalg.eigh((U[:, :k].T @ CU + CU.T @ U[:, :k]) / 2.0)
    return seen, numpy.linalg.norm(E.T * S[:k], axis=1)


def scale(B: Array, CB: Array) -> float:
    """Return `‖C B‖_F / ‖B‖_F`: how much of the factor the projection leaves."""
    return norm(CB) / norm(B)


def pdst(B_out: Array, CB: Array) -> float:
    """Return `1 / (1 + ‖B_out - C B‖_F)` of one module; the reference code prints the mean."""
    return 1.0 / (1.0 + norm(double(B_out) - double(CB)))
