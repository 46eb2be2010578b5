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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from safeproj.methods.eigenpairs import largest_first
from safeproj.methods.factors import settled
from safeproj.storage.arrays import AnyArray, double, namespace, on_device, quiet, to_host

OVERSAMPLING = 10
"""Columns of a sketch beyond the K that are wanted (Halko et al. 2011, section 4.2)."""

ITERATIONS = 4
"""Multiplications of a sketch with the Gram matrix."""

START = 64
"""Columns of the first sketch where K follows from an energy."""

PROBES = 16
"""Gaussian vectors of a norm bound."""

FAILURE = 1e-10
"""Probability that a norm bound is too small."""

POWER = 32
"""Power of the matrix in a norm bound."""

BLOCK = 512
"""Rows that are multiplied at a time."""

EPS = float(numpy.finfo(numpy.float32).eps)

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


def eigenpairs(V: AnyArray, rank: int | None = None, energy: float | None = None) -> Eigenpairs:
    """Return the leading eigenpairs of `C = V Vᵀ / ‖V‖_F`, with bounds on what they leave out.

    Subspace iteration on the smaller Gram matrix of `V` (Halko, Martinsson, Tropp, SIAM Review
    2011, algorithm 4.4), from a fixed seed, so that the result follows from `V` alone. With `Q` the
    basis found and `W` an orthonormal basis of the range of `Vᵀ Q` (m <= n; this is the Nyström
    approximation, Tropp et al., NeurIPS 2017) or `Q` itself (m > n), the eigenpairs are the leading
    ones of `F Fᵀ`, `F = V W / √‖V‖_F`, in float64. Where K is a large share of min(m, n), `Q` is
    made of eigenvectors of a float64 Gram matrix instead.

    The bounds allow for the rounding of the Gram matrix and of `U`. The residual's is
    wrong with probability `FAILURE` over the seed.

    Args:
        V: (m, n), float32, finite, not zero, on any device that has float64.
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

    xp = namespace(V)
    norm = _frobenius(V)
    generator = numpy.random.default_rng(0)
    width = (rank or START) + OVERSAMPLING
    G = _gram(V, norm, xp.float32 if 2 * width < min(V.shape) else xp.float64)
    while 2 * width < min(V.shape):
        values, F, W = _ritz(V, norm, _sketch(G, width, generator))
        K, wanted = _count(values, rank, energy, norm)
        if wanted <= width - OVERSAMPLING:
            break
        width *= 2
    else:
        if G.dtype == xp.float32:
            del G
            G = _gram(V, norm, xp.float64)
        values, Q = largest_first(G)
        K, _ = _count(values, rank, energy, norm)
        values, F, W = _ritz(V, norm, Q[:, :K])
        K, _ = _count(values, rank, energy, norm)

    values, W = values[:K], W[:, :K]
    U = xp.astype(F[:, :K] / xp.sqrt(values), xp.float32)
    stored = xp.astype(values, xp.float32)
    # A sum of n products x·y is off by √n u ‖x‖ ‖y‖ at most, u the unit roundoff, but for rare
    # inputs (Higham and Mary, SIAM J. Sci. Comput. 2019); and the trace of `C` is `‖V‖_F`.
    rounding = float(xp.finfo(G.dtype).eps) / 2 * math.sqrt(max(V.shape)) * norm
    rounding += 4 * EPS * float(values[0])  # of `U` and the eigenvalues
    whole = _frobenius(G)
    rest = _rest(G, U, stored, W)  # in the memory of G
    size = _frobenius(rest)
    wide = xp.astype(U, xp.float64)
    Z = _product(V.T, wide) / math.sqrt(norm)
    overlap = wide.T @ wide
    leaking = Z.T @ Z - (overlap * xp.astype(stored, xp.float64)) @ overlap
    return Eigenpairs(
        U=to_host(U),
        eigenvalues=to_host(stored),
        error=(size + 2 * rounding) / whole,
        residual=min(_norm_bound(rest, generator), size) + rounding,
        leak=float(xp.max(xp.abs(xp.linalg.eigvalsh(leaking)))) + 4 * EPS * float(values[0]),
    )


def smaller_form(V: AnyArray) -> tuple[Literal["C", "V"], AnyArray]:
    """Return the smaller exact form of `C = V Vᵀ / ‖V‖_F`: `C` itself (m, m) or `V` (m, n).

    Args:
        V: (m, n), float32, finite, not zero.

    Returns:
        `"C"` and the symmetric matrix where m <= n, else `"V"` and `V`; on the device of `V`.

    >>> smaller_form(numpy.array([[0.0, 4.0]], numpy.float32))
    ('C', array([[4.]], dtype=float32))
    """
    if V.shape[0] > V.shape[1]:
        return "V", V
    return "C", _gram(V, _frobenius(V), namespace(V).float32)


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


def _blocks(V: AnyArray) -> Iterator[AnyArray]:
    """Yield the rows in float64, so many at a time."""
    xp = namespace(V)
    for start in range(0, V.shape[0], BLOCK):
        yield xp.astype(V[start : start + BLOCK, :], xp.float64)


def _frobenius(V: AnyArray) -> float:
    xp = namespace(V)
    return math.sqrt(sum(float(xp.sum(block * block)) for block in _blocks(V)))


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
    return namespace(V).concat([block @ X for block in _blocks(V)])


def _sketch(G: AnyArray, width: int, generator: numpy.random.Generator) -> AnyArray:
    """Return an orthonormal float64 basis (s, width) close to the leading eigenvectors of `G`."""
    xp = namespace(G)
    start = generator.standard_normal((G.shape[0], width), numpy.float32)
    Q = xp.astype(on_device(start, G), G.dtype)
    for _ in range(ITERATIONS):
        Q = xp.linalg.qr(G @ Q)[0]
    basis: AnyArray = xp.linalg.qr(xp.astype(Q, xp.float64))[0]
    return basis


def _ritz(V: AnyArray, norm: float, Q: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return eigenvalues, `F = V W / √‖V‖_F` with orthogonal columns, and `W` orthonormal.

    `Q` (s, k) is an orthonormal basis on the smaller side of `V`, `W` (n, k) one on the right side.
    """
    xp = namespace(V)
    W = Q
    if V.shape[0] <= V.shape[1]:
        W = xp.linalg.qr(xp.astype(V.T @ xp.astype(Q, xp.float32), xp.float64))[0]
    F = _product(V, W) / math.sqrt(norm)
    values, R = largest_first(F.T @ F)
    return values, F @ R, W @ R


def _count(
    values: AnyArray, rank: int | None, energy: float | None, trace: float
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


def _rest(G: AnyArray, U: AnyArray, eigenvalues: AnyArray, W: AnyArray) -> AnyArray:
    """Turn `G` (s, s), in place, into a matrix with the nonzero spectrum of `E`."""
    xp = namespace(G)
    if U.shape[0] == G.shape[0]:  # m <= n
        U = xp.astype(U, G.dtype)
        return _less(G, U * xp.astype(eigenvalues, G.dtype), U)
    W = xp.astype(W, G.dtype)  # (I - W Wᵀ) G (I - W Wᵀ)
    GW = G @ W
    H = GW - W @ (W.T @ GW) / 2
    return _less(_less(G, H, W), W, H)


def _less(G: AnyArray, left: AnyArray, right: AnyArray) -> AnyArray:
    """Subtract `L Rᵀ` from `G`, in place."""
    for start in range(0, G.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        G[rows, :] -= left[rows, :] @ right.T
    return G


@quiet
def _norm_bound(M: AnyArray, generator: numpy.random.Generator) -> float:
    """Return an upper bound of `‖M‖₂` for a symmetric `M`.

    `‖N‖₂ <= α √(2/π) max ‖N ω‖` over `PROBES` Gaussian `ω`, except with probability `α^-PROBES`
    (Halko, Martinsson, Tropp 2011, lemma 4.1), for `N` a power of `M`.
    """
    xp = namespace(M)
    start = generator.standard_normal((M.shape[0], PROBES), numpy.float32)
    omega = xp.astype(on_device(start, M), M.dtype)
    log = xp.zeros(PROBES, dtype=xp.float64, device=M.device)
    for _ in range(POWER):
        omega = M @ omega
        lengths = xp.sqrt(xp.sum(xp.square(xp.astype(omega, xp.float64)), axis=0))
        log += xp.log(lengths)
        omega /= xp.astype(xp.clip(lengths, min=TINY), M.dtype)
    alpha = FAILURE ** (-1.0 / PROBES)
    power = float(xp.max(log)) + math.log(alpha * math.sqrt(2.0 / math.pi))
    return math.exp(power / POWER)
