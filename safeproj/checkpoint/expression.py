"""What a weight of the running model is made of: checkpoint tensors, stacked, joined, cut, turned.

An expression is plain data about names. Shapes come from the checkpoint's description, and nothing
is read until `matrix` turns a two-dimensional expression into something whose rows can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from safeproj.checkpoint.interface import Checkpoint, Reader, Weight
from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, joined


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    name: str


@dataclass(frozen=True)
class Stacked:
    """Parts of the same shape along a new first dimension, such as experts."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Joined:
    """Parts one after another along a dimension, such as gate and up."""

    parts: tuple[Expression, ...]
    dim: int


@dataclass(frozen=True)
class Swapped:
    """A part with its last two dimensions exchanged."""

    part: Expression


@dataclass(frozen=True)
class Chunk:
    """The `index`-th of `count` equal chunks of a part along a dimension."""

    part: Expression
    dim: int
    index: int
    count: int


@dataclass(frozen=True)
class Item:
    """One item of a part along its first dimension, which is dropped."""

    part: Expression
    index: int


@dataclass(frozen=True)
class Flat:
    """A part whose dimensions after the first are one, as for the kernel of a convolution."""

    part: Expression


@dataclass(frozen=True)
class Head:
    """The first `rows` rows of a part."""

    part: Expression
    rows: int


Expression = Stored | Stacked | Joined | Swapped | Chunk | Item | Flat | Head


def stored_names(expression: Expression) -> Iterator[str]:
    """Yield the names of the checkpoint tensors that an expression is made of."""
    if isinstance(expression, Stored):
        yield expression.name
    elif isinstance(expression, Stacked | Joined):
        for part in expression.parts:
            yield from stored_names(part)
    else:
        yield from stored_names(expression.part)


def dtype_and_shape(expression: Expression, checkpoint: Checkpoint) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape of an expression, as the running model has it.

    Raises:
        SafeprojError: its parts do not fit together.
    """
    if isinstance(expression, Stored):
        info = checkpoint.describe(expression.name)
        return info.dtype, _swap(info.shape) if info.turned else info.shape
    if isinstance(expression, Stacked | Joined):
        found = [dtype_and_shape(part, checkpoint) for part in expression.parts]
        shapes = [shape for _, shape in found]
        # Parts may differ in dtype; float32 says that something can be read.
        dtypes = {dtype for dtype, _ in found}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        if isinstance(expression, Stacked):
            _require(len(set(shapes)) == 1, expression, checkpoint, shapes)
            return dtype, (len(shapes), *shapes[0])
        dim = expression.dim
        rest = {shape[:dim] + shape[dim + 1 :] for shape in shapes}
        _require(len(rest) == 1 and len(shapes[0]) > dim, expression, checkpoint, shapes)
        total = sum(shape[dim] for shape in shapes)
        return dtype, (*shapes[0][:dim], total, *shapes[0][dim + 1 :])
    dtype, shape = dtype_and_shape(expression.part, checkpoint)
    if isinstance(expression, Swapped):
        return dtype, _swap(shape)
    if isinstance(expression, Item):
        return dtype, shape[1:]
    if isinstance(expression, Flat):
        return dtype, (shape[0], math.prod(shape[1:]))
    if isinstance(expression, Head):
        return dtype, (min(expression.rows, shape[0]), *shape[1:])
    dim, count = expression.dim, expression.count
    fits = len(shape) > dim and shape[dim] % count == 0
    _require(fits, expression, checkpoint, [shape])
    return dtype, (*shape[:dim], shape[dim] // count, *shape[dim + 1 :])


def _swap(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _require(
    fits: bool, expression: Expression, checkpoint: Checkpoint, shapes: list[tuple[int, ...]]
) -> None:
    if not fits:
        names = list(stored_names(expression))
        raise SafeprojError(
            f"{checkpoint.source}: {names[0]} and {len(names) - 1} more do not fit together: their "
            f"shapes are {sorted({str(list(shape)) for shape in shapes})}; is the checkpoint "
            "complete?"
        )


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional weight that can be read.

    Attributes:
        weight: the stored rows.
        transposed: the rows are columns of the matrix.
    """

    weight: Weight
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.weight.shape[0] * self.weight.row_bytes


def matrix(expression: Expression, checkpoint: Checkpoint) -> Matrix:
    """Return a two-dimensional expression as something whose rows can be read.

    Raises:
        SafeprojError: a file cannot be had, or parts are stored in different orientations.
    """
    if isinstance(expression, Stored):
        info = checkpoint.describe(expression.name)
        return Matrix(checkpoint.weight(expression.name), info.turned)
    if isinstance(expression, Swapped):
        found = matrix(expression.part, checkpoint)
        return Matrix(found.weight, not found.transposed)
    if isinstance(expression, Item):
        return _item(expression.part, expression.index, checkpoint)
    if isinstance(expression, Flat):
        return _flat(expression, checkpoint)
    if isinstance(expression, Head | Chunk):
        return _window(expression, checkpoint)
    assert isinstance(expression, Joined)
    parts = [matrix(part, checkpoint) for part in expression.parts]
    if len({part.transposed for part in parts}) > 1:
        raise SafeprojError(
            f"{checkpoint.source}: {next(stored_names(expression))} and what is joined to it are "
            "stored in different orientations, which is not supported"
        )
    along_rows = (expression.dim == 0) != parts[0].transposed
    weights = tuple(part.weight for part in parts)
    return Matrix((_Rows if along_rows else _Columns)(weights), parts[0].transposed)


def item_inside(part: Expression, index: int) -> Expression | None:
    """Return one item of a three-dimensional expression as an expression of items of its parts.

    None where it has no parts that can be taken one by one.
    """
    if isinstance(part, Stacked):
        return part.parts[index]
    if isinstance(part, Swapped):
        return Swapped(Item(part.part, index))
    if isinstance(part, Joined) and part.dim > 0:
        return Joined(tuple(Item(inner, index) for inner in part.parts), part.dim - 1)
    if isinstance(part, Chunk) and part.dim > 0:
        return Chunk(Item(part.part, index), part.dim - 1, part.index, part.count)
    return None


def _item(part: Expression, index: int, checkpoint: Checkpoint) -> Matrix:
    """Return one item of a three-dimensional expression, by taking it from each of its parts."""
    if isinstance(part, Stored):
        info = checkpoint.describe(part.name)
        rows = info.shape[1]
        window = _Window(checkpoint.weight(part.name), index * rows, rows, f"[{index}]")
        return Matrix(window, info.turned)
    inner = item_inside(part, index)
    if inner is not None:
        return matrix(inner, checkpoint)
    raise SafeprojError(
        f"{checkpoint.source}: {next(stored_names(part))} is stored in a form whose items cannot "
        "be read one by one; save the model again with save_pretrained"
    )


def _flat(expression: Flat, checkpoint: Checkpoint) -> Matrix:
    if not isinstance(expression.part, Stored):
        raise SafeprojError(
            f"{checkpoint.source}: {next(stored_names(expression))} is a convolution that the "
            "checkpoint stores in parts, which is not supported"
        )
    columns = math.prod(checkpoint.describe(expression.part.name).shape[1:])
    return Matrix(checkpoint.weight(expression.part.name, columns))


def _window(expression: Head | Chunk, checkpoint: Checkpoint) -> Matrix:
    inner = matrix(expression.part, checkpoint)
    _, shape = dtype_and_shape(expression.part, checkpoint)
    dim, start, stop = 0, 0, 0
    if isinstance(expression, Head):
        stop = min(expression.rows, shape[0])
    else:
        dim, size = expression.dim, shape[expression.dim] // expression.count
        start, stop = expression.index * size, (expression.index + 1) * size
    if (dim == 0) != inner.transposed:
        window = _Window(inner.weight, start, stop - start, f"[{start}:{stop}]")
        return Matrix(window, inner.transposed)
    return Matrix(_ColumnWindow(inner.weight, start, stop - start), inner.transposed)


@dataclass(frozen=True)
class _Part:
    """What parts of a matrix have in common with it."""

    whole: Weight

    @property
    def label(self) -> str:
        return self.whole.label

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def row_bytes(self) -> int:
        return self.whole.row_bytes

    @property
    def source(self) -> str:
        return self.whole.source


@dataclass(frozen=True)
class _Several:
    """What matrices that are joined have in common."""

    parts: tuple[Weight, ...]

    @property
    def label(self) -> str:
        return ", ".join(part.label for part in self.parts)

    @property
    def dtype(self) -> str:
        dtypes = {part.dtype for part in self.parts}
        # What is joined is promoted; what comes out is at most float32 unless a part is float64.
        return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    @property
    def source(self) -> str:
        return self.parts[0].source


@dataclass(frozen=True)
class _Window(_Part):
    """Some rows of a matrix."""

    start: int
    rows: int
    name: str

    @property
    def label(self) -> str:
        return self.whole.label + self.name

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.whole.shape[1])

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        with reader.window(self.name):
            return self.whole.read_rows(reader, self.start + start, self.start + stop, buffer)

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        self.whole.prefetch(reader, self.start + start, self.start + stop)


@dataclass(frozen=True)
class _ColumnWindow(_Part):
    """Some columns of a matrix; all of it is read."""

    start: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.whole.shape[0], self.columns)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        rows = self.whole.read_rows(reader, start, stop, buffer)
        return rows[:, self.start : self.start + self.columns]

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        self.whole.prefetch(reader, start, stop)


@dataclass(frozen=True)
class _Rows(_Several):
    """Matrices below one another."""

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    @property
    def row_bytes(self) -> int:
        return max(part.row_bytes for part in self.parts) + _ALIGN

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        found, first, used = [], 0, 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                found.append(part.read_rows(reader, low, high, buffer[used:]))
                used += _aligned((high - low) * part.row_bytes)
            first += part.shape[0]
        return joined(found)

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        first = 0
        for part in self.parts:
            part.prefetch(reader, max(start - first, 0), min(stop - first, part.shape[0]))
            first += part.shape[0]


@dataclass(frozen=True)
class _Columns(_Several):
    """Matrices beside one another."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    @property
    def row_bytes(self) -> int:
        return sum(_aligned(part.row_bytes) for part in self.parts)

    def read_rows(self, reader: Reader, start: int, stop: int, buffer: Array) -> Array:
        found, used = [], 0
        for part in self.parts:
            found.append(part.read_rows(reader, start, stop, buffer[used:]))
            used += _aligned((stop - start) * part.row_bytes)
        return joined(found, axis=1)

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        for part in self.parts:
            part.prefetch(reader, start, stop)


_ALIGN = 64
"""Bytes: parts share a buffer, and each starts where every dtype may start."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def key_of(expression: Expression) -> str | None:
    """Return the name of a matrix that is one weight, or one item of a stack, perhaps turned.

    None where it is more than that, such as several weights in one.

    >>> key_of(Swapped(Item(Stored("experts.down_proj"), 3)))
    'experts.down_proj[3].T'
    """
    if isinstance(expression, Stored):
        return expression.name
    if not isinstance(expression, Item | Swapped | Flat | Head):
        return None
    part = key_of(expression.part)
    if part is None or isinstance(expression, Flat | Head):
        return part
    return f"{part}[{expression.index}]" if isinstance(expression, Item) else f"{part}.T"
