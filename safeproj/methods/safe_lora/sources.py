"""What an alignment file holds of `V` of one weight."""

from __future__ import annotations

from dataclasses import dataclass

from safeproj.checkpoint import Weight


@dataclass(frozen=True)
class Kept:
    """What an alignment file holds of one weight.

    Attributes:
        form: `V` for `V` (m, n) itself, `C` for the projector (m, m), `U` for the leading
            eigenvectors of `C` (m, K).
        weight: the float32 matrix of that form; None where `V = 0`.
        alignment_norm: `‖V‖_F`.
        eigenvalues: of `C`, (K,), for form `U`.
        error: upper bound of `‖C - C_K‖_F / ‖C‖_F`.
        residual: upper bound of `‖C - C_K‖₂`.
        leak: upper bound of `‖Uᵀ (C - C_K) U‖₂`.
    """

    form: str
    weight: Weight | None
    alignment_norm: float
    eigenvalues: tuple[float, ...] = ()
    error: float = 0.0
    residual: float = 0.0
    leak: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return 0 if self.weight is None else self.weight.shape[0] * self.weight.row_bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return () if self.weight is None else (self.weight,)
