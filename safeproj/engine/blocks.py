"""Matrices of files as blocks of rows on the device, in buffers that are used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence

from safeproj.checkpoint import Reader, Weight
from safeproj.checkpoint.hashes import Digests, Hash
from safeproj.engine.device import Device, Staging
from safeproj.engine.task import Progress
from safeproj.storage.arrays import AnyArray, is_finite
from safeproj.storage.origins import StoppedError
from safeproj.storage.tensorfile import DTYPES

AHEAD = 16 << 20
"""Bytes of one weight that are asked for before they are read, so that a disk works meanwhile."""

OnProgress = Callable[[Progress], None]


class Buffers:
    """The buffers and files of one thread.

    Args:
        device: where the arithmetic runs.
        stop: set when the thread should give up.
        on_progress: told what was read.
    """

    def __init__(
        self, device: Device, stop: threading.Event, on_progress: OnProgress | None
    ) -> None:
        self.device = device
        self.readers = (Reader(stop), Reader(stop))
        self._stop = stop
        self._on_progress = on_progress
        self._V: tuple[int, AnyArray] | None = None
        self._staging: tuple[int, tuple[Staging, Staging]] | None = None
        self._beside: Buffers | None = None

    @property
    def beside(self) -> Buffers:
        """Further buffers of the same thread, for what is read at the same time."""
        if self._beside is None:
            self._beside = Buffers(self.device, self._stop, self._on_progress)
        return self._beside

    @property
    def all_readers(self) -> tuple[Reader, ...]:
        """The readers of these and of the further ones."""
        return (*self.readers, *(() if self._beside is None else self._beside.all_readers))

    def release(self) -> None:
        """Let go of `V`, whose memory something else is to have."""
        self._V = None

    def staging(self, nbytes: int) -> tuple[Staging, Staging]:
        """Return the staging of the aligned and the base weight for loads of up to `nbytes`."""
        if self._staging is None or self._staging[0] < nbytes:
            self._staging = None  # let go before the next is made
            self._staging = (nbytes, self.device.staging(nbytes))
        return self._staging[1]

    def matrix(self, rows: int, columns: int) -> AnyArray:
        """Return the reused float32 buffer of `V` as (rows, columns), on the device."""
        size = rows * columns
        if self._V is None or self._V[0] < size:
            self._V = None  # let go before the next is made
            self._V = (size, self.device.empty((size,)))
        return self._V[1][:size].reshape(rows, columns)

    def starts(self, step: int, *weights: Weight) -> Iterator[tuple[int, int]]:
        """Yield the row ranges of weights of one height, `step` rows each, until told to stop."""
        height = weights[0].shape[0]
        for start in range(0, height, step):
            if self._stop.is_set():
                raise StoppedError
            stop = min(start + step, height)
            for weight, reader in zip(weights, self.readers, strict=False):
                lead = _rows_ahead(weight)
                weight.prefetch(reader, min(start + lead, height), min(stop + lead, height))
            yield start, stop

    def prefetch(self, weights: Sequence[Weight]) -> None:
        """Ask for the beginning of weights that will be read after the current ones."""
        for weight, reader in zip(weights, self.readers, strict=False):
            weight.prefetch(reader, 0, min(_rows_ahead(weight), weight.shape[0]))

    def advance(self, name: str, nbytes: int) -> None:
        """Tell that `nbytes` of a module's weights were read."""
        if self._on_progress is not None:
            self._on_progress(Progress(name, nbytes))

    def close(self) -> None:
        """Close all files."""
        for reader in self.all_readers:
            reader.close()


class KeptBlocks:
    """A matrix of a file as float32 row blocks that can be iterated again.

    Args:
        name: of the module, for progress.
        weight: the matrix.
        buffers: of the thread.
        hashes: by which what is read is hashed.
        rows: of a block; as many as lie in the cache if None.

    Attributes:
        digests: of what was read, after the first iteration.
    """

    def __init__(
        self,
        name: str,
        weight: Weight,
        buffers: Buffers,
        hashes: Collection[Hash],
        rows: int | None = None,
    ) -> None:
        self.digests: Digests = {}
        self._rows = rows or rows_per_block(buffers.device, weight)
        self._name = name
        self._weight = weight
        self._buffers = buffers
        self._hashes = hashes
        self._seen = False

    def __iter__(self) -> Iterator[AnyArray]:
        """Raise FloatingPointError where the file has a value that is not finite."""
        buffers, weight, first = self._buffers, self._weight, not self._seen
        reader = buffers.readers[0]
        reader.start(self._hashes if first else ())
        staging = buffers.staging(min(self._rows, weight.shape[0]) * row_width(weight))[0]
        for start, stop in buffers.starts(self._rows, weight):
            block = staging.load(weight, reader, start, stop)
            if not is_finite(block):
                raise FloatingPointError(f"{weight.label} has a value that is not finite")
            if first:
                buffers.advance(self._name, (stop - start) * weight.row_bytes)
            yield block
        if first:
            self.digests = reader.digests
            self._seen = True


def rows_per_block(device: Device, *weights: Weight) -> int:
    """Return how many rows of each of the weights make a block: it depends on nothing else."""
    return max(1, device.block // max(1, *(row_width(weight) for weight in weights)))


def row_width(weight: Weight) -> int:
    """Return the bytes of one row, as it is stored or as it is computed with, whichever is more."""
    return max(weight.row_bytes, weight.shape[1] * DTYPES[weight.dtype][1])


def _rows_ahead(weight: Weight) -> int:
    return max(1, AHEAD // max(1, weight.row_bytes))
