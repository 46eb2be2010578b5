"""Matrices of low rank as the two factors of an adapter.

A product `B A` has many pairs of factors. Here they are those of its singular value decomposition,
each with the root of the singular values: none of the two is large where the other is small, so
that both can be written in any dtype, and no terms of the product cancel.
"""

from __future__ import annotations

import numpy

from safeproj.storage.arrays import Array, double


def decomposed(A: Array, B: Array) -> tuple[Array, Array, Array]:
    """Return the singular value decomposition of `B A`, which is never formed.

    Args:
        A: (r, n).
        B: (m, r).

    Returns:
        `U` (m, k), `S` (k,) in descending order and `V` (n, k), float64, with `B A = U S Vᵀ`.

    >>> U, S, V = decomposed(numpy.eye(2), numpy.array([[3.0, 0.0], [0.0, 4.0]]))
    >>> S.tolist()
    [4.0, 3.0]
    """
    Q, T = numpy.linalg.qr(double(B))
    P, Z = numpy.linalg.qr(double(A).T)
    U, S, Vh = numpy.linalg.svd(T @ Z.T, full_matrices=False)
    return Q @ U, S, P @ Vh.T


def balanced(U: Array, S: Array, V: Array, rank: int) -> tuple[Array, Array]:
    """Return the factors `A` (rank, n) and `B` (m, rank) of the leading part of `U S Vᵀ`.

    Its best approximation of that rank (Eckart and Young); zero where there is no more. The largest
    number of each row of `A` is positive, whatever library computed the signs.

    Args:
        U: (m, k), orthonormal columns.
        S: (k,), in descending order.
        V: (n, k), orthonormal columns.
        rank: of the factors.
    """
    root = numpy.sqrt(S[:rank])
    A, B = (V[:, :rank] * root).T, U[:, :rank] * root
    largest = numpy.abs(A).argmax(axis=1)[:, None]
    signs = numpy.sign(numpy.take_along_axis(A, largest, axis=1))
    return padded(A * signs, B * signs.T, rank)


def padded(A: Array, B: Array, rank: int) -> tuple[Array, Array]:
    """Return factors of the same product with so many rows and columns."""
    more = rank - len(A)
    return (
        numpy.concatenate([A, numpy.zeros((more, A.shape[1]))]),
        numpy.concatenate([B, numpy.zeros((len(B), more))], axis=1),
    )
