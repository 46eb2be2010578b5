"""The formulas of Safe LoRA on arrays of numpy or torch, and nothing else.

Safe LoRA (Hsu et al., NeurIPS 2024, arXiv 2405.16833) projects a LoRA update onto the directions in
which alignment moved the model. The names are the paper's:

=============  ======  ==================================================================
`V`            (m, n)  alignment matrix, `W_aligned - W_base`
`A`, `B`       (r, n), (m, r)  LoRA factors; the update is `ΔW = s · B A`
`C`            (m, m)  projector onto the safety-aligned subspace
=============  ======  ==================================================================

Neither `C` nor `ΔW` is ever formed: everything follows from `T = Vᵀ B` (n, r), `P = C B` (m, r)
and `G = A Aᵀ` (r, r). `V` arrives in blocks of rows, so that it need not fit in memory either. The
cosine of an update and its projection is `similarity` in measures.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy

from safeproj.methods.blocks import Blocks, Projected, with_rows
from safeproj.methods.eigenpairs import wide_dtype
from safeproj.methods.safe_lora.subspace import Gram, Known, Leading, leading
from safeproj.storage.arrays import AnyArray, namespace, sum_of_squares

if TYPE_CHECKING:
    from safeproj.adapter.record import Side


EPS64, EPS32 = (float(numpy.finfo(dtype).eps) for dtype in (numpy.float64, numpy.float32))

TINY = float(numpy.finfo(numpy.float64).tiny)

DETERMINED = 1e-5
"""Bound of `‖C - Ĉ‖₂` up to which `V` determines the exact projector."""


@dataclass(frozen=True)
class Approx:
    """The paper's fast projector, `C = V Vᵀ / ‖V‖_F` (Safe LoRA, section 3.2).

    It is no projector in the algebraic sense: `‖C‖₂ = σ₁² / ‖V‖_F`, so for the small, spread-out
    `V` of real checkpoint pairs `C B` is close to a strongly shrunk `B`.
    """

    kind: ClassVar[str] = "approx"
    side: ClassVar[Side] = "output"
    method: ClassVar[str] = "safe-lora"

    def from_V(self, blocks: Blocks, B: AnyArray) -> Projected:
        """Return `C B` for `B` (m, r), float32, in two passes over the blocks of `V` (m, n).

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        xp = namespace(B)
        T: AnyArray | None = None  # Tᵀ = Bᵀ V (r, n): row-major, as the products want it
        squares = _zero(B)
        for rows, V in with_rows(blocks):
            part = B[rows, :].T @ V
            T = part if T is None else T + part
            squares += sum_of_squares(V)
        norm = _norm(squares)
        if norm == 0.0 or T is None:
            return Projected(None, norm)
        CB = xp.empty_like(B)
        for rows, V in with_rows(blocks):
            CB[rows, :] = V @ T.T
        CB /= norm
        return Projected(CB, norm)

    def thin(self, blocks: Blocks, changes: Blocks) -> tuple[AnyArray, float]:
        """Return `Vᵀ ΔW / ‖V‖_F` (n, n), with which `C ΔW = V (Vᵀ ΔW / ‖V‖_F)`, and `‖V‖_F`.

        Args:
            blocks: rows of `V` (m, n).
            changes: the same rows of `ΔW` (m, n), float32.

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        T: AnyArray | None = None
        squares: AnyArray = 0.0
        for V, block in zip(blocks, changes, strict=True):
            part = V.T @ block
            if T is None:
                T, squares = part, _zero(block)
            else:
                T += part
            squares += sum_of_squares(V)
        norm = _norm(squares)
        if norm > 0.0 and T is not None:
            T /= norm
        return T, norm

    def square(self, V: AnyArray) -> tuple[AnyArray, float]:
        """Return `C = V Vᵀ / ‖V‖_F` (m, m), for a `V` (m, n) with m < n, and `‖V‖_F`.

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        norm = _norm(sum_of_squares(V))
        C = V @ V.T
        if norm > 0.0:
            C /= norm
        return C, norm

    def from_C(self, blocks: Blocks, norm: float, B: AnyArray) -> Projected:
        """Return `C B` for `B` (m, r), float32, from row blocks of `C` (m, m) and `‖V‖_F`."""
        CB = namespace(B).empty_like(B)
        for rows, C in with_rows(blocks):
            CB[rows, :] = C @ B
        return Projected(CB, norm)

    def from_U(self, blocks: Blocks, eigenvalues: AnyArray, norm: float, B: AnyArray) -> Projected:
        """Return `C_K B`, `C_K = U diag(eigenvalues) Uᵀ`, for `B` (m, r), float32.

        Args:
            blocks: row blocks of `U` (m, K), the leading eigenvectors of `C`.
            eigenvalues: (K,), those of `C`.
            norm: `‖V‖_F`.
            B: (m, r).
        """
        xp = namespace(B)
        UB = xp.zeros((len(eigenvalues), B.shape[1]), dtype=B.dtype, device=B.device)
        for rows, U in with_rows(blocks):
            UB += U.T @ B[rows, :]
        scaled, CB = UB * eigenvalues[:, None], xp.empty_like(B)
        for rows, U in with_rows(blocks):
            CB[rows, :] = U @ scaled
        return Projected(CB, norm, UB=UB)


@dataclass(frozen=True)
class Exact:
    """The orthogonal projector `C = U_k U_kᵀ`, `U_k` the top-k left singular vectors of `V`.

    Safe LoRA names `C = V (VᵀV)⁻¹ Vᵀ`, which is the identity for a full-rank `V`; truncated to its
    k largest singular values it means something. Exactly one of the two fields is given.

    Attributes:
        rank: k itself; at most the numerical rank of `V` is used.
        energy: choose the smallest k with `σ₁² + … + σ_k² >= energy · ‖V‖_F²`, 0 < energy <= 1.
    """

    rank: int | None = None
    energy: float | None = None
    kind: ClassVar[str] = "exact"
    side: ClassVar[Side] = "output"
    method: ClassVar[str] = "safe-lora"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("the exact projector takes either a rank or an energy")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy must lie in (0, 1], found {self.energy}")

    def from_V(self, blocks: Blocks, B: AnyArray) -> Projected:
        """Return `C B` for `B` (m, r), float32, from the leading eigenvectors of a Gram matrix.

        In float64: a Gram matrix squares the condition of `V`. Holds `V` (m, n), and as many
        vectors as it takes, or a Gram matrix of side min(m, n).

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        basis, found = self.basis_of_V(blocks, B)
        if basis is None:
            return found
        return replace(found, CB=_onto(basis, B))

    def basis_of_V(self, blocks: Blocks, like: AnyArray) -> tuple[AnyArray | None, Projected]:
        """Return `U_k` (m, k), float64, and what is said of it; None where `V = 0`.

        Args:
            blocks: rows of `V` (m, n).
            like: any float32 array of m rows on the device.

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        xp = namespace(like)
        V = _gathered(blocks, like)
        square = 0.0 if V is None else float(xp.sum(V * V))
        norm = _norm(square)
        if norm == 0.0 or V is None:
            return None, Projected(None, norm)
        wide = V.shape[0] <= V.shape[1]
        X, noise = V if wide else V.T, max(V.shape) * EPS64
        # A sum of l products x·y is off by √l u ‖x‖ ‖y‖ at most, u the unit roundoff, but for rare
        # inputs (Higham and Mary, SIAM J. Sci. Comput. 2019).
        rounding = math.sqrt(X.shape[1]) * EPS64 / 2 * square
        found = leading(Gram(X), partial(self._count, square, noise), self.rank or 1, rounding)
        basis = found.rows.T
        if not wide:  # right singular vectors: U_k = V W_k Σ_k⁻¹
            basis = (V @ basis) / xp.sqrt(found.values)
        return basis, self._told(basis, norm, found, 0.0)

    def from_C(self, blocks: Blocks, norm: float, B: AnyArray) -> Projected:
        """Return the same from row blocks of `C = V Vᵀ / ‖V‖_F` (m, m), rounded to float32."""
        basis, found = self.basis_of_C(blocks, norm, B)
        return replace(found, CB=_onto(basis, B))

    def basis_of_C(self, blocks: Blocks, norm: float, like: AnyArray) -> tuple[AnyArray, Projected]:
        """Return `U_k` (m, k), float64, and what is said of it, as `basis_of_V` does."""
        C = _gathered(blocks, like)
        assert C is not None
        count = partial(self._count, float(namespace(like).linalg.trace(C)), len(C) * EPS32)
        size = float(namespace(like).linalg.matrix_norm(C))
        found = leading(Known(C), count, self.rank or 1, EPS64 * size)
        # The rounding to float32 is spread over all directions, so that two mix by so much of it.
        rounding = EPS32 / 2 * size / len(C)
        return found.rows.T, self._told(found.rows.T, norm, found, rounding)

    def _told(self, basis: AnyArray, norm: float, found: Leading, rounding: float) -> Projected:
        m, k = basis.shape
        error = 0.0 if k == m else found.error + rounding / max(found.gap, TINY)
        return Projected(None, norm, k, is_determined=error <= DETERMINED)

    def _count(self, total: float, rounding: float, eigenvalues: AnyArray) -> int:
        """Return k for the leading eigenvalues, which are `σ²` times a constant; all if too few.

        Args:
            total: the sum of all eigenvalues.
            rounding: those below it, relative to the first, are noise: k is at most the numerical
                rank.
            eigenvalues: some of them, in descending order.
        """
        xp, noise = namespace(eigenvalues), rounding * eigenvalues[0]
        numerical_rank = int((eigenvalues > noise).sum())
        if self.rank is not None:
            return min(self.rank, numerical_rank)
        share = xp.cumulative_sum(xp.clip(eigenvalues, min=0.0))
        assert self.energy is not None
        return min(int((share < self.energy * total).sum()) + 1, numerical_rank)


def _gathered(blocks: Blocks, like: AnyArray) -> AnyArray | None:
    """Return all rows of a matrix in float64 on the device of `like`; None where it has none."""
    xp, whole = namespace(like), None
    for rows, block in with_rows(blocks):
        if whole is None:
            shape = (like.shape[0], block.shape[1])
            whole = xp.empty(shape, dtype=xp.float64, device=like.device)
        whole[rows, :] = block
    return whole


def _onto(basis: AnyArray, B: AnyArray) -> AnyArray:
    """Return `U Uᵀ B` in float32 for orthonormal columns `U`, float64."""
    xp = namespace(B)
    return xp.astype(basis @ (basis.T @ xp.astype(B, xp.float64)), xp.float32)


def _zero(like: AnyArray) -> AnyArray:
    """Return the start of a sum that stays on the device: in float64, which MPS does not have."""
    return namespace(like).zeros((), dtype=wide_dtype(like), device=like.device)


def _norm(squares: AnyArray) -> float:
    """Return `‖V‖_F` from its square."""
    value = float(squares)
    if not math.isfinite(value):
        raise FloatingPointError("the alignment matrix has a value that is not finite")
    return math.sqrt(value)
