"""Whole changes of weights, as full fine-tunes make them: what a method makes of one, by rows.

The change is `ΔW = W_tuned - W_aligned` (m, n), and `ΔW'` what takes its place. Neither has to fit
in memory: both come in blocks of rows, once to be scored and again to be written.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from safeproj.checkpoint.hashes import NONE, Digests, Hash, Sides
from safeproj.engine import Buffers, Task
from safeproj.errors import SafeprojError
from safeproj.methods.blocks import Blocks, with_rows
from safeproj.methods.detail import Detail
from safeproj.methods.differences import Difference, DifferenceBlocks
from safeproj.methods.score import Score, diagnosis
from safeproj.storage.arrays import AnyArray, inner, sum_of_squares

BLOCK = 16 << 20
"""Bytes of a block of `ΔW` in float32: products with fewer rows are slower, and more fill memory.
"""

MEMORY = 700 << 20
"""Bytes that all workers together may take for their matrices."""


@dataclass(frozen=True)
class WholeTask(Task):
    """A weight, or several that are computed in one reading, and how fine-tuning changed them.

    Attributes:
        changes: of each weight.
    """

    changes: tuple[Difference, ...] = ()


class Part(NamedTuple):
    """Some rows of a change, float32 on the device, which are valid until the next ones."""

    rows: slice
    before: AnyArray
    after: AnyArray


@dataclass(frozen=True)
class Sums:
    """What a change and what takes its place have to say together.

    Attributes:
        before: `‖ΔW‖_F²`.
        after: `‖ΔW'‖_F²`.
        both: `⟨ΔW, ΔW'⟩_F`.
    """

    before: float
    after: float
    both: float

    @property
    def cosine(self) -> float | None:
        """Of `ΔW` and `ΔW'`, None where `ΔW = 0`; 0 where nothing is left of it."""
        if self.before <= 0.0:
            return None
        if self.after <= 0.0:
            return 0.0
        return min(max(self.both / math.sqrt(self.before * self.after), 0.0), 1.0)


class Remade(ABC):
    """What a method makes of one change.

    Attributes:
        digests: of what was read for it, after the first pass.
        others: of what else was read, likewise.
        is_blank: whether there is nothing to compare the change with, likewise.
    """

    digests: Sides = NONE
    others: Digests = MappingProxyType({})
    is_blank: bool = False

    @abstractmethod
    def rows(self) -> Iterator[Part]:
        """Yield all of it; nothing where there is nothing to compare it with.

        Raises:
            FloatingPointError: what is read has a value that is not finite.
        """

    @abstractmethod
    def detail(self, sums: Sums) -> Detail:
        """Return what the method says of it, after its rows were seen."""

    def cosine(self, sums: Sums) -> float | None:
        """Return the similarity of both, likewise."""
        return sums.cosine

    def bounds(self, sums: Sums) -> tuple[float, float] | None:
        """Return between which the cosine lies, None where it is known."""
        del sums
        return None


class Beside(Remade):
    """What is made of a change and of another difference of the same shape, entry by entry.

    Args:
        name: of the module.
        other: the other difference.
        buffers: of the thread.
        hashes: by which what is read for it is hashed.
        D: the change.
    """

    def __init__(
        self,
        name: str,
        other: Difference,
        buffers: Buffers,
        hashes: Collection[Hash],
        D: DifferenceBlocks,
    ) -> None:
        self._D = D
        self._other = DifferenceBlocks(name, other, buffers, hashes, rows=D.rows)

    @abstractmethod
    def after(self, before: AnyArray, other: AnyArray) -> AnyArray:
        """Return what takes the place of some rows of the change."""

    def rows(self) -> Iterator[Part]:
        for (rows, before), other in zip(with_rows(self._D), self._other, strict=True):
            yield Part(rows, before, self.after(before, other))


Remake = Callable[[DifferenceBlocks], Remade]
"""What a method makes of changes of weights that are computed in one reading."""

WholeKernel = Callable[[WholeTask, Any, Buffers, Collection[Hash]], Remake]
"""Reads what is the same for all changes of a task, given formulas, and by which to hash it."""


@dataclass(frozen=True)
class WholeScore(Score):
    """What a method found out about a whole change; `factor` is always None.

    Attributes:
        relative_change: `‖ΔW‖_F / ‖W_aligned‖_F`; None where the aligned weight is zero.
        nothing: whether there is nothing to compare the change with.
        size: `‖ΔW‖_F`.
        tuned: digests of what was read of the fine-tuned weight.
        before: those of the aligned weight that it was compared with.
        others: those of what else was read.
    """

    empty: ClassVar[str] = "equal to the aligned model's; kept"

    relative_change: float | None = None
    nothing: bool = False
    size: float = 0.0
    tuned: Digests = field(default_factory=dict)
    before: Digests = field(default_factory=dict)
    others: Digests = field(default_factory=dict)

    @property
    def is_blank(self) -> bool:
        return self.nothing


def remade(
    task: WholeTask,
    formulas: Any,
    buffers: Buffers,
    kernel: WholeKernel,
    hashes: Collection[Hash] = (),
    *,
    weighs: bool = False,
) -> Iterator[tuple[Difference, DifferenceBlocks, Remade]]:
    """Yield what is made of each change of a task; all of one is to be used before the next.

    Args:
        task: the weights and their changes.
        formulas: of the method.
        buffers: of the thread.
        kernel: of the method.
        hashes: by which what is read is hashed.
        weighs: whether the size of the aligned weights is wanted.

    Raises:
        SafeprojError: what is the same for all of them cannot be used.
    """
    make = kernel(task, formulas, buffers, hashes)
    for change in task.changes:
        rows = block_rows(change)
        D = DifferenceBlocks(task.name, change, buffers.beside, hashes, rows=rows, weighs=weighs)
        yield change, D, make(D)


def block_rows(change: Difference) -> int:
    """Return how many rows of a change make a block: it depends on nothing but its shape."""
    height, width = change.after.weight.shape
    return max(1, BLOCK // (4 * (height if change.after.transposed else width)))


def scored(
    task: WholeTask, formulas: Any, buffers: Buffers, kernel: WholeKernel, hashes: Collection[Hash]
) -> tuple[WholeScore, ...]:
    """Score all changes of a task.

    Raises:
        SafeprojError: a weight has a value that is not finite, or what is read cannot be used.
    """
    return tuple(
        _score(task, buffers, change, D, made)
        for change, D, made in remade(task, formulas, buffers, kernel, hashes, weighs=True)
    )


def summed(made: Remade) -> Sums:
    """Return what a change and what takes its place have to say together, from all rows."""
    before = after = both = 0.0
    for part in made.rows():
        before += float(sum_of_squares(part.before))
        after += float(sum_of_squares(part.after))
        both += float(inner(part.before, part.after))
    return Sums(before, after, both)


def _score(
    task: WholeTask, buffers: Buffers, change: Difference, D: DifferenceBlocks, made: Remade
) -> WholeScore:
    try:
        sums = summed(made)
    except FloatingPointError as error:
        raise SafeprojError(diagnosis(task.name, task.origin, buffers)) from error
    before, after = sums.before, sums.after
    if not math.isfinite(before):
        raise SafeprojError(diagnosis(task.name, change, buffers))
    if not math.isfinite(after):
        raise SafeprojError(
            f"{task.name}: what takes the place of the change has a value that is not finite, "
            "though its weights are: they are too large for float32"
        )
    cosine = None if made.is_blank else made.cosine(sums)
    return WholeScore(
        None,
        cosine,
        made.detail(sums),
        scale=None if cosine is None else math.sqrt(after / before),
        bounds=None if cosine is None else made.bounds(sums),
        digests=made.digests,
        relative_change=math.sqrt(before / D.size) if D.size else None,
        nothing=made.is_blank,
        size=math.sqrt(before),
        tuned=D.digests[0],
        before=D.digests[1],
        others=made.others,
    )


def through(left: Blocks, middle: AnyArray, D: Blocks) -> Iterator[Part]:
    """Yield `ΔW' = L X` by rows, for row blocks of `L` (m, k) and `X` (k, n)."""
    for (rows, L), block in zip(with_rows(left), D, strict=True):
        yield Part(rows, block, L @ middle)


def outer(left: Blocks, D: Blocks) -> AnyArray:
    """Return `Lᵀ ΔW` (k, n) for row blocks of `L` (m, k)."""
    total: AnyArray | None = None
    for L, block in zip(left, D, strict=True):
        part = L.T @ block
        if total is None:
            total = part
        else:
            total += part
    assert total is not None  # no weight is without rows
    return total


def by(square: Blocks, D: DifferenceBlocks) -> Iterator[Part]:
    """Yield `ΔW' = C ΔW` by rows, for row blocks of `C` (m, m)."""
    whole = D.whole()
    for rows, C in with_rows(square):
        yield Part(rows, whole[rows, :], C @ whole)


def workers_for(shapes: Collection[tuple[int, int]], workers: int) -> int:
    """Return how many workers may hold their matrices at once, at least one.

    Args:
        shapes: (m, n) of all weights.
        workers: how many there would be.
    """
    largest = max((_held(m, n) for m, n in shapes), default=1)
    return max(1, min(workers, MEMORY // largest))


def _held(m: int, n: int) -> int:
    """Return the bytes that a worker holds for a weight, about."""
    side = min(m, n)
    whole = m * n if m < n else 0
    return 4 * (whole + 2 * side * side) + 3 * BLOCK
