"""What merging makes of whole changes: `(1-λ) ΔW + λ ΔW_safe`, or `ΔW + γ V`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers
from safeproj.methods.detail import Detail
from safeproj.methods.differences import Difference, DifferenceBlocks
from safeproj.methods.merge.detail import Mixed
from safeproj.methods.merge.forms import VECTOR, Merging
from safeproj.methods.merge.method import Merge
from safeproj.methods.merge.models import Mixing
from safeproj.methods.whole import Beside, Part, Remade, Remake, Sums, WholeTask, summed
from safeproj.storage.arrays import AnyArray, sum_of_squares


def remake(
    task: WholeTask,
    formulas: Any,
    buffers: Buffers,
    hashes: Collection[Hash],
    *,
    method: Merge,
) -> Remake:
    """Return what merges the change of one weight.

    Args:
        task: the weight.
        formulas: nothing.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        method: how it is merged, and by whose cosine it is chosen.

    Raises:
        SafeprojError: it is not said how much of the safety vector is added.
    """
    del formulas
    source, deciding = task.origin, method.deciding
    assert isinstance(source, Mixing)
    if source.safe is None:
        other = source.deciding
        assert isinstance(other, Difference)  # V
    else:
        (change,) = task.changes
        other = Difference(source.safe, change.before)
    decide: Remake | None = None
    if deciding is not None:
        assert source.deciding is not None
        own = replace(task, origin=source.deciding)
        decide = deciding.whole()(own, deciding.formulas, buffers, hashes)
    merging = method.formula

    def make(D: DifferenceBlocks) -> MergedChange:
        decided = decide(D) if decide is not None and D.weighs else None
        return MergedChange(task.name, other, merging, decided, buffers, hashes, D)

    return make


class MergedChange(Beside):
    """One change, merged.

    Args:
        name: of the module.
        other: what it is merged with.
        merging: how.
        decided: what Safe LoRA makes of it, where its cosine is wanted and known.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        D: the change.
    """

    def __init__(
        self,
        name: str,
        other: Difference,
        merging: Merging,
        decided: Remade | None,
        buffers: Buffers,
        hashes: Collection[Hash],
        D: DifferenceBlocks,
    ) -> None:
        super().__init__(name, other, buffers, hashes, D)
        self._merging, self._decided = merging, decided
        self._sums: Sums | None = None
        self._moved = 0.0

    def after(self, before: AnyArray, other: AnyArray) -> AnyArray:
        weight = self._merging.weight
        kept = 1.0 if self._merging.form == VECTOR else 1.0 - weight
        return kept * before + weight * other

    def rows(self) -> Iterator[Part]:
        if self._decided is not None:
            self._sums = summed(self._decided)
            self.digests = self._decided.digests
            if self._decided.is_blank:
                self.is_blank = True
                return
        for part in super().rows():
            if self._D.weighs:
                self._moved += float(sum_of_squares(part.after - part.before))
            yield part
        if self._merging.form != VECTOR:
            self.others = self._other.digests[0]

    def detail(self, sums: Sums) -> Detail:
        decided = Detail()
        if self._decided is not None and self._sums is not None:
            decided = self._decided.detail(self._sums)
        found = Mixed(decided, self._merging.form)
        if sums.before <= 0.0:
            return found
        return replace(found, change=math.sqrt(self._moved / sums.before), error=0.0)

    def cosine(self, sums: Sums) -> float | None:
        if self._decided is None or self._sums is None:
            return super().cosine(sums)
        return self._decided.cosine(self._sums)

    def bounds(self, sums: Sums) -> tuple[float, float] | None:
        if self._decided is None or self._sums is None:
            return super().bounds(sums)
        return self._decided.bounds(self._sums)
