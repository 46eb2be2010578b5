"""The formulas of the methods on tensors, and nothing else.

Safe LoRA (Hsu et al., NeurIPS 2024, arXiv 2405.16833) projects a LoRA update onto the directions in
which alignment moved the model. The names are the paper's:

=============  ======  ==================================================================
`V`            (m, n)  alignment matrix, `W_aligned - W_base`
`A`, `B`       (r, n), (m, r)  LoRA factors; the update is `ΔW = s · B A`
`C`            (m, m)  projector onto the safety-aligned subspace
=============  ======  ==================================================================

SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765) projects it away from the directions `U` (m, k) in
which a weight's outputs on safety data lie: `C_S = I - U Uᵀ`, in the place of `C`.

The covariance-weighted correction changes the other factor, `A' = A M`, by second moments of the
layer's inputs `x` (n,): `H = E x xᵀ` on safety data and `S` on benign data (`Correction`).

Neither `C` nor `ΔW` is ever formed: everything follows from `T = Vᵀ B` (n, r), `P = C B` (m, r)
and `G = A Aᵀ` (r, r). `V` arrives in blocks of rows, so that it need not fit in memory either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safeproj.adapter.record import Side
from safeproj.methods.factors import settled

Blocks = Iterable[Tensor]
"""`V` (m, n) as consecutive float32 row blocks. It can be iterated twice with the same result; a
block may be overwritten as soon as the next one is asked for."""

ORTHONORMAL = 1e-3
"""Largest entry of `UᵀU - I` for columns that are orthonormal but for rounding."""

RIDGE = 1e-3
"""What is added to the diagonal of `S`, relative to its mean: benign data need not reach every
direction."""

NEGLIGIBLE = 1e-3
"""Singular values of an update below this, relative to the largest, are too close to the rounding
of `C B` for a direction of their own."""


class NotOrthonormalError(Exception):
    """The columns of `U` are not orthonormal, so that `I - U Uᵀ` is no projector."""


class SingularError(Exception):
    """`H + μS` has no Cholesky factorisation in float64, or `S` is zero."""


@dataclass(frozen=True)
class Projected:
    """What a projector makes of one module.

    Attributes:
        CB: `C B`, shape (m, r), float32; None where `V = 0`, which leaves `C` undefined. A column
            of `B` that is too large gives values that are not finite.
        alignment_norm: `‖V‖_F`; None for SaLoRA, which has no `V`.
        rank: k of a truncated projector, None where the projector is not truncated.
        UB: `Uᵀ B`, shape (k, r), where `C` is known by orthonormal columns `U`.
    """

    CB: Tensor | None
    alignment_norm: float | None
    rank: int | None = None
    UB: Tensor | None = None


@dataclass(frozen=True)
class Approx:
    """The paper's fast projector, `C = V Vᵀ / ‖V‖_F` (Safe LoRA, section 3.2).

    It is no projector in the algebraic sense: `‖C‖₂ = σ₁² / ‖V‖_F`, so for the small, spread-out
    `V` of real checkpoint pairs `C B` is close to a strongly shrunk `B`.
    """

    kind: ClassVar[str] = "approx"
    side: ClassVar[Side] = "output"
    method: ClassVar[str] = "safe-lora"

    def from_V(self, blocks: Blocks, B: Tensor) -> Projected:
        """Return `C B` for `B` (m, r), float32, in two passes over the blocks of `V` (m, n).

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        T = B.new_zeros(B.shape[1], 0)  # Tᵀ = Bᵀ V (r, n): row-major, as the products want it
        squares = _zero(B.device)
        for rows, V in _with_rows(blocks):
            if T.shape[1] == 0:
                T = V.new_zeros(B.shape[1], V.shape[1])
            T.addmm_(B[rows].T, V)
            squares += V.square().sum()  # sums pairwise, unlike vector_norm
        norm = _norm(squares)
        if norm == 0.0:
            return Projected(None, norm)
        CB = torch.empty_like(B)
        for rows, V in _with_rows(blocks):
            torch.mm(V, T.T, out=CB[rows])
        return Projected(CB.div_(norm), norm)

    def from_C(self, blocks: Blocks, norm: float, B: Tensor) -> Projected:
        """Return `C B` for `B` (m, r), float32, from row blocks of `C` (m, m) and `‖V‖_F`."""
        CB = torch.empty_like(B)
        for rows, C in _with_rows(blocks):
            torch.mm(C, B, out=CB[rows])
        return Projected(CB, norm)

    def from_U(self, blocks: Blocks, eigenvalues: Tensor, norm: float, B: Tensor) -> Projected:
        """Return `C_K B`, `C_K = U diag(eigenvalues) Uᵀ`, for `B` (m, r), float32.

        Args:
            blocks: row blocks of `U` (m, K), the leading eigenvectors of `C`.
            eigenvalues: (K,), those of `C`.
            norm: `‖V‖_F`.
            B: (m, r).
        """
        UB = B.new_zeros(len(eigenvalues), B.shape[1])
        for rows, U in _with_rows(blocks):
            UB.addmm_(U.T, B[rows])
        CB = torch.empty_like(B)
        for rows, U in _with_rows(blocks):
            torch.mm(U, UB * eigenvalues[:, None], out=CB[rows])
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

    def from_V(self, blocks: Blocks, B: Tensor) -> Projected:
        """Return `C B` for `B` (m, r), float32, from the eigenvectors of the smaller Gram matrix.

        In float64: a Gram matrix squares the condition of `V`. Holds `V` (m, n) and a Gram matrix
        of side min(m, n).

        Raises:
            FloatingPointError: `V` has a value that is not finite.
        """
        V = B.new_empty(B.shape[0], 0, dtype=torch.float64)  # (m, n)
        for rows, block in _with_rows(blocks):
            if V.shape[1] == 0:
                V = V.new_empty(B.shape[0], block.shape[1])
            V[rows] = block
        norm = _norm(V.square().sum())
        if norm == 0.0:
            return Projected(None, norm)
        wide = V.shape[0] <= V.shape[1]
        eigenvalues, vectors = _largest_first(V @ V.T if wide else V.T @ V)
        k = self._truncate(eigenvalues, max(V.shape) * torch.finfo(torch.float64).eps)
        basis = vectors[:, :k]
        if not wide:  # right singular vectors: U_k = V W_k Σ_k⁻¹
            basis = (V @ basis) / eigenvalues[:k].sqrt()
        return Projected((basis @ (basis.T @ B.double())).float(), norm, k)

    def from_C(self, blocks: Blocks, norm: float, B: Tensor) -> Projected:
        """Return the same from row blocks of `C = V Vᵀ / ‖V‖_F` (m, m), rounded to float32."""
        C = B.new_empty(B.shape[0], B.shape[0], dtype=torch.float64)
        for rows, block in _with_rows(blocks):
            C[rows] = block
        eigenvalues, vectors = _largest_first(C)
        k = self._truncate(eigenvalues, len(C) * torch.finfo(torch.float32).eps)
        basis = vectors[:, :k]
        return Projected((basis @ (basis.T @ B.double())).float(), norm, k)

    def _truncate(self, eigenvalues: Tensor, rounding: float) -> int:
        """Return k for the eigenvalues in descending order, which are `σ²` times a constant.

        Those below `rounding`, relative to the first, are noise: k is at most the numerical rank.
        """
        noise = rounding * eigenvalues[0]
        numerical_rank = int((eigenvalues > noise).sum())
        if self.rank is not None:
            return min(self.rank, numerical_rank)
        share = eigenvalues.clamp(min=0).cumsum(0)
        assert self.energy is not None
        wanted = self.energy * share[-1]
        return min(int((share < wanted).sum()) + 1, numerical_rank)


@dataclass(frozen=True)
class Complement:
    """The orthogonal projector `C_S = I - U Uᵀ` of SaLoRA (section 3.2).

    `U` (m, k) are the leading right singular vectors of the weight's outputs on safety data.

    Attributes:
        rank: use the first k columns of `U`; all of them if None.
    """

    rank: int | None = None
    kind: ClassVar[str] = "complement"
    side: ClassVar[Side] = "output"
    method: ClassVar[str] = "salora"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")

    def from_U(self, blocks: Blocks, rank: int, B: Tensor) -> Projected:
        """Return `C_S B` and `Uᵀ B` for `B` (m, r), float32, in two passes over the rows of `U`.

        Args:
            blocks: row blocks of `U` (m, k).
            rank: how many of the columns are used, at most k.
            B: (m, r).

        Raises:
            FloatingPointError: `U` has a value that is not finite.
            NotOrthonormalError: its columns are not orthonormal.
        """
        UB, overlap = B.new_zeros(rank, B.shape[1]), B.new_zeros(rank, rank)
        for rows, U in _with_rows(blocks):
            UB.addmm_(U[:, :rank].T, B[rows])
            overlap.addmm_(U[:, :rank].T, U[:, :rank])
        require_orthonormal(overlap)
        CB = torch.empty_like(B)
        for rows, U in _with_rows(blocks):
            torch.addmm(B[rows], U[:, :rank], UB, alpha=-1, out=CB[rows])
        return Projected(CB, None, rank, UB)


@dataclass(frozen=True)
class Moment:
    """A second moment `E x xᵀ` (n, n) of a layer's inputs, whole or as the product `Xᵀ X`.

    Attributes:
        matrix: the moment itself (n, n), or `X` (k, n), in float64.
        whole: which of the two.
    """

    matrix: Tensor
    whole: bool

    def apply(self, A: Tensor) -> Tensor:
        """Return `A E x xᵀ` (r, n) for `A` (r, n), float64."""
        return A @ self.matrix if self.whole else (A @ self.matrix.T) @ self.matrix

    def dense(self) -> Tensor:
        """Return the moment itself, (n, n)."""
        return self.matrix if self.whole else self.matrix.T @ self.matrix

    @property
    def ridge(self) -> float:
        """What is added to the diagonal of a moment that is inverted: `RIDGE · tr / n`."""
        diagonal = self.matrix.diagonal() if self.whole else self.matrix.square()
        return RIDGE * float(diagonal.sum()) / self.matrix.shape[1]


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

    def from_moments(self, H: Moment, S: Moment, A: Tensor) -> Tensor:
        """Return `A · μS (H + μS)⁻¹ = A - A H (H + μS)⁻¹` for `A` (r, n), in float64.

        By a Cholesky factorisation of side n; or, where the two moments are products of fewer than
        n rows, of the side of that many (Woodbury): with `Z` (k, n) the rows of both, those of `S`
        times `√μ`, and `ε` the ridge, `H (H + μS)⁻¹ = X_Hᵀ E (Z Zᵀ + μεI)⁻¹ Z`, where `E` picks
        the rows of `H`. Nothing is divided by `ε`.

        Args:
            H: of the safety data.
            S: of the benign data, without ridge.
            A: (r, n), any dtype.

        Raises:
            SingularError: `S` is zero, or the moments are no moments.
        """
        A = A.double()
        ridge = self.mu * S.ridge
        if ridge <= 0.0:
            raise SingularError("S is zero")
        if not H.whole and not S.whole and len(H.matrix) + len(S.matrix) < A.shape[1]:
            Z = torch.cat([H.matrix, math.sqrt(self.mu) * S.matrix])
            K = Z @ Z.T
            right = Z.new_zeros(len(Z), len(A))
            right[: len(H.matrix)] = H.matrix @ A.T
            K.diagonal().add_(ridge)
            return A - (Z.T @ _solved(K, right)).T
        K = H.dense() + self.mu * S.dense()
        K.diagonal().add_(ridge)
        return A - _solved(K, H.apply(A).T).T


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


Projector = Approx | Exact | Complement | Correction | Reconstruction


def alignment(W_aligned: Tensor, W_base: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `V = W_aligned - W_base` in float32, whatever the stored dtypes.

    Args:
        W_aligned: (m, n), any floating-point dtype.
        W_base: (m, n), any floating-point dtype, not necessarily that of `W_aligned`.
        out: (m, n) float32 tensor to write to.

    >>> alignment(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)).sum()
    tensor(6.)
    """
    V = torch.empty(W_aligned.shape, device=W_aligned.device) if out is None else out
    if torch.float64 in (W_aligned.dtype, W_base.dtype):
        return V.copy_(W_aligned.double() - W_base.double())
    return V.copy_(W_aligned).sub_(W_base)


def similarity(A: Tensor, B: Tensor, CB: Tensor) -> float | None:
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

    >>> A, B = torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> similarity(A, B, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    0.6
    """
    A, B, CB = settled(A, B, CB)
    G = A @ A.T

    def inner(X: Tensor, Y: Tensor) -> float:
        return float(((X.T @ Y) * G).sum())

    before, after = inner(B, B), inner(CB, CB)
    if before <= 0.0:
        return None
    if after <= 0.0:
        return 0.0
    return min(max(inner(CB, B) / math.sqrt(after * before), 0.0), 1.0)


def share(A: Tensor, B: Tensor, XB: Tensor) -> float | None:
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

    >>> A, B = torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> share(A, B, torch.tensor([[3.0, 0.0]]))
    0.36
    """
    A, B, XB = settled(A, B, XB)
    G = A @ A.T

    def square(X: Tensor) -> float:
        return float(((X.T @ X) * G).sum())

    before = square(B)
    if before <= 0.0:
        return None
    return min(max(square(XB) / before, 0.0), 1.0)


def gains(A: Tensor, B: Tensor, CB: Tensor) -> tuple[Tensor, Tensor]:
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

    >>> A, B = torch.eye(2), torch.tensor([[3.0, 3.0], [4.0, -4.0]])
    >>> seen, sizes = gains(A, B, torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    >>> [round(abs(value), 4) for value in (*seen.tolist(), *sizes.tolist())]
    [0.0, 1.0, 5.6569, 4.2426]
    """
    A, B, CB = settled(A, B, CB)
    L = torch.linalg.qr(A.T)[1]
    U, S, W = torch.linalg.svd(B @ L.T, full_matrices=False)
    k = int((NEGLIGIBLE * S[0] < S).sum())
    CU = (CB @ L.T) @ (W[:k].T / S[:k])
    seen, E = torch.linalg.eigh((U[:, :k].T @ CU + CU.T @ U[:, :k]) / 2.0)
    return seen, (E.T * S[:k]).norm(dim=1)


def scale(B: Tensor, CB: Tensor) -> float:
    """Return `‖C B‖_F / ‖B‖_F`: how much of the factor the projection leaves."""
    return float(CB.double().norm() / B.double().norm())


def pdst(B_out: Tensor, CB: Tensor) -> float:
    """Return `1 / (1 + ‖B_out - C B‖_F)` of one module; the reference code prints the mean."""
    return 1.0 / (1.0 + float((B_out.double() - CB.double()).norm()))


def require_orthonormal(overlap: Tensor) -> None:
    """Refuse columns `U` whose products `UᵀU` (k, k) are not those of orthonormal ones.

    Raises:
        NotOrthonormalError: they are not.
    """
    error = float((overlap - torch.eye(len(overlap), device=overlap.device)).abs().max())
    if error > ORTHONORMAL:
        raise NotOrthonormalError(
            f"its columns are not orthonormal, UᵀU is off by {error:.2g}; the file is damaged"
        )


def _require_mu(mu: float) -> None:
    if not (math.isfinite(mu) and mu > 0.0):
        raise ValueError(f"mu must be a number of more than 0, found {mu}")


def _solved(K: Tensor, right: Tensor) -> Tensor:
    """Return `K⁻¹ R` for a positive definite `K`."""
    factor, info = torch.linalg.cholesky_ex(K)
    if int(info) != 0:
        raise SingularError("H + μS is not positive definite")
    return torch.cholesky_solve(right, factor)


def _with_rows(blocks: Blocks) -> Iterable[tuple[slice, Tensor]]:
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        yield slice(start, stop), block
        start = stop


def _zero(device: torch.device) -> Tensor:
    """Return the start of a sum that stays on the device: in float64, which MPS does not have."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=wide, device=device)


def _norm(squares: Tensor) -> float:
    """Return `‖V‖_F` from its square."""
    value = float(squares)
    if not math.isfinite(value):
        raise FloatingPointError("the alignment matrix has a value that is not finite")
    return math.sqrt(value)


def _largest_first(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in descending order and the eigenvectors as columns."""
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return eigenvalues.flip(0), vectors.flip(1)
