"""The difference of two stored weights, `V` or a whole change `ΔW`, as rows on the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy

from safeproj.checkpoint import Reader, Weight, settle
from safeproj.checkpoint.expression import Matrix
from safeproj.checkpoint.hashes import NONE, Hash, Sides
from safeproj.engine import Buffers, row_width, rows_per_block
from safeproj.engine.device import Staging
from safeproj.storage.arrays import (
    FLOAT32,
    AnyArray,
    Array,
    cast,
    namespace,
    promoted,
    sum_of_squares,
)

CPU_HOLD = 64 << 20
"""Largest float32 `V`, in bytes, that a CPU worker keeps for its second pass. A larger one is read
again, most likely from the page cache, so that memory does not grow with the size of a weight."""


GPU_HOLD = 2 << 30
"""The same on a GPU."""


@dataclass(frozen=True)
class Difference:
    """How a weight has changed from one checkpoint to another.

    Attributes:
        after: the weight in the later one, (m, n): the aligned model for `V`.
        before: the weight in the earlier one, (m, n): the base model for `V`.
    """

    after: Matrix
    before: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.after.nbytes + self.before.nbytes

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is read."""
        return (self.after.weight, self.before.weight)


def subtract(after: AnyArray, before: AnyArray, V: AnyArray) -> None:
    """Write `V = after - before` in float32, whatever the stored dtypes.

    Args:
        after: (m, n), any floating-point dtype.
        before: (m, n), any floating-point dtype, not necessarily that of `after`.
        V: (m, n), float32.

    >>> import numpy
    >>> V = numpy.empty((2, 3), numpy.float32)
    >>> subtract(numpy.full((2, 3), 3, numpy.float16), numpy.ones((2, 3)), V)
    >>> float(V.sum())
    12.0
    """
    xp = namespace(V)
    if xp.float64 in (after.dtype, before.dtype):
        V[...] = xp.astype(after, xp.float64) - xp.astype(before, xp.float64)
        return
    V[...] = after
    V -= before


class DifferenceBlocks:
    """The difference `V` of two weights as row blocks that can be iterated again.

    The first pass reads both weights; it keeps `V` if that is small enough, otherwise a further
    pass reads again. Weights that are stored transposed are always kept: their rows are columns of
    the file.

    Args:
        name: of the module, for progress.
        source: the two weights.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        keep: keep `V` whatever its size.
        rows: of a block; as many as lie in the cache if None.
        weighs: whether `size` is wanted.

    Attributes:
        weighs: whether `size` is wanted.
        shape: (m, n).
        rows: of a block.
        digests: of what was read, after the first pass.
        size: `‖before‖_F²`, after the first pass, if it is wanted.
    """

    def __init__(
        self,
        name: str,
        source: Difference,
        buffers: Buffers,
        hashes: Collection[Hash],
        *,
        keep: bool = False,
        rows: int | None = None,
        weighs: bool = False,
    ) -> None:
        self.digests: Sides = NONE
        self.size = 0.0
        self.weighs = weighs
        self._name = name
        self._buffers = buffers
        self._hashes = hashes
        self._after, self._before = source.after.weight, source.before.weight
        self._transposed = source.after.transposed
        self._mixed = source.after.transposed != source.before.transposed
        height, width = self._after.shape
        self.shape = (width, height) if self._transposed else (height, width)
        self.rows = rows or rows_per_block(buffers.device, self._after, self._before)
        limit = CPU_HOLD if buffers.device.is_host else GPU_HOLD
        small = math.prod(self._after.shape) * 4 <= limit
        self._keeps = keep or self._transposed or self._mixed or small
        self._kept: AnyArray | None = None
        self._seen = False

    def __iter__(self) -> Iterator[AnyArray]:
        if self._kept is None and not self._transposed:
            yield from self._stored_blocks()
        else:
            V = self.whole()
            for start in range(0, len(V), self.rows):
                yield V[start : start + self.rows]

    def whole(self) -> AnyArray:
        """Return `V` (m, n), which is kept; valid until the buffers are used again."""
        if self._kept is None:
            self._keeps = True
            for _ in self._stored_blocks():
                pass
        assert self._kept is not None
        return self._kept

    def _stored_blocks(self) -> Iterator[AnyArray]:
        """Yield `V` in the orientation in which the later weight is stored, by rows."""
        buffers, readers = self._buffers, self._buffers.readers
        for reader in readers:
            reader.start(() if self._seen else self._hashes)
        rows, columns = self._after.shape
        widest = max(row_width(self._after), row_width(self._before))
        staging = buffers.staging(min(max(rows, columns), self.rows) * widest)
        out = buffers.matrix(rows if self._keeps else min(rows, self.rows), columns)
        if self._mixed:
            self._load_turned(staging[1], out.T)
        weights = (self._after,) if self._mixed else (self._after, self._before)
        for start, stop in buffers.starts(self.rows, *weights):
            V = out[start:stop] if self._keeps else out[: stop - start]
            after = staging[0].load(self._after, readers[0], start, stop)
            if self._mixed:
                before = namespace(V).asarray(V, copy=True)
            else:
                before = staging[1].load(self._before, readers[1], start, stop)
                self._advance(stop - start, self._before)
            if self.weighs and not self._seen:
                self.size += float(sum_of_squares(namespace(V).astype(before, V.dtype)))
            subtract(after, before, V)
            yield V
            self._advance(stop - start, self._after)
        if self._keeps:
            self._kept = out.T if self._transposed else out
        if not self._seen:
            self.digests = (readers[0].digests, readers[1].digests)
        self._seen = True

    def _load_turned(self, staging: Staging, out: AnyArray) -> None:
        """Read all of the earlier weight, which is stored the other way round, into `out`."""
        for start, stop in self._buffers.starts(self.rows, self._before):
            out[start:stop] = staging.load(self._before, self._buffers.readers[1], start, stop)
            self._advance(stop - start, self._before)

    def _advance(self, rows: int, weight: Weight) -> None:
        if not self._seen:
            self._buffers.advance(self._name, rows * weight.row_bytes)


class Rows:
    """The rows (m, n) of a weight that a change is added to, in float32 or wider.

    Args:
        found: the weight.
    """

    def __init__(self, found: Matrix) -> None:
        self._weight, self._turned = found.weight, found.transposed
        settle([self._weight])
        self._reader = Reader()
        self._whole: Array | None = None

    def __call__(self, rows: range) -> Array:
        """Return some of them."""
        if not self._turned:
            return self._stored(rows)
        if self._whole is None:
            self._whole = self._stored(range(self._weight.shape[0])).T
        return self._whole[rows.start : rows.stop]

    @property
    def height(self) -> int:
        """How many there are."""
        return self._weight.shape[1 if self._turned else 0]

    def close(self) -> None:
        """Close its file."""
        self._reader.close()

    def _stored(self, rows: range) -> Array:
        self._reader.start()
        buffer = numpy.empty(len(rows) * row_width(self._weight), numpy.uint8)
        found = self._weight.read_rows(self._reader, rows.start, rows.stop, buffer)
        return cast(found, promoted(found.dtype, FLOAT32))
