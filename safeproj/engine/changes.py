"""How large the changes of whole weights are that adapters bring along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy

from safeproj.checkpoint import Reader, Weight, settle
from safeproj.checkpoint.expression import Matrix
from safeproj.engine.blocks import row_width, rows_per_block
from safeproj.engine.device import Host
from safeproj.engine.task import Comparison
from safeproj.storage.arrays import FLOAT64, Array, double, quiet


def relative_changes(comparisons: Sequence[Comparison]) -> list[float | None]:
    """Return `‖W_adapter - W_aligned‖_F / ‖W_aligned‖_F` of whole weights that adapters replace.

    It is that of the rows that both have. None where there are none, or the aligned weight is zero.

    Raises:
        SafeprojError: a weight cannot be read.
    """
    settle(comparison.aligned.weight for comparison in comparisons)
    readers = Reader(), Reader()
    try:
        return [_relative_change(comparison, *readers) for comparison in comparisons]
    finally:
        for reader in readers:
            reader.close()


@quiet
def _relative_change(comparison: Comparison, reader: Reader, other: Reader) -> float | None:
    weight, replacement = comparison.aligned.weight, comparison.replacement
    if isinstance(replacement, Matrix):
        length, take = _stored(replacement.weight, other)
    else:
        length, take = _held(replacement.T if comparison.aligned.transposed else replacement)
    step = rows_per_block(Host(), weight)
    buffer = numpy.empty(step * row_width(weight), numpy.uint8)
    change = size = 0.0
    for start, own, count in _runs(comparison, length, step):
        W_aligned = weight.read_rows(reader, start, start + count, buffer).astype(FLOAT64)
        size += float(numpy.square(W_aligned).sum())
        change += float(numpy.square(double(take(own, own + count)) - W_aligned).sum())
    return math.sqrt(change / size) if size else None


Take = Callable[[int, int], Array]
"""Returns some rows."""


def _held(replacement: Array) -> tuple[int, Take]:
    """Return how many rows there are, and what takes them from an array."""
    return len(replacement), lambda start, stop: replacement[start:stop]


def _stored(weight: Weight, reader: Reader) -> tuple[int, Take]:
    """Return the same of what is stored, as the aligned weight is."""
    reader.start()

    def take(start: int, stop: int) -> Array:
        buffer = numpy.empty((stop - start) * row_width(weight), numpy.uint8)
        return weight.read_rows(reader, start, stop, buffer)

    return weight.shape[0], take


def _runs(comparison: Comparison, length: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yield which rows of the aligned weight and of the replacement belong together, and how many.

    Trainable tokens name their rows; otherwise the first rows of both.
    """
    there = comparison.aligned.weight.shape[0]
    if comparison.rows is not None:
        yield from ((row, own, 1) for own, row in enumerate(comparison.rows) if row < there)
        return
    common = min(length, there)
    for start in range(0, common, step):
        yield start, start, min(step, common - start)
