"""The leading eigenpairs of a symmetric matrix that is known by its products with a few vectors.

`M` (s, s) is positive semidefinite but for rounding. Vectors are rows: a product of few rows with a
large matrix is faster than one with few columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy

from safeproj.storage.arrays import AnyArray, Array, is_finite, namespace, on_device, to_host

Found = TypeVar("Found")

Product = Callable[[AnyArray], AnyArray]
"""Returns `Q M` for `Q` (p, s)."""

WIDTH = 24
"""Vectors that a Krylov space grows by: more are multiplied faster, each of fewer finds more."""

WHOLE = 1000
"""Rows up to which the whole matrix is decomposed: that takes a third of a second."""

EARLY = 9
"""A Krylov space of one EARLY-th of all vectors takes a tenth as long as the whole matrix: by then
it is clear whether it is going to tell enough, which it does not where the spectrum is flat."""

LATE = 3
"""One of one LATE-th of all vectors takes a third as long: that is the end."""

GROWTH = 1.25
"""How much a Krylov space grows before it is looked at again where it is not clear yet how fast its
error falls."""

CONVERGED = 1e-12
"""Residual `‖M u - λ u‖` of an eigenpair, relative to the largest eigenvalue."""

TINY, EPS = (float(getattr(numpy.finfo(numpy.float64), name)) for name in ("tiny", "eps"))

ENDS = 0.8, 0.9, 1.0, 1.1, 1.2, 1.4
"""Intervals that are tried for such a bound, by what a norm seems to be."""

PROBES = 32
"""Gaussian vectors of a bound of `‖M‖₂`."""

FAILURE = 1e-10
"""Probability that such a bound is too small."""


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs of `M`.

    `M Uᵀ = Uᵀ diag(values) + Nᵀ coupling` for the Ritz vectors `U = vectorsᵀ basis` (d, s), where
    the orthonormal rows of `N` (b, s) are orthogonal to `basis`: a column of `coupling` is as long
    as the residual of its pair.

    Attributes:
        basis: (d, s), orthonormal rows.
        values: (d,), in descending order.
        vectors: (d, d), orthonormal columns.
        coupling: (b, d).
    """

    basis: AnyArray
    values: AnyArray
    vectors: AnyArray
    coupling: AnyArray

    def leading(self, count: int) -> AnyArray:
        """Return the first Ritz vectors (count, s), orthonormal rows."""
        return self.vectors[:, :count].T @ self.basis

    def residual(self, start: int, stop: int) -> float:
        """Return `‖M Uᵀ - Uᵀ diag(values)‖_F` of the Ritz vectors from one to another."""
        part = self.coupling[:, start:stop]
        return math.sqrt(float(namespace(part).sum(part * part)))


@dataclass(frozen=True)
class Space:
    """A Krylov space of `M`.

    Attributes:
        basis: `Q` (d, s), orthonormal rows.
        H: `Q M Qᵀ` (d, d).
        beyond: (b, b), how the last b vectors are coupled to what is not in the space.
    """

    basis: AnyArray
    H: AnyArray
    beyond: AnyArray

    def ritz(self) -> Ritz:
        """Return the eigenpairs of `M` within the space."""
        values, vectors = largest_first(self.H)
        return Ritz(self.basis, values, vectors, self.beyond @ vectors[-len(self.beyond) :, :])


def krylov(
    product: Product, size: int, like: AnyArray, limit: int, width: int = WIDTH
) -> Iterator[Space]:
    """Yield growing Krylov spaces of `M`, from a fixed seed.

    Lanczos' method in blocks (Saad, Numerical Methods for Large Eigenvalue Problems, 2011, section
    6.5), with every block made orthogonal to all before it, twice.

    Args:
        product: that of `M`.
        size: s.
        like: an array where `M` is, and of the dtype to compute in.
        limit: most vectors of a space.
        width: b, vectors of a block.

    Raises:
        FloatingPointError: a product is not finite.
    """
    xp = namespace(like)
    basis, H = (
        xp.zeros((limit, columns), dtype=like.dtype, device=like.device)
        for columns in (size, limit)
    )
    block = xp.linalg.qr(gaussian(width, size, like, numpy.random.default_rng(0)).T)[0]
    for stop in range(width, limit + 1, width):
        rows, known = slice(stop - width, stop), basis[:stop, :]
        basis[rows, :] = block.T
        rest = product(basis[rows, :])
        require_finite(rest)
        inside = rest @ known.T
        block, R = xp.linalg.qr((rest - inside @ known).T)
        # Where next to nothing is left, this block is noise, and not outside the space yet.
        again = known @ block
        block, S = xp.linalg.qr(block - known.T @ again)
        H[rows, :stop] = inside + R.T @ again.T
        H[:stop, rows] = H[rows, :stop].T
        yield Space(known, H[:stop, :stop], S @ R)


def from_space(
    product: Product, size: int, like: AnyArray, first: int, judge: Callable[[Ritz], Found | float]
) -> Found | None:
    """Return what a Krylov space of `M` tells, None if the whole matrix tells it sooner.

    To look at a space takes as long as some products, so it is looked at where it should tell
    enough by how the error fell so far. It falls faster and faster.

    Args:
        product: that of `M`.
        size: s.
        like: an array where `M` is, and of the dtype to compute in.
        first: vectors of a space that is worth a look.
        judge: returns what is wanted, or how many times the error is too large.

    Raises:
        FloatingPointError: a product is not finite.
    """
    early, late = size // EARLY, size // LATE
    look, before = float(min(first, 2 * early // 3)), (0, math.inf)
    for space in krylov(product, size, like, late):
        count = len(space.basis)
        if count < look:
            continue
        found = judge(space.ritz())
        if not isinstance(found, float):
            return found
        look = _next_look(before, (count, found))
        if count < early:
            look = min(look, GROWTH * count, early)
        elif look > late:
            break
        before = count, found
    return None


def _next_look(before: tuple[int, float], now: tuple[int, float]) -> float:
    """Return at how many vectors the error should be 1, by two counts and the errors of them."""
    (few, high), (count, low) = before, now
    if not low < high < math.inf:
        return math.inf
    return count + 0.8 * math.log(low) * (count - few) / math.log(high / low)


def upper_bounds(
    product: Product, probes: AnyArray, scale: float
) -> Iterator[tuple[float, AnyArray]]:
    """Yield upper bounds of `‖M‖₂`, from one product more each, and the first product.

    With `T` the Chebyshev polynomial for [0, a] of the same degree, and `Y = Ω T(M)`: if `M` had
    an eigenvalue λ beyond the bound, with the eigenvector x, `‖Y‖₂ >= ‖Y x‖ = T(λ) ‖Ω x‖`; and the
    p Gaussian numbers `Ω x` are as short as `√2 (FAILURE Γ(p/2 + 1))^{1/p}` with probability
    `FAILURE` at most, whatever a is. (With powers in the place of `T`, and one vector at a time:
    Halko, Martinsson, Tropp, SIAM Review 2011, lemma 4.1.)

    Args:
        product: that of `M`.
        probes: `Ω` (p, s), from `gaussian`, independent of `M`.
        scale: of `M`, not zero, so that its powers are not too large or small.
    """
    xp, p = namespace(probes), len(probes)
    short = math.sqrt(2.0) * math.exp((math.log(FAILURE) + math.lgamma(p / 2 + 1)) / p)
    powers, first = [probes], product(probes)
    powers.append(first / scale)
    while True:
        degree = len(powers) - 1
        wide = xp.astype(xp.concat(powers), wide_dtype(probes))
        squares = to_host(wide @ wide.T).reshape(degree + 1, p, degree + 1, p)
        before, now = (_longest(squares[at, :, at]) for at in (degree - 1, degree))
        grown = max(now / max(before, TINY), EPS)  # less than ‖M‖₂, not by much
        found = math.inf
        for end in (grown * factor for factor in ENDS):
            T = _chebyshev(degree, end)
            length = _longest(numpy.einsum("k,kalb,l->ab", T, squares, T))
            growth = math.acosh(max(length / short, 1.0)) / degree
            found = min(found, end * (1.0 + math.cosh(growth)) / 2.0)
        yield found * scale, first
        powers.append(product(powers[-1]) / scale)


def _longest(square: Array) -> float:
    """Return `‖Y‖₂` from `Y Yᵀ`."""
    return math.sqrt(max(float(numpy.linalg.eigvalsh(square)[-1]), 0.0))


def _chebyshev(degree: int, end: float) -> Array:
    """Return the coefficients of the Chebyshev polynomial for [0, end], the constant first."""
    before, now = numpy.eye(2, degree + 1)
    now[0], now[1] = -1.0, 2.0 / end
    for _ in range(degree - 1):
        before, now = now, 2.0 * (numpy.roll(now, 1) * (2.0 / end) - now) - before
    return now


def gaussian(count: int, size: int, like: AnyArray, generator: numpy.random.Generator) -> AnyArray:
    """Return random vectors (count, size) where another array is, and in its dtype."""
    drawn = generator.standard_normal((count, size), numpy.float32)
    return namespace(like).astype(on_device(drawn, like), like.dtype)


def leading_eigenpairs(
    product: Callable[[AnyArray], AnyArray], size: int, rank: int, like: AnyArray
) -> tuple[AnyArray, AnyArray]:
    """Return the leading eigenpairs of a symmetric positive semidefinite `M` (size, size).

    From a Krylov space; from the whole matrix where that is not faster, or does not converge.

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
    like = xp.empty(0, dtype=wide_dtype(like), device=like.device)
    eps = float(xp.finfo(like.dtype).eps)
    tolerance = max(CONVERGED, 100 * eps)

    def judge(found: Ritz) -> tuple[AnyArray, AnyArray] | float:
        if len(found.values) <= rank:
            return math.inf
        error = found.residual(0, rank) / max(tolerance * float(found.values[0]), TINY)
        return (found.values[:rank], found.leading(rank).T) if error <= 1.0 else error

    found = None
    if size > WHOLE:
        found = from_space(lambda Q: product(Q.T).T, size, like, 2 * rank, judge)
    if found is None:
        M = product(xp.eye(size, dtype=like.dtype, device=like.device))
        require_finite(M)
        found = largest_first((M + M.T) / 2, rank)
    values, vectors = found
    largest = max(float(values[0]), 0.0)
    signal = int(xp.sum(values > size * eps * largest))
    return (
        xp.astype(values[:signal], xp.float64),
        xp.astype(vectors[:, :signal], xp.float64),
    )


def require_finite(M: AnyArray) -> None:
    """Raise FloatingPointError if a number of a matrix is NaN or infinite."""
    if not is_finite(M):
        raise FloatingPointError("a matrix has a value that is not finite")


def wide_dtype(like: AnyArray) -> Any:
    """Return float64 where the array's device has it, as MPS does not."""
    xp = namespace(like)
    return xp.float32 if getattr(like.device, "type", "") == "mps" else xp.float64


def largest_first(symmetric: AnyArray, rank: int | None = None) -> tuple[AnyArray, AnyArray]:
    """Return eigenvalues in descending order and the eigenvectors as columns, `rank` of them."""
    xp = namespace(symmetric)
    values, vectors = xp.linalg.eigh(symmetric)
    return xp.flip(values)[:rank], xp.flip(vectors, axis=1)[:, :rank]
