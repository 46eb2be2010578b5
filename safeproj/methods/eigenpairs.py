"""The leading eigenpairs of a symmetric matrix that is known by its products with a few columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from safeproj.storage.arrays import AnyArray, is_finite, namespace, on_device

OVERSAMPLING = 32
"""Columns of the iterated block beyond twice the k that are wanted: the more, the faster."""

WHOLE = 1024
"""Rows up to which the whole matrix is decomposed: that takes less than a second."""

CONVERGED = 1e-12
"""Residual `‖M u - λ u‖` of an eigenpair, relative to the largest eigenvalue."""


def leading_eigenpairs(
    product: Callable[[AnyArray], AnyArray], size: int, rank: int, like: AnyArray
) -> tuple[AnyArray, AnyArray]:
    """Return the leading eigenpairs of a symmetric positive semidefinite `M` (size, size).

    Subspace iteration with Rayleigh-Ritz (Saad, Numerical Methods for Large Eigenvalue Problems,
    2011, algorithm 5.3) from a fixed seed; the whole matrix where the iteration is not faster, or
    does not converge.

    Args:
        product: returns `M Q` for `Q` (size, p).
        size: rows of `M`.
        rank: how many pairs are wanted.
        like: an array where `M` is.

    Returns:
        Eigenvalues (k,) in descending order, greater than 0, and eigenvectors (size, k), both
        float64, k <= `rank`: those that are rounding noise are left out.

    Raises:
        FloatingPointError: a value is not finite.
    """
    xp = namespace(like)
    wide = wide_dtype(like)
    width = 2 * rank + OVERSAMPLING
    found = None
    if size > WHOLE and 4 * width < size:
        start = numpy.random.default_rng(0).standard_normal((size, width))
        Q = xp.astype(on_device(start.astype(numpy.float32), like), wide)
        found = _iterated(product, xp.linalg.qr(Q)[0], rank)
    if found is None:
        M = product(xp.eye(size, dtype=wide, device=like.device))
        _require_finite(M)
        found = largest_first((M + M.T) / 2, rank)
    values, vectors = found
    largest = max(float(values[0]), 0.0)
    signal = int(xp.sum(values > size * float(xp.finfo(wide).eps) * largest))
    return (
        xp.astype(values[:signal], xp.float64),
        xp.astype(vectors[:, :signal], xp.float64),
    )


def wide_dtype(like: AnyArray) -> Any:
    """Return float64 where the array's device has it, as MPS does not."""
    xp = namespace(like)
    return xp.float32 if getattr(like.device, "type", "") == "mps" else xp.float64


def largest_first(symmetric: AnyArray, rank: int | None = None) -> tuple[AnyArray, AnyArray]:
    """Return eigenvalues in descending order and the eigenvectors as columns, `rank` of them."""
    xp = namespace(symmetric)
    values, vectors = xp.linalg.eigh(symmetric)
    return xp.flip(values)[:rank], xp.flip(vectors, axis=1)[:, :rank]


def _iterated(
    product: Callable[[AnyArray], AnyArray], Q: AnyArray, rank: int
) -> tuple[AnyArray, AnyArray] | None:
    """Return `rank` eigenpairs, None if they do not converge."""
    xp = namespace(Q)
    tolerance = max(CONVERGED, 100 * float(xp.finfo(Q.dtype).eps))
    for _ in range(2 * len(Q) // Q.shape[1]):  # more would take longer than the whole matrix
        Z = product(Q)
        _require_finite(Z)
        H = Q.T @ Z
        values, R = largest_first((H + H.T) / 2, rank)
        vectors = Q @ R
        residual = xp.max(xp.sqrt(xp.sum(xp.square(Z @ R - vectors * values), axis=0)))
        if residual <= tolerance * values[0]:
            return values, vectors
        Q = xp.linalg.qr(Z)[0]
    return None


def _require_finite(M: AnyArray) -> None:
    if not is_finite(M):
        raise FloatingPointError("a matrix has a value that is not finite")
