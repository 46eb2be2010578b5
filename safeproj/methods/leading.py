"""The leading singular triplets of a matrix, by subspace iteration from a fixed random start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from safeproj.adapter.low_rank import balanced
from safeproj.storage.arrays import (
    AnyArray,
    Array,
    double,
    namespace,
    on_device,
    single,
    sum_of_squares,
    to_host,
)

MORE = 16
"""Directions beside the wanted ones, at least: with them the wanted ones converge sooner."""

STEADY = 1e-4
"""Share of the squared error that a further step takes away, below which there is none. Of spectra
that fall slowly the last steps gain little, and neither would all that follow."""

MOST = 40
"""Steps, at most."""

ROWS = 1024
"""Rows of the remainder that are formed at a time."""


@dataclass(frozen=True)
class Leading:
    """The best approximation of a matrix, as factors.

    Attributes:
        A: (r, n), float32.
        B: (m, r), float32.
        norm: `‖M‖_F`.
        error: `‖M - B A‖_F / ‖M‖_F`.
    """

    A: Array
    B: Array
    norm: float
    error: float


def leading(M: AnyArray, rank: int) -> Leading | None:
    """Return the best approximation of a rank, None where the matrix is zero.

    Randomised subspace iteration (Halko, Martinsson, Tropp, SIAM Review 2011, algorithm 4.4), until
    a step no longer makes the error smaller. Every product has the whole matrix and few vectors.

    Args:
        M: (m, n), float32.
        rank: r; at most m and n.

    Raises:
        FloatingPointError: it has a value that is not finite.
    """
    square = float(sum_of_squares(M))
    if not numpy.isfinite(square):
        raise FloatingPointError("the change has a value that is not finite")
    if square == 0.0:
        return None
    U, S, V = _triplets(M, square, min(rank, *M.shape))
    A, B = map(single, balanced(U, S, V, len(S)))
    return Leading(A, B, square**0.5, (_remainder(M, A, B) / square) ** 0.5)


def _triplets(M: AnyArray, square: float, rank: int) -> tuple[Array, Array, Array]:
    """Return `U` (m, r), `S` (r,) and `V` (n, r), float64 on the host."""
    m, n = M.shape
    width = min(max(rank + MORE, rank * 5 // 4), m, n)
    Q = numpy.random.default_rng(0).standard_normal((n, width), numpy.float32)
    left = float("inf")
    for _ in range(MOST):
        P = _basis(M @ _like(Q, M))
        product = double(to_host(M.T @ _like(P, M)))  # Mᵀ P (n, w)
        Q, R = numpy.linalg.qr(product)
        S = numpy.linalg.svd(R, compute_uv=False)
        before, left = left, max(square - float(numpy.square(S[:rank]).sum()), 0.0)
        if width == min(m, n) or before - left <= STEADY * left:
            break
    W, S, Zh = numpy.linalg.svd(R)  # M ≈ P Rᵀ Qᵀ = (P Z) S (Q W)ᵀ
    return double(P) @ Zh[:rank].T, S[:rank], Q @ W[:, :rank]


def _basis(columns: AnyArray) -> Array:
    """Return orthonormal columns that span the same, on the host in float64."""
    found: Array = numpy.linalg.qr(double(to_host(columns)))[0]
    return found


def _like(matrix: Array, M: AnyArray) -> AnyArray:
    """Return a matrix in float32 where another one is."""
    return on_device(single(numpy.ascontiguousarray(matrix)), M)


def _remainder(M: AnyArray, A: Array, B: Array) -> float:
    """Return `‖M - B A‖_F²`, some rows at a time."""
    xp, total = namespace(M), 0.0
    right = on_device(A, M)
    for start in range(0, M.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        off = M[rows, :] - on_device(numpy.ascontiguousarray(B[rows]), M) @ right
        total += float(sum_of_squares(xp.asarray(off)))
    return total
