"""Where the numbers of a matrix lie among the tensors that a checkpoint stores: to write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from safeproj.checkpoint.expression import (
    Chunk,
    Expression,
    Flat,
    Head,
    Item,
    Joined,
    Stored,
    Swapped,
    dtype_and_shape,
    item_inside,
    stored_names,
)
from safeproj.checkpoint.interface import Checkpoint, as_matrix
from safeproj.errors import SafeprojError


@dataclass(frozen=True)
class Place:
    """A part of a matrix (m, n), and where it lies in a stored tensor that is seen as a matrix.

    Attributes:
        name: of the tensor.
        rows: of the matrix.
        columns: of the matrix.
        first_row: of the tensor's matrix, where the part begins.
        first_column: likewise.
        turned: the tensor's matrix has the part's rows as columns.
    """

    name: str
    rows: range
    columns: range
    first_row: int = 0
    first_column: int = 0
    turned: bool = False

    @property
    def swapped(self) -> Place:
        """The same part of the transpose."""
        return replace(self, rows=self.columns, columns=self.rows, turned=not self.turned)

    def shifted(self, rows: int, columns: int) -> Place:
        """Return the same part of a matrix in which there is something before it."""
        return replace(
            self,
            rows=range(self.rows.start + rows, self.rows.stop + rows),
            columns=range(self.columns.start + columns, self.columns.stop + columns),
        )

    def cut(self, rows: range) -> Place | None:
        """Return what of it lies in some rows of the matrix, None if nothing does."""
        start, stop = max(rows.start, self.rows.start), min(rows.stop, self.rows.stop)
        if start >= stop:
            return None
        further = start - self.rows.start
        moved = replace(self, rows=range(start, stop))
        if self.turned:
            return replace(moved, first_column=self.first_column + further)
        return replace(moved, first_row=self.first_row + further)


def places(expression: Expression, checkpoint: Checkpoint) -> tuple[Place, ...]:
    """Return where the parts of a matrix (m, n) lie.

    Args:
        expression: the matrix, as `expression.matrix` reads it.
        checkpoint: what stores it.

    Raises:
        SafeprojError: it is stored in a form in which it cannot be written.
    """
    if isinstance(expression, Stored):
        info = checkpoint.describe(expression.name)
        rows, columns = as_matrix(info.shape, None)
        place = Place(expression.name, range(rows), range(columns))
        return (place.swapped,) if info.turned else (place,)
    if isinstance(expression, Swapped):
        return tuple(place.swapped for place in places(expression.part, checkpoint))
    if isinstance(expression, Item):
        return _item(expression.part, expression.index, checkpoint)
    if isinstance(expression, Flat) and isinstance(expression.part, Stored):
        first, *others = checkpoint.describe(expression.part.name).shape
        return (Place(expression.part.name, range(first), range(math.prod(others))),)
    if isinstance(expression, Head | Chunk):
        return _window(expression, checkpoint)
    if isinstance(expression, Joined):
        return _joined(expression.parts, expression.dim, checkpoint)
    raise _unwritable(expression, checkpoint)


def _item(part: Expression, index: int, checkpoint: Checkpoint) -> tuple[Place, ...]:
    """Return the places of one item of a three-dimensional expression."""
    if isinstance(part, Stored):
        info = checkpoint.describe(part.name)
        _, rows, columns = info.shape
        place = Place(part.name, range(rows), range(columns), first_row=index * rows)
        return (place.swapped,) if info.turned else (place,)
    inner = item_inside(part, index)
    if inner is None:
        raise _unwritable(part, checkpoint)
    return places(inner, checkpoint)


def _window(expression: Head | Chunk, checkpoint: Checkpoint) -> tuple[Place, ...]:
    inner = places(expression.part, checkpoint)
    _, shape = dtype_and_shape(expression.part, checkpoint)
    if isinstance(expression, Head):
        return tuple(filter(None, (each.cut(range(expression.rows)) for each in inner)))
    size = shape[expression.dim] // expression.count
    start = expression.index * size
    wanted = range(start, start + size)
    if expression.dim == 0:
        cut = filter(None, (each.cut(wanted) for each in inner))
        return tuple(each.shifted(-start, 0) for each in cut)
    cut = filter(None, (each.swapped.cut(wanted) for each in inner))
    return tuple(each.swapped.shifted(0, -start) for each in cut)


def _joined(parts: Sequence[Expression], dim: int, checkpoint: Checkpoint) -> tuple[Place, ...]:
    found: list[Place] = []
    before = 0
    for part in parts:
        shift = (before, 0) if dim == 0 else (0, before)
        found += (place.shifted(*shift) for place in places(part, checkpoint))
        before += dtype_and_shape(part, checkpoint)[1][dim]
    return tuple(found)


def _unwritable(expression: Expression, checkpoint: Checkpoint) -> SafeprojError:
    return SafeprojError(
        f"{checkpoint.source}: {next(stored_names(expression))} is stored in a form in which it "
        "cannot be written; save the model again with save_pretrained, or leave it out with "
        "--exclude"
    )
