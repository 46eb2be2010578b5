"""What Safe LoRA makes of a whole change: `C ΔW`, through the smaller side of `V`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy

from safeproj.checkpoint import Weight
from safeproj.checkpoint.hashes import Hash
from safeproj.engine import Buffers, KeptBlocks
from safeproj.methods.differences import Difference, DifferenceBlocks
from safeproj.methods.safe_lora.decomposition import bounds_of
from safeproj.methods.safe_lora.detail import Alignment
from safeproj.methods.safe_lora.formulas import Approx, Exact
from safeproj.methods.safe_lora.sources import Kept
from safeproj.methods.whole import Part, Remade, Remake, Sums, WholeTask, by, outer, through
from safeproj.storage.arrays import AnyArray, namespace, sum_of_squares


def remake(
    task: WholeTask, formulas: Approx | Exact, buffers: Buffers, hashes: Collection[Hash]
) -> Remake:
    """Return what makes `C ΔW` of changes of one weight.

    Args:
        task: the weight.
        formulas: which `C`.
        buffers: of the thread.
        hashes: by which what is read is hashed.
    """
    source = task.origin
    assert isinstance(source, Difference | Kept)
    return lambda D: Aligned(task.name, source, formulas, buffers, hashes, D)


class Aligned(Remade):
    """`C ΔW` of one change.

    Args:
        name: of the module.
        source: what `V` follows from.
        formulas: which `C`.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        D: the change.
    """

    def __init__(
        self,
        name: str,
        source: Difference | Kept,
        formulas: Approx | Exact,
        buffers: Buffers,
        hashes: Collection[Hash],
        D: DifferenceBlocks,
    ) -> None:
        self._name, self._source, self._formulas = name, source, formulas
        self._buffers, self._hashes, self._D = buffers, hashes, D
        self._norm = 0.0
        self._rank: int | None = None
        self._is_determined = True
        self._inside: float | None = None

    def rows(self) -> Iterator[Part]:
        source = self._source
        if isinstance(source, Difference):
            V = DifferenceBlocks(self._name, source, self._buffers, self._hashes, rows=self._D.rows)
            yield from self._of_V(V)
            self.digests = V.digests
            return
        self._norm = source.alignment_norm
        if source.weight is None:
            self._blank()
            return
        kept = self._kept(source.weight)
        if source.form == "V":
            yield from self._of_V(kept)
        elif source.form == "C":
            yield from self._of_C(kept)
        else:
            yield from self._of_U(kept, source)
        self.digests = (kept.digests, {})

    def detail(self, sums: Sums) -> Alignment:
        del sums
        source = self._source
        if isinstance(source, Kept) and self._inside is not None:
            return Alignment(self._norm, self._rank, source.error, source.residual)
        return Alignment(self._norm, self._rank, is_determined=self._is_determined)

    def bounds(self, sums: Sums) -> tuple[float, float] | None:
        source = self._source
        if not isinstance(source, Kept) or self._inside is None:
            return None
        both = max(sums.both, 0.0)
        return bounds_of(
            sums.before, sums.after**0.5, both, self._inside, source.residual, source.leak
        )

    def _kept(self, weight: Weight) -> KeptBlocks:
        return KeptBlocks(self._name, weight, self._buffers, self._hashes, self._D.rows)

    def _blank(self) -> None:
        """See the change, of which its size is wanted, with nothing to compare it with."""
        self.is_blank = True
        for _ in self._D:
            pass

    def _of_V(self, V: DifferenceBlocks | KeptBlocks) -> Iterator[Part]:
        formulas, D = self._formulas, self._D
        if isinstance(formulas, Exact):
            yield from self._exact(V)
            return
        if D.shape[0] >= D.shape[1]:
            T, self._norm = formulas.thin(V, D)
            if self._norm > 0.0:
                yield from through(V, T, D)
            else:
                self._blank()
            return
        whole = V.whole() if isinstance(V, DifferenceBlocks) else _gathered(V, self._buffers, D)
        C, self._norm = formulas.square(whole)
        del whole
        if self._norm > 0.0:
            self._buffers.release()
            yield from by((C[start : start + D.rows, :] for start in range(0, len(C), D.rows)), D)
        else:
            self._blank()

    def _of_C(self, C: KeptBlocks) -> Iterator[Part]:
        if isinstance(self._formulas, Exact):
            yield from self._exact(C)
        else:
            yield from by(C, self._D)

    def _of_U(self, U: KeptBlocks, source: Kept) -> Iterator[Part]:
        UD = outer(U, self._D)
        self._inside = float(sum_of_squares(UD))
        values = self._buffers.device.put(numpy.array(source.eigenvalues, numpy.float32))
        yield from through(U, UD * values[:, None], self._D)

    def _exact(self, blocks: DifferenceBlocks | KeptBlocks) -> Iterator[Part]:
        formulas, D = self._formulas, self._D
        assert isinstance(formulas, Exact)
        like = self._buffers.device.empty((D.shape[0], 0))
        if isinstance(self._source, Kept) and self._source.form == "C":
            basis, told = formulas.basis_of_C(blocks, self._norm, like)
        else:
            basis, told = formulas.basis_of_V(blocks, like)
        self._rank, self._is_determined = told.rank, told.is_determined
        assert told.alignment_norm is not None
        self._norm = told.alignment_norm
        self._buffers.release()
        if basis is None:
            self._blank()
            return
        xp = namespace(like)
        U = xp.astype(basis, xp.float32)
        del basis
        parts = [U[start : start + D.rows, :] for start in range(0, len(U), D.rows)]
        yield from through(parts, outer(parts, D), D)


def _gathered(blocks: KeptBlocks, buffers: Buffers, D: DifferenceBlocks) -> AnyArray:
    """Return a whole matrix in the buffer of `V`."""
    whole, start = buffers.matrix(*D.shape), 0
    for block in blocks:
        whole[start : start + len(block), :] = block
        start += len(block)
    return whole
