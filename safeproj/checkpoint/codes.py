"""Weights that are stored as codes and scales, decoded block by block into float32.

The stored bytes are read behind the place where their numbers go, in the same buffer, so that a
quantised weight needs no more memory than its rows in float32 and as stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy

from safeproj.checkpoint.interface import Reader, Weight
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, DType, is_finite, single

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of E2M1; the highest of the four bits is the sign."""


@dataclass(frozen=True)
class Grid:
    """How scales lie over an FP8 tensor, which is one matrix or a stack of them.

    Attributes:
        name: of the scales.
        rows: rows of one matrix.
        scale_rows: rows of scales of one matrix.
        block: rows and columns that share a scale.
        stacked: there is a stack, each matrix with scales of its own.
    """

    name: str
    rows: int
    scale_rows: int
    block: tuple[int, int]
    stacked: bool


def lay(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]
) -> Grid | None:
    """Return how scales of a shape lie over a tensor of a shape, None if they do not.

    >>> lay("s", (256, 384), (2, 3), (128, 128)).block
    (128, 128)
    >>> lay("s", (8, 256, 384), (8, 256, 1), (128, 128)).block
    (1, 384)
    """
    if len(shape) not in (2, 3):
        return None
    *leading, rows, columns = shape
    if scales in ((), (1,)):
        rows *= math.prod(leading)
        return Grid(name, rows, 1, (max(rows, 1), max(columns, 1)), stacked=False)
    if len(shape) == 2 and scales == (rows,):
        scales = (rows, 1)
    if scales[:-2] != tuple(leading) or len(scales) != len(shape):
        return None
    down, across = scales[-2:]
    if (down, across) != tuple(
        -(-n // size) for n, size in zip((rows, columns), block, strict=True)
    ):
        # One for all rows or for each; the same for columns, or groups within a row.
        if down not in (1, rows) or not across or columns % across:
            return None
        if down != rows and across not in (1, columns):
            return None
        block = (max(rows // max(down, 1), 1), max(columns // across, 1))
    return Grid(name, rows, down, block, stacked=bool(leading))


@dataclass(frozen=True)
class FP8Weight:
    """A matrix, or a stack seen as one, of FP8 numbers with scales.

    Attributes:
        codes: the weight as it is stored.
        scales: its scales.
        grid: how they lie over it.
    """

    codes: Weight
    scales: Weight
    grid: Grid

    @property
    def label(self) -> str:
        return self.codes.label

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def row_bytes(self) -> int:
        return 4 * self.shape[1] + self.codes.row_bytes

    @property
    def source(self) -> str:
        return self.codes.source

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        out, rest = _split(buffer, stop - start, self.shape[1])
        codes = self.codes.read_rows(reader, start, stop, rest)
        _decode_pairs(codes.reshape(-1).view(numpy.uint8), codes.dtype, out)
        item = start // max(self.grid.rows, 1)
        while (first := item * self.grid.rows) < stop:
            low, high = max(start, first), min(stop, first + self.grid.rows)
            scales = self._scales(reader, item)
            which = numpy.arange(low - first, high - first) // self.grid.block[0]
            _multiply(out[low - start : high - start], scales[which], self.grid.block[1])
            item += 1
        return out

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        self.codes.prefetch(reader, start, stop)
        first, last = start // max(self.grid.rows, 1), -(-stop // max(self.grid.rows, 1))
        rows = self.grid.scale_rows
        self.scales.prefetch(reader, first * rows, last * rows)

    def _scales(self, reader: Reader, item: int) -> Array:
        """Return the scales of one matrix (scale_rows, scale_columns) in float32."""

        def read() -> Array:
            rows = self.grid.scale_rows
            buffer = numpy.empty(rows * self.scales.row_bytes, numpy.uint8)
            with reader.window(f"[{item}]" if self.grid.stacked else ""):
                found = self.scales.read_rows(reader, item * rows, (item + 1) * rows, buffer)
            return _finite(
                _powers()[found] if found.dtype == numpy.uint8 else single(found.copy()),
                self.scales,
            )

        return reader.once((self.scales.source, self.scales.label, item), read)


@dataclass(frozen=True)
class MXFP4Weight:
    """A stack of matrices in MXFP4, seen as one matrix.

    Attributes:
        label: the name of what is stored as blocks and scales.
        blocks: two numbers per byte, the lower four bits first.
        scales: the exponent of each 32 numbers of a row.
    """

    label: str
    blocks: Weight
    scales: Weight

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, int]:
        rows, nbytes = self.blocks.shape
        return (rows, 2 * nbytes)

    @property
    def row_bytes(self) -> int:
        return 4 * self.shape[1] + self.blocks.row_bytes + self.scales.row_bytes

    @property
    def source(self) -> str:
        return self.blocks.source

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        out, rest = _split(buffer, stop - start, self.shape[1])
        codes = self.blocks.read_rows(reader, start, stop, rest)
        numpy.take(_fp4_pairs(), codes, out=out.view(numpy.int64), mode="clip")
        found = self.scales.read_rows(reader, start, stop, rest[codes.nbytes :])
        # Not kept between blocks as those of FP8 are: each row has its own.
        _multiply(out, _finite(_powers()[found], self.scales), 32)
        return out

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        self.blocks.prefetch(reader, start, stop)
        self.scales.prefetch(reader, start, stop)


def _split(buffer: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Return a float32 matrix at the start of a buffer, and the rest of the buffer."""
    nbytes = 4 * rows * columns
    return buffer[:nbytes].view(numpy.float32).reshape(rows, columns), buffer[nbytes:]


def _multiply(values: Array, scales: Array, columns: int) -> None:
    """Multiply each row of `values` (k, n) by its `scales` (k, ⌈n/columns⌉), in place."""
    whole = values.shape[1] // columns
    covered = whole * columns
    blocks = values[:, :covered].reshape(len(values), whole, columns)  # a view
    blocks *= scales[:, :whole, None]
    values[:, covered:] *= scales[:, whole:]


def _finite(scales: Array, weight: Weight) -> Array:
    if not is_finite(scales):
        raise SafeprojError(
            f"{weight.source}: {weight.label} has NaN or Inf among the scales; the file is damaged"
        )
    return scales


def _decode_pairs(codes: Array, dtype: DType, out: Array) -> None:
    """Write what FP8 `codes` (bytes) mean into `out` (float32), two at a time.

    Looking up pairs is faster than converting numbers.
    """
    even = codes.size & ~1
    flat = out.reshape(-1)
    pairs = codes[:even].view(numpy.uint16)
    numpy.take(_fp8_pairs(dtype), pairs, out=flat[:even].view(numpy.int64), mode="clip")
    flat[even:] = codes[even:].view(dtype)


@cache
def _fp8_pairs(dtype: DType) -> Array:
    """Return the two float32 numbers, as one integer, for each pair of FP8 bytes."""
    pairs = numpy.arange(1 << 16, dtype=numpy.uint16).view(dtype)
    return pairs.astype(numpy.float32).view(numpy.int64)


@cache
def _fp4_pairs() -> Array:
    """Return the two float32 numbers, as one integer, for each byte of two FP4 numbers."""
    values = numpy.array([*_FP4, *(-value for value in _FP4)], numpy.float32)
    codes = numpy.arange(256)
    return numpy.stack([values[codes & 15], values[codes >> 4]], axis=1).view(numpy.int64)[:, 0]


@cache
def _powers() -> Array:
    """Return the scale for each byte of E8M0: a power of two, NaN for the last."""
    powers = [*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan]
    return numpy.array(powers, numpy.float32)
