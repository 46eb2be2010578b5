"""The formulas of Safe LoRA on tensors, and nothing else.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from safeproj.methods.blocks import Blocks, Projected, with_rows

if TYPE_CHECKING:
    from safeproj.adapter.record import Side


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
        for rows, V in with_rows(blocks):
            if T.shape[1] == 0:
                T = V.new_zeros(B.shape[1], V.shape[1])
            T.addmm_(B[rows].T, V)
            squares += V.square().sum()  # sums pairwise, unlike vector_norm
        norm = _norm(squares)
        if norm == 0.0:
            return Projected(None, norm)
        CB = torch.empty_like(B)
        for rows, V in with_rows(blocks):
            torch.mm(V, T.T, out=CB[rows])
        return Projected(CB.div_(norm), norm)

    def from_C(self, blocks: Blocks, norm: float, B: Tensor) -> Projected:
        """Return `C B` for `B` (m, r), float32, from row blocks of `C` (m, m) and `‖V‖_F`."""
        CB = torch.empty_like(B)
        for rows, C in with_rows(blocks):
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
        for rows, U in with_rows(blocks):
            UB.addmm_(U.T, B[rows])
        CB = torch.empty_like(B)
        for rows, U in with_rows(blocks):
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
        for rows, block in with_rows(blocks):
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
        for rows, block in with_rows(blocks):
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
