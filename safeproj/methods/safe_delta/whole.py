"""What Safe Delta makes of whole changes, which were made by running the fine-tune."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers
from safeproj.methods.detail import Detail
from safeproj.methods.differences import DifferenceBlocks
from safeproj.methods.safe_delta.detail import Kept
from safeproj.methods.safe_delta.sources import Delta
from safeproj.methods.whole import Beside, Remake, Sums, WholeTask
from safeproj.storage.arrays import AnyArray


def remake(task: WholeTask, formulas: Any, buffers: Buffers, hashes: Collection[Hash]) -> Remake:
    """Return what reads `ΔW'` of a weight.

    Args:
        task: the weight.
        formulas: nothing.
        buffers: of the thread.
        hashes: nothing that is read here is recorded: the aligned weight is by who asks.
    """
    del formulas, hashes
    source = task.origin
    assert isinstance(source, Delta)
    return lambda D: Made(task.name, source, buffers, D)


class Made(Beside):
    """One change, corrected.

    Args:
        name: of the module.
        source: `ΔW'`.
        buffers: of the thread.
        D: the change.
    """

    def __init__(self, name: str, source: Delta, buffers: Buffers, D: DifferenceBlocks) -> None:
        super().__init__(name, source, buffers, (), D)
        self._kept = source.kept

    def after(self, before: AnyArray, other: AnyArray) -> AnyArray:
        del before
        return other

    def detail(self, sums: Sums) -> Detail:
        return Kept(self._kept) if sums.before > 0.0 else Kept()
