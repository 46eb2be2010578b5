"""What SaLoRA makes of a whole change: `ΔW - U (Uᵀ ΔW)`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers, KeptBlocks
from safeproj.errors import SafeprojError
from safeproj.methods.differences import DifferenceBlocks
from safeproj.methods.salora.detail import Safety
from safeproj.methods.salora.formulas import Complement, NotOrthonormalError, require_orthonormal
from safeproj.methods.salora.sources import SafetyBasis
from safeproj.methods.whole import Part, Remade, Remake, Sums, WholeTask, outer, through
from safeproj.storage.arrays import sum_of_squares


def remake(
    task: WholeTask, formulas: Complement, buffers: Buffers, hashes: Collection[Hash]
) -> Remake:
    """Return what makes `C_S ΔW` of changes of one weight.

    Args:
        task: the weight.
        formulas: the projector, whose directions `origin` has counted already.
        buffers: of the thread.
        hashes: by which what is read is hashed.
    """
    del formulas
    source = task.origin
    assert isinstance(source, SafetyBasis)
    return lambda D: Outside(task.name, source, buffers, hashes, D)


class Outside(Remade):
    """`C_S ΔW` of one change.

    Args:
        name: of the module.
        source: `U` (m, k).
        buffers: of the thread.
        hashes: by which what is read is hashed.
        D: the change.
    """

    def __init__(
        self,
        name: str,
        source: SafetyBasis,
        buffers: Buffers,
        hashes: Collection[Hash],
        D: DifferenceBlocks,
    ) -> None:
        self._source, self._D = source, D
        self._blocks = KeptBlocks(name, source.weight, buffers, hashes, D.rows)
        self._inside = 0.0

    def rows(self) -> Iterator[Part]:
        rank, D = self._source.rank, self._D
        # Held: it has few columns, and its rows are wanted more than once.
        U = [block[:, :rank] + 0.0 for block in self._blocks]
        self.digests = (self._blocks.digests, {})
        try:
            require_orthonormal(sum(block.T @ block for block in U))
        except NotOrthonormalError as error:
            weight = self._source.weight
            raise SafeprojError(f"{weight.source}: {weight.label}: {error}") from error
        UD = outer(U, D)
        self._inside = float(sum_of_squares(UD))
        for rows, before, along in through(U, UD, D):
            yield Part(rows, before, before - along)

    def detail(self, sums: Sums) -> Safety:
        source = self._source
        share = min(self._inside / sums.before, 1.0) if sums.before > 0.0 else None
        return Safety(source.rank, share, source.energies)

    def cosine(self, sums: Sums) -> float | None:
        # C is an orthogonal projector: ⟨ΔW, C ΔW⟩ = ‖C ΔW‖²
        if sums.before <= 0.0:
            return None
        return min(math.sqrt(sums.after / sums.before), 1.0)
