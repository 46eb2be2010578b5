"""Matrices that arrive in blocks of rows, so that they need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from safeproj.storage.arrays import AnyArray

Blocks = Iterable[AnyArray]
"""`V` (m, n) as consecutive float32 row blocks. It can be iterated twice with the same result; a
block may be overwritten as soon as the next one is asked for."""


@dataclass(frozen=True)
class Projected:
    """What a projector makes of one module.

    Attributes:
        CB: `C B`, shape (m, r), float32; None where `V = 0`, which leaves `C` undefined. A column
            of `B` that is too large gives values that are not finite.
        alignment_norm: `‖V‖_F`; None for SaLoRA, which has no `V`.
        rank: k of a truncated projector, None where the projector is not truncated.
        UB: `Uᵀ B`, shape (k, r), where `C` is known by orthonormal columns `U`.
        is_determined: whether the gap after the k leading singular values is wide enough to tell
            which they are, where the projector is truncated.
    """

    CB: AnyArray | None
    alignment_norm: float | None
    rank: int | None = None
    UB: AnyArray | None = None
    is_determined: bool = True


def with_rows(blocks: Blocks) -> Iterable[tuple[slice, AnyArray]]:
    """Yield the blocks, each with the rows that it is."""
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        yield slice(start, stop), block
        start = stop
