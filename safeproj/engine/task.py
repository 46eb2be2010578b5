"""What the engine is given and what it gives back: plain data, one item per module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeproj.checkpoint.expression import Matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One module to score.

    Attributes:
        name: the module's name.
        aligned: its weight in the aligned checkpoint, (m, n).
        base: its weight in the base checkpoint, (m, n).
        A: (r, n).
        B: (m, r).
        bias: the bias of `lora_B` (m, 1), if there is one.
    """

    name: str
    aligned: Matrix
    base: Matrix
    A: Tensor
    B: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the two weights."""
        return self.aligned.nbytes + self.base.nbytes


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
    """What the engine found out about one module.

    Attributes:
        alignment_norm: `‖V‖_F`.
        CB: `C B`, (m, r) float32 on the CPU; None where `V = 0`.
        Cb: `C b` (m, 1) for the bias of `lora_B`, if there is one.
        cosine: similarity of `ΔW` and `C ΔW`; None where `V = 0` or `ΔW = 0`.
        scale: `‖C B‖_F / ‖B‖_F`; None where it is undefined.
        rank: k of a truncated projector.
        sha256: for the aligned and the base checkpoint, label of each tensor read to the digest of
            its bytes, if wanted.
    """

    alignment_norm: float
    CB: Tensor | None
    Cb: Tensor | None
    cosine: float | None
    scale: float | None
    rank: int | None
    sha256: tuple[dict[str, str], dict[str, str]] | None


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False
