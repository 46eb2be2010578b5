"""The leading singular vectors of `V`, which the exact projector is made of.

=============  ======  ==================================================================
`X`            (s, l)  `V` or `Vᵀ`, whichever has fewer rows
`G`            (s, s)  `X Xᵀ`, or a multiple of it
=============  ======  ==================================================================

`G` is decomposed whole only where a Krylov space does not tell soon which its k leading
eigenvectors are. What the space tells is proved. With its Ritz pairs (θ, U) in three groups, the k
leading ones, g next to them, and the others together with all that is outside of the space,

        ⎡ Θ_k   0    R_kᵀ ⎤
    G ≅ ⎢ 0    Θ_g   R_gᵀ ⎥ ,   M <= t < θ_k ,
        ⎣ R_k  R_g   M    ⎦

the leading eigenvectors are `A`, `D` and `E` in these three, `E Λ - M E = R_k A + R_g D` and
`D Λ - Θ_g D = R_gᵀ E`, so that with ρ = ‖R‖_F, the widths of the gaps `w = θ_k - θ_{k+1}` and
`W = θ_k - t`, and Λ >= θ_k,

    ‖E‖ <= (ρ_k + ρ_g ‖D‖) / W  and  ‖D‖ <= ρ_g ‖E‖ / w ,

which bounds the sine of the angle between the two subspaces, `√(‖D‖² + ‖E‖²)`, and so `‖C - Ĉ‖₂`.
A narrow gap at the cut is no obstacle: what is next to it is told apart within the space, as far as
rounding lets anything tell it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy

from safeproj.methods.eigenpairs import (
    PROBES,
    WHOLE,
    WIDTH,
    Ritz,
    from_space,
    gaussian,
    largest_first,
    upper_bounds,
)
from safeproj.storage.arrays import AnyArray, namespace

TOLERANCE = 1e-6
"""Bound of `‖C - Ĉ‖₂` of what a Krylov space tells, but for rounding."""

DEGREE = 8
"""Most products for a bound of what is outside of a space."""


class Gram:
    """`G`, by which rows are multiplied through `X` until that has cost about what it costs.

    Args:
        X: (s, l), float64.
    """

    def __init__(self, X: AnyArray) -> None:
        self.like, self.size = X, len(X)
        self._X = X
        self._rows = 0
        self._G: AnyArray = None

    def __call__(self, Q: AnyArray) -> AnyArray:
        """Return `Q G` for `Q` (p, s)."""
        self._rows += len(Q)
        # `G` takes as long as s/4 rows would if few were multiplied as fast as many. Where `X` is
        # very wide, rows cost so much that `G` is better had at once, whatever comes.
        if self._G is None and 5 * self._rows <= self.size >= self._X.shape[1] / 2:
            return (Q @ self._X) @ self._X.T
        return Q @ self.whole()

    def whole(self) -> AnyArray:
        """Return `G`."""
        if self._G is None:
            self._G = self._X @ self._X.T
        return self._G


class Known(Gram):
    """`G` that is there.

    Args:
        G: (s, s), float64.
    """

    def __init__(self, G: AnyArray) -> None:
        super().__init__(G)
        self._G = G


@dataclass(frozen=True)
class Leading:
    """The k leading eigenpairs of `G`.

    Attributes:
        values: (k,), in descending order.
        rows: (k, s), orthonormal.
        gap: from the last of them to the next one, and never less than is certain.
        error: upper bound of how far the projector onto `rows` is from the true one, in the
            spectral norm; infinite where nothing is known.
    """

    values: AnyArray
    rows: AnyArray
    gap: float
    error: float


def leading(G: Gram, count: Callable[[AnyArray], int], least: int, rounding: float) -> Leading:
    """Return the leading eigenpairs of `G`.

    Args:
        G: symmetric, positive semidefinite but for rounding.
        count: returns k for eigenvalues in descending order, all of them where there are not
            enough yet.
        least: a lower bound of k.
        rounding: of a product with `G`, in the spectral norm.

    Raises:
        FloatingPointError: a product is not finite.
    """
    generator = numpy.random.default_rng(1)

    def judge(found: Ritz) -> Leading | float:
        k = count(found.values)
        bound = _bound(found, k, rounding)
        if bound is None:
            return math.inf
        if bound.error <= TOLERANCE and _is_below(G, found.basis, bound.below, generator):
            error = bound.error + rounding / bound.gap
            return Leading(found.values[:k], found.leading(k), bound.gap, error)
        return max(bound.coming / TOLERANCE, 1.0)

    if G.size > WHOLE:
        told = from_space(G, G.size, G.like, max(3 * least, 2 * WIDTH), judge)
        if told is not None:
            return told
    values, vectors = largest_first(G.whole())
    k = count(values)
    gap = float(values[k - 1] - (values[k] if k < len(values) else 0.0))
    error = rounding / gap if gap > 0.0 else math.inf
    return Leading(values[:k], vectors[:, :k].T, gap, error)


@dataclass(frozen=True)
class _Bound:
    """What Ritz pairs prove.

    Attributes:
        error: upper bound of `‖C - Ĉ‖₂` but for rounding, infinite where nothing is proved yet.
        coming: what it comes down to, about.
        below: everything outside of the space has to be below this for it, in the spectral norm.
        gap: `w`.
    """

    error: float
    coming: float
    below: float
    gap: float


def _bound(found: Ritz, k: int, rounding: float) -> _Bound | None:
    """Return what is proved of the k leading Ritz pairs, None where there are not enough others."""
    xp, d = namespace(found.values), len(found.values)
    end = k + max(k // 2, WIDTH // 3)
    if end >= d:
        return None
    last, following, outer = (float(found.values[i]) for i in (k - 1, k, end))
    t = (last + outer) / 2
    gap, wide = max(last - following, rounding), last - t  # a narrower one tells nothing
    near, far = (found.residual(*each) + rounding for each in ((k, end), (0, k)))
    if wide <= 0.0:
        return None
    if near * near >= gap * wide:
        return _Bound(math.inf, far / wide, 0.0, gap)
    error = far / (wide - near * near / gap) * math.hypot(1.0, near / gap)
    rest = found.coupling[:, end:]
    pushed = (rest / (t - found.values[end:])) @ rest.T
    return _Bound(error, far / wide, t - float(xp.max(xp.linalg.eigvalsh(pushed))), gap)


def _is_below(G: Gram, basis: AnyArray, limit: float, generator: numpy.random.Generator) -> bool:
    """Tell whether `‖(I - QᵀQ) G (I - QᵀQ)‖₂` is less than a limit, for rows `Q` of a basis."""
    if limit <= 0.0:
        return False

    def outside(Q: AnyArray) -> AnyArray:
        return Q - (Q @ basis.T) @ basis

    probes = outside(gaussian(PROBES, G.size, G.like, generator))
    bounds = upper_bounds(lambda Q: outside(G(Q)), probes, limit)
    return any(bound <= limit for bound, _ in islice(bounds, DEGREE))
