"""The SaLoRA formulas on arrays of numpy or torch, and nothing else.

SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765) keeps an update away from the directions in which a
model's outputs on safety data lie. The names are the paper's:

==============  ========  ================================================================
`W`             (m, n)    weight of the aligned model
`Y`             (N, m)    outputs of a layer, `X Wᵀ`, at the N response positions of some data
`U_C`, `U_t`    (m, k)    top right singular vectors of `Y` on safety data, on task data
`C_S`           (m, m)    `I - U_C U_Cᵀ`, the fixed safety module; never formed
`A`, `B`        (r, n), (m, r)  LoRA factors; the update is `ΔW = s · C_S B A`
==============  ========  ================================================================

Singular vectors come as eigenvectors of a Gram matrix in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from safeproj.methods.blocks import Blocks, Projected, with_rows
from safeproj.methods.eigenpairs import leading_eigenpairs
from safeproj.storage.arrays import AnyArray, namespace

if TYPE_CHECKING:
    from safeproj.adapter.record import Side

ORTHONORMAL = 1e-3
"""Largest entry of `UᵀU - I` for columns that are orthonormal but for rounding."""


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

    def from_U(self, blocks: Blocks, rank: int, B: AnyArray) -> Projected:
        """Return `C_S B` and `Uᵀ B` for `B` (m, r), float32, in two passes over the rows of `U`.

        Args:
            blocks: row blocks of `U` (m, k).
            rank: how many of the columns are used, at most k.
            B: (m, r).

        Raises:
            FloatingPointError: `U` has a value that is not finite.
            NotOrthonormalError: its columns are not orthonormal.
        """
        xp = namespace(B)
        UB = xp.zeros((rank, B.shape[1]), dtype=B.dtype, device=B.device)
        overlap = xp.zeros((rank, rank), dtype=B.dtype, device=B.device)
        for rows, U in with_rows(blocks):
            UB += U[:, :rank].T @ B[rows, :]
            overlap += U[:, :rank].T @ U[:, :rank]
        require_orthonormal(overlap)
        CB = xp.empty_like(B)
        for rows, U in with_rows(blocks):
            CB[rows, :] = B[rows, :] - U[:, :rank] @ UB
        return Projected(CB, None, rank, UB)


def require_orthonormal(overlap: AnyArray) -> None:
    """Refuse columns `U` whose products `UᵀU` (k, k) are not those of orthonormal ones.

    Raises:
        NotOrthonormalError: they are not.
    """
    xp = namespace(overlap)
    identity = xp.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
    error = float(xp.max(xp.abs(overlap - identity)))
    if error > ORTHONORMAL:
        raise NotOrthonormalError(
            f"its columns are not orthonormal, UᵀU is off by {error:.2g}; the file is damaged"
        )


def without(U: AnyArray, B: AnyArray) -> AnyArray:
    """Return `C_S B = B - U (Uᵀ B)`, in float32 or wider, in the dtype of `B` (section 3.1).

    Args:
        U: (m, k), orthonormal columns.
        B: (m, r).

    >>> import numpy
    >>> without(numpy.array([[1.0], [0.0]]), numpy.array([[3.0], [4.0]]))
    array([[0.],
           [4.]])
    """
    xp = namespace(B)
    wide = xp.float64 if xp.float64 in (U.dtype, B.dtype) else xp.float32
    U, full = xp.astype(U, wide), xp.astype(B, wide)
    found: AnyArray = xp.astype(full - U @ (U.T @ full), B.dtype)
    return found


def initial_factors(W: AnyArray, U_t: AnyArray, rank: int) -> tuple[AnyArray, AnyArray]:
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
    xp = namespace(W)
    W, U_t = xp.astype(W, xp.float64), xp.astype(U_t, xp.float64)
    values, U_W = leading_eigenpairs(lambda Q: W @ (W.T @ Q), W.shape[0], rank, W)
    if len(values) < rank:
        raise ValueError(f"rank {rank} is larger than that of the weight, {len(values)}")
    roots = xp.sqrt(xp.sqrt(values))  # S_W^{1/2}
    A_0 = (U_W.T @ W) / roots[:, None]  # S_W^{-1/2} U_Wᵀ W = S_W^{1/2} V_Wᵀ
    return A_0, U_t @ (U_t.T @ (U_W * roots))
