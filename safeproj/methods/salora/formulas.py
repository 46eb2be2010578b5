"""The SaLoRA formulas on tensors, and nothing else.

SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765) keeps an update away from the directions in which a
model's outputs on safety data lie. The names are the paper's:

==============  ========  ================================================================
`W`             (m, n)    weight of the aligned model
`Y`             (N, m)    outputs of a layer, `X Wᵀ`, at the N response positions of some data
`U_C`, `U_t`    (m, k)    top right singular vectors of `Y` on safety data, on task data
`C_S`           (m, m)    `I - U_C U_Cᵀ`, the fixed safety module; never formed
`A`, `B`        (r, n), (m, r)  LoRA factors; the update is `ΔW = s · C_S B A`
==============  ========  ================================================================

Singular vectors come as eigenvectors of a Gram matrix in float64, which need only be known by its
products with a few columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from safeproj.methods.blocks import Blocks, Projected, with_rows

if TYPE_CHECKING:
    from safeproj.adapter.record import Side

ORTHONORMAL = 1e-3
"""Largest entry of `UᵀU - I` for columns that are orthonormal but for rounding."""

OVERSAMPLING = 32
"""Columns of the iterated block beyond twice the k that are wanted: the more, the faster."""

WHOLE = 1024
"""Rows up to which the whole matrix is decomposed: that takes less than a second."""

CONVERGED = 1e-12
"""Residual `‖M u - λ u‖` of an eigenpair, relative to the largest eigenvalue."""


class NotOrthonormalError(Exception):
    """The columns of `U` are not orthonormal, so that `I - U Uᵀ` is no projector."""


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
        for rows, U in with_rows(blocks):
            UB.addmm_(U[:, :rank].T, B[rows])
            overlap.addmm_(U[:, :rank].T, U[:, :rank])
        require_orthonormal(overlap)
        CB = torch.empty_like(B)
        for rows, U in with_rows(blocks):
            torch.addmm(B[rows], U[:, :rank], UB, alpha=-1, out=CB[rows])
        return Projected(CB, None, rank, UB)


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


def without(U: Tensor, B: Tensor) -> Tensor:
    """Return `C_S B = B - U (Uᵀ B)`, in float32 or wider, in the dtype of `B` (section 3.1).

    Args:
        U: (m, k), orthonormal columns.
        B: (m, r).

    >>> without(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[0.],
            [4.]])
    """
    wide = torch.promote_types(torch.promote_types(U.dtype, B.dtype), torch.float32)
    # Under autocast the products would be rounded, and C_S B would reach into U.
    with torch.autocast(B.device.type, enabled=False):
        U, full = U.to(wide), B.to(wide)
        return (full - U @ (U.T @ full)).to(B.dtype)


def initial_factors(W: Tensor, U_t: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `A_0` (r, n) and `B_0` (m, r), the task-specific initialisation (section 3.2).

    `B_0 = U_t U_tᵀ U_W S_W^{1/2}` and `A_0 = S_W^{1/2} V_Wᵀ`, where `U_W S_W V_Wᵀ` is the singular
    value decomposition of `W`, truncated to r.

    Args:
        W: (m, n).
        U_t: (m, d_s), orthonormal columns.
        rank: r.

    Returns:
        Both in float64.

    Raises:
        ValueError: r is larger than the rank of `W`.
    """
    W, U_t = W.double(), U_t.double()
    values, U_W = leading_eigenpairs(lambda Q: W @ (W.T @ Q), W.shape[0], rank, W.device)
    if len(values) < rank:
        raise ValueError(f"rank {rank} is larger than that of the weight, {len(values)}")
    roots = values.sqrt().sqrt()  # S_W^{1/2}
    A_0 = (U_W.T @ W) / roots[:, None]  # S_W^{-1/2} U_Wᵀ W = S_W^{1/2} V_Wᵀ
    return A_0, U_t @ (U_t.T @ (U_W * roots))


def leading_eigenpairs(
    product: Callable[[Tensor], Tensor], size: int, rank: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of a symmetric positive semidefinite `M` (size, size).

    Subspace iteration with Rayleigh-Ritz (Saad, Numerical Methods for Large Eigenvalue Problems,
    2011, algorithm 5.3) from a fixed seed; the whole matrix where the iteration is not faster, or
    does not converge.

    Args:
        product: returns `M Q` for `Q` (size, p).
        size: rows of `M`.
        rank: how many pairs are wanted.
        device: of `M`.

    Returns:
        Eigenvalues (k,) in descending order, greater than 0, and eigenvectors (size, k), both
        float64, k <= `rank`: those that are rounding noise are left out.

    Raises:
        FloatingPointError: a value is not finite.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    width = 2 * rank + OVERSAMPLING
    found = None
    if size > WHOLE and 4 * width < size:
        start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=wide)
        found = _iterated(product, torch.linalg.qr(start.to(device))[0], rank)
    if found is None:
        M = product(torch.eye(size, dtype=wide, device=device))
        _require_finite(M)
        values, vectors = torch.linalg.eigh((M + M.T) / 2)
        found = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    values, vectors = found
    signal = int((values > size * torch.finfo(wide).eps * values[0].clamp(min=0)).sum())
    return values[:signal].double(), vectors[:, :signal].double()


def _iterated(
    product: Callable[[Tensor], Tensor], Q: Tensor, rank: int
) -> tuple[Tensor, Tensor] | None:
    """Return `rank` eigenpairs, None if they do not converge."""
    tolerance = max(CONVERGED, 100 * torch.finfo(Q.dtype).eps)
    for _ in range(2 * len(Q) // Q.shape[1]):  # more would take longer than the whole matrix
        Z = product(Q)
        _require_finite(Z)
        H = Q.T @ Z
        values, R = torch.linalg.eigh((H + H.T) / 2)
        values, R = values.flip(0)[:rank], R.flip(1)[:, :rank]
        vectors = Q @ R
        residual = (Z @ R - vectors * values).norm(dim=0).max()
        if residual <= tolerance * values[0]:
            return values, vectors
        Q = torch.linalg.qr(Z)[0]
    return None


def _require_finite(M: Tensor) -> None:
    if not bool(M.isfinite().all()):
        raise FloatingPointError("a matrix has a value that is not finite")
