"""The projector `C` in fewer numbers, and what those still say about a cosine.

`C = V Vᵀ / ‖V‖_F` (m, m) is the fast projector of Safe LoRA (Hsu et al., NeurIPS 2024, arXiv
2405.16833). It can be kept as it is, as `V`, or as its leading eigenpairs:

=============  ======  ==================================================================
`V`            (m, n)  alignment matrix, not zero, finite, float32
`A`, `B`       (r, n), (m, r)  LoRA factors; the update is `ΔW = s · B A`
`C_K`          (m, m)  `U diag(eigenvalues) Uᵀ`, of rank K; never formed
`E`            (m, m)  `C - C_K`, positive semidefinite; never formed
=============  ======  ==================================================================

`C_K = V Π Vᵀ / ‖V‖_F` with `Π` an orthonormal projector of rank K, hence `E >= 0`: that is what the
bounds of a cosine rest on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy

from safeproj.methods.eigenpairs import (
    FAILURE,
    PROBES,
    Product,
    gaussian,
    krylov,
    largest_first,
    upper_bounds,
)
from safeproj.methods.factors import settled
from safeproj.storage.arrays import AnyArray, Array, double, namespace, to_host

STEPS = 4
"""Blocks of the Krylov space of a sketch: it is three times as large as K."""

WHOLE = 512
"""Rows up to which the whole matrix is decomposed: that takes a twentieth of a second."""

SHARE = 6
"""How many times as many rows as wanted eigenpairs a matrix has that is not decomposed whole."""

DEGREE = 5
"""Products for the bound of a norm, which is then a tenth too large."""

SMALL = 0.8
"""Of the norm of what is left out, that of a part where a closer bound would not show."""

HALVINGS = 8
"""Of the interval in which a norm lies."""

BLOCK = 512
"""Rows that are computed with in float64 at a time."""

START = 64
"""K that a sketch is made for where it follows from an energy."""

EPS, EPS64 = (float(numpy.finfo(dtype).eps) for dtype in (numpy.float32, numpy.float64))

TINY = float(numpy.finfo(numpy.float32).tiny)

SLACK = 1e-6
"""Absolute, of a cosine: what float32 loses in `C_K B` and `Uᵀ B`; more where terms cancel."""


@dataclass(frozen=True)
class Eigenpairs:
    """`C_K = U diag(eigenvalues) Uᵀ <= C` and how far it is from `C = V Vᵀ / ‖V‖_F`.

    Attributes:
        U: (m, K), float32, orthonormal columns, on the host.
        eigenvalues: (K,), float32, descending, greater than 0, on the host.
        error: upper bound of `‖C - C_K‖_F / ‖C‖_F`.
        residual: upper bound of `‖C - C_K‖₂`, in the unit of `V`.
        leak: upper bound of `‖Uᵀ (C - C_K) U‖₂`, in the unit of `V`.
    """

    U: AnyArray
    eigenvalues: AnyArray
    error: float
    residual: float
    leak: float


Count = Callable[[AnyArray], tuple[int, int]]
"""Returns K for eigenvalues in descending order, and K before the cut at the values at hand."""


def eigenpairs(
    V: AnyArray, norm: float, rank: int | None = None, energy: float | None = None
) -> Eigenpairs:
    """Return the leading eigenpairs of `C = V Vᵀ / ‖V‖_F`, with bounds on what they leave out.

    From a block Krylov space of the smaller Gram matrix of `V`, in float32 and from a fixed seed,
    so that the result follows from `V` alone. With its Ritz vectors `Q` and `W` an orthonormal
    basis of the range of `Vᵀ Q` (m <= n; this is the Nyström approximation, Tropp et al., NeurIPS
    2017) or `Q` itself (m > n), the eigenpairs are the leading ones of `F Fᵀ`, `F = V W / √‖V‖_F`,
    in float64. Where `V` is small, or K a large share of min(m, n), the Gram matrix is decomposed
    instead, in float64.

    The bounds allow for rounding. Each of them is wrong with probability `FAILURE` over the seed.

    Args:
        V: (m, n), float32, finite, not zero, on any device that has float64.
        norm: `‖V‖_F`.
        rank: K. Fewer are returned where the others are rounding noise in float32.
        energy: choose the smallest K with `σ₁² + … + σ_K² >= energy · ‖V‖_F²`, 0 < energy <= 1, up
            to the numerical rank.

    Raises:
        ValueError: not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("eigenpairs takes either a rank or an energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must lie in (0, 1], found {energy}")

    count = partial(_count, rank, energy, norm)
    found = None
    if min(V.shape) > WHOLE and SHARE * (rank or 1) < min(V.shape):
        found = _sketch(V, norm, count, rank or START)
    return found or _whole(V, norm, count)


def _whole(V: AnyArray, norm: float, count: Count) -> Eigenpairs:
    """Return the eigenpairs by way of all of them."""
    xp = namespace(V)
    X = V if V.shape[0] <= V.shape[1] else V.T
    G = _gram(V, norm, xp.float64)
    values, vectors = largest_first(G)
    K, _ = count(values)
    U = vectors[:, :K]
    if X is not V:
        U = _product(V, U) / xp.sqrt(values[:K] * norm)
    rest = xp.clip(values[K:], min=0.0)
    stored = 4 * EPS * float(values[0])  # of `U` and the eigenvalues
    rounding = EPS64 / 2 * math.sqrt(X.shape[1]) * norm + stored
    size, whole = (math.sqrt(float(xp.sum(xp.square(each)))) for each in (rest, values))
    return Eigenpairs(
        U=to_host(xp.astype(U, xp.float32)),
        eigenvalues=to_host(xp.astype(values[:K], xp.float32)),
        error=(size + 2 * rounding) / whole,
        residual=(float(rest[0]) if len(rest) else 0.0) + rounding,
        leak=rounding,
    )


def _sketch(V: AnyArray, norm: float, count: Count, rank: int) -> Eigenpairs | None:
    """Return the eigenpairs by way of a Krylov space, None if that is not faster."""
    xp, (m, n) = namespace(V), V.shape
    found = _krylov(V, norm, count, rank)
    if found is None:
        return None
    Q, QC, W = found
    W = xp.linalg.qr(xp.astype(W, xp.float64).T)[0]
    F = _product(V, W) / math.sqrt(norm)
    values, R = largest_first(F.T @ F)
    K, _ = count(values)
    values, W = values[:K], xp.astype((W @ R[:, :K]).T, V.dtype)
    U = xp.astype(F @ R[:, :K] / xp.sqrt(values), V.dtype)

    def outside(Y: AnyArray) -> AnyArray:
        return Y - (Y @ W.T) @ W

    def left_out(Y: AnyArray) -> AnyArray:  # has the nonzero spectrum of `E` where m > n
        return outside(Y @ V) / norm @ V.T if m <= n else outside(outside(Y) @ V.T / norm @ V)

    if m <= n:
        QE = QC - ((Q @ U) * xp.astype(values, V.dtype)) @ U.T
    else:
        QW = Q @ W.T
        QE = outside(QC - QW @ (QW.T @ QC))
    residual, size = _norm_bounds(left_out, Q, QE)
    leaking = xp.astype(outside(U.T @ V), xp.float64)
    stored = 4 * EPS * float(values[0])  # of `U` and the eigenvalues
    # A sum of n products x·y is off by √n u ‖x‖ ‖y‖ at most, u the unit roundoff, but for rare
    # inputs (Higham and Mary, SIAM J. Sci. Comput. 2019); and the trace of `C` is `‖V‖_F`.
    rounding = EPS / 2 * math.sqrt(max(V.shape)) * norm + stored
    size += 2 * rounding
    return Eigenpairs(
        U=to_host(U),
        eigenvalues=to_host(xp.astype(values, V.dtype)),
        error=size / math.hypot(size, math.sqrt(float(xp.sum(values * values)))),
        residual=residual + rounding,
        leak=float(xp.max(xp.linalg.eigvalsh(leaking @ leaking.T))) / norm + stored,
    )


def _krylov(
    V: AnyArray, norm: float, count: Count, rank: int
) -> tuple[AnyArray, AnyArray, AnyArray] | None:
    """Return a basis `Q` (d, s) on the smaller side of `V`, what it is multiplied to, and `W`."""
    xp, (m, n) = namespace(V), V.shape
    X, size = (V, m) if m <= n else (V.T, n)
    width = -(-(STEPS - 1) * rank // STEPS // 8) * 8
    halves: list[AnyArray] = []
    products: list[AnyArray] = []

    def product(Q: AnyArray) -> AnyArray:
        halves.append(Q @ X)
        products.append(halves[-1] / norm @ X.T)
        return products[-1]

    for space in krylov(product, size, V, size // 2, width):
        if len(space.basis) < STEPS * width:
            continue
        found = space.ritz()
        _, wanted = count(found.values)
        if (STEPS - 1) * wanted <= len(space.basis):
            rows = space.basis if m > n else xp.concat(halves)
            return space.basis, xp.concat(products), found.vectors[:, :wanted].T @ rows
        if SHARE * wanted >= size:
            break
    return None


def _norm_bounds(E: Product, Q: AnyArray, QE: AnyArray) -> tuple[float, float]:
    """Return upper bounds of `‖E‖₂` and `‖E‖_F`, given what a basis is multiplied to.

        E ≅ ⎡ A  Nᵀ ⎤ ,  A = Q E Qᵀ,  and M is known by its products with random vectors.
            ⎣ N  M  ⎦

    `E <= t` where `‖M‖₂ <= μ < t` and `A + NᵀN / (t - μ) <= t`.
    """
    xp = namespace(Q)

    def outside(Y: AnyArray) -> AnyArray:
        return Y - (Y @ Q.T) @ Q

    A = QE @ Q.T
    N = xp.astype(QE - A @ Q, xp.float64)
    A, NN = to_host(xp.astype(A + A.T, xp.float64) / 2), to_host(N @ N.T)
    top = max(_largest(A), TINY)
    probes = outside(gaussian(PROBES, Q.shape[1], Q, numpy.random.default_rng(1)))
    for found in islice(upper_bounds(lambda Y: outside(E(Y)), probes, top), DEGREE):
        if found[0] < SMALL * top:
            break
    bound, first = found
    low = max(top, bound)
    high = low + math.sqrt(_largest(NN))  # that of the norms of the four parts, at most
    for _ in range(HALVINGS):
        t = (low + high) / 2
        if _largest(A + NN / (t - bound)) <= t:
            high = t
        else:
            low = t
    first = xp.astype(first, xp.float64)
    square = float(xp.sum(first * first)) / PROBES
    # That is a sum of squares of Gaussian numbers, and rarely much less than it is on average,
    # `‖M‖_F²` (Laurent and Massart, Annals of Statistics 2000, lemma 1).
    slack = bound * math.sqrt(-math.log(FAILURE) / PROBES)
    inner = (A * A).sum() + 2 * NN.trace()
    return high, math.sqrt(inner + (slack + math.hypot(slack, math.sqrt(square))) ** 2)


def _largest(symmetric: Array) -> float:
    """Return the largest eigenvalue."""
    return float(numpy.linalg.eigvalsh(symmetric)[-1])


def smaller_form(V: AnyArray, norm: float) -> tuple[Literal["C", "V"], AnyArray]:
    """Return the smaller exact form of `C = V Vᵀ / ‖V‖_F`: `C` itself (m, m) or `V` (m, n).

    Args:
        V: (m, n), float32, finite, not zero.
        norm: `‖V‖_F`.

    Returns:
        `"C"` and the symmetric matrix where m <= n, else `"V"` and `V`; on the device of `V`.

    >>> smaller_form(numpy.array([[0.0, 4.0]], numpy.float32), 4.0)
    ('C', array([[4.]], dtype=float32))
    """
    if V.shape[0] > V.shape[1]:
        return "V", V
    return "C", _gram(V, norm, namespace(V).float32)


def cosine_bounds(
    A: AnyArray, B: AnyArray, CB: AnyArray, UB: AnyArray, residual: float, leak: float
) -> tuple[float, float] | None:
    """Return the range in which the cosine of `ΔW` and `C ΔW` lies, from eigenpairs of `C` alone.

    With `X = B A`, `y = C_K X`, `t = ⟨X, E X⟩`, `ε >= ‖E‖₂`, `κ >= ‖Uᵀ E U‖₂` and `E >= 0`:

    - `cos = (a + t) / (‖X‖ ‖y + E X‖)`, `a = ⟨X, y⟩`;
    - `0 <= √t = ‖E^½ X‖ <= √ε ‖(I - U Uᵀ) X‖ + √κ ‖U Uᵀ X‖ = √T`;
    - `t² / ‖X‖² <= ‖E X‖² <= ε t`;
    - `|⟨y, E X⟩| <= ‖E^½ y‖ ‖E^½ X‖ <= √(κ T) ‖y‖`, since `y` lies in the range of `U`.

    The range holds every cosine with some `t` in [0, T]. Both ends have a closed form.

    Args:
        A: (r, n).
        B: (m, r).
        CB: `C_K B`, (m, r).
        UB: `Uᵀ B`, (K, r).
        residual: `ε`.
        leak: `κ`.

    Returns:
        The lower and the upper bound, within [0, 1]; `similarity(A, B, CB)` lies between them. None
        where `ΔW` is exactly zero.

    Raises:
        CancellationError: the terms of `ΔW` cancel further than float64 can tell.

    >>> A, B = numpy.eye(2), numpy.array([[3.0, 0.0], [0.0, 4.0]])
    >>> CB = numpy.array([[3.0, 0.0], [0.0, 0.0]])
    >>> lower, upper = cosine_bounds(A, B, CB, CB[:1], residual=0.0, leak=0.0)
    >>> round(lower, 5), round(upper, 5)
    (0.6, 0.6)
    """
    magnitudes = (_magnitude(A, B), _magnitude(A, CB))  # as they were rounded
    A, B, CB, UB = settled(A, B, CB, UB)
    G = A @ A.T

    def inner(X: AnyArray, Y: AnyArray) -> float:
        return float(((X.T @ Y) * G).sum())

    square = inner(B, B)
    if square <= 0.0:
        return None
    x, y = math.sqrt(square), math.sqrt(max(inner(CB, CB), 0.0))
    slack = SLACK * max(magnitudes[0] / x, magnitudes[1] / y if y > 0.0 else 0.0)
    a, inside = max(inner(B, CB), 0.0), max(inner(UB, UB), 0.0)
    return bounds_of(square, y, a, inside, residual, leak, slack)


def bounds_of(
    square: float,
    y: float,
    a: float,
    inside: float,
    residual: float,
    leak: float,
    slack: float = SLACK,
) -> tuple[float, float]:
    """Return the same from what was summed.

    Args:
        square: `‖X‖²`, more than 0.
        y: `‖C_K X‖`.
        a: `⟨X, C_K X⟩`.
        inside: `‖Uᵀ X‖²`.
        residual: `ε`.
        leak: `κ`.
        slack: what rounding may add.
    """
    x = math.sqrt(square)
    outside = max(square - inside, 0.0) + slack * square
    T = (math.sqrt(residual * outside) + math.sqrt(leak * inside)) ** 2
    cross = 2.0 * math.sqrt(leak * T) * y

    # (a + t) / √(N + ε t) falls until t = a - 2 N / ε and rises from there.
    N = y * y + cross
    t = min(max(a - 2.0 * N / residual, 0.0), T) if residual > 0.0 else 0.0
    lower = (a + t) / (x * math.sqrt(N + residual * t)) if N > 0.0 else 0.0
    # (a + t) / √(D + t² / ‖X‖²) rises while it is less than ‖X‖.
    D = y * y - cross
    upper = (a + T) / (x * math.sqrt(D + T * T / square)) if D > 0.0 else float(T > 0.0)
    return max(min(lower, 1.0) - slack, 0.0), min(upper + slack, 1.0)


def _magnitude(A: AnyArray, X: AnyArray) -> float:
    """Return what `‖X A‖_F` would be if none of its terms cancelled."""
    A, X = double(A), double(X)
    return math.sqrt(float(numpy.abs((X.T @ X) * (A @ A.T)).sum()))


def _gram(V: AnyArray, norm: float, dtype: Any) -> AnyArray:
    """Return `V Vᵀ / ‖V‖_F` or `Vᵀ V / ‖V‖_F`, whichever is smaller, symmetric."""
    xp = namespace(V)
    X = V if V.shape[0] <= V.shape[1] else V.T
    size = X.shape[0]
    G = xp.empty((size, size), dtype=dtype, device=V.device)
    blocks = [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]
    for i, rows in enumerate(blocks):
        left = xp.astype(X[rows, :], dtype) / math.sqrt(norm)
        for columns in blocks[:i]:
            G[rows, columns] = left @ (xp.astype(X[columns, :], dtype) / math.sqrt(norm)).T
            G[columns, rows] = G[rows, columns].T
        lower = xp.tril(left @ left.T)
        G[rows, rows] = lower + xp.tril(lower, k=-1).T
    return G


def _product(V: AnyArray, X: AnyArray) -> AnyArray:
    """Return `V X` in float64 for `V` in float32."""
    xp = namespace(V)
    rows = (V[start : start + BLOCK, :] for start in range(0, len(V), BLOCK))
    return xp.concat([xp.astype(each, xp.float64) @ X for each in rows])


def _count(
    rank: int | None, energy: float | None, trace: float, values: AnyArray
) -> tuple[int, int]:
    """Return K for eigenvalues in descending order, and K before the cut at the values at hand."""
    signal = int((values > EPS * values[0]).sum())
    if rank is not None:
        return min(rank, signal), rank
    assert energy is not None
    held = namespace(values).cumulative_sum(values)
    wanted = int((held < energy * trace * (1.0 - 1e-12)).sum()) + 1
    # Once noise is among the values, more of them would be noise too.
    return min(wanted, signal), min(wanted, signal) if signal < len(values) else wanted
