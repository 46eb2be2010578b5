"""What the engine is given and what it gives back: plain data, one item per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeproj.checkpoint import Weight
from safeproj.checkpoint.expression import Matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """`V` of one weight as the difference of two checkpoints.

    Attributes:
        aligned: the weight in the aligned checkpoint, (m, n).
        base: the weight in the base checkpoint, (m, n).
    """

    aligned: Matrix
    base: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.aligned.nbytes + self.base.nbytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.aligned.weight, self.base.weight)


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


@dataclass(frozen=True)
class SafetyBasis:
    """What a safety module holds of one weight.

    Attributes:
        weight: `U` (m, k), float32, orthonormal columns, the most important first.
        rank: how many of the columns are used.
        energies: for each of the k columns the share of the safety data's output energy that it
            and those before it hold.
    """

    weight: Weight
    rank: int
    energies: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.weight.shape[0] * self.weight.row_bytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.weight,)


Origin = Difference | Kept | SafetyBasis
"""What the projector of one weight follows from."""


@dataclass(frozen=True)
class Update:
    """One low-rank update of a weight.

    Attributes:
        A: (r, n).
        B: (m, r).
        bias: the bias of `lora_B` (m, 1), if there is one.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """One weight, and all updates of it that are to be scored: it is read once for all of them.

    Attributes:
        name: of the module, for messages.
        origin: what the projector follows from.
        updates: the updates, of one adapter or of many.
    """

    name: str
    origin: Origin
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Comparison:
    """A tensor of the adapter that replaces a weight, or rows of it.

    Attributes:
        name: the weight's name in the running model.
        aligned: the weight in the aligned checkpoint, as a matrix.
        replacement: what the adapter puts in its place, as a matrix.
        rows: the rows that it replaces, None for all.
    """

    name: str
    aligned: Matrix
    replacement: Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Score:
    """What the engine found out about one update.

    Attributes:
        alignment_norm: `‖V‖_F`; None for SaLoRA, which has no `V`.
        CB: `C B`, (m, r) float32 on the CPU; None where `V = 0`.
        Cb: `C b` (m, 1) for the bias of `lora_B`, if there is one.
        cosine: similarity of `ΔW` and `C ΔW`; None where `V = 0` or `ΔW = 0`.
        bounds: between which that cosine lies where `C` is truncated; None where it is not.
        truncation: upper bound of `‖C - C_K‖_F / ‖C‖_F`, 0 where `C` is not truncated.
        scale: `‖C B‖_F / ‖B‖_F`; None where it is undefined.
        rank: k of a truncated projector, or of the basis of a safety subspace.
        sha256: for the aligned and the base checkpoint, label of each tensor read to the digest of
            its bytes, if wanted; from a file that stands for them they are the first of the two.
        safety_share: `‖Uᵀ ΔW‖_F² / ‖ΔW‖_F²`, for SaLoRA; None where it is undefined.
        energies: those of the `SafetyBasis`, for SaLoRA.
    """

    alignment_norm: float | None
    CB: Tensor | None
    Cb: Tensor | None
    cosine: float | None
    scale: float | None
    rank: int | None
    sha256: tuple[dict[str, str], dict[str, str]] | None
    bounds: tuple[float, float] | None = None
    truncation: float = 0.0
    safety_share: float | None = None
    energies: tuple[float, ...] = ()


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False
