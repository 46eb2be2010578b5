"""How large the changes of whole weights are that adapters bring along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from safeproj.checkpoint import Reader
from safeproj.engine.blocks import row_width, rows_per_block
from safeproj.engine.task import Comparison


def relative_changes(comparisons: Sequence[Comparison]) -> list[float | None]:
    """Return `‖W_adapter - W_aligned‖_F / ‖W_aligned‖_F` of whole weights that adapters replace.

    It is that of the rows that both have. None where there are none, or the aligned weight is zero.

    Raises:
        SafeprojError: a weight cannot be read.
    """
    reader = Reader()
    try:
        return [_relative_change(comparison, reader) for comparison in comparisons]
    finally:
        reader.close()


@torch.inference_mode()
def _relative_change(comparison: Comparison, reader: Reader) -> float | None:
    weight, replacement = comparison.aligned.weight, comparison.replacement
    if comparison.aligned.transposed:
        replacement = replacement.T
    step = rows_per_block(torch.device("cpu"), weight)
    buffer = torch.empty(step * row_width(weight), dtype=torch.uint8)
    change = size = 0.0
    for start, own, count in _runs(comparison, len(replacement), step):
        W_aligned = weight.read_rows(reader, start, start + count, buffer).double()
        size += float(W_aligned.square().sum())
        change += float((replacement[own : own + count].double() - W_aligned).square().sum())
    return math.sqrt(change / size) if size else None


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
