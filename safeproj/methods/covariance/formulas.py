"""The formulas of the covariance-weighted correction, and nothing else.

It changes the input-side factor, `A' = A M`, by second moments of the layer's inputs `x` (n,):
`H = E x xᵀ` on safety data and `S` on benign data. Arrays are of numpy or torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from safeproj.storage.arrays import AnyArray, namespace

if TYPE_CHECKING:
    from safeproj.adapter.record import Side

RIDGE = 1e-3
"""What is added to the diagonal of `S`, relative to its mean: benign data need not reach every
direction."""


class SingularError(Exception):
    """`H + μS` has no Cholesky factorisation in float64, or `S` is zero."""


@dataclass(frozen=True)
class Moment:
    """A second moment `E x xᵀ` (n, n) of a layer's inputs, whole or as the product `Xᵀ X`.

    Attributes:
        matrix: the moment itself (n, n), or `X` (k, n), in float64.
        whole: which of the two.
    """

    matrix: AnyArray
    whole: bool

    def apply(self, A: AnyArray) -> AnyArray:
        """Return `A E x xᵀ` (r, n) for `A` (r, n), float64."""
        return A @ self.matrix if self.whole else (A @ self.matrix.T) @ self.matrix

    def dense(self) -> AnyArray:
        """Return the moment itself, (n, n)."""
        return self.matrix if self.whole else self.matrix.T @ self.matrix

    @property
    def ridge(self) -> float:
        """What is added to the diagonal of a moment that is inverted: `RIDGE · tr / n`."""
        xp = namespace(self.matrix)
        trace = xp.linalg.trace(self.matrix) if self.whole else xp.sum(xp.square(self.matrix))
        size: int = self.matrix.shape[1]
        return RIDGE * float(trace) / size


@dataclass(frozen=True)
class Correction:
    """The covariance-weighted correction: least effect on safety data, most on benign data.

    The update `ΔW'` that minimises `E_safety ‖ΔW' x‖² + μ E_benign ‖(ΔW' - ΔW) x‖²` has
    `A' = A · μS (H + μS)⁻¹` and the same `B`. `S` has `RIDGE · tr(S)/n` on its diagonal.

    Attributes:
        mu: μ. The larger, the more of the adapter is kept.
    """

    mu: float = 0.3
    kind: ClassVar[str] = "covariance"
    side: ClassVar[Side] = "input"
    method: ClassVar[str] = "covariance"

    def __post_init__(self) -> None:
        _require_mu(self.mu)

    def from_moments(self, H: Moment, S: Moment, A: AnyArray) -> AnyArray:
        """Return `A · μS (H + μS)⁻¹ = A - A H (H + μS)⁻¹` for `A` (r, n), in float64.

        Args:
            H: of the safety data.
            S: of the benign data, without ridge.
            A: (r, n), any dtype.

        Raises:
            SingularError: `S` is zero, or the moments are no moments.
        """
        return self.solver(H, S)(A)

    def solver(self, H: Moment, S: Moment) -> Callable[[AnyArray], AnyArray]:
        """Return what makes the same of any `A`.

        By a Cholesky factorisation of side n; or, where the two moments are products of fewer than
        n rows, of the side of that many (Woodbury): with `Z` (k, n) the rows of both, those of `S`
        times `√μ`, and `ε` the ridge, `H (H + μS)⁻¹ = X_Hᵀ E (Z Zᵀ + μεI)⁻¹ Z`, where `E` picks
        the rows of `H`. Nothing is divided by `ε`.

        Args:
            H: of the safety data.
            S: of the benign data, without ridge.

        Raises:
            SingularError: `S` is zero, or the moments are no moments.
        """
        xp = namespace(H.matrix)
        ridge = self.mu * S.ridge
        if ridge <= 0.0:
            raise SingularError("S is zero")
        if not H.whole and not S.whole and len(H.matrix) + len(S.matrix) < H.matrix.shape[1]:
            Z = xp.concat([H.matrix, math.sqrt(self.mu) * S.matrix])
            L = _factor(Z @ Z.T, ridge)

            def by_rows(A: AnyArray) -> AnyArray:
                A = xp.astype(A, xp.float64)
                right = xp.zeros((len(Z), len(A)), dtype=A.dtype, device=A.device)
                right[: len(H.matrix), :] = H.matrix @ A.T
                return A - (Z.T @ _substituted(L, right)).T

            return by_rows
        whole = _factor(H.dense() + self.mu * S.dense(), ridge)

        def by_whole(A: AnyArray) -> AnyArray:
            A = xp.astype(A, xp.float64)
            return A - _substituted(whole, H.apply(A).T).T

        return by_whole


@dataclass(frozen=True)
class Reconstruction:
    """The covariance-weighted correction layer by layer, which runs the model with the adapter.

    `A'` is made where the model is, in covariance/reconstruct.py; here is what it is called.

    Attributes:
        mu: μ. The larger, the more of the adapter is kept.
    """

    mu: float = 1.0
    kind: ClassVar[str] = "reconstruction"
    side: ClassVar[Side] = "input"
    method: ClassVar[str] = "covariance"

    def __post_init__(self) -> None:
        _require_mu(self.mu)


def _require_mu(mu: float) -> None:
    if not (math.isfinite(mu) and mu > 0.0):
        raise ValueError(f"mu must be a number of more than 0, found {mu}")


PANEL = 256
"""Rows of a triangular matrix that are solved at a time."""


def _factor(K: AnyArray, ridge: float) -> AnyArray:
    """Return `L` with `L Lᵀ = K + εI` for a symmetric `K`, which is changed."""
    xp = namespace(K)
    diagonal = xp.arange(len(K), device=K.device)
    K[diagonal, diagonal] += ridge
    try:
        return xp.linalg.cholesky(K)
    except xp.linalg.LinAlgError as error:
        raise SingularError("H + μS is not positive definite") from error


def _substituted(L: AnyArray, right: AnyArray) -> AnyArray:
    """Return `(L Lᵀ)⁻¹ R`."""
    xp = namespace(L)
    panels = [slice(start, start + PANEL) for start in range(0, len(L), PANEL)]
    X = xp.asarray(right, copy=True)
    for rows in panels:  # L X = R
        X[rows, :] = xp.linalg.solve(
            L[rows, rows], X[rows, :] - L[rows, : rows.start] @ X[: rows.start, :]
        )
    for rows in reversed(panels):  # Lᵀ X = that
        below = slice(rows.stop, None)
        X[rows, :] = xp.linalg.solve(L[rows, rows].T, X[rows, :] - L[below, rows].T @ X[below, :])
    return X
