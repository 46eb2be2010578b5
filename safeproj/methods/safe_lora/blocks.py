"""`V` of one weight as blocks of rows on the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from safeproj.checkpoint import Weight
from safeproj.checkpoint.hashes import NONE, Hash, Sides
from safeproj.engine import Buffers, row_width, rows_per_block
from safeproj.engine.device import Staging
from safeproj.methods.safe_lora.formulas import alignment
from safeproj.methods.safe_lora.sources import Difference
from safeproj.storage.arrays import AnyArray, namespace

CPU_HOLD = 64 << 20
"""Largest float32 `V`, in bytes, that a CPU worker keeps for its second pass. A larger one is read
again, most likely from the page cache, so that memory does not grow with the size of a weight."""


GPU_HOLD = 2 << 30
"""The same on a GPU."""


class AlignmentBlocks:
    """`V` of one weight as row blocks that can be iterated again.

    The first pass reads both weights; it keeps `V` if that is small enough, otherwise a further
    pass reads again. Weights that are stored transposed are always kept: their rows are columns of
    the file.

    Args:
        name: of the module, for progress.
        source: the two weights.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        keep: keep `V` whatever its size.

    Attributes:
        digests: of what was read, after the first pass.
    """

    def __init__(
        self,
        name: str,
        source: Difference,
        buffers: Buffers,
        hashes: Collection[Hash],
        *,
        keep: bool = False,
    ) -> None:
        self.digests: Sides = NONE
        self._name = name
        self._buffers = buffers
        self._hashes = hashes
        self._aligned, self._base = source.aligned.weight, source.base.weight
        self._transposed = source.aligned.transposed
        self._mixed = source.aligned.transposed != source.base.transposed
        self._rows = rows_per_block(buffers.device, self._aligned, self._base)
        limit = CPU_HOLD if buffers.device.is_host else GPU_HOLD
        small = math.prod(self._aligned.shape) * 4 <= limit
        self._keeps = keep or self._transposed or self._mixed or small
        self._kept: AnyArray | None = None
        self._seen = False

    def __iter__(self) -> Iterator[AnyArray]:
        if self._kept is None and not self._transposed:
            yield from self._stored_blocks()
        else:
            V = self.whole()
            for start in range(0, len(V), self._rows):
                yield V[start : start + self._rows]

    def whole(self) -> AnyArray:
        """Return `V` (m, n), which is kept; valid until the buffers are used again."""
        if self._kept is None:
            for _ in self._stored_blocks():
                pass
        assert self._kept is not None
        return self._kept

    def _stored_blocks(self) -> Iterator[AnyArray]:
        """Yield `V` in the orientation in which the aligned weight is stored, by rows."""
        buffers, readers = self._buffers, self._buffers.readers
        for reader in readers:
            reader.start(() if self._seen else self._hashes)
        rows, columns = self._aligned.shape
        widest = max(row_width(self._aligned), row_width(self._base))
        staging = buffers.staging(min(max(rows, columns), self._rows) * widest)
        out = buffers.matrix(rows if self._keeps else min(rows, self._rows), columns)
        if self._mixed:
            self._load_turned(staging[1], out.T)
        weights = (self._aligned,) if self._mixed else (self._aligned, self._base)
        for start, stop in buffers.starts(self._rows, *weights):
            V = out[start:stop] if self._keeps else out[: stop - start]
            W_aligned = staging[0].load(self._aligned, readers[0], start, stop)
            if self._mixed:
                W_base = namespace(V).asarray(V, copy=True)
            else:
                W_base = staging[1].load(self._base, readers[1], start, stop)
                self._advance(stop - start, self._base)
            alignment(W_aligned, W_base, V)
            yield V
            self._advance(stop - start, self._aligned)
        if self._keeps:
            self._kept = out.T if self._transposed else out
        if not self._seen:
            self.digests = (readers[0].digests, readers[1].digests)
        self._seen = True

    def _load_turned(self, staging: Staging, out: AnyArray) -> None:
        """Read all of the base weight, which is stored the other way round, into `out`."""
        for start, stop in self._buffers.starts(self._rows, self._base):
            out[start:stop] = staging.load(self._base, self._buffers.readers[1], start, stop)
            self._advance(stop - start, self._base)

    def _advance(self, rows: int, weight: Weight) -> None:
        if not self._seen:
            self._buffers.advance(self._name, rows * weight.row_bytes)
