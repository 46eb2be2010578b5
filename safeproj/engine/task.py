"""What the engine is given and what it gives back: plain data, one item per module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeproj.checkpoint import Weight
from safeproj.tensorfile import DTYPES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One module to score.

    Attributes:
        name: the module's name.
        aligned: its weight in the aligned checkpoint.
        base: its weight in the base checkpoint.
        transposed: both are stored (n, m).
        A: (r, n).
        B: (m, r).
        bias: the bias of `lora_B` (m,), if there is one.
    """

    name: str
    aligned: Weight
    base: Weight
    transposed: bool
    A: Tensor
    B: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the two weights."""
        return sum(
            math.prod(weight.shape) * DTYPES[weight.dtype][1]
            for weight in (self.aligned, self.base)
        )


@dataclass(frozen=True)
class Score:
    """What the engine found out about one module.

    Attributes:
        alignment_norm: `‖V‖_F`.
        CB: `C B`, (m, r) float32 on the CPU; None where `V = 0`.
        Cb: `C b` (m,) for the bias of `lora_B`, if there is one.
        cosine: similarity of `ΔW` and `C ΔW`; None where `V = 0` or `ΔW = 0`.
        scale: `‖C B‖_F / ‖B‖_F`; None where it is undefined.
        rank: k of a truncated projector.
        sha256: digests of the bytes read from the aligned and the base checkpoint, if wanted.
    """

    alignment_norm: float
    CB: Tensor | None
    Cb: Tensor | None
    cosine: float | None
    scale: float | None
    rank: int | None
    sha256: tuple[str, str] | None


@dataclass(frozen=True)
class Progress:
    """One step forward: `nbytes` of the checkpoints were read, or a module was `finished`."""

    name: str
    nbytes: int = 0
    finished: bool = False
