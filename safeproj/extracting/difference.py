"""How large the change of a tensor is that no adapter of linear layers holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy

from safeproj.checkpoint import Reader, Weight, settle
from safeproj.engine import row_width, rows_per_block
from safeproj.engine.device import Host
from safeproj.errors import SafeprojError
from safeproj.methods.differences import Difference
from safeproj.storage.arrays import Array, double, quiet


@quiet
def relative_size(source: Difference) -> float | None:
    """Return `‖W_ft - W_aligned‖_F / ‖W_aligned‖_F`; None where only the latter is zero.

    Blocks of rows are read, so that an embedding is never held whole, unless the two models store
    it in different orientations.

    Args:
        source: the fine-tune after, the aligned model before.

    Raises:
        SafeprojError: a tensor cannot be read, or has a value that is not finite.
    """
    tuned, aligned = source.after.weight, source.before.weight
    is_mixed = source.after.transposed != source.before.transposed
    change = size = 0.0
    settle([tuned, aligned])
    reader = Reader()
    try:
        step = max(tuned.shape) if is_mixed else rows_per_block(Host(), tuned, aligned)
        pairs = zip(_blocks(tuned, reader, step), _blocks(aligned, reader, step), strict=True)
        for W_tuned, W_aligned in pairs:
            other = W_aligned.T if is_mixed else W_aligned
            change += float(numpy.square(W_tuned - other).sum())
            size += float(numpy.square(W_aligned).sum())
    finally:
        reader.close()
    if not math.isfinite(change):
        raise SafeprojError(
            f"{tuned.label} has NaN or Inf in {tuned.source} or {aligned.source}; one of the files "
            "is damaged"
        )
    return math.sqrt(change / size) if size else (None if change else 0.0)


def _blocks(weight: Weight, reader: Reader, step: int) -> Iterator[Array]:
    """Yield the rows of a weight in float64, so many at a time."""
    rows = weight.shape[0]
    buffer = numpy.empty(min(step, rows) * row_width(weight), numpy.uint8)
    for start in range(0, rows, step):
        reader.start()
        yield double(weight.read_rows(reader, start, min(start + step, rows), buffer))
